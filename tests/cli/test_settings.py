"""Settings: where a value comes from, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from weft.server.cli.launch import check_names
from weft.server.config import ConfigError, EngineConfig
from weft.server.settings import GivenAdapter, Settings


def write(text: str, path: str = "weft.toml") -> Path:
    file = Path(path)
    file.write_text(text)
    return file


def test_defaults_are_the_engines_own() -> None:
    config = Settings.load(model="some/model").engine_config()
    assert config == EngineConfig(model="some/model")
    assert all(
        type(value) in {str, int, float, bool, tuple, type(None)} for value in dataclasses.asdict(config).values()
    )


def test_flags_win_over_the_environment_over_the_file_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    write("port = 1\nmax_num_seqs = 11\nmax_adapters = 21\n")
    monkeypatch.setenv("WEFT_PORT", "2")
    monkeypatch.setenv("WEFT_MAX_NUM_SEQS", "12")
    settings = Settings.load(port="3", host=None)
    assert (settings.port, settings.max_num_seqs, settings.max_adapters) == (3, 12, 21)
    assert settings.host == "127.0.0.1"


def test_a_named_file_is_read_instead_of_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    write("port = 1")
    other = write("port = 4", "other.toml")
    assert Settings.load(config=other).port == 4
    monkeypatch.setenv("WEFT_CONFIG", str(other))
    assert Settings.load().port == 4


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536), ("7", 7), (" 2 gib", 2 << 30)]
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load(model="m", kv_cache_memory=text).engine_config().kv_cache_memory == size
    monkeypatch.setenv("WEFT_ADAPTER_MEMORY", text)
    memory = Settings.load(model="m").engine_config().adapter_memory
    assert memory == size
    assert type(memory) is int


@pytest.mark.parametrize("text", ["4 GiBs", "many", "-1GiB", "1e9x", "1,5GiB", "4 GB s", ""])
def test_a_bad_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^kv_cache_memory: .*\(from --kv-cache-memory\)$"):
        Settings.load(kv_cache_memory=text)


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest() -> None:
    write("max_model_length = 5")
    with pytest.raises(
        ConfigError, match=r"unknown key 'max_model_length' in the settings file; did you mean max_model_len\?"
    ):
        Settings.load()


def test_an_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MAXMODEL_LEN", "5")
    with pytest.raises(ConfigError, match=r"variable WEFT_MAXMODEL_LEN; did you mean WEFT_MAX_MODEL_LEN\?"):
        Settings.load()


def test_kubernetes_service_variables_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        Settings.load()


def test_a_bad_value_names_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    write('port = "x"\nlog_level = "loud"')
    monkeypatch.setenv("WEFT_DRAIN_TIMEOUT", "-1")
    with pytest.raises(ConfigError) as caught:
        Settings.load(max_num_seqs="few")
    lines = str(caught.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {"port", "log_level", "drain_timeout", "max_num_seqs"}
    origins = {line.split(":")[0]: line[line.index("(from") :] for line in lines}
    assert origins["port"] == "(from 'port' in the settings file)"
    assert origins["drain_timeout"] == "(from WEFT_DRAIN_TIMEOUT)"
    assert origins["max_num_seqs"] == "(from --max-num-seqs)"


def test_the_engines_own_checks_apply() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of"):
        Settings.load(model="m", dtype="float64").engine_config()
    with pytest.raises(ConfigError, match="quantization must be one of"):
        Settings.load(model="m", quantization="fp8").engine_config()


@pytest.mark.parametrize("origin", ["flag", "environment", "file"])
def test_quantization_reaches_the_engine(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if origin == "environment":
        monkeypatch.setenv("WEFT_QUANTIZATION", "nf4")
    elif origin == "file":
        write('quantization = "nf4"')
    flags = {"quantization": "nf4"} if origin == "flag" else {}
    assert Settings.load(model="m", **flags).engine_config().quantization == "nf4"
    assert Settings.load(model="m", quantization="int8").engine_config().quantization == "int8"


@pytest.mark.parametrize("origin", ["flag", "environment", "file"])
def test_proxy_models_and_their_adapters(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, list[str]] = {}
    if origin == "flag":
        flags = {"proxy_model": ["small=/models/small", "s2=org/s2"], "adapter": ["a=/a", "small:x=/x", "other:y=/y"]}
    elif origin == "environment":
        monkeypatch.setenv("WEFT_PROXY_MODEL", "small=/models/small,s2=org/s2")
        monkeypatch.setenv("WEFT_ADAPTER", "a=/a,small:x=/x,other:y=/y")
    else:
        write(
            '[proxy_model]\nsmall = "/models/small"\ns2 = "org/s2"\n'
            '[adapter]\na = "/a"\n"small:x" = "/x"\n"other:y" = "/y"\n'
        )
    settings = Settings.load(model="m", **flags)
    assert settings.engine_config().proxy_models == (("small", "/models/small"), ("s2", "org/s2"))
    assert settings.adapters == (
        GivenAdapter("a", "/a"),
        GivenAdapter("x", "/x", "small"),
        GivenAdapter("other:y", "/y"),  # no model has that name: it is an id like any other
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"proxy_model": ["small"]}, "proxy_model: must be NAME=PATH"),
        ({"proxy_model": ["=x"]}, "proxy_model: must be NAME=PATH"),
        ({"proxy_model": ["s=x", "s=y"]}, "proxy_model: the name 's' is given twice"),
        ({"proxy_model": ["s=x"], "adapter": ["a=1", "s:a=2"]}, "adapter: the id 'a' of s:a=2 is given twice"),
        ({"proxy_model": ["s=x"], "adapter": ["s:=2"]}, "adapter: the id '' of s:=2 is empty"),
        ({"proxy_model": ["s,t=x"]}, "proxy_model: 's,t' cannot be a model's name"),
        ({"proxy_model": ["M=x"]}, "proxy_model: 'M' cannot be a model's name"),
    ],
)
def test_proxy_models_that_make_no_sense(flags: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_names(Settings.load(model="org/m", served_model_name="m", **flags))


@pytest.mark.parametrize(
    ("text", "message"),
    [("port = ", "not valid TOML"), ('config = "x.toml"', "cannot name another")],
)
def test_a_file_that_makes_no_sense(text: str, message: str) -> None:
    write(text)
    with pytest.raises(ConfigError, match=message):
        Settings.load()


def test_a_named_file_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"config: there is no file nowhere\.toml"):
        Settings.load(config=Path("nowhere.toml"))


def test_adapters_as_flags_variable_list_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"a": "x/y", "b": "hf://org/repo@main"}
    items = ["a=x/y", "b=hf://org/repo@main"]
    assert Settings.load(adapter=items).adapter == expected
    assert Settings.load(adapter=['{"name": "a", "path": "x/y"}', items[1]]).adapter == expected
    monkeypatch.setenv("WEFT_ADAPTER", ", ".join(items))
    assert Settings.load().adapter == expected
    monkeypatch.delenv("WEFT_ADAPTER")
    write('adapter = ["a=x/y", "b=hf://org/repo@main"]')
    assert Settings.load().adapter == expected
    write('[adapter]\na = "x/y"\nb = "hf://org/repo@main"')
    assert Settings.load().adapter == expected


@pytest.mark.parametrize("item", ["a", "=x", "a=", '{"name": "a"}', "{broken"])
def test_a_malformed_adapter_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match=r"^adapter: "):
        Settings.load(adapter=[item])


def test_an_adapter_id_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="the id 'a' is given twice"):
        Settings.load(adapter=["a=x", "a=y"])


def test_adapter_roots_are_separated_as_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_ADAPTER_ROOT", "/a:/b")
    assert Settings.load().adapter_root == (Path("/a"), Path("/b"))
    assert Settings.load(adapter_root=["/c"]).adapter_root == (Path("/c"),)


def test_keys_are_not_shown() -> None:
    assert "sesame" not in repr(Settings.load(api_key="sesame", admin_key="sesame2"))


def test_the_state_directory_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().state_dir == tmp_path / "state" / "weft"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.load().state_dir == tmp_path / ".local" / "state" / "weft"
