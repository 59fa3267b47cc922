"""Clients of every dialect over raw sockets, which leave and come back at random and keep all they heard.

A client knows its protocol as a user's program does: where to ask, where to go on from, when it has the whole answer.
It judges nothing; `tests/chaos/checker.py` does.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from tests.chaos import hearing
from tests.chaos.checker import Connection, History
from tests.reader import Response, body_of

SILENCE_SECONDS = 20.0  # after which a client hangs up and asks again
ASKING = ("chat_completions", "responses", "ui_messages")  # their own first request creates the generation
OVER = ("complete", "failed", "cancelled")


@dataclass(frozen=True)
class Request:
    """What to ask next. `cursor`: what the client says it has."""

    path: str
    body: dict | None = None
    key: str = ""
    cursor: str = ""
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a generation is asked, the same for all its clients: one key for one question."""

    model: str
    prompt: str
    key: str


async def ask(
    base: str, request: Request, leave_after: int | None = None, into: list[Connection] | None = None
) -> Connection:
    """One request, read to its end, or until so many bytes of the body came. `into`: where it is to be seen at once."""
    connection, response = Connection(asked=request.cursor), Response()
    if into is not None:
        into.append(connection)
    with suppress(OSError, asyncio.IncompleteReadError, ValueError):  # refused, reset, broken off, silent
        await _exchange(base, request, connection, response, leave_after)
    connection.status, connection.clean = response.status, response.clean
    return connection


async def _exchange(
    base: str, request: Request, connection: Connection, response: Response, leave_after: int | None
) -> None:
    parts = urlsplit(base)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
    try:
        writer.write(_written(parts.netloc, request))
        async with asyncio.timeout(SILENCE_SECONDS):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        response.status = int(head[0].split()[1])
        response.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        async with aclosing(body_of(reader, response)) as pieces:
            await _listen(pieces, connection, leave_after)
    finally:
        writer.transport.abort()


async def _listen(pieces: AsyncIterator[bytes], connection: Connection, leave_after: int | None) -> None:
    """Until the end, or until the client goes: it has what it wanted, or it hears nothing more."""
    while leave_after is None or len(connection.body) < leave_after:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                connection.body += await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            break
    connection.left = True


def _written(host: str, request: Request) -> bytes:
    body = b"" if request.body is None else json.dumps(request.body).encode()
    method = "GET" if request.body is None else "POST"
    lines = [f"{method} {request.path} HTTP/1.1", f"Host: {host}", *request.headers]
    lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body else []
    lines += [f"Idempotency-Key: {request.key}"] if request.key else []
    return "\r\n".join([*lines, "", ""]).encode() + body


class Client(Protocol):
    """One program's way to read an answer. `over`: it knows how the answer ended."""

    over: bool

    def request(self) -> Request: ...

    def hear(self, connection: Connection) -> None: ...

    def once_more(self) -> Request | None:
        """The request for the whole answer after the end; None where all is compared with the log."""


@dataclass
class Native:
    """An EventSource that keeps its last id; with `?snapshot=true`, a page that opens in the middle."""

    question: Question
    generation_id: str
    snapshot: bool = False
    over: bool = False
    _last_id: str = ""

    def request(self) -> Request:
        query = "?snapshot=true" if self.snapshot else ""
        headers = (f"Last-Event-ID: {self._last_id}",) if self._last_id else ()
        return Request(f"/v1/generations/{self.generation_id}/events{query}", cursor=self._last_id, headers=headers)

    def hear(self, connection: Connection) -> None:
        heard = hearing.native(connection.body)
        if heard.blocks:
            self._last_id = heard.blocks[-1].fields["id"]
        self.over = self.over or heard.ending in OVER or connection.status == 204

    def once_more(self) -> None:
        return None


@dataclass
class Text:
    """Reads the words. Where they break off, it looks whether more are to come."""

    question: Question
    generation_id: str
    over: bool = False

    def request(self) -> Request:
        return Request(f"/v1/generations/{self.generation_id}/text")

    def hear(self, connection: Connection) -> None:
        self.over = self.over or (connection.status == 200 and connection.clean and not connection.left)

    def once_more(self) -> None:
        return None


