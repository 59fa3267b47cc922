"""Workers that block, die of their prompts, or are told the same thing five times; hints that nobody hears."""

from __future__ import annotations

import asyncio
import sys

from redis.asyncio import Redis

from shared.event_log import Hint
from shared.jobs import Jobs
from shared.redis import Keys
from tests.processes import Process
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

LEASE = {"REJOIN_LEASE_SECONDS": "1"}


async def hurt_worker(stack: Stack, **env: str) -> Process:
    """A worker that obeys `block` and `die` (tests/chaos/hurt_worker.py)."""
    argv = [sys.executable, "-m", "tests.chaos.hurt_worker"]
    process = await stack.processes.start("worker", argv, {**stack.env, **env})
    await process.says("worker.ready", timeout=30)
    return process


async def test_a_worker_that_blocks_longer_than_its_lease_is_fenced(stack: Stack, upstream: Upstream) -> None:
    """Its event loop stands still for three leases: another goes on, and what it says on waking is refused."""
    script = Script(count=60)
    upstream.script("blocked", Script(count=10_000, pace_seconds=0.05), script)
    await stack.api(**LEASE)
    blocked = await hurt_worker(stack, **LEASE)
    generation = await stack.create("blocked", "block 3")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await stack.worker(**LEASE)
    await stack.attempt(generation, 2, timeout=20)
    await blocked.says("generation.lost.*FENCED")
    await upstream.wait_closed("blocked")
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("block 3")
    assert (await stack.snapshot(generation))["attempt"] == 2
    first, second = upstream.requests_of("blocked")
    assert first.left_early and not second.left_early
    assert blocked.running and "generation.completed" not in blocked.log()


async def test_a_prompt_that_ends_its_worker_is_given_up(stack: Stack, upstream: Upstream) -> None:
    """Each worker that answers it dies, as often as REJOIN_MAX_ATTEMPTS says; then it fails, and the next is served."""
    lease = {"REJOIN_LEASE_SECONDS": "0.5"}
    upstream.script("deadly", Script(count=20, pace_seconds=0.01))
    await stack.api(**lease)
    generation = await stack.create("deadly", "die")
    for _ in range(3):
        worker = await hurt_worker(stack, **lease)  # what a supervisor does
        assert await worker.wait(30) == 70
    state = await stack.finished(generation)
    assert (state["status"], state["error"]["code"]) == ("failed", "attempts_exhausted")
    survivor = await hurt_worker(stack, **lease)
    assert (await stack.finished(await stack.create("deadly", "live")))["status"] == "completed"
    assert survivor.running and upstream.hits("deadly") == 4


async def test_a_hint_sent_five_times_is_one_run(stack: Stack, upstream: Upstream, redis: Redis) -> None:
    """Five hints of one generation before three workers: the claim decides, and the upstream is asked once."""
    script = Script(count=40, pace_seconds=0.02)
    upstream.script("hinted", script)
    await stack.api()
    generation = await stack.create("hinted")
    jobs = Jobs(redis, Keys(stack.env["REJOIN_KEY_PREFIX"]))
    for n in (1, 3, 5, 7, 9):  # a hint takes the place of the one before it: these stand side by side
        await jobs.send(Hint(generation["id"], 0, n))
    assert await jobs.depth() == 5
    workers = await asyncio.gather(*(stack.worker(REJOIN_LOG_LEVEL="debug") for _ in range(3)))
    reader = await stack.reader(generation).read_to_end()
    assert reader.text == script.text("hello")

    def heard() -> int:
        return sum(worker.log().count("hint.stale") for worker in workers)

    await wait_until(lambda: heard() == 4, timeout=30)
    assert (await stack.snapshot(generation))["attempt"] == 1
    assert upstream.hits("hinted") == 1


async def test_a_generation_whose_hint_was_lost_is_hinted_again(stack: Stack, upstream: Upstream, redis: Redis) -> None:
    """The api dies as it has written the order, before any worker hears of it: the queued lease sends the hint."""
    grace = {"REJOIN_CLAIM_GRACE_SECONDS": "1"}
    script = Script(count=10)
    upstream.script("unhinted", script)
    api = await stack.api(**grace)
    generation = await stack.create("unhinted")
    await api.process.kill()
    keys = Keys(stack.env["REJOIN_KEY_PREFIX"])
    assert await redis.delete(keys.queue, keys.doorbell, f"arq:job:{keys.hint(generation['id'], 1)}") == 3
    stack.apis.remove(api)
    await stack.api(**grace)
    worker = await stack.worker(**grace)
    reader = await stack.reader(generation).read_to_end()
    assert reader.text == script.text("hello")
    assert (await stack.snapshot(generation))["attempt"] == 1
    assert upstream.hits("unhinted") == 1
    assert "generation.hinted_again" in worker.log() + stack.apis[0].process.log()
