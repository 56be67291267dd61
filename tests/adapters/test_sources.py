"""Where adapters may come from."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from weft.adapters import sources
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterSourceError, AdapterTooLarge
from weft.adapters.files import CONFIG, FILES, WEIGHTS
from weft.adapters.sources import resolve
from weft.adapters.store import Store


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a test must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "sql"
    folder.mkdir(parents=True)
    write_files(folder)
    return tmp_path / "root"


def write_files(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(b"weights")


def refusal(source: str, roots: list[Path], cache: Path) -> AdapterSourceError:
    with pytest.raises(AdapterSourceError) as caught:
        resolve(source, roots=roots, cache=cache)
    assert caught.value.param == "source" and caught.value.message.isprintable()
    return caught.value


def test_local_forms(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = root / "sql"
    for source in (
        str(expected),
        "sql",
        "./sql",
        f"{root}/x/../sql",
        f"file://{expected}",
        f"file://localhost{expected}",
    ):
        assert resolve(source, roots=[tmp_path / "none", root], cache=tmp_path) == expected
    monkeypatch.chdir(tmp_path)
    assert resolve("root/sql", roots=[root], cache=tmp_path) == expected


def test_percent_encoded_file_url(root: Path, tmp_path: Path) -> None:
    (root / "a b").mkdir()
    assert resolve(f"file://{root}/a%20b", roots=[root], cache=tmp_path) == root / "a b"


@pytest.mark.parametrize("source", ["../outside", "/etc", "sql/../../outside", "link", "link/..", "file:///etc", "/"])
def test_outside_the_roots(source: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    assert "not inside an allowed folder" in refusal(source, [root], tmp_path).message


def test_nothing_outside_the_roots_is_told_apart(root: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    there, nowhere = (refusal(str(tmp_path / name), [root], tmp_path).message for name in ("there", "nowhere"))
    assert there.replace("there", "") == nowhere.replace("nowhere", "")


def test_sibling_with_the_same_beginning(root: Path, tmp_path: Path) -> None:
    (tmp_path / "root2").mkdir()
    refusal(str(tmp_path / "root2"), [root], tmp_path)


def test_root_that_is_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert resolve(f"{tmp_path}/alias/sql", roots=[tmp_path / "alias"], cache=tmp_path) == root / "sql"


def test_no_root(root: Path, tmp_path: Path) -> None:
    assert "--adapter-root" in refusal(str(root / "sql"), [], tmp_path).message


def test_missing_and_not_a_folder(root: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal("nothing", [root], tmp_path).message
    assert "not a folder" in refusal(f"sql/{CONFIG}", [root], tmp_path).message
    (root / "loop").symlink_to("loop")
    refusal("loop", [root], tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x" * 5000,
        "y" * 300,
        "a\x00b",
        "file:///a%00b",
        "a\nb",
        "\ud800",
        "http://127.0.0.1/a",
        "https://example.com/a",
        "HTTP://169.254.169.254/latest",
        "ftp://host/a",
        "data://x",
        "memory://a",
        "github://org:repo@main/a",
        "simplecache::s3://bucket/a",
        "zip://x::http://169.254.169.254/a",
        "s3://bucket/a::http://169.254.169.254/",
        "hf://",
        "hf://repo",
        "hf://org/repo@",
        "hf://org/repo@main/../..",
        "hf://org/repo@main//etc",
        "hf://../../etc",
        "hf://org/repo/a@b@c",
        "file://host/sql",
        "file://sql",
    ],
)
def test_refused_without_a_look(source: str, root: Path, tmp_path: Path) -> None:
    refusal(source, [root], tmp_path)


def test_backend_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "s3fs", None)
        assert "pip install s3fs" in refusal("s3://bucket/adapter", [], tmp_path).message


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object store in memory, under ``memory://bucket/a``."""
    monkeypatch.setattr(sources, "STORES", {"memory": "fsspec"})
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe(f"/bucket/a/{CONFIG}", b"{}")
    files.pipe(f"/bucket/a/{WEIGHTS}", b"weights")
    files.pipe("/bucket/a/optimizer.pt", b"large")
    yield files
    files.store.clear()


def test_object_store(bucket: Any, tmp_path: Path) -> None:
    folder = resolve("memory://bucket/a", roots=[], cache=tmp_path)
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert resolve("memory://bucket/a", roots=[], cache=tmp_path) == folder
    Store(tmp_path / "store").add(folder)


