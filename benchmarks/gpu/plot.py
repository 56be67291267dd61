"""The figures of a run as one picture: by matplotlib, or as SVG written here where that is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]
COLOURS = ("#1f5fa8", "#c2451e", "#2c8a4b", "#7a4bb0", "#b08a1a", "#3a9aa8", "#777777", "#a83a72")


@dataclass(frozen=True)
class Panel:
    """Curves over a logarithmic x."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Points]


def panels(sections: Mapping[str, Any]) -> list[Panel]:
    """What there is to draw."""
    found = []
    rows = sections.get("bandwidth", {}).get("workloads", [])
    if rows:
        who = [name for name in ("weft", "vllm", "sglang") if any("share" in row.get(name, {}) for row in rows)]
        curves = {
            name: _medians([(r["total_rank"], r[name]["share"]) for r in rows if "share" in r.get(name, {})])
            for name in who
        }
        found.append(Panel("Grouped LoRA, median over sites and batches", "N r", "share of a copy's bandwidth", curves))
    for name, model in sections.get("decode", {}).get("models", {}).items():
        curves = {}
        for step in model["steps"]:
            if "measured_of_ideal" in step:
                label = f"{step['adapters']} x r{step['rank'] or ' mixed'}, {step['mode']}"
                curves.setdefault(label, []).append((step["batch"], step["measured_of_ideal"]))
        if curves:
            found.append(Panel(f"Decode steps of {name}", "rows", "R measured / R ideal", curves))
    return found


def draw(sections: Mapping[str, Any], path: Path) -> Path | None:
    """Write the picture beside the JSON; None where there is nothing to draw."""
    drawn = panels(sections)
    if not drawn:
        return None
    try:
        import matplotlib
    except ImportError:
        target = path.with_suffix(".svg")
        target.write_text(svg(drawn))
        return target
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(drawn), 1, figsize=(9, 4.5 * len(drawn)), squeeze=False)
    for panel, axis in zip(drawn, axes[:, 0], strict=True):
        for label, points in panel.curves.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def svg(drawn: Sequence[Panel], width: int = 860, height: int = 380) -> str:
    """The panels one below the other."""
    parts = [
        f'<g transform="translate(0 {index * height})">{_panel(panel, width, height)}</g>'
        for index, panel in enumerate(drawn)
    ]
    size = f'width="{width}" height="{height * len(drawn)}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _panel(panel: Panel, width: int, height: int) -> str:
    left, right, top, bottom = 60, width - 240, 34, height - 44
    xs = sorted({x for points in panel.curves.values() for x, _ in points})
    highest = max([1.0, *(y for points in panel.curves.values() for _, y in points)])
    place = {x: left + (right - left) * (index + 0.5) / len(xs) for index, x in enumerate(xs)}

    def up(y: float) -> float:
        return bottom - (bottom - top) * y / highest

    parts = [f'<text x="{left}" y="20" font-weight="bold">{escape(panel.title)}</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = up(tick * highest)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * highest:.2f}</text>')
    every = max(1, len(xs) // 12)
    parts += [f'<text x="{place[x]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>' for x in xs[::every]]
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">{escape(panel.x)}</text>')
    parts.append(f'<text x="{left}" y="{top - 2}" fill="#555">{escape(panel.y)}</text>')
    for index, (label, points) in enumerate(panel.curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(f"{place[x]:.1f},{up(y):.1f}" for x, y in sorted(points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{right + 12}" y="{top + 14 * index + 8}" fill="{colour}">{escape(label)}</text>')
    return "".join(parts)


def _medians(points: Points) -> Points:
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    return [(x, sorted(ys)[len(ys) // 2]) for x, ys in sorted(by_x.items())]
