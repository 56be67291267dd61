"""The fields of an ``adapter_config.json``: read with types and bounds, every one accounted for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any

from weft.adapters.errors import AdapterFormatError, AdapterUnsupported

MAX_DEPTH = 16


@dataclass(frozen=True)
class Neutral:
    """A field that must not change the computation.

    Attributes:
        reason: what weft would have to do, completing "is not served: ".
        also: accepted values beside null, false and empty ones.
        chosen_by_object: an object sets it, an empty one too.
    """

    reason: str
    also: tuple[object, ...] = ()
    chosen_by_object: bool = False


@dataclass(frozen=True)
class FieldTable:
    """What a method makes of each field its config can have.

    Attributes:
        honoured: read by the loader with a typed accessor.
        ignored: without effect on the output of a trained adapter; the value says why.
        neutral: must have a value that changes nothing, else the adapter is refused.
    """

    honoured: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Neutral] = field(default_factory=dict)

    def __or__(self, other: FieldTable) -> FieldTable:
        return FieldTable(
            self.honoured + other.honoured,
            {**self.ignored, **other.ignored},
            {**self.neutral, **other.neutral},
        )

    def without(self, *names: str) -> FieldTable:
        """The table less some fields, which a method treats in another way."""
        return FieldTable(
            tuple(name for name in self.honoured if name not in names),
            {name: why for name, why in self.ignored.items() if name not in names},
            {name: why for name, why in self.neutral.items() if name not in names},
        )

    @property
    def names(self) -> frozenset[str]:
        """Every field the table classifies."""
        return frozenset(self.honoured) | self.ignored.keys() | self.neutral.keys()


class ConfigFields:
    """Typed access to the fields of a config. A field that is absent has its default; so has null, except for a number.

    Every accessor raises AdapterFormatError naming the field and its value when the type or the bounds are wrong.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self._unread = set(values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def check(self, table: FieldTable) -> None:
        """Refuse fields with an effect that is not served, and unknown fields unless they are null, false or empty.

        Raises:
            AdapterUnsupported: names the field.
        """
        for name, value in self._values.items():
            if name in table.honoured:
                continue
            self._unread.discard(name)
            by_object = name in table.neutral and table.neutral[name].chosen_by_object and isinstance(value, dict)
            if name in table.ignored or (_is_empty(value) and not by_object):
                continue
            if name not in table.neutral:
                raise AdapterUnsupported(
                    f"the config field {show(name)} is unknown and set to {show(value)}; it may change the output",
                    param=name[:200],
                )
            neutral = table.neutral[name]
            if not any(type(value) is type(other) and value == other for other in neutral.also):
                raise AdapterUnsupported(f"{name}={show(value)} is not served: {neutral.reason}", param=name)

    def finish(self) -> None:
        """Raise AdapterUnsupported if a field was neither read nor checked."""
        if self._unread:
            names = sorted(self._unread)
            raise AdapterUnsupported(f"config fields without a meaning here: {', '.join(names)}", param=names[0])

    def flag(self, name: str, default: bool = False) -> bool:
        # The libraries ask whether a field is true, so null is False to them: refused where that is not the default.
        value = self._take(name, default, null=not default)
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value

    def integer(self, name: str, default: int, *, low: int, high: int) -> int:
        return as_integer(name, self._take(name, default, null=False), low=low, high=high)

    def number(self, name: str, default: float) -> float:
        return as_number(name, self._take(name, default, null=False))

    def text(self, name: str) -> str | None:
        value = self._take(name, None)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, value, "a string")
        return value

    def value(self, name: str, default: object) -> object:
        """The field as it is, for a caller that checks it."""
        return self._take(name, default)

    def names(self, name: str) -> str | tuple[str, ...] | None:
        """One string or a list of strings."""
        value = self._take(name, None)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _wrong(name, value, "a string or a list of strings")

    def integers(self, name: str) -> tuple[int, ...] | None:
        """One integer or a list of integers."""
        value = self._take(name, None)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise _wrong(name, value, "an integer or a list of integers")
        return tuple(items)

    def mapping(self, name: str) -> Mapping[str, object]:
        """An object; its values are for the caller to check."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object")
        return value

    def everything(self) -> dict[str, object]:
        """All fields as they are, for a caller that checks each of them."""
        self._unread.clear()
        return dict(self._values)

    def _take(self, name: str, default: object, *, null: bool = True) -> object:
        self._unread.discard(name)
        value = self._values.get(name, default)
        return default if value is None and null else value


def parse_config(data: bytes) -> ConfigFields:
    """Read strict JSON: one object, no duplicate keys, no NaN or Infinity, nested at most ``MAX_DEPTH`` deep.

    Raises:
        AdapterFormatError: it is not that.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"adapter_config.json is not valid JSON: {show(str(error))}") from error
    if not isinstance(values, dict):
        raise AdapterFormatError("adapter_config.json must hold one JSON object")
    if _deeper_than(values, MAX_DEPTH):
        raise AdapterFormatError(f"adapter_config.json is nested more than {MAX_DEPTH} deep")
    return ConfigFields(values)


def as_integer(name: str, value: object, *, low: int, high: int) -> int:
    """``value`` if it is an integer within bounds, else AdapterFormatError naming ``name``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value, f"an integer from {low} to {high}")
    return value


def as_number(name: str, value: object) -> float:
    """``value`` as a float if it is a finite number, else AdapterFormatError naming ``name``."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9 and math.isfinite(value):
        return float(value)
    raise _wrong(name, value, "a finite number")


def show(value: object) -> str:
    """``value`` for a message: short, ASCII, whatever its size."""
    shortener = Repr()
    shortener.maxstring = shortener.maxother = 100
    text = shortener.repr(value)
    return text.encode("ascii", "backslashreplace").decode()


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _wrong(name: str, value: object, expected: str) -> AdapterFormatError:
    return AdapterFormatError(f"{name} must be {expected}, got {show(value)}", param=name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(key)} appears twice")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
