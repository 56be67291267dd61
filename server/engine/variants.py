"""What a request makes of the adapter it names: its variant, and from which token on it works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weft.adapters.choices import Choice
from weft.server.errors import InvalidRequest


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
