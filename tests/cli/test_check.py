"""``weft check``, on adapters saved by the real peft."""

import json
from pathlib import Path

import pytest
from peft import OSFConfig, PolyConfig, PrefixTuningConfig, ShadowConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.support.adapters import make_adapter, make_lora
from tests.support.models import tiny_model
from tests.support.own_formats import make_chain, make_relora
from tests.support.quantized import SETTINGS, save_quantized, wide_model
from weft.adapters.store import digest
from weft.server.cli import create_cli


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_lora(
        base, tmp_path / "adapter", r=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}
    )


def check(*arguments: object) -> Result:
    return CliRunner().invoke(create_cli(), ["check", *map(str, arguments)])


def edit_config(adapter: Path, **fields: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_lora_adapter_can_be_served(base: Path, adapter: Path) -> None:
    result = check(adapter, "--base", base)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{adapter} on {base} can be served"
    assert lines[1:4] == ["method   LORA", "forms    LowRank", "rank     5"]
    assert lines[5:] == [
        f"version  {digest(adapter)}",
        "sites    6",
        "  model.layers.*.self_attn.q_proj  LowRank, rank 3  (×3)",
        "  model.layers.*.mlp.down_proj  LowRank, rank 5  (×3)",
    ]


def test_as_json(base: Path, adapter: Path) -> None:
    report = json.loads(check(adapter, "--base", base, "--json").stdout)
    assert (report["servable"], report["method"], report["rank"], len(report["sites"])) == (True, "LORA", 5, 6)
    hidden, inner, q = 48, 88, 80
    assert report["nbytes"] == 4 * 3 * (3 * (hidden + q) + 5 * (inner + hidden))


def test_the_base_is_the_one_the_adapter_names(base: Path, adapter: Path) -> None:
    assert check(adapter).stdout.startswith(f"{adapter} on {base} can be served\n")
    edit_config(adapter, base_model_name_or_path=None)
    result = check(adapter)
    assert result.exit_code == 1
    assert "names no base model; pass --base" in result.stderr


def test_no_weights_of_the_base_are_needed(base: Path, adapter: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    assert check(adapter, "--base", bare).exit_code == 0


def test_a_method_that_needs_the_weights_reads_them(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, tmp_path / "dora", r=5, target_modules=["q_proj"], use_dora=True)
    result = check(adapter, "--base", base)
    assert result.exit_code == 0, result.output
    assert "forms    LowRank, Gain, Bias" in result.stdout.splitlines()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    result = check(adapter, "--base", bare)
    assert result.exit_code == 1
    assert "follows from the weights" in result.stderr and "Traceback" not in result.stderr


def test_the_base_of_a_chain_is_that_of_its_first_link(base: Path, tmp_path: Path) -> None:
    chain = make_chain(base, tmp_path / "chain", [{"r": 3, "target_modules": ["q_proj"]}] * 2).folder
    result = check(chain)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:4] == [
        f"{chain} on {base} can be served",
        "method   CHAIN",
        "forms    LowRank",
        "rank     6",
    ]
    (chain / "adapter_chain.json").write_text('{"links": 3}')
    assert "cannot read" in check(chain).stderr


def test_a_model_trained_in_full_is_compared_with_the_weights(base: Path, tmp_path: Path) -> None:
    relora = make_relora(base, tmp_path / "relora").folder
    result = check(relora, "--base", base)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1] == "method   RELORA"


