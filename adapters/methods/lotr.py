"""LoTR (arXiv 2402.01376): y += s / r · L M R x, where the layers of a kind share L and R, and each has its own M.

The authors' code (daskol/lotr) has modules and saves nothing. What is served is what their modules hold: every adapted
linear has ``lotr.lhs`` ``[r, out]``, ``lotr.mid`` ``[r, r]`` and ``lotr.rhs`` ``[in, r]``, transposed as they act on
rows, and keeps the linear of the base inside as ``linear``. The names are those of the model's ``state_dict``, and each
layer has all three in the file. The config says the rest: ``"peft_type": "LOTR"``, ``target_modules`` and ``scale``, s.
"""

from __future__ import annotations

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import FieldTable, show
from weft.adapters.errors import AdapterMismatch
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import CONFIG_FIELDS, method_sites, take_base_copy
from weft.adapters.methods.factors import MAX_RANK, product, refuse_conv1d
from weft.adapters.methods.targets import TARGET_FIELDS

FIELDS = CONFIG_FIELDS | FieldTable(honoured=("scale", *TARGET_FIELDS))
"""Every field the config can have."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. The rank is that of the tensors, so layers of other kinds may have other ranks."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "LoTR")
    scale = checkpoint.config.number("scale", 1.0)
    forms = {site.path: _update(checkpoint, site, scale) for site in sites}
    _take_frozen(checkpoint, base)
    return forms


def _update(checkpoint: Checkpoint, site: Site, scale: float) -> SiteForms:
    name = f"{site.path}.lotr"
    rank = checkpoint.tensors.shapes.get(f"{name}.mid", (1,))[0]
    if not 1 <= rank <= MAX_RANK:
        raise AdapterMismatch(f"{show(name)} has rank {rank}; it must be 1 to {MAX_RANK}", param=f"{name}.mid"[:200])
    core = checkpoint.tensors.take(f"{name}.mid", (rank, rank)).float()
    left = checkpoint.tensors.take(f"{name}.lhs", (rank, site.out_features)).float()
    right = checkpoint.tensors.take(f"{name}.rhs", (site.in_features, rank)).float()
    return product((core @ left).T * (scale / rank), right.T, site)


def _take_frozen(checkpoint: Checkpoint, base: Base) -> None:
    """Take what a whole ``state_dict`` has besides: the base's own parameters, adapted linears' one module in."""
    for name in checkpoint.tensors.left:
        parameter = base.parameters.get(name.replace(".linear.", "."))
        if parameter is not None:
            take_base_copy(checkpoint, name, parameter)
