"""A primary dies with words that its replica never got: what was shown is written again or voided, never spliced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as sync_redis

from tests.conftest import environment
from tests.processes import Processes, Valkey, valkey
from tests.proxy import Proxy
from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until


@dataclass
class Pair:
    """A primary and its replica. `front` leads to the one that counts; `replication` between them can be frozen."""

    primary: Valkey
    replica: Valkey
    front: Proxy
    replication: Proxy

    async def stop_replicating(self) -> None:
        """From now on; what is there at this moment, the claims above all, gets through."""
        written = await asyncio.to_thread(_replication, self.primary, "master_repl_offset")

        async def has_it() -> bool:
            return await asyncio.to_thread(_replication, self.replica, "slave_repl_offset") >= written

        await wait_until(has_it, timeout=30)
        self.replication.freeze()

    async def fail_over(self) -> None:
        await self.primary.kill()
        with sync_redis.Redis(port=self.replica.port) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        self.front.port_behind = self.replica.port
        self.front.cut()


def _replication(server: Valkey, field: str) -> Any:
    with sync_redis.Redis(port=server.port) as client:
        return client.info("replication")[field]


@pytest.fixture
async def pair(processes: Processes, tmp_path: Path) -> AsyncIterator[Pair]:
    primary = valkey(processes, tmp_path / "primary", append_only=True)
    replica = valkey(processes, tmp_path / "replica", append_only=True)
    primary.start()
    async with Proxy(primary.port) as front, Proxy(primary.port) as replication:
        replica.argv += ["--replicaof", f"127.0.0.1 {replication.port}"]
        await asyncio.to_thread(replica.start)  # the proxy between them runs here

        async def linked() -> bool:
            return bool(await asyncio.to_thread(_replication, replica, "master_link_status") == "up")

        await wait_until(linked, timeout=30)
        yield Pair(primary, replica, front, replication)


@pytest.fixture
async def stack(processes: Processes, pair: Pair, upstream: Upstream) -> AsyncIterator[Stack]:
    one = Stack(processes, environment(f"redis://127.0.0.1:{pair.front.port}/0", "lossy", upstream))
    yield one
    await one.http.aclose()
    processes.end_all()


async def _read_on(readers: list[Reader], more: int) -> None:
    seen = [len(reader.blocks) for reader in readers]
    await wait_until(lambda: all(len(r.blocks) > n + more for r, n in zip(readers, seen, strict=True)), timeout=40)


async def test_what_the_new_primary_lacks_is_written_again(stack: Stack, pair: Pair, upstream: Upstream) -> None:
    """The worker lives: every word that readers have seen comes back to the log under its own id, and goes on."""
    script = Script(count=200, pace_seconds=0.04)
    upstream.script("healed", script)
    await stack.api()
    await stack.worker()
    generations = [await stack.create("healed", f"p{n}") for n in range(10)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end(timeout=100)) for reader in readers]
    await _read_on(readers, 5)
    await pair.stop_replicating()
    await _read_on(readers, 20)
    await pair.fail_over()
    await asyncio.gather(*reading)
    assert "generation.gap_healed" in stack.workers[0].log(), "nothing was lost, so nothing was shown"
    for n, reader in enumerate(readers):
        check_history(reader.blocks)
        assert reader.text == script.text(f"p{n}")
        assert [b.data["attempt"] for b in reader.blocks if b.event == "generation.started"] == [1]
    late = await stack.reader(generations[0]).read_to_end()
    assert late.raw == readers[0].raw
    assert upstream.hits("healed") == 10


async def test_without_its_worker_the_attempt_starts_over_and_says_so(
    stack: Stack, pair: Pair, upstream: Upstream, tmp_path: Path
) -> None:
    """The worker dies too. Its upstream could go on from the log's words, but readers have seen more: nobody does."""
    (tmp_path / "models.toml").write_text('[able]\ncontinuation = "prefix"\n')
    env = {"REJOIN_MODELS": str(tmp_path / "models.toml"), "REJOIN_LEASE_SECONDS": "1"}
    rest = Script(count=60)
    upstream.script("able", Script(count=1000, pace_seconds=0.04), rest)
    await stack.api(**env)
    victim = await stack.worker(**env)
    generation = await stack.create("able")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end(timeout=100))
    await _read_on([reader], 5)
    await pair.stop_replicating()
    await _read_on([reader], 20)
    await victim.kill()
    await pair.fail_over()
    await stack.worker(**env)
    await reading
    starts = [block for block in reader.blocks if block.event == "generation.started"]
    assert [start.data["mode"] for start in starts] == ["fresh", "fresh"]
    check_history(reader.blocks)
    assert reader.text == rest.text("hello")


async def test_an_end_that_was_lost_is_written_again(stack: Stack, pair: Pair, upstream: Upstream) -> None:
    """REJOIN_WAIT_REPLICAS=1: the worker keeps a finished answer until the replica has it, and no prompt runs twice."""
    upstream.script("end-lost", Script(count=30, pace_seconds=0.03))
    env = {"REJOIN_WAIT_REPLICAS": "1", "REJOIN_WAIT_MILLISECONDS": "100"}
    await stack.api(**env)
    await stack.worker(**env)
    generation = await stack.create("end-lost")
    reader = stack.reader(generation)
    await reader.connect(stop_after=5)
    await pair.stop_replicating()
    await reader.read_to_end()
    assert reader.terminal is not None
    await pair.fail_over()

    async def ended_there() -> bool:
        answer = await stack.http.get(f"{stack.apis[0].url}/v1/generations/{generation['id']}")
        return answer.status_code == 200 and answer.json()["status"] == "completed"  # 503 while the store is away

    await wait_until(ended_there, timeout=20, every=0.1)
    late = await stack.reader(generation).read_to_end()
    assert late.raw == reader.raw
    assert upstream.hits("end-lost") == 1
