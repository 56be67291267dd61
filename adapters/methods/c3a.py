"""C3A (arXiv 2407.19342): ΔW is made of circulant blocks, ΔW[m b + t, n b + j] = w[m, n, (j − t) mod b] / in."""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import check_dense, method_sites, site_tensor, take_biases
from weft.adapters.methods.factors import refuse_conv1d
from weft.adapters.methods.lora import with_biases
from weft.adapters.methods.places import LINEAR_FIELDS, count_of_sites
from weft.adapters.methods.targets import DOTTED_KEY

FIELDS = LINEAR_FIELDS | FieldTable(
    honoured=("block_size", "block_size_pattern", "bias", "layers_to_transform", "layers_pattern"),
)
"""Every field of peft 0.21.2's C3AConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.SPECTRAL)
    refuse_conv1d(sites, "C3A")
    check_dense(base, sites)
    blocks = count_of_sites(checkpoint.config, "block_size", 256, sites, key_format=DOTTED_KEY)
    biases = take_biases(checkpoint, base, sites)
    forms = {site.path: SiteForms(delta=_circulant(checkpoint, site, blocks[site.path])) for site in sites}
    return with_biases(forms, biases, base)


def _circulant(checkpoint: Checkpoint, site: Site, block: int) -> torch.Tensor:
    if site.in_features % block or site.out_features % block:
        raise AdapterMismatch(
            f"block_size {block} does not divide {site.path} of {site.out_features} by {site.in_features}",
            param="block_size",
        )
    shape = (site.out_features // block, site.in_features // block, block)
    kernel = site_tensor(checkpoint, site, "c3a_kernel", shape) / site.in_features
    index = (torch.arange(block) - torch.arange(block)[:, None]) % block
    # [m, n, t, j] to [m, t, n, j]
    return kernel[:, :, index].transpose(1, 2).reshape(site.out_features, site.in_features)
