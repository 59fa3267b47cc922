"""A reader of event streams over a raw socket: it keeps what it got byte for byte, leaves and rejoins as told.

It follows the HTML Standard's way of parsing: a block counts when its blank line has come, else it is dropped; what it
sends on rejoining is the id of the last block that counted.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

TERMINAL = ("generation.completed", "generation.failed", "generation.cancelled")


@dataclass(frozen=True, slots=True)
class Block:
    """One dispatched event, with the very bytes it came in."""

    id: str
    event: str
    data: Any
    raw: bytes


@dataclass
class Response:
    """One connection's answer. `clean`: the body was ended properly, not broken off."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    clean: bool = False


@dataclass
class Reader:
    """A client of one generation: `blocks` is all it has seen over all its connections."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    pings: int = 0

    @property
    def last_event_id(self) -> str:
        return self.blocks[-1].id if self.blocks else ""

    @property
    def text(self) -> str:
        """The text as a client shows it: a fresh attempt voids what came before."""
        text = ""
        for block in self.blocks:
            if block.event == "generation.started" and block.data["mode"] == "fresh":
                text = ""
            elif block.event == "text.delta":
                text += block.data["text"]
        return text

    @property
    def terminal(self) -> Block | None:
        ends = [block for block in self.blocks if block.event in TERMINAL]
        assert len(ends) <= 1, f"more than one terminal event: {ends}"
        assert not ends or self.blocks[-1] is ends[0], "something followed the terminal event"
        return ends[0] if ends else None

    @property
    def raw(self) -> bytes:
        return b"".join(block.raw for block in self.blocks)

    async def connect(self, *, stop_after: int | None = None, url: str | None = None) -> Response:
        """Read one connection to its end, or until so many more blocks have come, then leave."""
        response = Response()
        self.responses.append(response)
        blocks_before = len(self.blocks)
        parts = urlsplit(url or self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
        try:
            headers = {"Host": parts.netloc, "Accept": "text/event-stream", **self.headers}
            if self.last_event_id:
                headers["Last-Event-ID"] = self.last_event_id
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            response.status = int(head[0].split()[1])
            response.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
            pending = b""
            async for chunk in body_of(reader, response):
                response.body += chunk
                pending = self._take(pending + chunk)
                if stop_after is not None and len(self.blocks) - blocks_before >= stop_after:
                    del self.blocks[blocks_before + stop_after :]
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
        return response

    async def read_to_end(self, timeout: float = 60) -> Reader:
        """Rejoin again and again, as an EventSource does, until the terminal event."""
        async with asyncio.timeout(timeout):
            while self.terminal is None:
                response = await self.connect()
                if response.status not in (0, 200):
                    raise AssertionError(f"{response.status}: {response.body!r}")
                if self.terminal is None:
                    await asyncio.sleep(0.05)
        return self

    def _take(self, pending: bytes) -> bytes:
        while (end := pending.find(b"\n\n")) >= 0:
            raw, pending = pending[: end + 2], pending[end + 2 :]
            fields = [line.partition(":")[::2] for line in raw.decode().split("\n") if line]
            values = {name: value.removeprefix(" ") for name, value in fields if name}
            if "data" in values:
                data = json.loads(values["data"])
                self.blocks.append(Block(values.get("id", ""), values.get("event", ""), data, raw))
            elif "retry" in values:
                self.retries.append(int(values["retry"]))
            else:
                self.pings += 1
        return pending


async def body_of(reader: asyncio.StreamReader, response: Response) -> Any:
    """The body's pieces as they come; sets `clean` when it is ended properly."""
    if response.headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            left = size
            while left:
                piece = await reader.read(left)
                if not piece:
                    return
                left -= len(piece)
                yield piece
            await reader.readexactly(2)
        response.clean = True
    else:
        length = int(response.headers.get("content-length", "0"))
        yield await reader.readexactly(length)
        response.clean = True


def check_history(blocks: list[Block]) -> None:
    """Each position once, in order, from one attempt at a time, then exactly one terminal event at most."""
    positions = [tuple(map(int, re.fullmatch(r"(\d+)-(\d+)", block.id).groups())) for block in blocks]  # type: ignore[union-attr]
    assert positions == sorted(set(positions)), "a position came twice or out of order"
    for before, after in pairwise(positions):
        assert after[0] != before[0] or after[1] == before[1] + 1, f"a hole between {before} and {after}"
    for position, block in zip(positions, blocks, strict=True):
        if position != (0, 1) and position[1] == 0:
            assert block.event == "generation.started" or block.event in TERMINAL
    assert sum(block.event in TERMINAL for block in blocks) <= 1
