"""The scripted upstream: a Chat Completions server whose every answer, pause and misdeed is written beforehand.

A raw asyncio server without a framework, so that it can cut at a byte, stall for ever, and know within a
millisecond that the client has left. A request's model name chooses its script. Streams only.

    async with Upstream() as upstream:
        upstream.script("slow", Script(count=50, pace_seconds=0.02))
        ... ask upstream.base_url for the model "slow" ...
        await upstream.wait_closed("slow")

By hand: `python -m tests.upstream --port 9000`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from tests.waiting import wait_until

_ODDITIES = (
    "👋 ",
    "👩\u200d👩\u200d👧 ",
    "café ",
    "naïve ",
    "Zoë ",
    "日本語 ",
    "中文，",
    "\u2028",
    "\u2029",
    "\x85",
    '"quoted" ',
    "\\back ",
    "line\n",
    "return\r\n",
    "\n\n",
    "data: x\n\n",
    "\tтаб ",
    "\x00",
    "\ufeff",
)
_PLAIN = ("the", "stream", "of", "words", "goes", "on", "while", "nobody", "reads", "and", "all", "are", "kept")


def words(n: int, seed: int | str = 0) -> list[str]:
    """`n` pieces of text, the same for the same seed: plain words, and now and then what breaks careless code."""
    chance = random.Random(str(seed))
    return [chance.choice(_ODDITIES) if chance.random() < 0.15 else f"{chance.choice(_PLAIN)} " for _ in range(n)]


def frame(**chunk: Any) -> bytes:
    """One chunk of a stream as a server-sent event; for the raw frames of a script."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    """The frame of one delta of the first choice."""
    return frame(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the upstream does with a request. Places `…_at` count the output chunks sent before (`0`: at once)."""

    chunks: Sequence[str | bytes] | None = None  # str: a content delta; bytes: a frame, sent as it is
    count: int = 20  # without `chunks`: so many `words`, seeded by the last user text
    reasoning: Sequence[str] = ()
    reasoning_field: str = "reasoning_content"
    refusal: Sequence[str] = ()
    tool_calls: Sequence[Mapping[str, Any]] = ()  # each one a fragment, in a delta of its own
    pace_seconds: float = 0.0  # between output chunks
    first_delay_seconds: float = 0.0  # between the headers and the first output chunk
    finish_reason: str | None = "stop"
    usage: bool | Literal["last"] = True  # in a chunk of its own, in the finishing one, or not at all
    done: bool = True

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # sent instead of a stream
    fail_first: int | None = None  # `status` and `body` for so many hits only, the stream from then on

    html: bool = False  # a page instead of a stream, though it is called one
    error_at: int | None = None
    bad_json_at: int | None = None
    cut_at: int | None = None
    cut_at_byte: int | None = None
    cut: Literal["reset", "close", "end"] = "reset"  # RST; FIN in mid-body; a proper end of the body
    stall_headers: bool = False  # until the client leaves, or `release`
    stall_at: int | None = None
    stall_end: bool = False  # after the finish reason
    keep_alive: bool = False  # more requests over one connection
    repeats_prefix: bool = False  # asked to go on with an assistant's message, say its words again first

    def outputs(self, seed: str) -> list[str | bytes]:
        """The content chunks of an answer to a prompt whose last user text is `seed`."""
        return list(words(self.count, seed) if self.chunks is None else self.chunks)

    def text(self, seed: str = "") -> str:
        """The whole text of that answer, raw frames left out."""
        return "".join(chunk for chunk in self.outputs(seed) if isinstance(chunk, str))


@dataclass(slots=True)
class Request:
    """One request as it was received and served. Times are `loop.time()`."""

    model: str
    body: dict[str, Any]
    headers: dict[str, str]
    opened_at: float
    chunks_sent: int = 0
    closed_at: float | None = None  # the answer is over, or its socket closed
    left_early: bool = False  # the client closed before the script was at its end


