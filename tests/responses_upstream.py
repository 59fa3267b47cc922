"""The scripted upstream that answers in the background: OpenAI's Responses, whose every event and misdeed is written.

A response goes on when its client leaves, and can be come back to behind any event; what it generated is counted, so
that a test can tell an answer that was taken up from one that was paid for twice. The model's name chooses the script.

    async with ResponsesUpstream() as upstream:
        upstream.script("slow", Background(count=50, pace_seconds=0.02))
        ... ask upstream.base_url for the model "slow" ...
        assert upstream.only("slow").generated == 50
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from tests.upstream import words
from tests.waiting import wait_until

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What becomes of a request. A str of `chunks` is a text delta, a dict an event of its own, without its number.

    `cuts` and `stalls` are for each connection in turn, the POST's being the first: after how many events it breaks or
    falls silent; None: it does not."""

    chunks: Sequence[str | Mapping[str, Any]] | None = None
    count: int = 20  # without `chunks`: so many `words`, seeded by the last user text
    pace_seconds: float = 0.0
    hold_at: int | None = None  # chunks after which it generates nothing more until `release`
    end: Mapping[str, Any] | None = field(default_factory=lambda: {"type": "response.completed"})
    response: Mapping[str, Any] = field(default_factory=dict)  # fields of the Response, in all events that have one
    silent_at_first: bool = False  # the response has begun, and its creator is told nothing until `release`
    status: int = 200  # of the POST
    attach_status: int = 200  # of coming back
    fail_first: int | None = None  # that many POSTs, and that many returns, get that status; None: all of them
    cuts: Sequence[int | None] = ()
    cut: Literal["reset", "end"] = "reset"
    stalls: Sequence[int | None] = ()
    numbered: bool = True
    ignores_starting_after: bool = False

    def outputs(self, seed: str) -> list[str | Mapping[str, Any]]:
        return list(words(self.count, seed) if self.chunks is None else self.chunks)

    def text(self, seed: str = "") -> str:
        return "".join(chunk for chunk in self.outputs(seed) if isinstance(chunk, str))


@dataclass(eq=False)
class Generation:
    """One response: its events so far, and who listened."""

    id: str
    body: Json
    headers: dict[str, str]
    script: Background
    events: list[Json] = field(default_factory=list)
    generated: int = 0  # chunks
    status: str = "in_progress"
    cancelled_at: float | None = None
    cancels: int = 0
    starts: list[int | None] = field(default_factory=list)  # `starting_after` of each return
    listeners: int = 0  # connections that are open
    connections: int = 0  # that there were
    released: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.status != "in_progress"


