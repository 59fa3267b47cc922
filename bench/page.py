"""The results as a page to read, bench/results/latest.md: the goals, then every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from bench.figures import OWN, short

Results: TypeAlias = dict[str, Any]


def page(results: Results) -> str:
    about = results["about"]
    how = "a short run" if about["quick"] else "a full run"
    where = f"{about['cores']} cores ({about['cpu']}), Linux {about['kernel']}, Python {about['python']}"
    head = f"# Results\n\n`make bench` writes this page. {how.capitalize()} of {about['at'][:10]} on {where}. "
    head += (
        "How to read it: [docs/performance.md](../../docs/performance.md).\n\n![The same as a picture](latest.svg)\n"
    )
    return "\n".join([head, _goals(results), _figures(results), _events(results), _notes(results)])


def _goals(results: Results) -> str:
    lines = [["goal", "wanted", "found", "verdict"]]
    for goal in results["goals"]:
        found = "not measured" if goal["found"] is None else f"{short(goal['found'])} {goal['unit']}".strip()
        wanted = f"{goal['sense']} {short(goal['limit'])} {goal['unit']}".strip()
        verdict = "**missed**" if goal["verdict"] == "MISSED" else goal["verdict"]
        lines.append([goal["goal"], wanted, found, verdict])
    return "## Goals\n\n" + _table(lines)


def _figures(results: Results) -> str:
    """Each figure a row; behind a peer's median, how many times Rejoin's it is."""
    figures = results["figures"]
    systems = list(dict.fromkeys(system for figure in figures.values() for system in figure["median"]))
    lines = [["figure", "unit", *systems]]
    for name, figure in figures.items():
        own = figure["median"].get(OWN)
        cells = []
        for system in systems:
            value = figure["median"].get(system)
            ratio = f" ({short(value / own)}x)" if value is not None and own and system != OWN else ""
            cells.append("" if value is None else short(value) + ratio)
        lines.append([name, figure["unit"], *cells])
    return "## Figures\n\n" + _table(lines)


def _events(results: Results) -> str:
    """How much was checked."""
    lines = [["system", "events that had to come once and in order", "that did not, and clients sent away"]]
    lines += [[name, f"{count:,}", f"{results['faults'].get(name, 0):,}"] for name, count in results["events"].items()]
    return "## Every event once and in order\n\n" + _table(lines)


def _notes(results: Results) -> str:
    return "## Notes\n\n" + "".join(f"* {note}\n" for note in results["notes"] or ["none"])


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rest))
