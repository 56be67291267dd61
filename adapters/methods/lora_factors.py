"""The factors of a LoRA site as peft's variants save them, and what some variants take from the base before training.

Whatever the variant, a site's update is one low-rank product. PiSSA (arXiv 2404.02948), OLoRA (2406.01775), KaSA
(2412.06071) and MiLoRA (2406.09044) train on W less a part of itself that follows from W alone, so serving them beside
others on the unchanged base subtracts that part too, as further ranks. MiLoRA's authors (sufenlp/MiLoRA) save the rest
of W as a model of its own and the adapter as a plain LoRA of that; ``"init_lora_weights": "milora"``, which peft does
not know, says so in the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, as_number, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods.common import DECOMPOSED, PREFIX, refuse_quantized
from weft.adapters.parts import LowRank

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights as they are."""

RESIDUAL_INITS = ("pissa", "olora", "milora")
"""Those that take a part from them that can be computed again."""

UNREPEATABLE_INITS: Mapping[str, str] = {
    "pissa_niter_": "its randomised SVD cannot be repeated, by peft neither",
    "corda": "what it took from the base follows from data that is not saved",
    "lora_ga": "what it took from the base follows from gradients that are not saved",
    "loftq": "it was trained on a base that LoftQ quantised",
}

VARIANT_FIELDS = ("use_bdlora", "velora_config", "monteclora_config", "kasa_config")
"""Fields that choose a variant when they hold an object, even an empty one."""

MAX_BLOCKS = 1 << 14


