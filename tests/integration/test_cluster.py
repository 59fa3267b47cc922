"""A Redis Cluster of three primaries, each with a replica, holds the logs; the queue is on a server beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as sync_redis

from shared.cluster import Cluster
from shared.config import Settings
from shared.event_log import EventLog, Hint
from shared.redis import PARTITIONS
from tests.conftest import environment, key_leaks
from tests.processes import Processes, Valkey, free_port, valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

SLOTS = 16384
PREFIX = "cluster"


@dataclass
class Node:
    """One server of the cluster, asked over a connection of its own."""

    server: Valkey
    bus_port: int

    def ask(self, *command: Any) -> Any:
        with sync_redis.Redis(port=self.server.port, decode_responses=True) as client:
            return client.execute_command(*command)

    @property
    def knows(self) -> str:
        return str(self.ask("CLUSTER", "NODES"))


@dataclass
class Nodes:
    primaries: list[Node]
    replicas: list[Node]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.server.port}" for node in self.primaries)

    def partitions_of(self, node: Node) -> set[str]:
        names = (f"{PREFIX}:{{{partition}}}:leases" for partition in PARTITIONS)
        here = {tuple(map(int, line)) for line in _own_slots(node)}
        return {name[-9] for name in names if _covers(here, node.ask("CLUSTER", "KEYSLOT", name))}


def _own_slots(node: Node) -> list[tuple[str, str]]:
    (me,) = [line for line in node.knows.splitlines() if "myself" in line]
    return [(first, last or first) for first, _, last in (part.partition("-") for part in me.split()[8:])]


def _covers(ranges: set[tuple[int, ...]], slot: int) -> bool:
    return any(first <= slot <= last for first, last in ranges)


def _start_node(processes: Processes, folder: Path) -> Node:
    server, bus_port = valkey(processes, folder, append_only=True), free_port()
    server.argv += ["--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--cluster-node-timeout", "1500"]
    server.start()
    return Node(server, bus_port)


@pytest.fixture
async def nodes(processes: Processes, tmp_path: Path) -> Nodes:
    found = [_start_node(processes, tmp_path / f"node{n}") for n in range(6)]
    primaries, replicas = found[:3], found[3:]
    for n, node in enumerate(primaries):
        node.ask("CLUSTER", "ADDSLOTSRANGE", n * SLOTS // 3, (n + 1) * SLOTS // 3 - 1)
    for n, node in enumerate(found):
        node.ask("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        if n:
            found[0].ask("CLUSTER", "MEET", "127.0.0.1", node.server.port, node.bus_port)
    await wait_until(lambda: all(node.knows.count("connected") == 6 for node in found), timeout=30)
    for primary, replica in zip(primaries, replicas, strict=True):
        replica.ask("CLUSTER", "REPLICATE", primary.ask("CLUSTER", "MYID"))
    await wait_until(lambda: all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in found), timeout=30)
    await wait_until(lambda: all(node.ask("ROLE")[0] == "slave" for node in replicas), timeout=30)
    await wait_until(lambda: all(node.ask("ROLE")[3] == "connected" for node in replicas), timeout=30)
    return Nodes(primaries, replicas)


@pytest.fixture
async def stack(processes: Processes, nodes: Nodes, redis_url: str, upstream: Upstream) -> AsyncIterator[Stack]:
    env = {**environment(nodes.url, PREFIX, upstream), "REJOIN_QUEUE_URL": redis_url}
    one = Stack(processes, env)
    yield one
    await one.http.aclose()
    with sync_redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(f"*{PREFIX}:*", count=1000):
            client.delete(key)


async def test_the_main_job_on_a_cluster_and_the_loss_of_a_node(stack: Stack, nodes: Nodes, upstream: Upstream) -> None:
    """Streams on all three primaries; one of them dies for good. Each reader gets its whole text; what was on the
    others is not held up by it; cancel, resume and delete work before and after."""
    script = Script(count=200, pace_seconds=0.05)
    upstream.script("sharded", script)
    await stack.api()
    await stack.api()
    for _ in range(2):
        await stack.worker()
    generations = [await stack.create("sharded", f"p{n}") for n in range(40)]
    homes = [nodes.partitions_of(node) for node in nodes.primaries]
    assert set().union(*homes) == set(PARTITIONS) and all(homes), "the partitions are spread"
    assert {next(n for n, home in enumerate(homes) if g["id"][-1] in home) for g in generations} == {0, 1, 2}
    readers = [stack.reader(generation, stack.apis[n % 2]) for n, generation in enumerate(generations)]
    reading = [asyncio.create_task(reader.read_to_end(timeout=100)) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 10 for reader in readers), timeout=40)
    await nodes.primaries[1].server.kill()
    await wait_until(lambda: nodes.replicas[1].ask("ROLE")[0] == "master", timeout=60)
    await asyncio.gather(*reading)
    for n, reader in enumerate(readers):
        check_history(reader.blocks)
        assert reader.terminal is not None and reader.terminal.event == "generation.completed"
        assert reader.text == script.text(f"p{n}")
        if generations[n]["id"][-1] not in homes[1]:
            assert len(reader.responses) == 1, "a stream on a living node was not disturbed"
    await _everything_else(stack, upstream)
    for node in (nodes.primaries[0], nodes.primaries[2], nodes.replicas[1]):
        with sync_redis.Redis(port=node.server.port) as client:
            assert not key_leaks(client, PREFIX)


async def _everything_else(stack: Stack, upstream: Upstream) -> None:
    """Cancel, resume, delete, list and an idempotent create, in every partition."""
    upstream.script("on-and-on", Script(count=100_000, pace_seconds=0.02))
    running = [await stack.create("on-and-on", f"q{n}") for n in range(12)]
    for generation in running:
        reader = stack.reader(generation)
        await reader.connect(stop_after=5)
        await reader.connect(stop_after=5, url=stack.apis[1].url + generation["events_url"])
        check_history(reader.blocks)
        assert (await stack.cancel(generation))["status"] == "cancelled"
    await upstream.wait_closed("on-and-on")
    api = stack.apis[0].url
    assert (await stack.http.delete(f"{api}/v1/generations/{running[0]['id']}")).status_code == 204
    listed = (await stack.http.get(f"{api}/v1/generations?limit=50")).json()["data"]
    assert {generation["id"] for generation in running[1:]} <= {one["id"] for one in listed}
    first, second = [await stack.create("sharded", "once", key="the key") for _ in range(2)]
    assert first["id"] == second["id"]


async def test_slots_that_moved_are_followed(nodes: Nodes) -> None:
    """A partition moves to another primary while a client knows it at the first: the client asks again there."""
    settings = Settings(_env_file=None, redis_url=nodes.url, queue_url="redis://127.0.0.1:1/0", key_prefix=PREFIX)
    servers = Cluster(nodes.url, connections=2, timeout_seconds=2.0)
    log = EventLog(servers, settings)
    before = {partition: await servers.at(partition) for partition in PARTITIONS}
    assert len(await servers.all()) == 3 and await log.is_reachable()
    moved = nodes.partitions_of(nodes.primaries[0])
    await _move(nodes)
    for partition in PARTITIONS:
        assert await log.claim(Hint(partition * 32, 0, 1), "nonce") is None
    assert await log.orders([partition * 32 for partition in PARTITIONS]) == []
    after = {partition: await servers.at(partition) for partition in PARTITIONS}
    assert {partition for partition in PARTITIONS if after[partition] is not before[partition]} == moved
    await servers.aclose()


async def _move(nodes: Nodes) -> None:
    """The partitions of the first primary, all of them empty, become the second's."""
    first, second, third = nodes.primaries
    home = second.ask("CLUSTER", "MYID")
    for partition in nodes.partitions_of(first):
        slot = first.ask("CLUSTER", "KEYSLOT", f"{{{partition}}}")
        for node in (second, first, third):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", home)


def test_a_cluster_needs_a_queue_elsewhere() -> None:
    """ARQ's keys cross slots: without REJOIN_QUEUE_URL the setting is refused, with a line that says what to set."""
    with pytest.raises(ValueError, match="REJOIN_QUEUE_URL"):
        Settings(_env_file=None, redis_url="redis+cluster://127.0.0.1:7000")
