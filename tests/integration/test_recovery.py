"""A worker dies, freezes or is told to stop: another goes on, readers are told, the final text comes exactly once."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

LEASE_SECONDS = 3.0
GRACE_SECONDS = 1.5
ENDLESS = Script(count=10_000, pace_seconds=0.05)  # what the first attempt of a worker to be hurt is given
SHORT = Script(count=80, pace_seconds=0.005)  # and the second
SLOW = Script(count=80, pace_seconds=0.05)  # four seconds


async def _attempts(readers: list[Reader]) -> None:
    for reader in readers:
        check_history(reader.blocks)
        starts = [block for block in reader.blocks if block.event == "generation.started"]
        assert [start.data["attempt"] for start in starts] == [1, 2]
        assert reader.text == SHORT.text("hello")
        assert reader.terminal is not None and reader.terminal.event == "generation.completed"


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("streams", [1, 50])
async def test_a_killed_worker_is_followed_by_another_within_lease_and_grace(
    stack: Stack, upstream: Upstream, workers: int, streams: int
) -> None:
    """`kill -9` mid-stream: every reader sees attempt 2 within lease + 1.5 s, and the final text exactly once."""
    model = f"killed-{workers}-{streams}"
    upstream.script(model, ENDLESS)
    await stack.api()
    victim = await stack.worker()
    generations = [await stack.create(model) for _ in range(streams)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 5 for reader in readers), timeout=20)
    for _ in range(workers - 1):  # they come when the victim has all the work
        await stack.worker()
    upstream.script(model, SHORT)
    await victim.kill()
    killed_at = time.monotonic()
    if workers == 1:
        await stack.worker()  # what a supervisor does

    def second_attempts() -> bool:
        return all(any(b.event == "generation.started" and b.data["attempt"] == 2 for b in r.blocks) for r in readers)

    await wait_until(second_attempts, timeout=20)
    took = time.monotonic() - killed_at
    assert took < LEASE_SECONDS + GRACE_SECONDS, f"{took:.2f} s"
    await asyncio.gather(*reading)
    await _attempts(readers)
    for generation in generations:
        assert (await stack.snapshot(generation))["text"] == SHORT.text("hello")


@pytest.mark.parametrize("streams", [1, 50])
async def test_a_frozen_worker_that_wakes_writes_nothing(stack: Stack, upstream: Upstream, streams: int) -> None:
    """SIGSTOP for longer than a lease: another worker takes over, and the one that wakes is fenced at once."""
    model = f"frozen-{streams}"
    upstream.script(model, ENDLESS)
    await stack.api()
    zombie = await stack.worker()
    generations = [await stack.create(model) for _ in range(streams)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 5 for reader in readers), timeout=20)
    await stack.worker()
    upstream.script(model, SHORT)
    zombie.signal(signal.SIGSTOP)
    for generation in generations:
        await stack.attempt(generation, 2)
    zombie.signal(signal.SIGCONT)
    await wait_until(lambda: zombie.log().count("generation.lost") == streams, timeout=10)
    assert "FENCED" in zombie.log() and "generation.completed" not in zombie.log()
    await asyncio.gather(*reading)
    await _attempts(readers)
    assert zombie.running


async def test_a_stopping_worker_drains_what_it_can(stack: Stack, upstream: Upstream) -> None:
    """SIGTERM with time to drain: the running generation ends in its first attempt, and no new one is taken."""
    upstream.script("drained", SLOW)
    await stack.api()
    worker = await stack.worker(REJOIN_DRAIN_SECONDS="20")
    generation = await stack.create("drained")
    reader = stack.reader(generation)
    await reader.connect(stop_after=10)
    worker.signal(signal.SIGTERM)
    await worker.says("worker.stopping")
    late = await stack.create("drained", "late")
    await reader.read_to_end()
    assert await worker.wait() == 0
    assert reader.text == SLOW.text("hello")
    state = await stack.snapshot(generation)
    assert (state["status"], state["attempt"]) == ("completed", 1)
    assert (await stack.snapshot(late))["status"] == "queued"
    await stack.worker()
    assert (await stack.finished(late))["status"] == "completed"


async def test_a_stopping_worker_hands_over_the_rest_uncharged(stack: Stack, upstream: Upstream) -> None:
    """SIGTERM without time: the generation goes on elsewhere within a second, and nothing is charged to it."""
    upstream.script("released", SLOW)
    await stack.api()
    first = await stack.worker(REJOIN_DRAIN_SECONDS="0")
    generation = await stack.create("released")
    reader = stack.reader(generation)
    await reader.connect(stop_after=10)
    await stack.worker()
    first.signal(signal.SIGTERM)
    assert await stack.attempt(generation, 2) < 1.0
    assert await first.wait() == 0
    await reader.read_to_end()
    assert reader.text == SLOW.text("hello")
    await upstream.wait_closed("released")


async def test_a_prompt_that_kills_every_worker_fails_honestly(stack: Stack, upstream: Upstream) -> None:
    """After REJOIN_MAX_ATTEMPTS lost workers the generation fails as `attempts_exhausted` instead of a crash loop."""
    upstream.script("poison", Script(count=10, stall_at=3))
    lease = {"REJOIN_LEASE_SECONDS": "0.5"}
    await stack.api(**lease)
    generation = await stack.create("poison")
    for attempt in (1, 2, 3):
        worker = await stack.worker(**lease)
        await stack.attempt(generation, attempt)
        await worker.kill()
    state = await stack.finished(generation)
    assert (state["status"], state["error"]["code"]) == ("failed", "attempts_exhausted")
