"""What a request makes of the adapters it names: a variant, a composition, and from which token on it works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weft.adapters.choices import Choice
from weft.adapters.composing import Recipe, as_adapter, check_weights
from weft.adapters.composition import Composition
from weft.adapters.entries import Derivation
from weft.adapters.errors import AdapterError, NotComposable
from weft.adapters.forms import CompiledAdapter
from weft.adapters.residency import Residency
from weft.server.engine.startup import CompileFolder
from weft.server.errors import InvalidRequest, NotFound


@dataclass(frozen=True)
class RunsWith:
    """What a sequence runs with.

    Attributes:
        identity: of a registered adapter, a variant or a composition: what slots, pages of prompts and KV blocks go by.
            None: the base.
        parents: the registered versions that it is, or is made of.
        outline: the adapter without its sites; None: the base.
        derivation: how it is made, where it is none of the registered adapters.
    """

    identity: str | None = None
    parents: tuple[str, ...] = ()
    outline: CompiledAdapter | None = None
    derivation: Derivation | None = None


class Variants:
    """What requests can run with on one model.

    Args:
        adapters: of that model. compile_folder: what they are compiled with.
    """

    def __init__(self, adapters: Residency, compile_folder: CompileFolder) -> None:
        self.adapters = adapters
        self.compile_folder = compile_folder

    def find(self, adapter: str | None, composition: Composition | None, choices: Mapping[str, int]) -> RunsWith:
        """What a request for an adapter or a composition (neither: the base) runs with, as it chose.

        Raises:
            InvalidRequest: naming the field. NotFound: an adapter is not registered.
        """
        if composition is not None:
            if adapter is not None:
                raise InvalidRequest("a request is for one adapter or for a composition, not both", param="adapters")
            resolve((), choices)
            return self._composed(composition)
        if adapter is None:
            resolve((), choices)
            return RunsWith()
        outline = self.adapters.outline(adapter)
        if outline is None:
            raise _not_registered(adapter, "model")
        chosen = resolve(outline.choices, choices)
        identity = variant(outline.version, chosen)
        derivation = None
        if chosen:
            derivation = Derivation(identity, (adapter,), make=partial(self._make, identity, chosen))
        return RunsWith(identity, (adapter,), outline, derivation)

    def _make(self, identity: str, chosen: Mapping[str, int], folders: Sequence[Path]) -> CompiledAdapter:
        return self.compile_folder(folders[0], identity, chosen)

    def _composed(self, composition: Composition) -> RunsWith:
        """A composition, checked against what is known of its members."""
        try:
            check_weights(composition)
            known = {}
            for index, member in enumerate(composition.members):
                described = self.adapters.describe(member.version)
                if described is None:
                    raise _not_registered(member.version, f"adapters[{index}]")
                known[member.version] = described
            identity, recipe = composition.identity, None
            if not self.adapters.knows(identity):
                recipe = Recipe.of(composition, known)
        except NotComposable as error:
            raise InvalidRequest(error.message, param=error.param) from error
        derivation = Derivation(identity, composition.versions, recipe=recipe)
        return RunsWith(identity, composition.versions, as_adapter(composition), derivation)

    def hold(self, runs: RunsWith) -> None:
        """Keep what a sequence runs with until it is dropped, and have it made if it is not there.

        Raises:
            NotFound: an adapter is not registered. InvalidRequest: a composition does not fit the adapter memory.
        """
        if runs.identity is None:
            return
        self.adapters.clear_error(runs.identity)
        try:
            held = self.adapters.hold(runs.identity, runs.derivation)
        except AdapterError as error:
            raise InvalidRequest(error.message, param="adapters") from error
        if not held:
            raise _not_registered(", ".join(runs.parents), "model")


def _not_registered(version: str, param: str) -> NotFound:
    return NotFound(f"no adapter of version {version!r} is registered", param=param)


def resolve(choices: Iterable[Choice], given: Mapping[str, int]) -> dict[str, int]:
    """The values that make a variant: those that are not the default's, by name, sorted.

    Args:
        choices: what the adapter lets requests choose; nothing for the base.
        given: what the request chose.

    Raises:
        InvalidRequest: naming the field that is missing, has no meaning here or is out of range.
    """
    known = {choice.name: choice for choice in choices}
    for name in given:
        if name not in known:
            raise InvalidRequest(f"'{name}' has no meaning for this model", param=name)
    resolved = {}
    for name, choice in sorted(known.items()):
        value = given.get(name, choice.default)
        if value is None:
            raise InvalidRequest(f"this model needs '{name}', from {choice.low} to {choice.high}", param=name)
        if not isinstance(value, int) or isinstance(value, bool) or not choice.low <= value <= choice.high:
            raise InvalidRequest(
                f"'{name}' must be an integer from {choice.low} to {choice.high} for this model, got {value!r}",
                param=name,
            )
        if value != choice.default:
            resolved[name] = value
    return resolved


def variant(version: str, chosen: Mapping[str, int]) -> str:
    """The identity of a version as it was chosen; the version itself where all is as by default."""
    return version + "".join(f"+{name}={value}" for name, value in sorted(chosen.items()))


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where ``wanted`` begins in ``tokens`` for the last time; None where it does not."""
    size = len(wanted)
    for start in range(len(tokens) - size, -1, -1):
        if tokens[start] == wanted[0] and all(tokens[start + i] == wanted[i] for i in range(1, size)):
            return start
    return None
