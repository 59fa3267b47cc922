"""Redis emptied, full, unable to save, frozen, replaced by its replica; and one that would evict."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from tests.chaos.looks import resident_bytes, stands_still
from tests.processes import Processes, Valkey
from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream, frame
from tests.waiting import wait_until

# ---- F7: the data is gone ----


async def test_flushed_data_is_gone_for_readers_and_ends_what_runs(
    own_stack: Stack, own_redis: Redis, upstream: Upstream
) -> None:
    """FLUSHALL mid-run: readers are told within 5 s, workers close their upstreams, and the house goes on."""
    upstream.script("flushed-flowing", Script(count=10_000, pace_seconds=0.02))
    upstream.script("flushed-silent", Script(count=20, stall_at=5))
    api = await own_stack.api()
    worker = await own_stack.worker()
    generations = [await own_stack.create(model) for model in ("flushed-flowing", "flushed-silent") for _ in range(5)]
    readers = [own_stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.connect()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 5 for reader in readers))
    await own_redis.flushall()
    responses = await asyncio.wait_for(asyncio.gather(*reading), 5)
    assert all(response.clean for response in responses)
    for reader, generation in zip(readers, generations, strict=True):
        check_history(reader.blocks)
        assert (await Reader(api.url + generation["events_url"]).connect()).status == 404
    for model in ("flushed-flowing", "flushed-silent"):
        await upstream.wait_closed(model)
    await wait_until(lambda: worker.log().count("reason=GONE") == 10)
    again = await own_stack.create("after-flush")
    assert (await own_stack.finished(again))["status"] == "completed"
    assert worker.running and api.process.running


# ---- F18: no room ----


async def _saving_fails(server: Valkey, redis: Redis) -> Callable[[], Awaitable[None]]:
    """Redis refuses writes (MISCONF) since its last snapshot failed: the file it would replace is a folder."""
    blocked = server.folder / "dump.rdb"
    blocked.mkdir()
    await redis.config_set("save", "3600 1")

    async def save(outcome: str) -> None:
        async def saved() -> bool:
            found = await redis.info("persistence")
            return not found["rdb_bgsave_in_progress"] and found["rdb_last_bgsave_status"] == outcome

        await redis.execute_command("BGSAVE")
        await wait_until(saved)

    await save("err")

    async def recover() -> None:
        blocked.rmdir()
        await save("ok")

    return recover


async def _disk_is_full(server: Valkey, redis: Redis) -> Callable[[], Awaitable[None]]:
    """Each write to the append-only file fails from here on: no file of this process may grow any more."""
    assert server.process is not None
    pid, unlimited = server.process.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    async def status(wanted: str) -> bool:
        return (await redis.info("persistence"))["aof_last_write_status"] == wanted

    await wait_until(lambda: status("err"), timeout=20)

    async def recover() -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        await wait_until(lambda: status("ok"), timeout=20)

    return recover


@pytest.mark.parametrize("fill", [_disk_is_full, _saving_fails], ids=["disk", "snapshot"])
async def test_a_store_without_room_refuses_and_loses_nothing(
    own_stack: Stack,
    own_server: Valkey,
    own_redis: Redis,
    upstream: Upstream,
    fill: Callable[[Valkey, Redis], Awaitable[Callable[[], Awaitable[None]]]],
) -> None:
    """A create gets 503 and may be sent again; what runs waits; afterwards every word is there, in one attempt."""
    model = f"no-room{fill.__name__}"
    script = Script(count=100, pace_seconds=0.02)
    upstream.script(model, script)
    api = await own_stack.api()
    worker = await own_stack.worker()
    generation = await own_stack.create(model)
    reader = own_stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 20)
    recover = await fill(own_server, own_redis)
    answer = await own_stack.http.post(api.url + "/v1/generations", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (503, "store_full")
    assert "retry-after" in answer.headers
    seen = len(reader.blocks)
    await worker.says("writer.redis_away")
    await upstream_is_through(upstream, model)
    assert len(reader.blocks) - seen < 10, "it was not full"
    await recover()
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello") and len(reader.responses) == 1
    assert (await own_stack.snapshot(generation))["attempt"] == 1
    again = await own_stack.http.post(api.url + "/v1/generations", json={"model": "after", "prompt": "x"})
    assert again.status_code == 202
    assert (await own_stack.finished(again.json()))["status"] == "completed"
    assert worker.running and api.process.running


async def upstream_is_through(upstream: Upstream, model: str) -> None:
    (request,) = upstream.requests_of(model)
    await wait_until(lambda: request.chunks_sent > 60)


@pytest.mark.parametrize("role", ["api", "worker"])
async def test_a_store_that_evicts_stops_the_start(
    processes: Processes, own_stack: Stack, own_redis: Redis, role: str
) -> None:
    """A Redis that would throw generations away when full is refused, and the refusal says what to set."""
    await own_redis.config_set("maxmemory-policy", "allkeys-lru")
    process = await processes.start(role, [sys.executable, "-m", role], own_stack.env)
    assert await process.wait() != 0
    assert "set maxmemory-policy noeviction" in process.log()


# ---- F28: Redis is gone while the upstream is fast ----


async def test_a_fast_upstream_is_held_while_redis_is_away(
    own_stack: Stack, own_server: Valkey, upstream: Upstream
) -> None:
    """Redis frozen for longer than a lease: the upstream is not read on, memory stays small, and nothing is missing."""
    words = [f"word{n} " for n in range(600)]
    padded = [frame(choices=[{"index": 0, "delta": {"content": word}}], padding="x" * 100_000) for word in words]
    upstream.script("fast", Script(chunks=padded, pace_seconds=0.005))
    await own_stack.api()
    worker = await own_stack.worker(REJOIN_LEASE_SECONDS="1")
    generation = await own_stack.create("fast")
    reader = own_stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 20, every=0.001)
    before = resident_bytes(worker)
    assert own_server.process is not None
    own_server.process.signal(signal.SIGSTOP)
    (request,) = upstream.requests_of("fast")
    await stands_still(request)
    assert request.chunks_sent < len(words) and request.closed_at is None
    assert resident_bytes(worker) - before < 50_000_000
    own_server.process.signal(signal.SIGCONT)
    await reading
    check_history(reader.blocks)
    assert reader.text == "".join(words) and len(reader.responses) == 1
    assert (await own_stack.snapshot(generation))["attempt"] == 1
