"""A prompt in and a stream out in one call: `/v1/chat/stream`, `/v1/chat/stream-sse` and `/stream-question/`."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from tests.reader import Reader, Response, body_of, check_history
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream

CHAT = ("/v1/chat/stream", "/v1/chat/stream-sse")


async def post(api: Api, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx2.Response:
    async with httpx2.AsyncClient(timeout=30, trust_env=False) as http:
        return await http.post(api.url + path, json=body, headers=headers)


async def leave_after_first_byte(api: Api, path: str, body: bytes) -> dict[str, str]:
    """POST over a raw socket, close it as soon as a byte of the body is there; the headers of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:]
    response = Response(headers={k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)})
    async for _ in body_of(reader, response):
        break
    writer.close()
    return response.headers


async def test_text_and_events_in_one_call(house: Stack, upstream: Upstream) -> None:
    """The words, or the events with their ids; where to find them again; nothing that a proxy would hold back."""
    upstream.script("one-call", Script(count=30))
    for path in CHAT:
        answer = await post(house.apis[0], path, {"model": "one-call", "prompt": "hello"})
        assert answer.status_code == 200
        generation_id = answer.headers["x-generation-id"]
        assert answer.headers["location"] == f"/v1/generations/{generation_id}"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        snapshot = await house.snapshot(generation_id)
        assert snapshot["status"] == "completed" and snapshot["text"] == Script(count=30).text("hello")
        again = await Reader(house.apis[1].url + snapshot["events_url"]).read_to_end()
        if path.endswith("sse"):
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.content == again.raw
        else:
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert answer.text == snapshot["text"]


async def test_the_body_is_that_of_a_generation(house: Stack, upstream: Upstream) -> None:
    """Messages, options and the default model are taken as at `/v1/generations`; so are the errors."""
    upstream.script("one-call-body", Script(count=3))
    body = {"model": "one-call-body", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5}
    assert (await post(house.apis[0], CHAT[0], body)).status_code == 200
    (request,) = upstream.requests_of("one-call-body")
    assert request.body["temperature"] == 0.5
    by_default = await post(house.apis[0], CHAT[0], {"prompt": "What is a log?", "max_tokens": 5})
    assert len(by_default.text.split()) == 5
    for path in CHAT:
        wrong = await post(house.apis[0], path, {"prompt": "hi", "temprature": 1})
        assert wrong.status_code == 422 and wrong.headers["content-type"] == "application/problem+json"


async def test_who_leaves_ends_it(stack: Stack, upstream: Upstream) -> None:
    """Without a reader the upstream is closed after the grace time; `on_disconnect: continue` lets it go on."""
    await stack.api(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    await stack.worker(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    for path in CHAT:
        model = f"left{path.rpartition('/')[2]}"
        upstream.script(model, Script(count=50, stall_at=10))
        headers = await leave_after_first_byte(stack.apis[0], path, b'{"model": "%s", "prompt": "x"}' % model.encode())
        state = await stack.finished({"id": headers["x-generation-id"]})
        assert state["status"] == "cancelled"
        await upstream.wait_closed(model)
        assert upstream.requests_of(model)[0].left_early
    upstream.script("left-and-goes-on", Script(count=50, stall_at=10))
    body = b'{"model": "left-and-goes-on", "prompt": "x", "on_disconnect": "continue"}'
    headers = await leave_after_first_byte(stack.apis[0], CHAT[0], body)
    await upstream.wait_sent("left-and-goes-on", 10)
    upstream.release("left-and-goes-on")
    state = await stack.finished({"id": headers["x-generation-id"]})
    assert state["status"] == "completed" and state["text"] == Script(count=50).text("x")


async def test_rejoin_by_location(house: Stack, upstream: Upstream) -> None:
    """A client that was cut off goes on at `Location` from the last id that it had: together they are the whole."""
    upstream.script("one-call-rejoin", Script(count=40, stall_at=20))
    async with (
        httpx2.AsyncClient(timeout=30, trust_env=False) as http,
        http.stream("POST", house.apis[0].url + CHAT[1], json={"model": "one-call-rejoin", "prompt": "x"}) as answer,
    ):
        location, first = answer.headers["location"], Reader("")
        pending = b""
        async for data in answer.aiter_raw():
            pending = first._take(pending + data)
            if len(first.blocks) > 10:
                break
    rest = Reader(house.apis[1].url + location + "/events", blocks=list(first.blocks))
    upstream.release("one-call-rejoin")
    await rest.read_to_end()
    check_history(rest.blocks)
    assert rest.text == Script(count=40).text("x")
    assert rest.blocks[: len(first.blocks)] == first.blocks


async def test_the_same_key_attaches_to_the_same_answer(house: Stack, upstream: Upstream) -> None:
    """With an Idempotency-Key the request may be sent again: one generation, one request upstream, the same words."""
    upstream.script("one-call-key", Script(count=20))
    key = {"Idempotency-Key": "streams-key-1"}
    first, second = [
        await post(house.apis[0], CHAT[0], {"model": "one-call-key", "prompt": "x"}, key) for _ in range(2)
    ]
    assert first.text == second.text == Script(count=20).text("x")
    assert first.headers["location"] == second.headers["location"]
    assert upstream.hits("one-call-key") == 1


async def test_what_is_not_complete_is_broken_off(house: Stack, upstream: Upstream) -> None:
    """Plain text has no word for an error: the connection breaks, and `Location` has the reason. Events say it."""
    upstream.script("one-call-cut", Script(count=20, error_at=10))
    async with httpx2.AsyncClient(timeout=30, trust_env=False) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post(house.apis[0].url + CHAT[0], json={"model": "one-call-cut", "prompt": "x"})
    answer = await post(house.apis[0], CHAT[1], {"model": "one-call-cut", "prompt": "x"})
    assert b"event: generation.failed" in answer.content and b"upstream_error" in answer.content
    state = await house.snapshot(answer.headers["x-generation-id"])
    assert state["error"]["code"] == "upstream_error"


async def test_a_question_without_documents_says_what_to_set(house: Stack) -> None:
    """Where there is no folder, nothing goes to another model of that name."""
    answer = await house.http.get(house.apis[0].url + "/stream-question/", params={"query_text": "hi"})
    assert answer.status_code == 422 and answer.json()["code"] == "model_not_found"
    assert "REJOIN_DOCUMENTS" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://elsewhere.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:3000"}, 422),
        ({"Sec-Fetch-Site": "none"}, 422),
        ({}, 422),
    ],
)
async def test_no_page_of_another_site_asks_the_documents(house: Stack, headers: dict[str, str], status: int) -> None:
    """A GET that costs something is not to be had by an image on a website; 422 is how one gets in here."""
    answer = await house.http.get(house.apis[0].url + "/stream-question/?query_text=hi", headers=headers)
    assert answer.status_code == status


@pytest.mark.parametrize("query", ["", "?query_text=", "?query_text=" + "x" * 8001, "?query_text=a&on_disconnect=stay"])
async def test_a_wrong_question_is_refused(house: Stack, query: str) -> None:
    """The field that is wrong is named."""
    answer = await house.http.get(house.apis[0].url + "/stream-question/" + query)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_value"
