"""AdapterFusion (arXiv 2005.00247), as the AdapterHub library's ``save_adapter_setup`` writes it: a folder with
``adapter_setup.json``, a sub-folder for each member, and one for what fuses them.

The members' bottlenecks all see the input of the last one; of each, only what it would add takes part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weft.adapters.base import Base
from weft.adapters.bottlenecks import Bottleneck, Fusion
from weft.adapters.checkpoint import open_checkpoint, read_checkpoint
from weft.adapters.config_fields import FieldTable, Neutral, parse_config, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.files import CONFIG, FUSION_CONFIG, FUSION_WEIGHTS, SETUP, open_regular, present, size_limit
from weft.adapters.forms import SiteForms
from weft.adapters.methods.hub.bottleneck import compile_bottlenecks
from weft.adapters.methods.hub.saved import ENVELOPE, Saved, read_envelope
from weft.kernels.grouped_bottleneck import Input

SETUP_FIELDS = FieldTable(
    honoured=("adapter_setup", "version"), neutral={"head_setup": Neutral("the setup has a head of its own")}
)
FUSION_ENVELOPE = ENVELOPE | FieldTable(honoured=("adapter_names",))
FIELDS = FieldTable(
    honoured=("architecture", "key", "query", "value"),
    ignored={
        "dropout_prob": "no dropout at inference",
        "regularization": "of the training loss",
        "value_before_softmax": "V has no bias, so that its place does not matter",
        "value_initialized": "how V was initialised before training",
    },
    neutral={
        "query_before_ln": Neutral("the query is asked of something else than the members' input"),
        "residual_before": Neutral("the library then adds the residual to keys and values alike"),
        "temperature": Neutral("the library lowers it with every forward pass"),
    },
)
"""Every field of AdapterFusionConfig of adapters 1.3.0."""

Members = Sequence[Mapping[str, Bottleneck]]


def compile_fusion(folder: Path, base: Base) -> dict[str, SiteForms]:
    """The fusion of every sublayer that the members adapt, by its path."""
    names = present(folder)
    children = _children(folder)
    inner = [name.rpartition("/")[0] for name in names if name.endswith(f"/{FUSION_CONFIG}")]
    if len(inner) != 1:
        raise AdapterFormatError(f"the setup has {len(inner)} folders with a {FUSION_CONFIG}, not one", param=SETUP)
    for child in children:
        if f"{child}/{CONFIG}" not in names:
            raise AdapterFormatError(f"the setup names {show(child)}, which has no folder of its own", param=SETUP)
    others = {name.rpartition("/")[0] for name in names} - {"", inner[0], *children}
    if others:
        raise AdapterMismatch(f"the setup does not name the folder {show(min(others))}", param=SETUP)
    weights = [name for name in FUSION_WEIGHTS if f"{inner[0]}/{name}" in names]
    if len(weights) != 1:
        raise AdapterFormatError(f"{inner[0]} holds {len(weights)} files of weights, not one", param=FUSION_WEIGHTS[0])
    checkpoint = open_checkpoint(folder / inner[0], FUSION_CONFIG, weights[0])
    saved, _ = read_envelope(checkpoint, base, FUSION_ENVELOPE)
    saved.config.check(FIELDS)
    if checkpoint.config.names("adapter_names") not in (None, tuple(children)):
        raise AdapterMismatch("adapter_names are not the members of the setup", param="adapter_names")
    if not (saved.config.flag("key") and saved.config.flag("query")):
        raise AdapterUnsupported("a fusion without key or query is not served", param="key")
    members = [_member(folder / child, base, child) for child in children]
    if any(member.keys() != members[0].keys() for member in members):
        raise AdapterMismatch("the members of a fusion must adapt the same layers", param="adapter_names")
    with_value = saved.config.flag("value")
    forms = {path: SiteForms(fusion=_fusion(saved, path, members, with_value)) for path in members[0]}
    saved.config.finish()
    checkpoint.finish()
    return forms


def _fusion(saved: Saved, path: str, members: Members, with_value: bool) -> Fusion:
    sublayer, hidden = saved.base.sublayers[path], saved.base.hidden_size
    place = "attention_adapters" if sublayer.attention else "output_adapters"
    name = f"{path.rpartition('.')[0]}.{place}.adapter_fusion_layer.{saved.name}"
    given = members[-1][path].input
    return Fusion(
        tuple(replace(member[path], input=given) for member in members),
        saved.take(f"{name}.query.weight", hidden, hidden),
        saved.take(f"{name}.query.bias", hidden),
        saved.take(f"{name}.key.weight", hidden, hidden),
        saved.take(f"{name}.key.bias", hidden),
        saved.take(f"{name}.value.weight", hidden, hidden) if with_value else None,
    )


def _member(folder: Path, base: Base, name: str) -> dict[str, Bottleneck]:
    checkpoint = read_checkpoint(folder)
    saved, architecture = read_envelope(checkpoint, base)
    if architecture != "bottleneck" or saved.name != name:
        raise AdapterUnsupported(
            f"{show(name)} is {show(architecture)} under the name {show(saved.name)}; a fusion takes bottlenecks under "
            "their own names",
            param="architecture",
        )
    forms = compile_bottlenecks(saved)
    saved.config.finish()
    checkpoint.finish()
    bottlenecks = {path: form.bottleneck for path, form in forms.items() if form.bottleneck is not None}
    if any(bottleneck.input is Input.RESIDUAL for bottleneck in bottlenecks.values()):
        raise AdapterUnsupported(
            "a fusion of parallel adapters is not served: the library adds the residual stream twice",
            param="is_parallel",
        )
    if any(bottleneck.gate is not None for bottleneck in bottlenecks.values()):
        raise AdapterUnsupported("a fusion of gated adapters is not served", param="use_gating")
    if saved.layers_left_out():
        raise AdapterUnsupported("a fusion of adapters that leave out layers is not served", param="leave_out")
    return bottlenecks


def _children(folder: Path) -> list[str]:
    """The members' names, in order."""
    with open_regular(folder, SETUP) as file:
        config = parse_config(file.read(size_limit(SETUP)))
    config.check(SETUP_FIELDS)
    setup = config.mapping("adapter_setup")
    config.text("version")
    config.finish()
    children = setup.get("children")
    names = []
    if setup.get("type") == "Fuse" and set(setup) == {"type", "children"} and isinstance(children, list):
        names = [_single(child) for child in children]
    if len(names) < 2 or not all(names) or len(set(names)) != len(names):
        raise AdapterUnsupported(
            f"adapter_setup={show(setup)} is not served: only a Fuse of two or more adapters is", param="adapter_setup"
        )
    return [name for name in names if name]


def _single(child: object) -> str | None:
    """The name in ``{"type": "single", "children": [name]}``."""
    if not isinstance(child, dict) or child.get("type") != "single":
        return None
    match child.get("children"):
        case [str(name)]:
            return name
    return None
