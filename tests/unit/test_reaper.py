"""The reaper: what is due is reaped, and hinted again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from shared import reaper
from shared.config import Settings
from shared.event_log import EventLog, Hint
from shared.events import Cancelled
from shared.jobs import Jobs
from shared.prompt import Prompt
from shared.redis import AWAY, PARTITIONS, connect
from tests.processes import Processes, valkey
from tests.waiting import wait_until

PROMPT = Prompt(model="demo", messages=[{"role": "user", "content": "hello"}])


async def create(log: EventLog, name: str, *, partition: str = "a") -> str:
    generation_id = f"{name:0>31}{partition}"
    await log.create(generation_id, tenant="t", provider="demo", prompt=PROMPT)
    return generation_id


async def end_lease(log: EventLog, generation_id: str) -> None:
    await log.servers.client.zadd(log.keys.leases(generation_id[-1]), {generation_id: 1})


async def has_looked(log: EventLog, partition: str = "a") -> None:
    """As if a reaper had looked a moment ago, so that the grace guard does not hold."""
    seconds, microseconds = await log.servers.client.time()
    now = int(seconds) * 1000 + int(microseconds) // 1000
    await log.servers.client.hset(log.keys.reaper(partition), mapping={"last_run": now - 1, "not_before": now - 1})


async def test_a_lost_hint_is_sent_again(event_log: EventLog, jobs: Jobs) -> None:
    """The api died between create and hint: the queued lease remembers."""
    generation_id = await create(event_log, "1")
    await end_lease(event_log, generation_id)
    await has_looked(event_log)
    assert await reaper.reap_partition(event_log, jobs, "a") == 1
    assert await jobs.position(Hint(generation_id, 0, 2)) == 0
    assert await reaper.reap_partition(event_log, jobs, "a") == 0


async def test_what_a_dead_process_held_is_handed_over_and_nothing_else(event_log: EventLog, jobs: Jobs) -> None:
    """Its leases end at once and are charged; those of others, and what it has finished, stay as they are."""
    ours, others, ended = [await create(event_log, name, partition=name) for name in ("1", "2", "3")]
    claims = {}
    for generation_id, owner in ((ours, "host:7"), (others, "host:77"), (ended, "host:7")):
        claims[generation_id] = await event_log.claim(Hint(generation_id, 0, 1), "nonce", owner=owner)
    await event_log.close(ended, Cancelled("caller"))
    assert await reaper.reap_owner(event_log, jobs, "host:7") == 1
    epoch = claims[ours].epoch  # type: ignore[union-attr]
    assert await jobs.position(Hint(ours, epoch, 2)) == 0
    assert await event_log.servers.client.hmget(event_log.keys.order(ours), ["nonce", "charged"]) == [b"", b"1"]
    assert await event_log.held_by("host:77", "2") == [(others, claims[others].epoch)]  # type: ignore[union-attr]
    assert await reaper.reap_owner(event_log, jobs, "host:7") == 0


async def test_the_generation_of_a_dead_worker_is_hinted_at_its_epoch(event_log: EventLog, jobs: Jobs) -> None:
    """Whoever gets the hint can claim it."""
    generation_id = await create(event_log, "1")
    claimed = await event_log.claim(Hint(generation_id, 0, 1), "nonce")
    assert claimed is not None
    await end_lease(event_log, generation_id)
    await has_looked(event_log)
    assert await reaper.reap_partition(event_log, jobs, "a") == 1
    second = await event_log.claim(Hint(generation_id, claimed.epoch, 2), "another")
    assert second is not None and second.attempt == 2


async def test_what_ended_meanwhile_is_not_hinted(event_log: EventLog, jobs: Jobs) -> None:
    """A lease may have stayed behind; it is removed."""
    generation_id = await create(event_log, "1")
    await event_log.close(generation_id, Cancelled("caller"))
    await end_lease(event_log, generation_id)
    await has_looked(event_log)
    assert await reaper.reap_partition(event_log, jobs, "a") == 0
    assert await event_log.servers.client.zcard(event_log.keys.leases("a")) == 0
    assert await jobs.depth() == 0


async def test_two_reapers_send_one_hint(event_log: EventLog, jobs: Jobs) -> None:
    """Every worker and every api runs one: the script decides whose it is."""
    ids = [await create(event_log, str(n)) for n in range(10)]
    for generation_id in ids:
        await end_lease(event_log, generation_id)
    await has_looked(event_log)
    sent = await asyncio.gather(*(reaper.reap_partition(event_log, jobs, "a") for _ in range(5)))
    assert sum(sent) == await jobs.depth() == 10


async def test_the_reaper_looks_at_every_partition_until_it_is_cancelled(event_log: EventLog, jobs: Jobs) -> None:
    """Sixteen partitions, one after the other or all at once."""
    for partition in PARTITIONS:
        await end_lease(event_log, await create(event_log, "1", partition=partition))
        await has_looked(event_log, partition)
    task = asyncio.create_task(reaper.reap_forever(event_log, jobs))

    async def all_hinted() -> bool:
        return await jobs.depth() == len(PARTITIONS)

    try:
        await wait_until(all_hinted)
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)


async def test_the_reaper_outlives_its_redis(processes: Processes, tmp_path: Path, settings: Settings) -> None:
    """Redis being away only delays it."""
    server = valkey(processes, tmp_path / "own")
    server.start()
    redis = connect(server.url, connections=2, retries=0)
    log = EventLog(redis, settings)
    task = asyncio.create_task(reaper.reap_forever(log, Jobs(redis, log.keys)))

    async def has_run() -> bool:
        with suppress(*AWAY):
            return bool(await redis.exists(log.keys.reaper("f")))
        return False

    try:
        await wait_until(has_run)
        await server.kill()
        server.start()
        await wait_until(has_run)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await redis.aclose(close_connection_pool=True)