@dataclass
class ChatCompletions:
    """Sends the same request again until it was told how it ended."""

    question: Question
    generation_id: str
    over: bool = False

    def request(self) -> Request:
        body = {
            "model": self.question.model,
            "messages": [{"role": "user", "content": self.question.prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Request("/v1/chat/completions", body, self.question.key)

    def hear(self, connection: Connection) -> None:
        self.over = self.over or _is_over("chat_completions", connection)

    def once_more(self) -> Request:
        return self.request()


@dataclass
class Responses:
    """Creates in the background, then retrieves after the last number it saw."""

    question: Question
    generation_id: str
    over: bool = False
    _response_id: str = ""
    _last: int | None = None

    def request(self) -> Request:
        if not self._response_id:
            asked = {"model": self.question.model, "input": self.question.prompt}
            return Request("/v1/responses", {**asked, "stream": True, "background": True}, self.question.key)
        after = "" if self._last is None else f"&starting_after={self._last}"
        cursor = "" if self._last is None else str(self._last)
        return Request(f"/v1/responses/{self._response_id}?stream=true{after}", cursor=cursor)

    def hear(self, connection: Connection) -> None:
        heard = hearing.responses(connection.body) if connection.status == 200 else hearing.Heard()
        for block in heard.blocks:
            self._last = block.json["sequence_number"]
            if block.json["type"] == "response.created":
                self._response_id = block.json["response"]["id"]
        if connection.status == 409 or heard.ending == "superseded":
            self._last = None
        self.over = self.over or heard.ending in OVER

    def once_more(self) -> Request:
        return Request(f"/v1/responses/{self._response_id}?stream=true")


@dataclass
class UiMessages:
    """`useChat`: sends a message once, then resumes the chat; also what has ended."""

    question: Question
    generation_id: str
    over: bool = False
    _chat_is_known: bool = False

    def request(self) -> Request:
        chat = f"chat-{self.question.key}"
        if self._chat_is_known:
            return Request(f"/api/chat/{chat}/stream?ended=true")
        message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": self.question.prompt}]}
        return Request(
            "/api/chat", {"id": chat, "model": self.question.model, "messages": [message]}, self.question.key
        )

    def hear(self, connection: Connection) -> None:
        self._chat_is_known = connection.status == 200 or (self._chat_is_known and connection.status != 204)
        self.over = self.over or _is_over("ui_messages", connection)

    def once_more(self) -> Request:
        return self.request()


def _is_over(dialect: str, connection: Connection) -> bool:
    return connection.status == 200 and hearing.HEAR[dialect](connection.body).ending in OVER


CLIENTS: dict[str, Callable[[Question, str], Client]] = {
    "native": Native,
    "snapshot": lambda question, generation_id: Native(question, generation_id, snapshot=True),
    "text": Text,
    "chat_completions": ChatCompletions,
    "responses": Responses,
    "ui_messages": UiMessages,
}


@dataclass
class Swarm:
    """Clients that hop between the apis. `restless`: the share of connections a client leaves before their end."""

    apis: Callable[[], Sequence[str]]
    chance: random.Random
    restless: float = 0.4
    connections: int = 0
    lost_patience: list[str] = field(default_factory=list)

    async def create(self, question: Question) -> str:
        """POST it until an api takes it; the generation's id."""
        body = {"model": question.model, "prompt": question.prompt}
        while True:
            connection = await ask(self._api(), Request("/v1/generations", body, question.key))
            if connection.status == 202 and connection.clean:
                return str(json.loads(connection.body)["id"])
            if connection.status not in (0, 202, 503):
                raise AssertionError(f"{question.prompt}: {connection.status} {connection.body!r}")
            await self._breathe()

    async def read(self, question: Question, generation_id: str, history: History, seconds: float) -> History:
        """All that one client hears, until it knows how the answer ended and has heard it once more."""
        dialect = history.dialect
        client = CLIENTS[dialect](question, generation_id)
        try:
            async with asyncio.timeout(seconds):
                if dialect not in ASKING:
                    await self.create(question)
                await self._follow(client, history)
                history.full = await self._once_more(client, dialect)
        except TimeoutError:
            self.lost_patience.append(f"{question.prompt} {dialect} {history.reader}")
        return history

    async def _follow(self, client: Client, history: History) -> None:
        while not client.over:
            leave_after = self.chance.randrange(1, 6000) if self.chance.random() < self.restless else None
            connection = await ask(self._api(), client.request(), leave_after, history.connections)
            self.connections += 1
            client.hear(connection)
            if not client.over:
                await self._look(client, connection)
                await self._breathe()
        history.knows_the_end = True

    async def _look(self, client: Client, connection: Connection) -> None:
        """A stream that says no more than that something went wrong: the snapshot tells whether more will come."""
        if connection.status != 200 or connection.left or not isinstance(client, Text | UiMessages):
            return
        if await self.status(client.generation_id) in ("failed", "cancelled"):
            client.over = True

    async def status(self, generation_id: str) -> str:
        """What the snapshot says; empty when no api answers."""
        connection = await ask(self._api(), Request(f"/v1/generations/{generation_id}"))
        found = connection.status == 200 and connection.clean
        return str(json.loads(connection.body)["status"]) if found else ""

    async def _once_more(self, client: Client, dialect: str) -> Connection | None:
        """The whole stream after the end, asked for until an api gives it."""
        request = client.once_more()
        while request is not None:
            connection = await ask(self._api(), request)
            heard = hearing.HEAR[dialect](connection.body)
            if connection.status == 200 and connection.clean and heard.ending in (*OVER, "error"):
                return connection
            await self._breathe()
        return None

    def _api(self) -> str:
        return self.chance.choice(self.apis())

    async def _breathe(self) -> None:
        await asyncio.sleep(self.chance.uniform(0.02, 0.3))
