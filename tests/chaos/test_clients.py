"""Clients that leave in the burst, never read, come back all at once, or wait for what has expired; upstreams that
never stop talking."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack

from redis.asyncio import Redis

from shared.config import Settings
from shared.event_log import Append, EventLog, Hint, new_id
from shared.events import Completed, TextDelta, encode
from shared.prompt import Message, Prompt
from shared.redis import Keys
from tests.chaos.looks import resident_bytes
from tests.integration.test_scale import MAX_CONNECTIONS, _connections_of
from tests.reader import Reader, check_history
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

PAGES = 300  # of a big log, each 250 events


async def big_log(own_stack: Stack, own_redis: Redis) -> str:
    """A generation that has ended with `PAGES` times 250 events, far more than a worker would write; its id."""
    settings = Settings(_env_file=None, key_prefix=own_stack.env["REJOIN_KEY_PREFIX"])
    log, generation_id = EventLog(own_redis, settings), new_id()
    prompt = Prompt(model="demo", messages=[Message(role="user", content="x")])
    await log.create(generation_id, tenant="local", provider="demo", prompt=prompt)
    claim = await log.claim(Hint(generation_id, 0, 1), "nonce")
    assert claim is not None
    page = [encode(TextDelta("x" * 200))] * 250
    for n in range(PAGES):
        await log.append([Append(generation_id, claim.epoch, 1 + 250 * n, page)])
    await log.append([Append(generation_id, claim.epoch, 1 + 250 * PAGES, [encode(Completed("stop"))], "completed")])
    return generation_id


async def reads_of(redis: Redis) -> int:
    """How often a page of a log was read."""
    found = await redis.info("commandstats")
    return int(found.get("cmdstat_xrange", {"calls": 0})["calls"])


async def settled_reads(redis: Redis) -> int:
    """The same, once it has not grown for a second."""

    async def settled() -> int:
        before = await reads_of(redis)
        await asyncio.sleep(1)
        return before if await reads_of(redis) == before else 0

    return await wait_until(settled, timeout=40)


def slow_socket(api: Api, path: str) -> socket.socket:
    """A client with hardly any room for what it is sent, that has asked for a stream."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", api.port))
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return sock


async def test_a_client_that_leaves_in_the_burst_is_noticed(own_stack: Stack, own_redis: Redis) -> None:
    """It asks for a log of 75,000 events and goes: the rest is neither read nor rendered. One that stays gets it all,
    and meanwhile the api answers others."""
    api = await own_stack.api()
    path = f"/v1/generations/{await big_log(own_stack, own_redis)}/events"
    before = await reads_of(own_redis)
    reading = asyncio.create_task(own_stack.http.get(api.url + path))
    slowest = 0.0
    while not reading.done():
        started = time.monotonic()
        assert (await own_stack.http.get(api.url + "/healthz")).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    assert (await reading).content.count(b"\nevent: text.delta\n") == 250 * PAGES
    assert slowest < 3, f"the event loop stood still for {slowest:.2f} s"

    whole = await reads_of(own_redis) - before
    for _ in range(10):
        reader, writer = await asyncio.open_connection(sock=slow_socket(api, path))
        await reader.readexactly(100_000)
        writer.transport.abort()
    read = await settled_reads(own_redis) - before - whole
    assert 0 < read < 10 * whole / 2, f"{read} reads for ten that left, {whole} for one that stayed"


async def test_clients_that_never_read_cost_little(own_stack: Stack, own_redis: Redis) -> None:
    """60 of them on a log of 20 MB: the api keeps what it is about to send to each, not what each has still to get."""
    api = await own_stack.api()
    path = f"/v1/generations/{await big_log(own_stack, own_redis)}/events"
    await own_stack.http.get(api.url + path)  # what the api needs for any reader at all
    before = resident_bytes(api.process)
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(slow_socket(api, path))
        await settled_reads(own_redis)
        grown = resident_bytes(api.process) - before
        assert (await own_stack.http.get(api.url + "/healthz")).status_code == 200
    assert grown / 60 < 200_000, f"{grown / 60:.0f} bytes for each; on a quiet machine it is about 100,000"


async def test_a_thousand_clients_that_come_back_at_once_are_served(
    own_stack: Stack, own_redis: Redis, upstream: Upstream
) -> None:
    """Their api is killed, and all 1,000 rejoin another at the same moment: all are answered within 10 s, over at most
    8 connections to Redis, and none is sent away."""
    script = Script(count=40, stall_at=20)
    upstream.script("stampede", script)
    first, second = await own_stack.api(), await own_stack.api()
    await own_stack.worker()
    generations = [await own_stack.create("stampede", f"p{n}") for n in range(20)]
    readers = [own_stack.reader(generations[n % 20], first) for n in range(1000)]
    reading = [asyncio.create_task(reader.connect()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 10 for reader in readers), timeout=60)
    await first.process.kill()
    await asyncio.gather(*reading)
    started = time.monotonic()
    for n, reader in enumerate(readers):
        reader.url = second.url + generations[n % 20]["events_url"]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(r.responses) > 1 and r.responses[-1].status for r in readers), timeout=60)
    took = time.monotonic() - started
    assert took < 10, f"{took:.1f} s"
    assert await _connections_of(own_redis, second.process.pid) <= MAX_CONNECTIONS
    upstream.release("stampede")
    await asyncio.gather(*reading)
    for n, reader in enumerate(readers):
        check_history(reader.blocks)
        assert reader.text == script.text(f"p{n % 20}")
        assert [response.status for response in reader.responses] == [200, 200]


async def test_what_expires_under_a_waiting_reader_is_gone(
    own_stack: Stack, own_redis: Redis, upstream: Upstream
) -> None:
    """PEXPIRE of log and order while readers wait: they are told within 5 s, the worker stops, and nothing is known of
    it any more."""
    upstream.script("expires", Script(count=20, stall_at=5))
    api = await own_stack.api()
    await own_stack.worker()
    generation = await own_stack.create("expires")
    readers = [own_stack.reader(generation) for _ in range(5)]
    reading = [asyncio.create_task(reader.connect()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 5 for reader in readers))
    keys = Keys(own_stack.env["REJOIN_KEY_PREFIX"])
    await own_redis.pexpire(keys.log(generation["id"]), 1)
    await own_redis.pexpire(keys.order(generation["id"]), 1)
    responses = await asyncio.wait_for(asyncio.gather(*reading), 5)
    assert all(response.clean for response in responses)
    assert (await Reader(api.url + generation["events_url"]).connect()).status == 404
    await upstream.wait_closed("expires")


async def test_an_answer_without_an_end_is_cut_off(house: Stack, upstream: Upstream) -> None:
    """Chunks of 200 KB, for ever: each becomes events of at most 16 KiB, the whole is bounded, the upstream closed."""
    upstream.script("endless", Script(chunks=["😀" * 50_000] * 1000))
    generation = await house.create("endless")
    reader = await house.reader(generation).read_to_end()
    check_history(reader.blocks)
    assert reader.terminal is not None
    assert (reader.terminal.event, reader.terminal.data["code"]) == ("generation.failed", "output_too_large")
    await upstream.wait_closed("endless")
    (request,) = upstream.requests_of("endless")
    assert request.left_early
    assert max(len(block.raw) for block in reader.blocks) < 17_000
    assert 6_000_000 < len(reader.raw) < 10_000_000
