"""Two Valkey servers and three sentinels: the primary dies under load, another takes its place, the streams go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis as sync_redis

from cli.valkey import server_binary
from tests.conftest import environment
from tests.processes import Processes, Valkey, free_port, valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

SENTINEL = """
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor store 127.0.0.1 {primary} 2
sentinel down-after-milliseconds store 800
sentinel failover-timeout store 5000
"""


@dataclass
class Replicated:
    """A primary, its replica, and the sentinels that watch them."""

    primary: Valkey
    replica: Valkey
    sentinels: list[int]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/store"

    def role(self, server: Valkey) -> str:
        with sync_redis.Redis(port=server.port) as client:
            return str(client.info("replication")["role"])


def _sentinel(processes: Processes, folder: Path, primary: int) -> int:
    folder.mkdir()
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(SENTINEL.format(port=port, folder=folder, primary=primary))
    processes.launch("sentinel", [str(server_binary()), str(config), "--sentinel"])
    return port


@pytest.fixture
async def replicated(processes: Processes, tmp_path: Path) -> AsyncIterator[Replicated]:
    primary = valkey(processes, tmp_path / "primary", append_only=True)
    replica = valkey(processes, tmp_path / "replica", append_only=True)
    replica.argv += ["--replicaof", f"127.0.0.1 {primary.port}"]
    primary.start()
    replica.start()
    ports = [_sentinel(processes, tmp_path / f"sentinel{n}", primary.port) for n in range(3)]

    def all_see_all() -> bool:
        return all(_sees(port) for port in ports)

    await wait_until(all_see_all, timeout=30)
    yield Replicated(primary, replica, ports)


def _sees(port: int) -> bool:
    try:
        with sync_redis.Redis(port=port) as client:
            state = client.sentinel_masters()["store"]
            slaves = client.sentinel_slaves("store")
    except (sync_redis.RedisError, KeyError):
        return False
    healthy = [slave for slave in slaves if slave.get("master-link-status", "ok") == "ok" and not slave["is_sdown"]]
    return state["num-other-sentinels"] == 2 and len(healthy) == 1


@pytest.fixture
async def stack(processes: Processes, replicated: Replicated, upstream: Upstream) -> AsyncIterator[Stack]:
    one = Stack(processes, environment(replicated.url, "sentinel", upstream))
    yield one
    await one.http.aclose()


async def test_without_a_replica_that_is_wanted_a_post_is_refused_and_may_come_again(
    stack: Stack, replicated: Replicated, upstream: Upstream
) -> None:
    """REJOIN_WAIT_REPLICAS=1: a prompt that no replica has is not accepted; with the replica back, the same key is."""
    upstream.script("durable", Script(count=5))
    wait = {"REJOIN_WAIT_REPLICAS": "1", "REJOIN_WAIT_MILLISECONDS": "200"}
    api = await stack.api(**wait)
    await stack.worker(**wait)
    assert (await stack.finished(await stack.create("durable")))["status"] == "completed"
    await replicated.replica.kill()
    body, headers = {"model": "durable", "prompt": "again"}, {"Idempotency-Key": "k"}
    refused = await stack.http.post(api.url + "/v1/generations", json=body, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_durable"), refused.text
    replicated.replica.start()

    async def accepted() -> bool:
        answer = await stack.http.post(api.url + "/v1/generations", json=body, headers=headers)
        return answer.status_code == 202

    await wait_until(accepted, timeout=60, every=0.2)
    again = await stack.create("durable", "again", key="k")
    assert (await stack.finished(again))["status"] == "completed"


async def test_a_primary_that_dies_under_load_loses_nothing_that_was_shown(
    stack: Stack, replicated: Replicated, upstream: Upstream
) -> None:
    """Thirty streams run over a failover: each reader gets its whole text, in order, from one attempt at a time."""
    script = Script(count=150, pace_seconds=0.05)
    upstream.script("failover", script)
    await stack.api()
    await stack.worker()
    await stack.worker()
    generations = [await stack.create("failover", f"p{n}") for n in range(30)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end(timeout=100)) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 10 for reader in readers), timeout=30)
    assert replicated.primary.process is not None
    await replicated.primary.kill()
    await wait_until(lambda: replicated.role(replicated.replica) == "master", timeout=60)
    await asyncio.gather(*reading)
    for n, reader in enumerate(readers):
        check_history(reader.blocks)
        assert reader.terminal is not None and reader.terminal.event == "generation.completed"
        assert reader.text == script.text(f"p{n}")
    late = await stack.create("failover", "afterwards")
    assert (await stack.finished(late))["status"] == "completed"
