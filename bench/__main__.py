"""`python -m bench`: run everything, print one table and a verdict for each goal, write bench/results/latest.json.

python -m bench                  ten to twenty minutes
python -m bench --quick          two to four: the figures move more
python -m bench --only relay     one section (the names are those of SECTIONS), printed and not written
python -m bench --pictures       only make the page and the pictures again, from bench/results/latest.json
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import orjson

from bench import jobs, machine, path, pictures, profiles, relays
from bench.figures import Figures, table
from bench.goals import GOALS, verdict_table, verdicts
from bench.page import page
from bench.programs import HERE, Missing, compiled
from bench.systems import RELAYS, Floor, Naive, Nchan, Rejoin

RESULTS = HERE / "results" / "latest.json"
Section: TypeAlias = Callable[[Figures, dict[str, Path], bool], Awaitable[None]]


async def relay(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    kinds = (Rejoin, Floor, Naive, Nchan) if quick else RELAYS
    await relays.latency(figures, built, 1 if quick else 3, 1.5 if quick else 2.5, kinds)


async def growth(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await relays.growth(figures, built, 1, 1.2 if quick else 3, (Rejoin,) if quick else (Rejoin, Floor))


async def memory(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    sizes, kinds = ((500,), (Rejoin, Naive)) if quick else ((500, 1000, 2000), RELAYS)
    await relays.memory(figures, built, sizes, kinds, 0 if quick else 2)


async def replay(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    kinds = (Rejoin, Naive, Nchan) if quick else RELAYS
    await relays.replay(figures, built, 1 if quick else 3, 10 if quick else 20, kinds)


async def storm(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await relays.storm(figures, built, 1000 if quick else 10_000, (Rejoin,) if quick else (Rejoin, Naive, Nchan))


async def job(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await jobs.job_start(figures, built, 1 if quick else 2, 40 if quick else 200, 1 if quick else 4)


async def first(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await path.first_token(figures, built, 1 if quick else 3, 40 if quick else 150)


async def worker(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await path.worker(figures, built, 1 if quick else 3, 1.5 if quick else 4)


async def saturated(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await path.saturated(figures, built, 1, (100,) if quick else path.CROWDS)


async def crowds(figures: Figures, built: dict[str, Path], quick: bool) -> None:
    await path.crowds(figures, built, 1, 1.5 if quick else 3, (1, 100) if quick else path.CROWDS)


SECTIONS: dict[str, Section] = {
    "relay": relay,
    "growth": growth,
    "memory": memory,
    "replay": replay,
    "storm": storm,
    "job": job,
    "first": first,
    "worker": worker,
    "saturated": saturated,
    "crowds": crowds,
}
LEFT_OUT_WHEN_QUICK = ("growth", "saturated", "crowds")


async def measure(figures: Figures, names: list[str], quick: bool) -> None:
    built = compiled()
    for name in names:
        began = time.monotonic()
        print(f"{name}:", flush=True)
        try:
            await SECTIONS[name](figures, built, quick)
        except Exception as error:  # the other sections still have something to say
            figures.note(f"the section {name} broke: {type(error).__name__}: {str(error)[:300]}")
        print(f"{name} took {time.monotonic() - began:.0f} s\n", flush=True)


def report(figures: Figures) -> None:
    print(table(figures))
    print()
    print(verdict_table(figures))
    for note in figures.notes:
        print(f"NOTE: {note}")


def write(figures: Figures, quick: bool) -> None:
    """The results as JSON, and beside it the page and the pictures."""
    RESULTS.parent.mkdir(exist_ok=True)
    about = {"at": datetime.now(UTC).isoformat(timespec="minutes"), "quick": quick, **machine.facts()}
    found = {"about": about, "goals": verdicts(figures), **figures.as_json()}
    RESULTS.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    print(f"written: {RESULTS.relative_to(HERE.parent)}")
    draw()


def draw() -> None:
    """What there is to look at, from the JSON."""
    results = orjson.loads(RESULTS.read_bytes())
    RESULTS.with_suffix(".md").write_text(page(results))
    for note in pictures.draw(results, RESULTS.parent):
        print(note)


def main() -> int:
    """Exit code 0: it ran and every event came once and in order; 1: some did not, or a section broke."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and systems")
    parser.add_argument("--only", action="append", choices=[*SECTIONS, "profile"], help="one section; may be repeated")
    parser.add_argument("--pictures", action="store_true", help="make the page and the pictures again")
    asked = parser.parse_args()
    if asked.pictures:
        draw()
        return 0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a storm opens ten thousand connections
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        if asked.only == ["profile"]:
            asyncio.run(profiles.show(compiled()))
            return 0
        figures = Figures()
        names = asked.only or [name for name in SECTIONS if not (asked.quick and name in LEFT_OUT_WHEN_QUICK)]
        asyncio.run(measure(figures, names, asked.quick))
    except Missing as why:
        print(f"bench: {why}", file=sys.stderr)
        return 2
    report(figures)
    if not asked.only:
        write(figures, asked.quick)
    broke = any(note.startswith("the section") for note in figures.notes)
    wrong = any(figures.faults.values())
    print(f"{sum(goal.found(figures)[1] == 'met' for goal in GOALS)} of {len(GOALS)} goals met")
    return 1 if broke or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
