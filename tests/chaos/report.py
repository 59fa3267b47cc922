"""What a scenario found: rows of one table, each with its goal and whether it was met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, how it came out, what was wanted."""

    scenario: str
    what: str
    figure: str
    goal: str
    met: bool


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; `share` of 0.99 is the p99."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -(-int(share * 1000) * len(ranked) // 1000) - 1))]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one below the other in columns."""
    lines = [
        ("scenario", "what", "figure", "goal", ""),
        *((r.scenario, r.what, r.figure, r.goal, _mark(r)) for r in rows),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _mark(row: Row) -> str:
    return "ok" if row.met else "MISSED"
