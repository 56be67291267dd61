"""Files as they should not be."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from weft.adapters import checkpoint as checkpoint_module
from weft.adapters.checkpoint import read_checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, Neutral, parse_config
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterTooLarge, AdapterUnsupported
from weft.adapters.files import CONFIG, FILES, WEIGHTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1)}, tmp_path / WEIGHTS)
    return tmp_path


def test_everything_taken(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.text("peft_type") == "LORA"
    assert checkpoint.config.integer("r", 8, low=1, high=9) == 4
    assert checkpoint.tensors.take("a", (2, 3)).sum() == 6
    assert checkpoint.tensors.left == ("b",)
    checkpoint.tensors.take("b")
    checkpoint.finish()


def test_what_is_left_is_named(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    checkpoint.tensors.take("b")
    checkpoint.config.text("peft_type")
    with pytest.raises(AdapterUnsupported, match=r": r$"):
        checkpoint.finish()
    checkpoint.config.integer("r", 8, low=1, high=9)
    with pytest.raises(AdapterMismatch) as caught:
        checkpoint.finish()
    assert caught.value.param == "a"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="No such file"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(AdapterFormatError, match="missing") as caught:
        read_checkpoint(folder)
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickle_is_never_read(name: str, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(AdapterFormatError, match=r"pickle.*safe_serialization") as caught:
        read_checkpoint(folder)
    assert name in caught.value.message


def test_pickle_beside_the_weights_is_ignored(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    read_checkpoint(folder)


def make_link(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


def make_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("make", [make_link, make_dangling_link, make_fifo, make_folder])
@pytest.mark.timeout(20)
def test_only_regular_files(make: Callable[[Path], None], name: str, folder: Path) -> None:
    make(folder / name)
    with pytest.raises(AdapterFormatError, match=r"symbolic link|not a regular file") as caught:
        read_checkpoint(folder)
    assert caught.value.param == name


def test_file_beyond_its_limit(folder: Path) -> None:
    os.truncate(folder / CONFIG, FILES[CONFIG] + 1)
    with pytest.raises(AdapterTooLarge) as caught:
        read_checkpoint(folder)
    assert caught.value.param == CONFIG


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b'{"r": NaN}',
        b'{"r": Infinity}',
        b'{"r": -Infinity}',
        b'{"r": 1, "r": 2}',
        b'{"rank_pattern": {"a": 1, "a": 1}}',
        b'{"r": 1} x',
        b'{"r": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b'{"a": ' + b"[" * 17 + b"]" * 17 + b"}",
    ],
)
def test_config_that_is_not_strict_json(text: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        read_checkpoint(folder)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", (32 << 20) + 1) + b"{}",
        save({"a": torch.ones(8)})[:-1],
        save({"a": torch.ones(8)}) + b"x",
        with_header([]),
        with_header({"a": entry("F32", [2], 4)}, b"\0" * 4),
        with_header({"a": entry("F32", [-2], 8)}, b"\0" * 8),
        with_header({"a": entry("F32", [2**63], 8)}, b"\0" * 8),
        with_header({"a": entry("F32", [], 4)}, b"\0" * 4),
        with_header({"a": entry("F32", [0, 2**40], 0)}),
        with_header({"a": entry("F64", [1], 8)}, b"\0" * 8),
        with_header({"a": entry("U16", [4], 8)}, b"\0" * 8),
        with_header({"a": entry("F8_E4M3", [8], 8)}, b"\0" * 8),
        with_header({"a": entry("XYZ", [1], 8)}, b"\0" * 8),
    ],
)
def test_weights_that_are_not_sound(data: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterFormatError):
        read_checkpoint(folder)


def test_too_many_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_TENSORS", 1)
    with pytest.raises(AdapterFormatError, match="2 tensors; the limit is 1"):
        read_checkpoint(folder)


def test_long_names_and_values_are_shortened(folder: Path) -> None:
    save_file({"x" * 10_000: torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(AdapterMismatch) as caught:
        read_checkpoint(folder).tensors.finish()
    assert len(caught.value.message) < 300 and len(caught.value.param or "") <= 200


TABLE = FieldTable(
    honoured=("r",),
    ignored={"revision": "a name"},
    neutral={"bias": Neutral("biases", also=("none",)), "use_dora": Neutral("DoRA")},
)


@pytest.mark.parametrize("fields", ['{"r": 1}', '{"revision": {"x": 1}}', '{"bias": "none"}', '{"use_dora": false}'])
def test_fields_without_effect(fields: str) -> None:
    config = parse_config(fields.encode())
    config.check(TABLE)
    config.integer("r", 1, low=1, high=1)
    config.finish()


@pytest.mark.parametrize(
    ("field", "value"), [("bias", "all"), ("bias", True), ("use_dora", True), ("use_dora", 0), ("other", 1)]
)
def test_fields_with_an_effect(field: str, value: object) -> None:
    with pytest.raises(AdapterUnsupported, match=field) as caught:
        ConfigFields({field: value}).check(TABLE)
    assert caught.value.param == field
