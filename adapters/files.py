"""The files that make an adapter, and how they are opened: regular files of bounded size, no symbolic links.

An adapter is a flat folder. Only a fusion (AdapterHub's ``save_adapter_setup``) has sub-folders, one for each member
and one for what fuses them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterTooLarge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFERENCES = "pytorch_diff.bin"
"""Sparse differences from the base's parameters, as LT-SFT saves them: an adapter by itself, without a config."""

HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
"""What the AdapterHub library writes instead; the pickle is all it can write for some methods."""
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
INTERFACE = "adapter_interface.json"
SETUP = "adapter_setup.json"
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")

CHAIN = "adapter_chain.json"
"""Names the folders of adapters that were trained one after the other, each on what the last left: a chain."""

RELORA = "relora_config.json"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""A model trained in full, which is served as what it differs in from the base; and ReLoRA's own file beside it."""

MAX_FOLDERS = 128

FILES: Mapping[str, int] = MappingProxyType(
    {
        CONFIG: 8 << 20,
        DIFFERENCES: 1 << 30,
        **dict.fromkeys((WEIGHTS, *HUB_WEIGHTS, *HEAD_WEIGHTS, *FUSION_WEIGHTS), 16 << 30),
        **dict.fromkeys((INTERFACE, SETUP, FUSION_CONFIG, "head_config.json", CHAIN), 8 << 20),
        # A tokenizer saved beside the adapter (new tokens, an own chat template).
        "added_tokens.json": 16 << 20,
        "chat_template.jinja": 1 << 20,
        "chat_template.json": 1 << 20,
        "merges.txt": 64 << 20,
        "special_tokens_map.json": 1 << 20,
        "tokenizer.json": 256 << 20,
        "tokenizer.model": 64 << 20,
        "tokenizer_config.json": 64 << 20,
        "vocab.json": 64 << 20,
        "vocab.txt": 64 << 20,
    }
)
"""Files that are part of an adapter, each with its largest size in bytes. Whatever else lies beside them is ignored."""

MODEL_FILES: Mapping[str, int] = MappingProxyType(
    {**dict.fromkeys((RELORA, MODEL_CONFIG), 8 << 20), **dict.fromkeys(MODEL_WEIGHTS, 16 << 30)}
)
"""Likewise, of a model that is an adapter; beside another adapter they are not part of it."""

ROUTER = "arrow_router"
"""The folder of the adapter that chooses between those beside it, as ``peft.create_arrow_model`` names it."""

_FOLDER = re.compile(r"(?!\.)[\w.,\-]+", re.ASCII)
"""Names of sub-folders: a digest over names relies on their having no spaces."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def size_limit(name: str) -> int:
    """The largest size in bytes of a file of an adapter, or of one of its members (``member/file``)."""
    last = name.rpartition("/")[2]
    return FILES[last] if last in FILES else MODEL_FILES[last]


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open ``folder/name`` for reading, if it is a regular file within its size limit. ``name`` may be a member's file.

    Raises:
        AdapterFormatError: it is missing, a link, a directory, a pipe or a device, or cannot be read.
        AdapterTooLarge: it is larger than ``FILES`` allows.
    """
    # O_NOFOLLOW: a link could lead anywhere. O_NONBLOCK: opening a pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    inner, _, last = name.rpartition("/")
    try:
        inside = os.open(folder / inner, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC) if inner else None
        try:
            descriptor = os.open(last if inner else folder / last, flags, dir_fd=inside)
        finally:
            if inside is not None:
                os.close(inside)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ELOOP:
            reason = "it is a symbolic link; copy the file itself, or give a Hugging Face repository as hf://org/repo"
        raise AdapterFormatError(f"{name} cannot be opened: {reason}", param=name) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterFormatError(f"{name} is not a regular file", param=name)
        if status.st_size > size_limit(name):
            raise AdapterTooLarge(f"{name} has {status.st_size} bytes; the limit is {size_limit(name)}", param=name)
        return os.fdopen(descriptor, "rb")
    except AdapterError:
        os.close(descriptor)
        raise


def present(folder: Path) -> list[str]:
    """The adapter's files that are in ``folder``, in the order of ``FILES``; those in sub-folders as ``folder/file``.

    Raises:
        AdapterFormatError: the config or the weights are missing, or the weights are only there as a pickle.
    """
    names = _listed(folder)
    if CHAIN in names and CONFIG in names:
        raise AdapterFormatError(f"{CHAIN} lies beside {CONFIG}; a link has a folder of its own", param=CHAIN)
    top = next((name for name in (SETUP, CHAIN) if name in names), None)
    if top is not None:
        inner = [f"{name}/{file}" for name in _subfolders(folder) for file in _known(_listed(folder / name))]
        return [top, *inner]
    found = members(folder)
    return [f"{member}/{name}" for member in found for name in _present(folder / member)] or _present(folder)


def members(folder: Path) -> list[str]:
    """A router and the adapters beside it, each in a folder of its own, sorted; none where ``folder`` is an adapter.

    Raises:
        AdapterTooLarge: there are too many.
    """
    names = _listed(folder)
    if CONFIG in names or ROUTER not in names:
        return []
    # Links too, so that opening one says what is wrong with it.
    found = sorted(name for name in names if _FOLDER.fullmatch(name) and (folder / name / CONFIG).is_file())
    _check_count(found)
    return found if ROUTER in found else []


def _present(folder: Path) -> list[str]:
    names = _listed(folder)
    if CONFIG in names:
        names.discard(DIFFERENCES)
    elif DIFFERENCES in names:
        return [DIFFERENCES]
    elif MODEL_CONFIG in names and any(name in names for name in MODEL_WEIGHTS):
        return [name for name in MODEL_FILES if name in names]
    else:
        raise AdapterFormatError(f"{CONFIG} is missing; an adapter is a folder as peft saves it", param=CONFIG)
    if not has_weights(names):
        raise AdapterFormatError(missing_weights(names), param=WEIGHTS)
    return _known(names)


def has_weights(names: Collection[str]) -> bool:
    """Whether one of ``names`` is an adapter's weights, as peft or AdapterHub calls them."""
    return any(name in names for name in (WEIGHTS, *HUB_WEIGHTS))


def _known(names: set[str]) -> list[str]:
    return [name for name in FILES if name in names]


def _listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise AdapterFormatError(f"the adapter's folder cannot be read: {error.strerror}", param=CONFIG) from error


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and _FOLDER.fullmatch(e.name))
    _check_count(found)
    return found


def _check_count(folders: Sequence[str]) -> None:
    if len(folders) > MAX_FOLDERS:
        raise AdapterTooLarge(f"the adapter has {len(folders)} sub-folders; the limit is {MAX_FOLDERS}", param=CONFIG)


def missing_weights(names: set[str]) -> str:
    """Say what is wrong with a folder that holds ``names`` but not the weights."""
    pickles = sorted(name for name in names if name.endswith(PICKLES) and name.startswith("adapter_model"))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is read; "
            f"save the adapter with safe_serialization=True, which writes {WEIGHTS}"
        )
    return f"{WEIGHTS} is missing"