class Upstream(AbstractAsyncContextManager["Upstream"]):
    """The server, listening while its `async with` lasts. Port 0: a free one."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, default: Script | None = None) -> None:
        self.host, self.port = host, port
        self._default = default or Script()
        self._hits: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.connections: set[_Connection] = set()
        self._scripts: dict[str, tuple[Script, ...]] = {}
        self._released: dict[str, asyncio.Event] = {}

    async def __aenter__(self) -> Upstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [connection.task for connection in self.connections if connection.task]
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await wait_until(lambda: not self.connections)
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    @property
    def open_sockets(self) -> int:
        return len(self.connections)

    def script(self, model: str, *scripts: Script) -> None:
        """The n-th request for `model` gets the n-th script, and those after it the last one."""
        self._scripts[model] = scripts

    def script_of(self, model: str, hit: int) -> Script:
        scripts = self._scripts.get(model) or (self._default,)
        return scripts[min(hit, len(scripts)) - 1]

    def requests_of(self, model: str) -> list[Request]:
        return [request for request in self.requests if request.model == model]

    def hits(self, model: str) -> int:
        return self._hits[model]

    def note(self, request: Request) -> int:
        """Record a request; the hit it is for its model, counted from 1."""
        self.requests.append(request)
        self._hits[request.model] += 1
        return self._hits[request.model]

    def open_requests(self, model: str | None = None) -> int:
        return sum(1 for request in self.requests if request.closed_at is None and model in (None, request.model))

    def release(self, model: str) -> None:
        """Let the stalled requests for `model` go on, and those to come."""
        self.release_event(model).set()

    def release_event(self, model: str) -> asyncio.Event:
        return self._released.setdefault(model, asyncio.Event())

    async def wait_hits(self, model: str, n: int = 1, timeout: float = 10) -> None:
        await wait_until(lambda: self.hits(model) >= n, timeout, every=0.002)

    async def wait_sent(self, model: str, n: int, timeout: float = 10) -> None:
        """Until the latest request for `model` has been sent `n` output chunks."""
        await wait_until(lambda: self.hits(model) and self.requests_of(model)[-1].chunks_sent >= n, timeout, 0.002)

    async def wait_closed(self, model: str, timeout: float = 10) -> None:
        """Until no request for `model` is open any more."""
        await wait_until(lambda: not self.open_requests(model), timeout, every=0.002)


class _Cut(Exception):
    """The script says that the connection ends here."""


class _Connection(asyncio.Protocol):
    """One socket. Answers one request after the other; its end ends the answer."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.task: asyncio.Task[None] | None = None
        self._received = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, though not by class
        self.upstream.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self.task is None and (parsed := _parse(self._received)):
            self.task = asyncio.get_running_loop().create_task(self._serve(*parsed))

    def eof_received(self) -> None:
        self.transport.abort()  # a client that closes has left: nobody half-closes here

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.upstream.connections.discard(self)
        if self.task:
            self.task.cancel()

    async def _serve(self, target: str, headers: dict[str, str], body: bytes) -> None:
        if target != "POST /v1/chat/completions":
            self.transport.write(_head(404, {"Content-Length": "0", "Connection": "close"}))
            self.transport.close()
            return
        parsed = json.loads(body)
        model, clock = str(parsed.get("model")), asyncio.get_running_loop().time
        request = Request(model, parsed, headers, clock())
        hit = self.upstream.note(request)
        script = self.upstream.script_of(model, hit)
        try:
            await _Answer(self, request, script, hit).send()
        except asyncio.CancelledError:
            request.left_early = True
        except _Cut:
            pass
        finally:
            request.closed_at = clock()
            self.task = None
            if not script.keep_alive:
                self.transport.close()

    async def write(self, data: bytes) -> None:
        self.transport.write(data)
        if self.transport.is_closing():  # the client has left: `connection_lost` is about to cancel this
            await asyncio.sleep(60)
        await self._writable.wait()

    def reset(self) -> None:
        """Close with RST, so that the client sees a broken connection."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class _Answer:
    """One script, performed."""

    def __init__(self, connection: _Connection, request: Request, script: Script, hit: int) -> None:
        self._connection, self._request, self._script, self._hit = connection, request, script, hit
        self._bytes = 0
        self._id = f"chatcmpl-{hit}"

    async def send(self) -> None:
        script = self._script
        if script.stall_headers:
            await self._stall()
        refused = script.fail_first is None or self._hit <= script.fail_first
        if refused and (script.status != 200 or script.body is not None):
            return await self._plain(script.body if script.body is not None else b'{"error":{"message":"scripted"}}')
        close = {} if script.keep_alive else {"Connection": "close"}
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **close}
        await self._connection.write(_head(200, headers if script.status != 200 else {**headers, **script.headers}))
        if script.html:
            await self._write(b"<!DOCTYPE html>\n<html><body><h1>502 Bad Gateway</h1></body></html>\n")
        else:
            await self._stream()
        await self._connection.write(b"0\r\n\r\n")

    async def _plain(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json", "Connection": "close", **self._script.headers}
        await self._connection.write(_head(self._script.status, {**headers, "Content-Length": str(len(body))}) + body)

    async def _stream(self) -> None:
        script = self._script
        await self._write(self._frame({"role": "assistant", "content": ""}))
        loop = asyncio.get_running_loop()
        start = loop.time() + script.first_delay_seconds
        number = -1
        for number, output in enumerate(self._outputs()):
            due = start + number * script.pace_seconds
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._misbehave(number)
            await self._write(output)
            self._request.chunks_sent += 1
        await self._misbehave(number + 1)
        await self._finish()

    def _outputs(self) -> Iterator[bytes]:
        script = self._script
        yield from (self._frame({script.reasoning_field: text}) for text in script.reasoning)
        for chunk in self._contents():
            yield chunk if isinstance(chunk, bytes) else self._frame({"content": chunk})
        yield from (self._frame({"refusal": text}) for text in script.refusal)
        yield from (self._frame({"tool_calls": [dict(fragment)]}) for fragment in script.tool_calls)

    def _contents(self) -> Iterator[str | bytes]:
        """The content of the answer, or of its rest, where the request is to go on with an assistant's message."""
        outputs, begun = self._script.outputs(_last_user_text(self._request.body)), _begun(self._request.body)
        if begun and self._script.repeats_prefix:
            yield begun
        while begun:
            chunk = outputs.pop(0)
            assert isinstance(chunk, str) and begun.startswith(chunk), "asked to go on from words that were not said"
            begun = begun[len(chunk) :]
        yield from outputs

    async def _misbehave(self, number: int) -> None:
        script = self._script
        if number == script.stall_at:
            await self._stall()
        if number == script.error_at:
            await self._write(frame(error={"message": "scripted error with secret words", "type": "server_error"}))
        if number == script.bad_json_at:
            await self._write(b'data: {"choices": [{"delta": {"content": \n\n')
        if number == script.cut_at:
            await self._cut()

    async def _finish(self) -> None:
        script = self._script
        sent = self._request.chunks_sent
        usage = {"prompt_tokens": 7, "completion_tokens": sent, "total_tokens": 7 + sent}
        if script.finish_reason is not None:
            extra = {"usage": usage} if script.usage == "last" else {}
            await self._write(self._frame({}, script.finish_reason, **extra))
        if script.stall_end:
            await self._stall()
        if script.usage is True:
            await self._write(frame(**self._base(), choices=[], usage=usage))
        if script.done:
            await self._write(b"data: [DONE]\n\n")

    async def _write(self, data: bytes) -> None:
        """One piece of the body, cut where the script says so."""
        left = None if self._script.cut_at_byte is None else self._script.cut_at_byte - self._bytes
        data, cut = (data, False) if left is None or left > len(data) else (data[:left], True)
        self._bytes += len(data)
        if data:
            await self._connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        if cut:
            await self._cut()

    async def _cut(self) -> None:
        match self._script.cut:
            case "reset":
                self._connection.reset()
            case "end":
                await self._connection.write(b"0\r\n\r\n")
            case "close":
                pass
        self._connection.transport.close()
        raise _Cut

    async def _stall(self) -> None:
        await self._connection.upstream.release_event(self._request.model).wait()

    def _base(self) -> dict[str, Any]:
        return {"id": self._id, "object": "chat.completion.chunk", "created": 1, "model": self._request.model}

    def _frame(self, fields: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": fields, "finish_reason": finish_reason}
        return frame(**self._base(), choices=[choice], **extra)


def _parse(received: bytearray) -> tuple[str, dict[str, str], bytes] | None:
    """Take one request off the front of what was received: `METHOD path`, headers, body."""
    head, end, _ = bytes(received).partition(b"\r\n\r\n")
    if not end:
        return None
    start, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    size = len(head) + len(end) + int(headers.get("content-length", "0"))
    if len(received) < size:
        return None
    body = bytes(received[len(head) + len(end) : size])
    del received[:size]
    return start.rpartition(" ")[0], headers, body


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _last_user_text(body: Mapping[str, Any]) -> str:
    contents = [message.get("content") for message in body.get("messages", ()) if message.get("role") == "user"]
    last = contents[-1] if contents else ""
    return last if isinstance(last, str) else "".join(str(part.get("text", "")) for part in last or ())


def _begun(body: Mapping[str, Any]) -> str:
    """The words to go on from: those of the last message, where the request asks for it as vLLM or Mistral do."""
    last = (body.get("messages") or [{}])[-1]
    if last.get("role") != "assistant" or not (body.get("continue_final_message") or last.get("prefix")):
        return ""
    return str(last.get("content", ""))


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible upstream, on loopback.")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--pace-seconds", type=float, default=0.05)
    asked = parser.parse_args()
    default = Script(count=asked.words, pace_seconds=asked.pace_seconds)
    async with Upstream(port=asked.port, default=default) as upstream:
        print(f"{upstream.base_url} answers to any model", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main())
