"""The results as one picture: an SVG written by hand, and a PNG of it by the system's Chromium, where there is one."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

Point: TypeAlias = tuple[float, float]
Results: TypeAlias = dict[str, Any]

WIDTH, HEIGHT = 1200, 1180
PANEL_WIDTH, PANEL_HEIGHT = 500, 280
COLUMNS, ROWS = (70, 660), (70, 450, 830)
# Colours that hold apart for most eyes; Rejoin's is the strongest.
COLOURS = {
    "rejoin": "#d1495b",
    "floor": "#222222",
    "naive": "#8d6a9f",
    "nchan": "#2a9d8f",
    "resumable": "#e9a23b",
    "durable": "#3d6fb6",
    "direct": "#6b7280",
}
STYLE = (
    "text{font-family:sans-serif;font-size:13px;fill:#333}"
    ".title{font-size:16px;font-weight:600}.axis{fill:#777;font-size:12px}"
)


def draw(results: Results, folder: Path) -> list[str]:
    """Write latest.svg and latest.png; what was left out, and why, as lines to print."""
    svg = folder / "latest.svg"
    svg.write_text(picture(results))
    return [f"written: {svg.name}", _png(svg, folder / "latest.png")]


def picture(results: Results) -> str:
    panels = [
        _latencies(results, "relay 10k/s", "10,000 events/s on 100 streams: how late, in ms", COLUMNS[0], ROWS[0]),
        _latencies(results, "relay 30k/s", "30,000 events/s on 1,000 streams: how late, in ms", COLUMNS[1], ROWS[0]),
        _bars(
            results, "relay 10k/s: cpu per event", "CPU of the relay per event at 10,000/s, in µs", COLUMNS[0], ROWS[1]
        ),
        _bars(results, _idle(results), "Memory of a relay per idle connection, in KiB", COLUMNS[1], ROWS[1]),
        _growth(results, "at 5,000/s", "CPU per event, in µs, over the number of streams", COLUMNS[0], ROWS[2]),
        _growth(results, "100 streams", "CPU per event, in µs, over events a second", COLUMNS[1], ROWS[2]),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    back = f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    about = results["about"]
    where = f"{about['cores']} cores, Python {about['python']}, {about['at'][:10]}"
    what = f"Rejoin, make bench: {where}. Medians of one interleaved run; the curves are of its last round."
    foot = _text(COLUMNS[0], HEIGHT - 12, what, "axis")
    return "\n".join([head, back, *panels, foot, "</svg>"]) + "\n"


def _latencies(results: Results, figure: str, title: str, x: int, y: int) -> str:
    """Share of events that came within so many milliseconds, each system a line, the axis logarithmic."""
    curves = results["curves"].get(figure, {})
    lines = {system: _cumulative(points) for system, points in curves.items()}
    values = [value for points in lines.values() for value, _ in points]
    if not values:
        return _empty(title, x, y)
    low, high = math.floor(math.log10(max(min(values), 0.01))), math.ceil(math.log10(max(values)))
    frame = _frame(title, x, y)
    ticks = [(power, f"{10.0**power:g}") for power in range(low, high + 1)]
    frame += _ticks(x, y, [((power - low) / max(1, high - low), label) for power, label in ticks])
    frame += _sides(x, y, [(share, f"{share:.0%}") for share in (0, 0.5, 0.9, 1)])
    for system, points in lines.items():
        scaled = [((math.log10(max(value, 0.01)) - low) / max(1, high - low), share) for value, share in points]
        frame += _line(x, y, scaled, system)
    return frame + _legend(x, y, lines)


def _cumulative(points: Sequence[Sequence[float]]) -> list[Point]:
    total, seen, line = sum(count for _, count in points), 0.0, []
    for value, count in points:
        seen += count
        line.append((value, seen / total))
    return line


def _bars(results: Results, figure: str, title: str, x: int, y: int) -> str:
    medians = results["figures"].get(figure, {}).get("median", {})
    if not medians:
        return _empty(title, x, y)
    top, step = max(*medians.values(), 1e-9), PANEL_WIDTH / len(medians)
    frame = _frame(title, x, y)
    for n, (system, value) in enumerate(medians.items()):
        height, left = max(value, 0) / top * (PANEL_HEIGHT - 40), x + n * step + step * 0.2
        colour = COLOURS.get(system, "#999999")
        bar = f'<rect x="{left:.1f}" y="{y + PANEL_HEIGHT - height:.1f}" width="{step * 0.6:.1f}" height="{height:.1f}"'
        frame += f'{bar} fill="{colour}"/>'
        frame += _text(left + step * 0.3, y + PANEL_HEIGHT - height - 6, f"{value:.3g}", anchor="middle")
        frame += _text(left + step * 0.3, y + PANEL_HEIGHT + 18, system, anchor="middle")
    return frame


def _growth(results: Results, part: str, title: str, x: int, y: int) -> str:
    """The figures `cpu per event, … PART …`, over the number in their names."""
    lines: dict[str, list[Point]] = {}
    for name, figure in results["figures"].items():
        if name.startswith("cpu per event") and part in name:
            number = (
                name.split(", ", 1)[1].split()[0] if part == "at 5,000/s" else name.rsplit(" ", 1)[1].removesuffix("/s")
            )
            for system, value in figure["median"].items():
                lines.setdefault(system, []).append((float(number.replace(",", "")), value))
    if not lines:
        return _empty(title, x, y)
    numbers = sorted({number for points in lines.values() for number, _ in points})
    top = max(value for points in lines.values() for _, value in points)
    low, wide = math.log10(numbers[0]), max(1e-9, math.log10(numbers[-1]) - math.log10(numbers[0]))
    frame = _frame(title, x, y) + _ticks(x, y, [((math.log10(n) - low) / wide, f"{n:,.0f}") for n in numbers])
    frame += _sides(x, y, [(share, f"{top * share:.3g}") for share in (0, 0.5, 1)])
    for system, points in lines.items():
        frame += _line(x, y, [((math.log10(n) - low) / wide, value / top) for n, value in sorted(points)], system)
    return frame + _legend(x, y, lines)


def _idle(results: Results) -> str:
    names = [name for name in results["figures"] if name.startswith("memory per idle connection") and ":" not in name]
    return max(names, key=lambda name: int(name.rpartition(" ")[2]), default="")


# --- the pieces


def _frame(title: str, x: int, y: int) -> str:
    box = f'<rect x="{x}" y="{y}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="#ccc"/>'
    return _text(x, y - 14, title, "title") + box


def _empty(title: str, x: int, y: int) -> str:
    return _frame(title, x, y) + _text(x + PANEL_WIDTH / 2, y + PANEL_HEIGHT / 2, "not measured", "axis", "middle")


def _ticks(x: int, y: int, ticks: Iterable[tuple[float, str]]) -> str:
    drawn = ""
    for share, label in ticks:
        at = x + share * PANEL_WIDTH
        drawn += f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{y + PANEL_HEIGHT}" stroke="#eee"/>'
        drawn += _text(at, y + PANEL_HEIGHT + 18, label, "axis", "middle")
    return drawn


def _sides(x: int, y: int, sides: Iterable[tuple[float, str]]) -> str:
    return "".join(_text(x - 6, y + PANEL_HEIGHT - at * PANEL_HEIGHT + 4, label, "axis", "end") for at, label in sides)


def _line(x: int, y: int, points: Iterable[Point], system: str) -> str:
    path = " ".join(f"{x + a * PANEL_WIDTH:.1f},{y + PANEL_HEIGHT - b * PANEL_HEIGHT:.1f}" for a, b in points)
    width = 3 if system == "rejoin" else 1.8
    return f'<polyline points="{path}" fill="none" stroke="{COLOURS.get(system, "#999999")}" stroke-width="{width}"/>'


def _legend(x: int, y: int, systems: Iterable[str]) -> str:
    legend = ""
    for n, system in enumerate(systems):
        at = y + PANEL_HEIGHT - 20 - n * 18
        colour = COLOURS.get(system, "#999999")
        legend += f'<rect x="{x + PANEL_WIDTH - 100}" y="{at - 10}" width="12" height="12" fill="{colour}"/>'
        legend += _text(x + PANEL_WIDTH - 82, at, system)
    return legend


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _png(svg: Path, png: Path) -> str:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        return "no PNG: there is no Chromium here (Debian: apt-get install chromium)"
    with tempfile.TemporaryDirectory(prefix="rejoin-bench-") as profile:
        page = Path(profile) / "page.html"
        page.write_text(f'<body style="margin:0">{svg.read_text()}</body>')
        argv = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        argv += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={png}", page.as_uri()]
        try:
            subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            return f"no PNG: Chromium failed ({type(error).__name__})"
    return f"written: {png.name}"
