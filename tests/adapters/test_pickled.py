"""Weights that are a pickle: tensors are read, anything else is refused before it is done."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.adapters.checkpoint import Tensors
from weft.adapters.errors import AdapterFormatError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_adapter.bin"


def refused(file: Path) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        tensors = Tensors(file)
        for name in tensors.left:
            tensors.take(name)
    return caught.value.message


def rewrite(file: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Change the pickle inside a file that torch saved."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_tensors_are_read_as_they_were_saved(file: Path) -> None:
    saved = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).half(),
        "c": torch.randn(4, 6).T,
        "d": torch.arange(3),
        "e": torch.randn(2, 2).bfloat16(),
    }
    torch.save(OrderedDict(saved), file)
    tensors = Tensors(file)
    assert tensors.shapes == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name, tensor in saved.items():
        taken = tensors.take(name, integers=name == "d")
        assert torch.equal(taken, tensor) and taken.dtype == tensor.dtype
    tensors.finish()


@pytest.mark.parametrize("name", ["os system", "builtins eval", "builtins bytearray", "torch Tensor", "torch load"])
def test_a_pickle_that_asks_for_anything_else(name: str, file: Path) -> None:
    torch.save({"a": torch.ones(2)}, file)
    module, _, member = name.partition(" ")
    call = f"c{module}\n{member}\n".encode() + b"(K\x01tR0"
    rewrite(file, lambda data: data[:2] + call + data[2:])
    assert name in refused(file)


class Shell:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_run(protocol: int, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Shell()}, file, pickle_protocol=max(2, protocol))
    refused(file)
    torch.save({"a": torch.ones(2)}, file)
    rewrite(file, lambda data: pickle.dumps({"a": Shell()}, protocol=protocol))
    refused(file)
    file.write_bytes(pickle.dumps({"a": Shell()}, protocol=protocol))
    refused(file)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count", [5, 1 << 40])
def test_a_tensor_that_claims_more_than_there_is(count: int, file: Path) -> None:
    torch.save({"a": torch.ones(4)}, file)
    size = b"K\x04\x85"  # the tuple (4,)
    claimed = b"\x8a\x08" + count.to_bytes(8, "little") + b"\x85"
    rewrite(file, lambda data: data.replace(size, claimed, 1))
    assert "cannot be read" in refused(file)


def test_a_tensor_that_repeats_few_values(file: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, file)
    assert "larger than its values" in refused(file)


def test_a_compressed_file(file: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, file)
    rewrite(file, lambda data: data, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 16 and "compressed" in refused(file)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {1: torch.ones(2)},
        {"a": 1.0},
        {"a": {"b": torch.ones(2)}},
        {"a": torch.ones(2, dtype=torch.float64)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.tensor(1.0)},
        {"a": torch.tensor([float("nan")])},
        {"a": torch.nn.Parameter(torch.ones(2))},
        torch.ones(2),
    ],
)
def test_what_is_no_dictionary_of_weights(content: object, file: Path) -> None:
    torch.save(content, file)
    refused(file)


@pytest.mark.parametrize("cut", [0, 1, 10, 300, -10])
def test_a_file_that_ends_early(cut: int, file: Path) -> None:
    torch.save({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    refused(file)


def test_the_old_format(file: Path) -> None:
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    refused(file)
