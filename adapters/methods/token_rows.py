"""Trained tokens: rows of the embedding, and of a head tied to it, that stand in for the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import as_integer, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods.common import PREFIX
from weft.adapters.parts import TokenRows


def take_trained_tokens(
    checkpoint: Checkpoint, base: Base, tokens: Mapping[str, Sequence[object]], part: str, param: str
) -> dict[str, SiteForms]:
    """The rows that were trained, by path of the embedding or the head.

    peft saves the rows themselves, not what they add. Where the head is tied to the embedding it follows it, and peft
    may save the rows once more under its name.

    Args:
        tokens: the ids by path, in the order of the saved rows.
        part: the tensor's name below the module's path.
        param: the config field to name in errors.
    """
    forms = {}
    for path, indices in tokens.items():
        if base.tied and path == base.head:
            raise AdapterUnsupported(f"{param} names the head, which is tied to the embedding", param=param)
        ids = _checked(indices, base, param)
        vectors = checkpoint.tensors.take(f"{PREFIX}{path}.{part}", (len(ids), base.hidden_size)).float()
        ascending = ids.argsort()
        ids, vectors = ids[ascending], vectors[ascending]
        own = base.embedding is not None and path == base.embedding.path
        forms[path] = SiteForms(rows=TokenRows(ids, vectors * (base.embedding_scale if own else 1.0)))
        if own and base.tied and base.head is not None:
            forms[base.head] = SiteForms(rows=TokenRows(ids, vectors))
            _take_copy(checkpoint, f"{PREFIX}{base.head}.{part}", vectors, ascending)
    return forms


def token_module(name: str, base: Base, param: str) -> str:
    """The path of the embedding or the head that ``name`` is the end of.

    Raises:
        AdapterUnsupported: it is of neither.
    """
    for path in (base.embedding.path if base.embedding else None, base.head):
        if path is not None and (path == name or path.endswith(f".{name}")):
            return path
    raise AdapterUnsupported(f"{param} names {show(name)}, which is neither the embedding nor the head", param=param)


def _checked(indices: Sequence[object], base: Base, param: str) -> torch.Tensor:
    assert base.embedding is not None, "every base has an embedding"
    ids = [as_integer(param, index, low=0, high=base.embedding.in_features - 1) for index in indices]
    if not ids or len(set(ids)) != len(ids):
        raise AdapterFormatError(f"{param} must hold some tokens, each once, got {show(ids)}", param=param)
    return torch.tensor(ids)


def _take_copy(checkpoint: Checkpoint, name: str, vectors: torch.Tensor, ascending: torch.Tensor) -> None:
    if name in checkpoint.tensors:
        copy = checkpoint.tensors.take(name, tuple(vectors.shape)).float()
        if not torch.equal(copy[ascending], vectors):
            raise AdapterMismatch(f"{show(name)} differs from the embedding's rows it is tied to", param=name[:200])
