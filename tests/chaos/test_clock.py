"""The clock of Redis jumps, forward and back, while generations run. Only Redis' time counts, so this is the one clock
that could end all leases at once, or let a dead worker keep its own."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.conftest import environment
from tests.processes import Processes, Valkey, valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

LEASE_SECONDS = 1.0


def faketime_library() -> str | None:
    """Where Debian's package has it, whatever the machine is called."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


LIBRARY = faketime_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="NOT TESTED with a clock that jumps: apt-get install faketime")


@dataclass
class Clock:
    """The clock of one Valkey: the machine's, and so many seconds."""

    file: Path
    server: Valkey

    def set(self, seconds: float) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+f}")
        os.replace(new, self.file)

    async def ahead(self, redis: Redis) -> float:
        await redis.ping()
        seconds, micros = await redis.time()
        return float(seconds + micros / 1e6 - time.time())


@pytest.fixture
def clock(processes: Processes, tmp_path: Path) -> Clock:
    """A server whose clock a test may set. Its monotonic clock, which drives its own timers, is left alone."""
    server = valkey(processes, tmp_path / "valkey")
    one = Clock(tmp_path / "clock", server)
    one.set(0)
    told = {"FAKETIME_TIMESTAMP_FILE": str(one.file), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    words = [f"{name}={value}" for name, value in {"LD_PRELOAD": LIBRARY, **told}.items()]
    server.argv = ["env", *words, *server.argv]
    server.start()
    return one


async def test_a_clock_that_jumps_restarts_nothing(processes: Processes, clock: Clock, upstream: Upstream) -> None:
    """Living workers keep what they run, through jumps forward and back: one attempt, every word once. New work is
    taken after each. Silent generations are in most danger: nothing but the heartbeat speaks for them."""
    scripts = {"jumps": Script(count=170, pace_seconds=0.03), "jumps-silent": Script(count=10, stall_at=5)}
    for model, script in scripts.items():
        upstream.script(model, script)
    stack = Stack(processes, environment(clock.server.url, "clock", upstream))
    redis: Redis = Redis.from_url(clock.server.url)
    await stack.api()
    worker = await stack.worker()
    models = [*scripts] * 3
    generations = [await stack.create(model) for model in models]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 5 for reader in readers))
    for jump in (600.0, -600.0, 0.0):
        before = len(readers[0].blocks)
        clock.set(jump)
        assert abs(await clock.ahead(redis) - jump) < 1, "the clock did not jump"
        await wait_until(lambda n=before: len(readers[0].blocks) > n + 35)
        assert (await stack.finished(await stack.create("quick", f"{jump}")))["status"] == "completed"
    upstream.release("jumps-silent")
    await asyncio.gather(*reading)
    for model, reader, generation in zip(models, readers, generations, strict=True):
        check_history(reader.blocks)
        assert reader.text == scripts[model].text("hello")
        assert (await stack.snapshot(generation))["attempt"] == 1
    assert upstream.hits("jumps") == upstream.hits("jumps-silent") == 3 and "generation.lost" not in worker.log()
    await redis.aclose()
    await stack.http.aclose()


@pytest.mark.parametrize("jump", [600.0, -600.0], ids=["forward", "back"])
async def test_a_dead_workers_lease_ends_in_time_for_all_that(
    processes: Processes, clock: Clock, upstream: Upstream, jump: float
) -> None:
    """The clock jumps as a worker dies: its generations go on after its lease and the guard's, not after the jump."""
    model = f"dead-{jump:.0f}"
    script = Script(count=30)
    upstream.script(model, Script(count=10_000, pace_seconds=0.05), script)
    env = {**environment(clock.server.url, "clock", upstream), "REJOIN_LEASE_SECONDS": str(LEASE_SECONDS)}
    stack = Stack(processes, env)
    await stack.api()
    victim = await stack.worker()
    generation = await stack.create(model)
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 10)
    await victim.kill()
    clock.set(jump)
    await stack.worker()
    took = await stack.attempt(generation, 2, timeout=60)
    assert took < 20 * LEASE_SECONDS, f"{took:.1f} s"
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello")
    await stack.http.aclose()
