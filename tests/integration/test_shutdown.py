"""An api that goes down says so: open streams end with a jittered `retry:`, and go on at the next api."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

from tests.reader import Reader, check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until


async def test_sigterm_ends_open_streams_with_a_jittered_retry(stack: Stack, upstream: Upstream) -> None:
    """All streams are closed cleanly within 5 s, each with its own `retry:`, and lose nothing at the other api."""
    script = Script(count=300, pace_seconds=0.03)
    upstream.script("shutdown", script)
    first, second = await stack.api(), await stack.api()
    await stack.worker()
    generation = await stack.create("shutdown")
    readers = [stack.reader(generation, first) for _ in range(100)]
    reading = [asyncio.create_task(reader.connect()) for reader in readers]
    await wait_until(lambda: all(len(reader.blocks) > 3 for reader in readers))
    first.process.signal(signal.SIGTERM)
    stopped_at = time.monotonic()
    responses = await asyncio.gather(*reading)
    assert time.monotonic() - stopped_at < 5
    assert all(response.clean for response in responses)
    assert all(len(reader.retries) == 2 for reader in readers)
    assert len({reader.retries[-1] for reader in readers}) > 20, "the retries are not jittered"
    assert await first.process.wait(15) in (0, -signal.SIGTERM)
    for reader in readers[:5]:
        reader.url = second.url + generation["events_url"]
        await reader.read_to_end()
        check_history(reader.blocks)
        assert reader.text == script.text("hello")


async def test_an_api_killed_mid_stream_costs_nothing_but_a_reconnect(stack: Stack, upstream: Upstream) -> None:
    """`kill -9` of an api: its readers go on at another from the last id they have."""
    script = Script(count=200, pace_seconds=0.02)
    upstream.script("api-killed", script)
    first, second = await stack.api(), await stack.api()
    await stack.worker()
    generation = await stack.create("api-killed")
    reader = stack.reader(generation, first)
    reading = asyncio.create_task(reader.connect())
    await wait_until(lambda: len(reader.blocks) > 10)
    await first.process.kill()
    await reading
    reader.url = second.url + generation["events_url"]
    await reader.read_to_end()
    check_history(reader.blocks)
    assert reader.text == script.text("hello")


async def test_a_reader_that_never_reads_is_cut_off(stack: Stack, upstream: Upstream) -> None:
    """A client that takes nothing is closed after the send time-out and can resume; others are not held up."""
    script = Script(chunks=["x" * 4000] * 1000, pace_seconds=0.001)
    upstream.script("greedy", script)
    api = await stack.api(REJOIN_SEND_TIMEOUT_SECONDS="1")
    await stack.worker()
    generation = await stack.create("greedy")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", api.port))
    sock.sendall(f"GET {generation['events_url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    full = await stack.reader(generation).read_to_end()
    assert full.text == script.text("hello")

    def cut_off() -> bool:
        try:
            sock.send(b"\r\n", socket.MSG_DONTWAIT)
            return False
        except BlockingIOError:
            return False
        except OSError:
            return True

    await wait_until(cut_off, timeout=15)
    sock.close()
    resumed = Reader(full.url, blocks=full.blocks[:10])
    await resumed.read_to_end()
    assert resumed.raw == full.raw


async def test_a_server_that_is_full_starts_nothing(stack: Stack, upstream: Upstream) -> None:
    """Beyond REJOIN_MAX_STREAMS a streamed POST is refused before anything is started; an EventSource comes back."""
    upstream.script("full-house", Script(count=10, stall_at=2))
    api = await stack.api(REJOIN_MAX_STREAMS="1")
    await stack.worker()
    generation = await stack.create("full-house")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.connect())
    await wait_until(lambda: len(reader.blocks) > 2)
    late = stack.reader(generation)
    response = await late.connect()
    assert response.status == 200 and response.clean and not late.blocks and late.retries[0] > 5000
    say = {"role": "user", "content": "hi"}
    asked = {
        "/v1/chat/completions": {"model": "refused", "messages": [say], "stream": True},
        "/v1/responses": {"model": "refused", "input": "hi", "stream": True},
        "/api/chat": {"model": "refused", "id": "c", "messages": [{**say, "parts": [{"type": "text", "text": "hi"}]}]},
    }
    for path, body in asked.items():
        answer = await stack.http.post(api.url + path, json=body)
        assert answer.status_code == 503, path
    listed = (await stack.http.get(api.url + "/v1/generations")).json()["data"]
    assert [one["id"] for one in listed] == [generation["id"]]
    await stack.cancel(generation)
    await reading
