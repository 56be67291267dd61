"""The table of what is served in docs/adapters.md, made of the adapters that a test saw served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields

from peft import PeftConfig

from tests.support.documentation import BEGIN, END, MATRIX

BASICS = {"task_type", "peft_type", "inference_mode", "r", "lora_alpha", "target_modules", "num_layers", "token_dim"}
BASICS |= {
    "peft_version",
    "init_weights",
    "progressbar",
    "num_attention_heads",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "base_model_name_or_path",
}
"""Fields that every adapter sets, or that peft fills in itself."""


@dataclass(frozen=True)
class Served:
    """One adapter that was served.

    Attributes:
        type, forms: as the server shows them.
        config: of peft, if peft made it of one.
        chosen: fields of the request that choose what it does.
    """

    type: str
    forms: tuple[str, ...]
    config: PeftConfig | None
    chosen: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        if "RoutedLowRank" in self.forms:
            return f"{self.type}, several behind a router (Arrow)"
        return f"{self.type} with `use_dora`" if getattr(self.config, "use_dora", False) else self.type

    @property
    def options(self) -> set[str]:
        """Fields that this adapter sets to something else than their default."""
        return {
            field.name
            for field in (fields(self.config) if self.config else ())
            if field.name not in BASICS
            and getattr(self.config, field.name)
            not in (field.default_factory() if field.default_factory is not MISSING else field.default, None, [], {})
        }


def table(served: Iterable[Served]) -> str:
    """A row for every method: its forms, the options that were seen served, and how many adapters that took."""
    by_method: dict[str, list[Served]] = {}
    for adapter in served:
        by_method.setdefault(adapter.method, []).append(adapter)
    lines = ["| method | forms | options served | adapters |", "| --- | --- | --- | --- |"]
    for method, own in sorted(by_method.items()):
        forms = ", ".join(sorted({form for adapter in own for form in adapter.forms}))
        names = sorted({name for adapter in own for name in adapter.options})
        chosen = sorted({f"{name} of the request" for adapter in own for name in adapter.chosen})
        options = ", ".join([*(f"`{name}`" for name in names), *chosen])
        lines.append(f"| {method} | {forms} | {options} | {len(own)} |")
    return "\n".join(lines) + "\n"


def check_page(expected: str, *, write: bool = False) -> None:
    """The page holds the table; ``write`` puts it there.

    Raises:
        AssertionError: it holds another one.
    """
    before, begin, rest = MATRIX.read_text().partition(BEGIN)
    found, end, after = rest.partition(END)
    assert begin and end, f"{MATRIX} has no place for the table"
    if write:
        MATRIX.write_text(before + BEGIN + expected + END + after)
    else:
        assert found == expected, f"{MATRIX.name} is behind; `pytest --write-matrix` rewrites it:\n{expected}"
