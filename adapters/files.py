"""The files that make an adapter, and how they are opened: regular files of bounded size, no symbolic links."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterTooLarge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFERENCES = "pytorch_diff.bin"
"""Sparse differences from the base's parameters, as LT-SFT saves them: an adapter by itself, without a config."""

FILES: Mapping[str, int] = MappingProxyType(
    {
        CONFIG: 8 << 20,
        WEIGHTS: 16 << 30,
        DIFFERENCES: 1 << 30,
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

ROUTER = "arrow_router"
"""The folder of the adapter that chooses between those beside it, as ``peft.create_arrow_model`` names it."""

MEMBER = re.compile(r"[A-Za-z0-9_\-]{1,64}")
"""Names of the folders beside it."""

MAX_MEMBERS = 128

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def size_limit(name: str) -> int:
    """The largest size in bytes of a file of an adapter, or of one of its members (``member/file``)."""
    return FILES[name.rpartition("/")[2]]


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open ``folder/name`` for reading, if it is a regular file within its size limit. ``name`` may be a member's file.

    Raises:
        AdapterFormatError: it is missing, a link, a directory, a pipe or a device, or cannot be read.
        AdapterTooLarge: it is larger than ``FILES`` allows.
    """
    # O_NOFOLLOW: a link could lead anywhere. O_NONBLOCK: opening a pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    member, _, file = name.rpartition("/")
    try:
        parent = os.open(
            folder / member, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if member else 0)
        )
        try:
            descriptor = os.open(file, flags, dir_fd=parent)
        finally:
            os.close(parent)
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
    """The adapter's files that are in ``folder``, in the order of ``FILES``; where it has members, theirs by member.

    Raises:
        AdapterFormatError: the config or the weights are missing, or the weights are only there as a pickle.
    """
    found = members(folder)
    return [f"{member}/{name}" for member in found for name in _present(folder / member)] or _present(folder)


def members(folder: Path) -> list[str]:
    """A router and the adapters beside it, each in a folder of its own, sorted; none where ``folder`` is an adapter.

    Raises:
        AdapterFormatError: there are more than ``MAX_MEMBERS``.
    """
    names = _listed(folder)
    if CONFIG in names or ROUTER not in names:
        return []
    found = sorted(name for name in names if MEMBER.fullmatch(name) and (folder / name / CONFIG).is_file())
    if len(found) > MAX_MEMBERS:
        raise AdapterFormatError(f"{len(found)} adapters lie together; the limit is {MAX_MEMBERS}", param=CONFIG)
    return found if ROUTER in found else []


def _listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise AdapterFormatError(f"the adapter's folder cannot be read: {error.strerror}", param=CONFIG) from error


def _present(folder: Path) -> list[str]:
    names = _listed(folder)
    if CONFIG in names:
        names.discard(DIFFERENCES)
    elif DIFFERENCES in names:
        return [DIFFERENCES]
    else:
        raise AdapterFormatError(f"{CONFIG} is missing; an adapter is a folder as peft saves it", param=CONFIG)
    if WEIGHTS not in names:
        raise AdapterFormatError(missing_weights(names), param=WEIGHTS)
    return [name for name in FILES if name in names]


def missing_weights(names: set[str]) -> str:
    """Say what is wrong with a folder that holds ``names`` but not the weights."""
    pickles = sorted(name for name in names if name.endswith(PICKLES) and name.startswith("adapter_model"))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is read; "
            f"save the adapter with safe_serialization=True, which writes {WEIGHTS}"
        )
    return f"{WEIGHTS} is missing"
