"""Redis is killed and comes back: clients stay connected, workers buffer, the gap is healed, nobody starts again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.conftest import environment
from tests.processes import Processes, Valkey, valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until


@pytest.fixture
def own_server(processes: Processes, tmp_path: Path) -> Iterator[Valkey]:
    """A server with an append-only file, of this test's own: it is going to be killed."""
    one = valkey(processes, tmp_path / "valkey", append_only=True)
    one.start()
    yield one


@pytest.mark.parametrize("away_seconds", [0.1, 2.0, 4.5])
async def test_a_store_killed_mid_stream_loses_nothing(
    processes: Processes, own_server: Valkey, upstream: Upstream, away_seconds: float
) -> None:
    """`kill -9` of Valkey while tokens flow: same connections, same attempt, every position once."""
    script = Script(count=250, pace_seconds=0.03)
    upstream.script(f"restart-{away_seconds}", script)
    stack = Stack(processes, environment(own_server.url, "restart", upstream))
    await stack.api()
    worker = await stack.worker()
    generations = [await stack.create(f"restart-{away_seconds}") for _ in range(5)]
    readers = [stack.reader(generation) for generation in generations]
    reading = [asyncio.create_task(reader.read_to_end()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 20 for reader in readers))
    await own_server.kill()
    await asyncio.sleep(away_seconds)  # the outage itself
    own_server.start()
    await asyncio.gather(*reading)
    for reader in readers:
        check_history(reader.blocks)
        assert len(reader.responses) == 1, "the client was cut off"
        assert reader.text == script.text("hello")
    for generation in generations:
        state = await stack.snapshot(generation)
        assert (state["attempt"], state["status"]) == (1, "completed")
    assert worker.running and stack.apis[0].process.running
    again = await stack.create("after-restart")
    assert (await stack.finished(again))["status"] == "completed"
    await stack.http.aclose()


async def test_a_create_while_the_store_is_away_says_so(
    processes: Processes, own_server: Valkey, upstream: Upstream
) -> None:
    """A POST during an outage gets 503 with Retry-After; an EventSource gets 200 and `retry:`, so it comes back."""
    stack = Stack(processes, environment(own_server.url, "away", upstream))
    await stack.api()
    generation = await stack.create("words")
    await own_server.kill()
    answer = await stack.http.post(stack.apis[0].url + "/v1/generations", json={"prompt": "x"})
    assert (
        answer.status_code == 503 and answer.json()["code"] == "store_unavailable" and "retry-after" in answer.headers
    )
    reader = stack.reader(generation)
    response = await reader.connect()
    assert response.status == 200 and response.clean and reader.retries
    own_server.start()
    await stack.worker()
    await reader.read_to_end()
    assert reader.terminal is not None
    await stack.http.aclose()


async def test_a_full_store_ends_no_process(processes: Processes, own_server: Valkey, upstream: Upstream) -> None:
    """While Redis has no room, creates get 503 `store_full`; workers, apis and readers live on, nothing is lost."""
    script = Script(count=300, pace_seconds=0.02)
    upstream.script("full", script)
    stack = Stack(processes, environment(own_server.url, "full", upstream))
    await stack.api()
    worker = await stack.worker()
    generation = await stack.create("full", on_disconnect="cancel")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 20)
    client: Redis = Redis.from_url(own_server.url)
    await client.config_set("maxmemory", "1mb")
    answer = await stack.http.post(stack.apis[0].url + "/v1/generations", json={"prompt": "x"})
    assert answer.status_code == 503 and answer.json()["code"] == "store_full"
    event_source = stack.reader(generation)
    assert (await event_source.connect(stop_after=5)).status == 200
    await asyncio.sleep(3)  # the fullness itself: the reaper, the heartbeat and the readers' sign all meet it
    await client.config_set("maxmemory", "0")
    await client.aclose()
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello") and len(reader.responses) == 1
    assert (await stack.snapshot(generation))["attempt"] == 1
    assert worker.running and stack.apis[0].process.running
    again = await stack.create("after-full")
    assert (await stack.finished(again))["status"] == "completed"
    await stack.http.aclose()


async def test_an_outage_longer_than_the_grace_does_not_cancel_what_is_watched(
    processes: Processes, own_server: Valkey, upstream: Upstream
) -> None:
    """Redis frozen for longer than the disconnect grace: the reader is still there, and the answer goes on."""
    script = Script(count=300, pace_seconds=0.03)
    upstream.script("watched", script)
    grace = {"REJOIN_DISCONNECT_GRACE_SECONDS": "2"}
    stack = Stack(processes, {**environment(own_server.url, "watched", upstream), **grace})
    await stack.api()
    await stack.worker()
    generation = await stack.create("watched", on_disconnect="cancel")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 20)
    assert own_server.process is not None
    own_server.process.signal(signal.SIGSTOP)
    await asyncio.sleep(5)  # the outage
    own_server.process.signal(signal.SIGCONT)
    await reading
    check_history(reader.blocks)
    assert reader.terminal is not None and reader.terminal.event == "generation.completed"
    assert reader.text == script.text("hello")
    await stack.http.aclose()


async def test_a_worker_stops_in_time_while_the_store_is_away(
    processes: Processes, own_server: Valkey, upstream: Upstream
) -> None:
    """SIGTERM during an outage: the worker drains, gives up on the hand-over, and ends."""
    upstream.script("stopping", Script(count=10_000, pace_seconds=0.05))
    stack = Stack(processes, {**environment(own_server.url, "stopping", upstream), "REJOIN_DRAIN_SECONDS": "1"})
    await stack.api()
    worker = await stack.worker()
    generation = await stack.create("stopping")
    await stack.reader(generation).connect(stop_after=5)
    await own_server.kill()
    assert await worker.terminate(timeout=20) == 0
    await upstream.wait_closed("stopping")
    await stack.http.aclose()