class ResponsesUpstream(AbstractAsyncContextManager["ResponsesUpstream"]):
    """The server, listening on a free port while its `async with` lasts."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", 0
        self.generations: list[Generation] = []
        self.posts: list[Json] = []
        self.returns = 0
        self._scripts: dict[str, Background] = {}
        self._open: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> ResponsesUpstream:
        self._server = await asyncio.start_server(self._accept, self.host, 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [*self._open, *(one.task for one in self.generations if one.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def script(self, model: str, script: Background) -> None:
        self._scripts[model] = script

    def of(self, model: str) -> list[Generation]:
        return [one for one in self.generations if one.body.get("model") == model]

    def only(self, model: str) -> Generation:
        """The one response there was for a model."""
        (one,) = self.of(model)
        return one

    async def wait_generated(self, model: str, n: int, timeout: float = 20) -> Generation:
        await wait_until(lambda: self.of(model) and self.of(model)[-1].generated >= n, timeout, every=0.005)
        return self.of(model)[-1]

    async def wait_left(self, model: str, timeout: float = 20) -> None:
        """Until nobody listens to the responses for a model."""
        await wait_until(lambda: not any(one.listeners for one in self.of(model)), timeout, every=0.005)

    # --- serving

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = start.split(" ")
        url = urlsplit(target)
        found = re.fullmatch(r"/v1/responses(?:/([\w-]+)(/cancel)?)?", url.path)
        if found is None:
            return await _plain(writer, 404)
        match method, found[1], found[2]:
            case "POST", None, None:
                await self._create(reader, writer, json.loads(body), headers)
            case "GET", given, None if given:
                await self._return(reader, writer, given, parse_qs(url.query))
            case "POST", given, "/cancel" if given:
                await self._cancel(writer, given)
            case _:
                await _plain(writer, 405)

    async def _create(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Json, headers: dict[str, str]
    ) -> None:
        assert body["stream"] and body["background"] and body["store"], "not a background stream"
        self.posts.append(body)
        script = self._scripts.get(body["model"], Background())
        tries = sum(post["model"] == body["model"] for post in self.posts)
        if script.status != 200 and (script.fail_first is None or tries <= script.fail_first):
            return await _plain(writer, script.status)
        one = Generation(f"resp_{len(self.generations):032x}", body, headers, script)
        self.generations.append(one)
        one.task = asyncio.create_task(_generate(one))
        await self._listen(reader, writer, one, -1)

    async def _return(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, given: str, query: dict[str, list[str]]
    ) -> None:
        self.returns += 1
        one = next((one for one in self.generations if one.id == given), None)
        if one is None:
            return await _plain(writer, 404)
        assert query.get("stream") == ["true"]
        after = int(query["starting_after"][0]) if "starting_after" in query else None
        one.starts.append(after)
        script = one.script
        if script.attach_status != 200 and (script.fail_first is None or len(one.starts) <= script.fail_first):
            return await _plain(writer, script.attach_status)
        await self._listen(reader, writer, one, -1 if after is None or script.ignores_starting_after else after)

    async def _cancel(self, writer: asyncio.StreamWriter, given: str) -> None:
        one = next((one for one in self.generations if one.id == given), None)
        if one is None:
            return await _plain(writer, 404)
        one.cancels += 1
        if not one.is_over and one.task is not None:
            one.task.cancel()
            one.status, one.cancelled_at = "cancelled", asyncio.get_running_loop().time()
        await _plain(writer, 200)

    async def _listen(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one: Generation, after: int
    ) -> None:
        """Write the events that follow, until the response or the connection ends, or the client leaves."""
        n, one.connections = one.connections, one.connections + 1
        one.listeners += 1
        writing = asyncio.create_task(_write_events(writer, one, after, n))
        leaving = asyncio.create_task(reader.read())
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            one.listeners -= 1
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)


async def _generate(one: Generation) -> None:
    """Speak, whoever listens."""
    if one.script.silent_at_first:
        await one.released.wait()
    for kind in ("response.created", "response.queued", "response.in_progress"):
        one.events.append(_about(one, {"type": kind}))
    seed = _last_user_text(one.body)
    for n, chunk in enumerate(one.script.outputs(seed)):
        if n == one.script.hold_at:
            await one.released.wait()
        if one.script.pace_seconds:
            await asyncio.sleep(one.script.pace_seconds)
        one.generated += 1
        one.events.append(text_delta(chunk) if isinstance(chunk, str) else dict(chunk))
    if one.script.hold_at is not None and one.script.hold_at >= one.generated:
        await one.released.wait()
    if one.script.end is not None:
        one.events.append(_about(one, dict(one.script.end)))
    one.status = "over"


def text_delta(text: str) -> Json:
    return {"type": "response.output_text.delta", "item_id": "msg_0", "output_index": 0, "content_index": 0,
            "delta": text, "logprobs": []}  # fmt: skip


def call_added(output_index: int, call_id: str, name: str) -> Json:
    item = {"type": "function_call", "id": f"fc_{output_index}", "call_id": call_id, "name": name, "arguments": ""}
    return {"type": "response.output_item.added", "output_index": output_index, "item": item}


def arguments_delta(output_index: int, text: str) -> Json:
    where = {"item_id": f"fc_{output_index}", "output_index": output_index}
    return {"type": "response.function_call_arguments.delta", **where, "delta": text}


def _about(one: Generation, event: Json) -> Json:
    usage = {"input_tokens": 7, "output_tokens": one.generated, "total_tokens": 7 + one.generated}
    kind = event["type"].removeprefix("response.")
    own = {"id": one.id, "object": "response", "status": kind, "background": True, "output": [], "usage": usage}
    return {**event, "response": {**own, **one.script.response, **event.get("response", {})}}


async def _write_events(writer: asyncio.StreamWriter, one: Generation, after: int, n: int) -> None:
    cut, stall = (places[n] if n < len(places) else None for places in (one.script.cuts, one.script.stalls))
    head = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", "Connection": "close"}
    writer.write(_head(200, head))
    number = after + 1
    while not (one.is_over and number >= len(one.events)):
        if number == stall:
            await asyncio.Event().wait()
        if number == cut:
            return await _cut(writer, one)
        if number >= len(one.events):  # not yet generated
            await asyncio.sleep(0.002)
            continue
        event = one.events[number]
        told = {**event, "sequence_number": number} if one.script.numbered else event
        data = f"event: {event['type']}\ndata: {json.dumps(told)}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        number += 1
    writer.write(b"0\r\n\r\n")
    return await writer.drain()


async def _cut(writer: asyncio.StreamWriter, one: Generation) -> None:
    if one.script.cut == "end":
        writer.write(b"0\r\n\r\n")
        return await writer.drain()
    await writer.drain()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return None


async def _plain(writer: asyncio.StreamWriter, status: int) -> None:
    body = b'{"object":"scripted"}'
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    writer.write(_head(status, headers) + body)
    await writer.drain()


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _last_user_text(body: Json) -> str:
    contents = [item.get("content") for item in body["input"] if item.get("role") == "user"]
    last = contents[-1] if contents else ""
    return last if isinstance(last, str) else "".join(str(part.get("text", "")) for part in last or ())
