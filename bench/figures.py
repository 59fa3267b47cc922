"""The figures of a run: what was measured, of which system, in which round. A figure is the median of its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OWN = "rejoin"


@dataclass
class Figures:
    """Samples by figure and system; what went wrong; and the distributions, for the pictures."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def add(self, figure: str, system: str, value: float, unit: str) -> None:
        self.units[figure] = unit
        self.samples.setdefault(figure, {}).setdefault(system, []).append(value)

    def curve(self, figure: str, system: str, points: list[list[float]]) -> None:
        """A distribution, as [milliseconds, count] pairs; the one of the last round stands."""
        self.curves.setdefault(figure, {})[system] = points

    def checked(self, system: str, events: int, faults: int) -> None:
        """So many events were counted, of which so many were not as they should be."""
        self.events[system] = self.events.get(system, 0) + events
        self.faults[system] = self.faults.get(system, 0) + faults

    def note(self, text: str) -> None:
        """Something a reader of the table has to know; said once."""
        if text not in self.said:
            self.said.add(text)
            self.notes.append(text)
            print(f"  NOTE: {text}", flush=True)

    def median(self, figure: str, system: str = OWN) -> float | None:
        found = self.samples.get(figure, {}).get(system)
        return statistics.median(found) if found else None

    def ratio(self, figure: str, over: str, system: str = OWN) -> float | None:
        """This system's median over another's; None where one of them is missing."""
        mine, theirs = self.median(figure, system), self.median(figure, over)
        return mine / theirs if mine is not None and theirs else None

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": {
                figure: {
                    "unit": self.units[figure],
                    "median": {system: self.median(figure, system) for system in systems},
                    "rounds": systems,
                }
                for figure, systems in self.samples.items()
            },
            "events": self.events,
            "faults": self.faults,
            "notes": self.notes,
            "curves": self.curves,
        }


def table(figures: Figures) -> str:
    """Each figure a row, each system a column; behind a peer's median, how many times Rejoin's it is."""
    systems = list(dict.fromkeys(system for row in figures.samples.values() for system in row))
    lines = [("figure", "unit", *systems)]
    for figure, row in figures.samples.items():
        cells = [_cell(figures, figure, system) if system in row else "" for system in systems]
        lines.append((figure, figures.units[figure], *cells))
    return aligned(lines)


def _cell(figures: Figures, figure: str, system: str) -> str:
    value, ratio = figures.median(figure, system), figures.ratio(figure, OWN, system)
    assert value is not None
    return short(value) + ("" if system == OWN or ratio is None else f" ({short(ratio)}x)")


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