@dataclass(frozen=True)
class Factors:
    """How the factors of a config's linear sites are read.

    Attributes:
        blocks: of block-diagonal factors.
        packed: by path, whether ``"A"`` or ``"B"`` is block-diagonal, and saved as its blocks alone.
        groups: VeLoRA's, of the input.
        samplers: MonteCLoRA's samplers may be in the file.
        diagonal: KaSA's trained diagonal stands between A and B.
        removed: what took a part of the base's weights before training: ``"pissa"``, ``"olora"``, ``"milora"``,
            ``"kasa"``.
    """

    blocks: int = 1
    packed: Mapping[str, str] = field(default_factory=dict)
    groups: int | None = None
    samplers: bool = False
    diagonal: bool = False
    removed: str | None = None

    @classmethod
    def read(cls, config: ConfigFields, sites: Sequence[Site], base: Base) -> Factors:
        """Read and check the fields of the variants.

        Raises:
            AdapterUnsupported: their effect cannot be computed, or peft does not define it.
        """
        init = config.value("init_lora_weights", True)
        _check_init(init)
        chosen = [name for name in VARIANT_FIELDS if config.value(name, None) is not None]
        named = [*chosen, *(["use_dora"] if config.flag("use_dora") else []), *(["mica"] if init == "mica" else [])]
        if len(named) > 1:
            raise AdapterUnsupported(f"{' with '.join(named)} is not defined, nor does peft make it", param=named[0])
        removed = str(init) if init in RESIDUAL_INITS else None
        if "kasa_config" in chosen:
            if removed:
                raise AdapterUnsupported(f"kasa_config with init_lora_weights={removed} is not served", param=chosen[0])
            removed = "kasa"
        _check_sites(chosen, removed, sites, base)
        if removed:
            refuse_quantized(sites, base, f"LoRA that took its start from the base ({removed})", DECOMPOSED)
        if config.flag("lora_bias") and ("use_bdlora" in chosen or not isinstance(init, bool)):
            raise AdapterUnsupported(
                "lora_bias is not defined for this variant, nor does peft make it", param="lora_bias"
            )
        blocks, packed = _packed(_fields(config, "use_bdlora", BD_FIELDS), sites) if "use_bdlora" in chosen else (1, {})
        groups = _groups(_fields(config, "velora_config", VELORA_FIELDS)) if "velora_config" in chosen else None
        for name, table in (("monteclora_config", MONTECLORA_FIELDS), ("kasa_config", KASA_FIELDS)):
            if name in chosen:
                _fields(config, name, table)
        return cls(blocks, packed, groups, "monteclora_config" in chosen, "kasa_config" in chosen, removed)

    def take(self, checkpoint: Checkpoint, base: Base, site: Site, rank: int, scale: float) -> LowRank:
        """The low-rank update of a site, the scale in B."""
        self._drop_training_state(checkpoint, site)
        a = self._factor(checkpoint, site, "A", (rank, site.in_features))
        b = self._factor(checkpoint, site, "B", (site.out_features, rank)) * scale
        if self.diagonal:
            a = a * checkpoint.tensors.take(tensor_name(checkpoint, site, "lora_diag"), (rank,)).float()[:, None]
        if self.removed is None:
            saved = not self.diagonal and site.path not in self.packed
            return LowRank(a, b, scale=scale if saved else None)
        part = _removed_part(self.removed, base, site, rank, scale)
        _take_residual(checkpoint, base, site, part)
        return LowRank(torch.cat([a, part.a]), torch.cat([b, -part.b], dim=1))

    def _factor(self, checkpoint: Checkpoint, site: Site, which: str, shape: tuple[int, int]) -> torch.Tensor:
        packed = self.packed.get(site.path) == which
        saved = (shape[0], shape[1] // self.blocks) if packed else shape
        factor = checkpoint.tensors.take(tensor_name(checkpoint, site, f"lora_{which}", "weight"), saved).float()
        return torch.block_diag(*factor.chunk(self.blocks)) if packed else factor

    def _drop_training_state(self, checkpoint: Checkpoint, site: Site) -> None:
        """Take what only training reads: VeLoRA's projection of activations, MonteCLoRA's samplers."""
        projection = tensor_name(checkpoint, site, "lora_velora_embed")
        if self.groups and projection in checkpoint.tensors:
            checkpoint.tensors.take(projection, (-(-site.in_features // self.groups),))
        if self.samplers:
            sampler = f"{PREFIX}{site.path}.lora_monteclora_sampler."
            for name in checkpoint.tensors.left:
                if name.startswith(sampler):
                    checkpoint.tensors.take(name)


BD_FIELDS = FieldTable(honoured=("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"))
VELORA_FIELDS = FieldTable(
    honoured=("num_groups",),
    ignored={"scale": "of the gradient", "init_type": "how the projection of activations was initialised"},
)
MONTECLORA_FIELDS = FieldTable(
    ignored=dict.fromkeys(
        ("num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size"),
        "of the samples drawn in training; at inference the factors are used as they are",
    )
)
KASA_FIELDS = FieldTable(ignored=dict.fromkeys(("beta", "gamma"), "of the loss during training"))


def tensor_name(checkpoint: Checkpoint, site: Site, part: str, kind: str = "") -> str:
    """The tensor's name. A state dict saved without peft's help keeps the adapter's name, by default ``default``."""
    ending = f".{kind}" if kind else ""
    name = f"{PREFIX}{site.path}.{part}{ending}"
    named = f"{PREFIX}{site.path}.{part}.default{ending}"
    return named if named in checkpoint.tensors and name not in checkpoint.tensors else name


def _check_init(init: object) -> None:
    if any(type(init) is type(value) and init == value for value in (*HARMLESS_INITS, *RESIDUAL_INITS)):
        return
    text = str(init)
    why = next((why for name, why in UNREPEATABLE_INITS.items() if text.startswith(name)), "it is unknown")
    raise AdapterUnsupported(
        f"init_lora_weights={show(init)} is not served: {why}; save the adapter with "
        "path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        param="init_lora_weights",
    )


def _check_sites(chosen: Sequence[str], removed: str | None, sites: Sequence[Site], base: Base) -> None:
    """Refuse sites that peft's variant cannot adapt, and a base's weight in two places when one of them changes."""
    param = chosen[0] if chosen else "init_lora_weights"
    for site in sites:
        if site is base.embedding and (chosen or removed):
            raise AdapterUnsupported(f"{param} on an embedding is not defined, nor does peft make it", param=param)
        if site.kind == "conv1d" and param in ("use_bdlora", "kasa_config"):
            raise AdapterUnsupported(f"{param} on a Conv1D is not defined, nor does peft make it", param=param)
        if removed and base.tied and site.path == base.head:
            raise AdapterUnsupported(f"{param} on a head that is tied changes the embedding as well", param=param)


def _fields(config: ConfigFields, name: str, table: FieldTable) -> ConfigFields:
    fields = ConfigFields(config.mapping(name))
    fields.check(table)
    return fields


def _groups(fields: ConfigFields) -> int:
    as_number("scale", fields.value("scale", 1.0))
    return fields.integer("num_groups", 32, low=1, high=1 << 31)


def _packed(fields: ConfigFields, sites: Sequence[Site]) -> tuple[int, dict[str, str]]:
    """BD-LoRA: the number of blocks, and which factor is packed by path; peft looks for its patterns anywhere in it."""
    blocks = fields.integer("nblocks", 1, low=1, high=MAX_BLOCKS)
    strict = fields.flag("match_strict", True)
    patterns = {which: _names(fields, f"target_modules_bd_{which.lower()}") for which in "AB"}
    packed: dict[str, str] = {}
    for site in sites:
        found = [which for which, names in patterns.items() if any(name in site.path for name in names)]
        if len(found) > 1 or (strict and not found):
            how = "both A and B" if found else "neither A nor B"
            raise AdapterMismatch(f"use_bdlora makes {how} of {show(site.path)} block-diagonal", param="use_bdlora")
        packed |= dict.fromkeys([site.path] if found else [], found[0] if found else "")
    return blocks, packed


def _names(fields: ConfigFields, name: str) -> tuple[str, ...]:
    names = fields.names(name)
    if isinstance(names, str):
        raise AdapterFormatError(f"{name} must be a list of strings, got {show(names)}", param="use_bdlora")
    return names or ()


def _removed_part(how: str, base: Base, site: Site, rank: int, scale: float) -> LowRank:
    """What was taken from W: its largest singular components (PiSSA), its smallest (KaSA, MiLoRA), or a part of Q R
    (OLoRA).

    The products do not depend on the signs that an SVD or a QR is free to choose. In 16 bits peft rounds W less the
    part once; here W stays as it is and the part is rounded by itself, so the two agree to within that rounding.
    """
    weight = base.weight(site)
    if how == "olora":
        # peft factors the weight as it is stored, so Conv1D's transposed.
        q, r = torch.linalg.qr(weight.T if site.kind == "conv1d" else weight)
        _check_determined(r.diagonal()[:rank].abs(), float(r.abs().max()), site)
        q, r = q[:, :rank], r[:rank] * scale
        return LowRank(q.T, r.T) if site.kind == "conv1d" else LowRank(r, q)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    if how == "kasa" and rank >= len(s):
        raise AdapterMismatch(f"kasa_config needs a rank below {len(s)} at {site.path}, got {rank}", param="r")
    if how == "milora" and rank > len(s):
        raise AdapterMismatch(f"MiLoRA needs a rank of at most {len(s)} at {site.path}, got {rank}", param="r")
    if how == "pissa" and scale <= 0:
        raise AdapterUnsupported("init_lora_weights='pissa' needs a positive lora_alpha", param="lora_alpha")
    cut = rank if how == "pissa" else len(s) - rank
    if cut < len(s) and float(s[cut]) > 1e-4 * float(s[0]):
        _check_determined(s[cut - 1 : cut] - s[cut], float(s[0]), site)
    part = slice(0, cut) if how == "pissa" else slice(cut, None)
    return LowRank(s[part, None] * v[part], u[:, part])


def _take_residual(checkpoint: Checkpoint, base: Base, site: Site, part: LowRank) -> None:
    """Take the weight that peft saves of a head it adapts: W less the part, which on loading replaces the same."""
    name = f"{PREFIX}{site.path}.base_layer.weight"
    if name not in checkpoint.tensors:
        return
    weight = base.weight(site)
    error = checkpoint.tensors.take(name, tuple(weight.shape)).float() - (weight - part.b @ part.a)
    if float(error.abs().max()) > max(1e-5, 4 * torch.finfo(base.dtype).eps) * float(weight.abs().max()):
        raise AdapterUnsupported(
            f"{show(name)} is not the base's weight less what was taken from it before training", param=name[:200]
        )


def _check_determined(gaps: torch.Tensor, size: float, site: Site) -> None:
    """Refuse a part of a weight that rounding alone decides: two singular values are equal, or columns dependent."""
    if bool((gaps <= 8 * torch.finfo(torch.float32).eps * size).any()):
        raise AdapterUnsupported(
            f"what init_lora_weights or kasa_config took from {site.path} does not follow from its weight",
            param="init_lora_weights",
        )
