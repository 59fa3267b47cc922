"""`python -m tests.chaos`: run the scenarios of the fault suite, say how they go, and print one table at the end.

Writes nothing else, unless told to `--keep` the logs. Exit code 1 when a row is not met, or a scenario could not be run
to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.chaos.report import Row, Say, table

# Name -> `module:function` of an `async def run(say: Say, quick: bool) -> list[Row]`. A `run` that has a parameter
# `seed`, `generations`, `faults` or `keep` is given the option of that name, when there was one.
SCENARIOS: dict[str, str] = {
    "mixed": "tests.chaos.mixed:run",
    "negative controls": "tests.chaos.naive:run",
    "recovery": "tests.chaos.recovery:run",
    "recovery up": "tests.chaos.recovery:run_under_up",
    "hand-over": "tests.chaos.hand_over:run",
    "zombies": "tests.chaos.zombies:run",
    "store away": "tests.chaos.store_away:run",
    "store gone": "tests.chaos.store_gone:run",
    "cancels": "tests.chaos.cancels:run",
    "draining": "tests.chaos.draining:run",
    "upstream": "tests.chaos.upstream_failures:run",
    "silent readers": "tests.chaos.silent_readers:run",
    "storm": "tests.chaos.storm:run",
}
OPTIONS = ("seed", "generations", "faults", "keep")


def main(argv: Sequence[str]) -> int:
    asked = _parser().parse_args(argv)
    options = {name: value for name in OPTIONS if (value := getattr(asked, name)) is not None}
    rows: list[Row] = []
    started = time.monotonic()
    for name in asked.only or SCENARIOS:
        rows += asyncio.run(_scenario(name, asked.quick, options))
    print(f"\n{table(rows)}\n\n{time.monotonic() - started:.0f} s", flush=True)
    return 0 if all(row.met for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short form of every scenario")
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--seed", type=int, help="of the schedule of faults; printed by every run")
    parser.add_argument("--generations", type=int)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the logs of the processes there")
    return parser


async def _scenario(name: str, quick: bool, options: dict[str, Any]) -> list[Row]:
    """Its rows; a scenario that broke is a row that is not met."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{name:18} {time.monotonic() - started:6.1f} s  {text}", flush=True)

    say("begins")
    try:
        run = _function(SCENARIOS[name])
        wanted = inspect.signature(run).parameters
        return await run(say, quick, **{key: value for key, value in options.items() if key in wanted})
    except Exception as error:
        traceback.print_exc()
        return [Row(name, "ran to its end", type(error).__name__, "yes", False)]


def _function(address: str) -> Callable[..., Awaitable[list[Row]]]:
    module, _, function = address.partition(":")
    found: Callable[..., Awaitable[list[Row]]] = getattr(import_module(module), function)
    return found


__all__ = ["SCENARIOS", "Say", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
