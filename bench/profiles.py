"""Where the time of an api and of a worker goes, function by function: `python -m bench --only profile`.

The profiler itself makes every call dearer, so the shares count, not the times."""

from __future__ import annotations

import io
import pstats
import sys
from pathlib import Path

from bench import path
from bench.house import House, answers, house
from bench.relays import load_once
from bench.systems import Rejoin
from shared import lua
from tests.processes import Process, free_port

LINES = 40


class ProfiledRejoin(Rejoin):
    """Rejoin's api under the profiler."""

    async def launch(self, home: House) -> Process:
        self.port = free_port()
        argv = [sys.executable, "-m", "bench.profiled", str(home.folder / "api.prof"), "api"]
        process = home.start("api", argv, **{**home.env, "REJOIN_PORT": str(self.port)})
        await answers(process, f"http://127.0.0.1:{self.port}/readyz")
        self.house = home
        self._sha = await home.redis.script_load(lua.source("append"))
        return process


async def show(built: dict[str, Path]) -> None:
    async with house(built) as home:
        system = ProfiledRejoin()
        await system.start(home)
        streams = await system.streams(100)
        run = await load_once(home, system, streams, 5000, 4)
        await system.stop()
        print(f"api, {run.counts['events']:,} events on 100 streams:")
        print(top(home.folder / "api.prof"))
    async with house(built) as home, path.upstream(home) as env:
        argv = [sys.executable, "-m", "bench.profiled", str(home.folder / "worker.prof"), "worker"]
        process = home.start("worker-profiled", argv, **{**home.env, "REJOIN_LOG_LEVEL": "info", **env})
        await process.says("worker.ready", timeout=30)
        await path.timed(home, process, path.send_own, 240, path.PACE_MICROSECONDS)
        await home.end(process)
        print("worker, 100 streams x 80/s, 24,000 chunks:")
        print(top(home.folder / "worker.prof"))


def top(file: Path) -> str:
    """The functions with the most time of their own."""
    out = io.StringIO()
    pstats.Stats(str(file), stream=out).strip_dirs().sort_stats("tottime").print_stats(LINES)
    return "\n".join(line for line in out.getvalue().splitlines() if line.strip())
