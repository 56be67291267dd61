"""Which modules of the base a peft config adapts: peft's own rules (``peft.tuners.tuners_utils``, version 0.21)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weft.adapters.base import Base, Site
from weft.adapters.config_fields import ConfigFields, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.patterns import first_matches, is_plain

TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
ALL_LINEAR = "all-linear"
LONG_LIST = 20
"""From this many target_modules on, peft replaces them by fewer, shorter ones (MIN_TARGET_MODULES_FOR_OPTIMIZATION)."""

PATTERN_KEY = r"(.*\.)?({})$"
"""How peft's ``get_pattern_key`` completes a key of a ``rank_pattern``."""

DOTTED_KEY = r".*\.{}$"
"""How FourierFT and C3A do."""

Selector = str | tuple[str, ...]
"""A regular expression for the whole path, or names that must equal it or end it after a dot."""


def targeted_sites(
    config: ConfigFields,
    base: Base,
    defaults: Mapping[str, Selector],
    *,
    norms: bool = False,
    embeddings: bool = False,
    optional: bool = False,
) -> list[Site]:
    """The sites the config adapts, in the base's order.

    Args:
        defaults: the method's own targets by model type, for a config that names none.
        norms: the method adapts norms, not linear layers.
        embeddings: the method adapts the token embedding too.
        optional: the config may target no module at all.

    Raises:
        AdapterFormatError: the fields contradict each other or hold a bad pattern.
        AdapterUnsupported: a target is of another kind.
        AdapterMismatch: no module of the base is targeted.
    """
    own = base.embedding if embeddings else None
    paths = targeted_paths(config, base, defaults, optional=optional)
    return [own if own and path == own.path else _site(path, base, norms) for path in paths]


def targeted_paths(
    config: ConfigFields, base: Base, defaults: Mapping[str, Selector], *, optional: bool = False
) -> Sequence[str]:
    """Likewise, the paths of the modules, whatever they are."""
    targets = config.names("target_modules")
    excluded = config.names("exclude_modules")
    layers = config.integers("layers_to_transform")
    layer_patterns = config.names("layers_pattern")
    if isinstance(targets, str) and layers is not None:
        raise AdapterFormatError(
            "layers_to_transform needs target_modules to be a list, not a pattern", param="layers_to_transform"
        )
    if layer_patterns and (isinstance(targets, str) or layers is None):
        raise AdapterFormatError(
            "layers_pattern needs layers_to_transform, and target_modules as a list", param="layers_pattern"
        )
    if optional and targets is None and base.model_type not in defaults:
        return []
    targets = _resolve(targets, base, defaults)
    paths: Sequence[str] = [path for path in base.module_paths if path]
    if excluded:
        dropped = set(_select(excluded, paths, "exclude_modules"))
        paths = [path for path in paths if path not in dropped]
    paths = _select(targets, paths, "target_modules")
    if layers and not isinstance(targets, str):
        paths = _in_layers(paths, targets, layers, layer_patterns)
    if not paths and not optional:
        raise AdapterMismatch(
            f"target_modules={show(targets)} selects no module of this {base.model_type} model", param="target_modules"
        )
    return paths


def match_patterns(
    patterns: Mapping[str, object], sites: Sequence[Site], param: str, *, key_format: str = PATTERN_KEY
) -> dict[str, object]:
    """The value for each site's path in a ``rank_pattern`` or ``alpha_pattern``, where one applies.

    A key applies to paths it matches, or the end of which after a dot; of several the first (``get_pattern_key``).
    """
    plain: dict[str, list[int]] = {}
    slow: list[int] = []
    keys = list(patterns)
    for index, key in enumerate(keys):
        if is_plain(key):
            # Dots match any character, so only the name after the last one is sure to end the path.
            plain.setdefault(key.strip("^$").rpartition(".")[2], []).append(index)
        else:
            slow.append(index)
    texts = [site.path for site in sites]
    first = dict.fromkeys(texts, len(keys))
    for ending, indices in plain.items():
        ended = [text for text in texts if text.endswith(ending)]
        _keep_first(first, ended, [key_format.format(keys[i]) for i in indices], indices, param, plain=True)
    if slow:
        _keep_first(first, texts, [key_format.format(keys[i]) for i in slow], slow, param, plain=False)
    return {text: patterns[keys[index]] for text, index in first.items() if index < len(keys)}


def _keep_first(
    first: dict[str, int], texts: list[str], keys: list[str], indices: list[int], param: str, *, plain: bool
) -> None:
    for text, hit in zip(texts, first_matches(keys, texts, param=param, full=False, plain=plain), strict=True):
        if hit is not None:
            first[text] = min(first[text], indices[hit[0]])


def _resolve(targets: Selector | None, base: Base, defaults: Mapping[str, Selector]) -> Selector:
    if targets is None:
        if base.model_type not in defaults:
            raise AdapterUnsupported(
                f"target_modules is not given, and peft has no default for {base.model_type}", param="target_modules"
            )
        return defaults[base.model_type]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return tuple(path for path in base.sites if path != base.head)
    return targets


def _select(selector: Selector, paths: Sequence[str], param: str) -> list[str]:
    if isinstance(selector, str):
        hits = first_matches([selector], paths, param=param, full=True, plain=is_plain(selector))
        return [path for path, hit in zip(paths, hits, strict=True) if hit is not None]
    names = frozenset(selector)
    return [path for path in paths if not names.isdisjoint(_endings(path))]


def _endings(path: str) -> Iterable[str]:
    """``a.b.c``, ``b.c``, ``c``."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _in_layers(
    paths: Sequence[str], targets: tuple[str, ...], layers: tuple[int, ...], layer_patterns: Selector | None
) -> list[str]:
    # In peft a module named by its full path is adapted whatever its layer, unless peft shortens a long list of names.
    in_full = frozenset(targets).intersection(paths)
    if in_full and len(targets) >= LONG_LIST:
        raise AdapterUnsupported(
            f"layers_to_transform with {len(targets)} target_modules, some of them full paths, depends on how peft "
            "shortens the list; leave layers_to_transform out",
            param="layers_to_transform",
        )
    if not layer_patterns:
        patterns, plain = [r".*?\.[^.]*\.(?P<idx>\d+)\."], True
    else:
        given = (layer_patterns,) if isinstance(layer_patterns, str) else layer_patterns
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in given]
        plain = all(is_plain(pattern) for pattern in given)
    hits = first_matches(patterns, paths, param="layers_pattern", full=False, plain=plain)
    indices = {path: int(hit[1]) for path, hit in zip(paths, hits, strict=True) if hit and hit[1]}
    return [path for path in paths if path in in_full or indices.get(path) in layers]


def _site(path: str, base: Base, norms: bool) -> Site:
    site = (base.norms if norms else base.sites).get(path)
    if site is None:
        kind = "norm" if norms else "linear layer"
        raise AdapterUnsupported(
            f"target_modules selects {show(path)}, which is not a {kind}; only such are served",
            param="target_modules",
        )
    return site
