"""OFT (arXiv 2306.07280) as peft has it since 0.18: y = W (x R) + b0, R a rotation in blocks, by Cayley's transform or
its series. At the token embedding R rotates its vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterFormatError, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.cayley import cayley, cayley_series, rotation_rows, skew_symmetric
from weft.adapters.methods.common import (
    COMMON_FIELDS,
    check_memory,
    method_sites,
    site_tensor,
    take_biases,
)
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = COMMON_FIELDS.without("peft_version") | FieldTable(
    honoured=(
        "r",
        "oft_block_size",
        "coft",
        "eps",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "bias",
        "peft_version",
        *TARGET_FIELDS,
    ),
    ignored={
        "fan_in_fan_out": "peft adapts no Conv1D with OFT",
        "init_weights": "how the parameters were initialised before training",
        "module_dropout": "no dropout at inference",
    },
)
"""Every field of peft 0.21.2's OFTConfig."""

LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class _Rotation:
    """How R follows from what is saved.

    Attributes:
        count, size: of the blocks at every site; one of the two, the other is 0.
        shared: one block stands for all.
        terms: of the series, or None for the exact transform.
        largest: of the norm of all blocks of a site, each taking its share; None without a bound.
    """

    count: int
    size: int
    shared: bool
    terms: int | None
    largest: float | None

    @classmethod
    def read(cls, config: ConfigFields) -> _Rotation:
        if "oft_block_size" not in config:
            raise AdapterUnsupported(
                "oft_block_size is missing: the adapter was saved by peft before 0.14, whose OFT was another",
                param="oft_block_size",
            )
        count = config.integer("r", 0, low=0, high=LARGEST_SIZE)
        size = config.integer("oft_block_size", 32, low=0, high=LARGEST_SIZE)
        if (count == 0) == (size == 0):
            raise AdapterFormatError(f"one of r={count} and oft_block_size={size} must be 0", param="oft_block_size")
        terms = config.integer("num_cayley_neumann_terms", 5, low=1, high=100)
        series, version = config.flag("use_cayley_neumann", True), config.text("peft_version")
        if series and not _knows_series(version):
            raise AdapterUnsupported(
                f"use_cayley_neumann is not served for an adapter of peft {show(version)}: before 0.18 the series was "
                "another one; train or save it again with peft 0.18 or later",
                param="peft_version",
            )
        bounded, largest = config.flag("coft"), config.number("eps", 6e-5)
        if bounded and largest < 0:
            raise AdapterFormatError(f"eps must not be negative, got {largest}", param="eps")
        shared = config.flag("block_share")
        return cls(count, size, shared, terms if series else None, largest if bounded else None)

    def block_size(self, width: int) -> int:
        """Of a site of this width."""
        return _divisor(width, self.size) if self.size else width // _divisor(width, self.count)

    def rows(self, checkpoint: Checkpoint, site: Site, part: str, width: int) -> torch.Tensor:
        """``SiteForms.rotate_in`` of a site."""
        size = self.block_size(width)
        saved = (1 if self.shared else width // size, size * (size - 1) // 2)
        skew = skew_symmetric(site_tensor(checkpoint, site, f"{part}.weight", saved).double(), size)
        if self.largest is not None:
            norm, most = skew.norm(dim=(1, 2), keepdim=True), self.largest / saved[0] ** 0.5
            skew = torch.where(norm <= most, skew, skew * (most / norm))
        return rotation_rows(cayley(skew) if self.terms is None else cayley_series(skew, self.terms), width // size)


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA, embeddings=True)
    refuse_conv1d([site for site in sites if site is not base.embedding], "OFT")
    rotation = _Rotation.read(checkpoint.config)
    widths = {site.path: site.out_features if site is base.embedding else site.in_features for site in sites}
    check_memory(base, sum(rotation.block_size(width) * width for width in widths.values()))
    biases = take_biases(checkpoint, base, sites)
    forms = {}
    for site in sites:
        part = "oft_embedding_R" if site is base.embedding else "oft_R"
        forms[site.path] = SiteForms(rotate_in=rotation.rows(checkpoint, site, part, widths[site.path]))
    return with_biases(forms, biases, base)


def _divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` nearest to ``wanted``, of two the smaller; all of it where more is wanted."""
    if wanted >= width:
        return width
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _knows_series(version: str | None) -> bool:
    """Whether peft's ``version``, such as ``0.18.1.dev0@a1b2c3``, is 0.18.0 or later."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(\.dev)?", version or "", re.ASCII)
    return match is not None and (*(int(match[i]) for i in (1, 2, 3)), not match[4]) >= (0, 18, 0, True)
