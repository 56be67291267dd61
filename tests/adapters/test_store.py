"""The content-addressed store: whole versions or none, whatever happens meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.adapters import store as store_module
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterSourceError, AdapterTooLarge
from weft.adapters.files import CONFIG, FILES, WEIGHTS
from weft.adapters.store import Store, digest


def write_adapter(folder: Path, *, fill: float = 1.0, **extra: str) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.full((64, 64), fill)}, folder / WEIGHTS)
    for name, text in extra.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(store: Store) -> list[str]:
    return sorted(entry.name for entry in store.root.iterdir() if entry.name not in {".lock", *store.versions()})


def test_add_and_read_back(store: Store, source: Path) -> None:
    version = store.add(source)
    assert version == digest(source) and store.versions() == [version]
    assert {file.name for file in store.path(version).iterdir()} == {CONFIG, WEIGHTS}
    assert (store.path(version) / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert store.size(version) == sum((source / name).stat().st_size for name in (CONFIG, WEIGHTS))
    store.verify(version)
    assert leftovers(store) == []


def test_digest_is_of_the_contents_alone(source: Path, tmp_path: Path) -> None:
    same = write_adapter(tmp_path / "other_name", README__md="ignored", optimizer__pt="ignored")
    assert digest(same) == digest(source)
    assert digest(write_adapter(tmp_path / "weights", fill=2)) != digest(source)
    assert digest(write_adapter(tmp_path / "template", chat_template__jinja="x")) != digest(source)
    # Where one file ends and the next begins is part of it.
    first = write_adapter(tmp_path / "first", merges__txt="ab", vocab__txt="c")
    second = write_adapter(tmp_path / "second", merges__txt="a", vocab__txt="bc")
    assert digest(first) != digest(second)


def test_digest_is_stable(source: Path) -> None:
    """Manifests of earlier runs hold it."""
    lines = [
        f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        for name in (CONFIG, WEIGHTS)
        if (data := (source / name).read_bytes())
    ]
    assert digest(source) == hashlib.sha256(("weft-adapter-v1\n" + "".join(lines)).encode()).hexdigest()


def test_tokenizer_files_are_kept(store: Store, tmp_path: Path) -> None:
    version = store.add(write_adapter(tmp_path / "a", tokenizer__json="{}", chat_template__jinja="{{x}}"))
    assert (store.path(version) / "chat_template.jinja").read_text() == "{{x}}"


def test_adding_again_changes_nothing(store: Store, source: Path) -> None:
    version = store.add(source)
    inode = (store.path(version) / WEIGHTS).stat().st_ino
    assert store.add(source) == version
    assert (store.path(version) / WEIGHTS).stat().st_ino == inode and leftovers(store) == []


def test_remove(store: Store, source: Path) -> None:
    version = store.add(source)
    store.remove(version)
    assert store.versions() == leftovers(store) == []
    with pytest.raises(AdapterSourceError):
        store.remove(version)


@pytest.mark.parametrize("version", ["", "..", "../source", "a" * 64, "A" * 64, "/etc", "\x00", ".lock"])
def test_unknown_version(version: str, store: Store, source: Path) -> None:
    for method in (store.path, store.verify, store.remove, store.size):
        with pytest.raises(AdapterSourceError) as caught:
            method(version)
        assert caught.value.param == "version"


def test_damage_is_found_and_repaired_by_adding_again(store: Store, source: Path) -> None:
    version = store.add(source)
    weights = store.path(version) / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="damaged"):
        store.verify(version)
    assert store.add(source) == version
    store.verify(version)
    assert leftovers(store) == []


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.timeout(20)
def test_only_regular_files_are_copied(kind: str, name: str, store: Store, source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / name).unlink(missing_ok=True)
    if kind == "link":
        (source / name).symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(source / name)
    else:
        (source / name).mkdir()
    with pytest.raises(AdapterFormatError) as caught:
        store.add(source)
    assert caught.value.param == name and store.versions() == leftovers(store) == []


def test_half_downloaded_folder(store: Store, source: Path) -> None:
    (source / WEIGHTS).rename(source / f"{WEIGHTS}.incomplete")
    with pytest.raises(AdapterFormatError, match="missing"):
        store.add(source)
    assert leftovers(store) == []


def test_file_beyond_its_limit(store: Store, source: Path) -> None:
    os.truncate(source / CONFIG, FILES[CONFIG] + 1)
    with pytest.raises(AdapterTooLarge):
        store.add(source)
    assert leftovers(store) == []


def test_file_that_grows_while_it_is_copied(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "size_limit", lambda name: 100 if name == WEIGHTS else FILES[name])
    with pytest.raises(AdapterTooLarge, match="grew"):
        store.add(source)
    assert store.versions() == leftovers(store) == []


def test_file_that_vanishes_while_it_is_copied(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "present", lambda folder: [CONFIG, WEIGHTS, "vocab.txt"])
    with pytest.raises(AdapterError):
        store.add(source)
    assert leftovers(store) == []


class _FullDisk:
    """Writes a few bytes, then none."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_nothing_behind(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": _FullDisk(open_file(path, mode)))
    with pytest.raises(AdapterTooLarge, match="no room"):
        store.add(source)
    monkeypatch.undo()
    assert store.versions() == leftovers(store) == []
    store.verify(store.add(source))


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdtemp"])
def test_any_failing_call_leaves_nothing_behind(
    call: str, store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "failing disk")

    owner: Any = {"fsync": os, "rename": Path, "mkdtemp": tempfile}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(OSError, match="failing disk"):
            store.add(source)
    assert store.versions() == leftovers(store) == []


def test_write_that_reads_back_differently(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "digest", lambda folder: "0" * 64)
    with pytest.raises(OSError, match="reads back differently"):
        store.add(source)
    assert store.versions() == leftovers(store) == []


def test_start_removes_what_a_crash_left(store: Store, source: Path) -> None:
    version = store.add(source)
    half = store.root / ".incoming-crashed"
    shutil.copytree(source, half / "old")
    assert Store(store.root).versions() == [version]
    assert leftovers(store) == []


def test_start_of_another_store_spares_an_add_under_way(store: Store) -> None:
    with store._incoming() as folder:
        Store(store.root)
        assert folder.is_dir()
    Store(store.root)
    assert leftovers(store) == []


def test_concurrent_adds_of_the_same_and_of_others(store: Store, tmp_path: Path) -> None:
    sources = [write_adapter(tmp_path / f"source{index}", fill=index) for index in range(3)]
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(store.add, sources * 8))
    assert versions == [digest(folder) for folder in sources] * 8
    assert store.versions() == sorted(set(versions)) and leftovers(store) == []
    for version in set(versions):
        store.verify(version)


def test_concurrent_adds_from_several_processes(store: Store, source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from weft.adapters.store import Store\n"
        "for _ in range(20): Store(Path(sys.argv[1])).add(Path(sys.argv[2]))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, store.root, source]) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert store.versions() == [digest(source)] and leftovers(store) == []