def test_virtual_tokens_are_told(base: Path, tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    lines = check(make_adapter(base, tmp_path / "prefix", config), "--base", base).stdout.splitlines()
    assert lines[1:5] == [
        "method   PREFIX_TUNING",
        "forms    PrefixKV",
        "rank     0",
        "prompt   6 virtual tokens, the first real one at 6",
    ]


def test_what_depends_on_the_request_is_told(base: Path, tmp_path: Path) -> None:
    nested = make_lora(base, tmp_path / "nested", r=5, target_modules=["q_proj"])
    edit_config(nested, peft_type="DYLORA")
    result = check(nested, "--base", base)
    assert "choice   lora_rank from 1 to 5, default 5" in result.stdout.splitlines()
    report = json.loads(check(nested, "--base", base, "--json").stdout)
    assert report["choices"] == {"lora_rank": {"min": 1, "max": 5, "default": 5}}
    tasks = make_adapter(base, tmp_path / "tasks", PolyConfig(task_type="CAUSAL_LM", n_tasks=3))
    assert "choice   task_id from 0 to 2, must be given" in check(tasks, "--base", base).stdout.splitlines()
    activated = make_lora(base, tmp_path / "alora", target_modules=["q_proj"], alora_invocation_tokens=[7, 8])
    lines = check(activated, "--base", base).stdout.splitlines()
    assert "works    from the last occurrence of the tokens [7, 8] on" in lines


def test_a_missing_tensor_is_named(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    del tensors[name]
    save_file(tensors, file)
    result = check(adapter, "--base", base)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{adapter} on {base} cannot be served: ")
    assert name in result.stderr
    report = json.loads(check(adapter, "--base", base, "--json").stdout)
    assert (report["servable"], report["error"]["code"]) == (False, "adapter_mismatch")


def test_an_option_that_cannot_be_honoured_is_named(base: Path, adapter: Path) -> None:
    edit_config(adapter, layer_replication=[[0, 2], [1, 3]])
    result = check(adapter, "--base", base)
    assert result.exit_code == 1
    assert "layer_replication" in result.stderr
    assert "(adapter_unsupported)" in result.stderr


def test_the_wrong_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", hidden_size=40)
    result = check(adapter, "--base", other)
    assert result.exit_code == 1
    assert "adapter_mismatch" in result.stderr


@pytest.mark.parametrize("wrong", ["base", "adapter"])
def test_what_is_not_there(wrong: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    result = check(*((adapter, "--base", nowhere) if wrong == "base" else (nowhere, "--base", base)))
    assert result.exit_code == 1
    assert str(nowhere) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_quantised_base(tmp_path: Path) -> None:
    base = wide_model("llama", tmp_path / "base")
    lora = make_lora(base, tmp_path / "lora", r=5, target_modules=["q_proj"])
    dora = make_lora(base, tmp_path / "dora", r=5, target_modules=["q_proj"], use_dora=True)
    saved = save_quantized(base, tmp_path / "saved", **SETTINGS["int8"])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    for arguments in ((bare, "--quantization", "nf4"), (bare, "--quantization", "int8"), (saved,)):
        assert "forms    LowRank" in check(lora, "--base", *arguments).stdout.splitlines()
    for arguments in ((base, "--quantization", "nf4"), (base, "--quantization", "int8"), (saved,)):
        assert "forms    LowRank, Gain, Bias" in check(dora, "--base", *arguments).stdout.splitlines()
    result = check(dora, "--base", bare, "--quantization", "nf4")
    assert result.exit_code == 1 and "follows from the weights" in result.stderr


def test_what_a_quantised_base_does_not_take(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = check(adapter, "--base", base, "--quantization", "fp4")
    assert result.exit_code == 1 and "quantization must be one of none, nf4, int8" in result.stderr
    gptq = tmp_path / "gptq"
    gptq.mkdir()
    config = json.loads((base / "config.json").read_text())
    (gptq / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    result = check(adapter, "--base", gptq)
    assert result.exit_code == 1 and "quantization_config.quant_method is 'gptq'" in result.stderr
    osf = make_adapter(base, tmp_path / "osf", OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert check(osf, "--base", base).exit_code == 0
    result = check(osf, "--base", base, "--quantization", "int8")
    assert result.exit_code == 1 and "OSF is served on unquantised layers only" in result.stderr


def test_a_side_network_needs_no_weights_of_the_base(base: Path, tmp_path: Path) -> None:
    """Nor any memory of the sizes that it is compared with."""
    adapter = make_adapter(base, tmp_path / "adapter", ShadowConfig(task_type="CAUSAL_LM", r=4))
    result = check(adapter, "--base", base)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1:4] == ["method   SHADOW", "forms    SideNetwork", "rank     4"]
    edit_config(adapter, shadow_intermediate_size=1 << 16)
    assert check(adapter, "--base", base).exit_code == 1