def test_object_store_that_changed(bucket: Any, tmp_path: Path) -> None:
    before = resolve("memory://bucket/a", roots=[], cache=tmp_path)
    bucket.pipe(f"/bucket/a/{WEIGHTS}", b"other weights")
    after = resolve("memory://bucket/a", roots=[], cache=tmp_path)
    assert (before / WEIGHTS).read_bytes() == b"weights" and (after / WEIGHTS).read_bytes() == b"other weights"


def test_object_store_without_an_adapter(bucket: Any, tmp_path: Path) -> None:
    refusal("memory://bucket/nowhere", [], tmp_path)
    bucket.rm(f"/bucket/a/{WEIGHTS}")
    bucket.pipe("/bucket/a/adapter_model.bin", b"pickle")
    with pytest.raises(AdapterFormatError, match="pickle"):
        resolve("memory://bucket/a", roots=[], cache=tmp_path)
    bucket.rm(f"/bucket/a/{CONFIG}")
    with pytest.raises(AdapterFormatError, match=CONFIG):
        resolve("memory://bucket/a", roots=[], cache=tmp_path)


@pytest.mark.parametrize(("name", "why"), [("adapter_chain.json", "sub-folders"), ("model.safetensors", "is a model")])
def test_object_store_with_what_must_be_local(name: str, why: str, bucket: Any, tmp_path: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        bucket.rm(f"/bucket/a/{file}")
    bucket.pipe("/bucket/a/config.json", b"{}")
    bucket.pipe(f"/bucket/a/{name}", b"{}")
    assert why in refusal("memory://bucket/a", [], tmp_path).message


def test_download_that_breaks_off(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(type(bucket), "get_file", fail)
    assert "reset" in refusal("memory://bucket/a", [], tmp_path / "cache").message
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() or "incoming" in path.name] == []


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """One repository, ``org/repo``, with adapters at its top and under ``sub/folder``."""

    def __init__(self) -> None:
        self.sizes = {CONFIG: 2, WEIGHTS: 7, "optimizer.pt": 9, f"sub/folder/{CONFIG}": 2, f"sub/folder/{WEIGHTS}": 7}
        self.asked: list[str] = []
        self.downloads = 0

    def model_info(self, repo: str, *, revision: str, files_metadata: bool) -> SimpleNamespace:
        self.asked.append(revision)
        if repo != "org/repo":
            raise RuntimeError("404 \x1b[31m")
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(self, repo: str, *, revision: str, allow_patterns: list[str], local_dir: Path) -> None:
        assert revision == COMMIT
        self.downloads += 1
        for name in self.sizes.keys() & set(allow_patterns):
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(b"x" * self.sizes[name])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(sources, "HfApi", lambda: fake)
    monkeypatch.setattr(sources, "snapshot_download", fake.download)
    return fake


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("hf://org/repo", "main"),
        ("hf://org/repo@v1", "v1"),
        ("hf://org/repo@refs%2Fpr%2F3", "refs/pr/3"),
        ("hf://org/repo@v1/sub/folder", "v1"),
        ("hf://org/repo/sub/folder", "main"),
    ],
)
def test_hub(source: str, revision: str, hub: FakeHub, tmp_path: Path) -> None:
    folder = resolve(source, roots=[], cache=tmp_path)
    assert hub.asked == [revision]
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert not any(file.is_symlink() for file in folder.iterdir())
    Store(tmp_path / "store").add(folder)


def test_hub_is_asked_but_not_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    first = resolve("hf://org/repo", roots=[], cache=tmp_path)
    assert resolve("hf://org/repo@v1", roots=[], cache=tmp_path) == first and hub.downloads == 1
    assert resolve(f"hf://org/repo@{COMMIT}", roots=[], cache=tmp_path) == first and len(hub.asked) == 2


def test_hub_refusals(hub: FakeHub, tmp_path: Path) -> None:
    assert "404" in refusal("hf://other/repo", [], tmp_path).message
    with pytest.raises(AdapterFormatError, match=CONFIG):
        resolve("hf://org/repo@main/nowhere", roots=[], cache=tmp_path)
    hub.sizes[CONFIG] = FILES[CONFIG] + 1
    with pytest.raises(AdapterTooLarge):
        resolve("hf://org/repo", roots=[], cache=tmp_path)
    assert hub.downloads == 0


def test_hub_offline(tmp_path: Path) -> None:
    """The real client, under HF_HUB_OFFLINE as all tests are."""
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        resolve("hf://org/repo", roots=[], cache=tmp_path)
