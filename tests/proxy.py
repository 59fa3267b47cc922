"""A TCP proxy that goes wrong on purpose: between a client and a server, on loopback.

It passes everything on until told otherwise. Its switches stand for what a network does: packets that come late
(`freeze`, `delay_seconds`), connections that break (`cut`, `cut_after`), an answer that is lost after the server did
what it was asked (`drop_replies`), a host that is not there any more (`black_hole`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Direction: TypeAlias = Literal["up", "down"]  # to the server, to the client
BOTH: tuple[Direction, ...] = ("up", "down")


def _open_gates() -> dict[Direction, asyncio.Event]:
    gates: dict[Direction, asyncio.Event] = {direction: asyncio.Event() for direction in BOTH}
    for gate in gates.values():
        gate.set()
    return gates


@dataclass
class Proxy:
    """Breaks each connection after `cut_after` bytes of the server's answer, when set; the rest are switches."""

    port_behind: int
    cut_after: int | None = None
    delay_seconds: float = 0.0  # that each piece is held back, in either direction
    black_hole: bool = False  # new connections are taken, and nothing ever comes of them
    port: int = 0
    cuts: int = 0
    dropped: int = 0  # replies that were swallowed
    _to_drop: int = 0
    _drop_marker: bytes = b""
    _gates: dict[Direction, asyncio.Event] = field(default_factory=_open_gates)
    _links: set[_Link] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [link.task for link in self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def freeze(self, *directions: Direction) -> None:
        """Hold back everything (in these directions only, if named): nothing is lost, nothing arrives."""
        for direction in directions or BOTH:
            self._gates[direction].clear()

    def thaw(self) -> None:
        """Let everything flow again, what was held back first: also what a client sent that has left meanwhile."""
        for gate in self._gates.values():
            gate.set()

    def cut(self) -> int:
        """Break all connections; how many there were."""
        links = list(self._links)
        for link in links:
            link.abort()
        self.cuts += len(links)
        return len(links)

    def drop_replies(self, count: int = 1, to: bytes = b"") -> None:
        """Lose the replies to the next `count` requests that contain `to`: the server has done what it was asked, the
        client sees its connection break."""
        self._to_drop, self._drop_marker = count, to

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _Link(task, writer)
        self._links.add(link)
        try:
            if self.black_hole:
                await asyncio.Event().wait()
            behind, link.behind = await asyncio.open_connection("127.0.0.1", self.port_behind)
            await self._pass_on(link, reader, behind)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._links.discard(link)
            link.abort()

    async def _pass_on(self, link: _Link, client: asyncio.StreamReader, server: asyncio.StreamReader) -> None:
        """Both ways, until either side is done or the link is broken."""
        ways = [asyncio.create_task(self._up(link, client)), asyncio.create_task(self._down(link, server))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, link: _Link, client: asyncio.StreamReader) -> None:
        assert link.behind is not None
        with suppress(ConnectionError):
            while data := await client.read(65536):
                await self._hold("up")
                if self._to_drop and self._drop_marker in data:
                    self._to_drop -= 1
                    link.reply_is_lost = True
                link.behind.write(data)
                await link.behind.drain()

    async def _down(self, link: _Link, server: asyncio.StreamReader) -> None:
        left = self.cut_after
        with suppress(ConnectionError):
            while data := await server.read(65536):
                await self._hold("down")
                if link.reply_is_lost:
                    self.dropped += 1
                    return
                if left is not None and len(data) >= left:
                    link.writer.write(data[:left])
                    await link.writer.drain()
                    link.writer.write_eof()
                    self.cuts += 1
                    return
                link.writer.write(data)
                await link.writer.drain()
                left = None if left is None else left - len(data)

    async def _hold(self, direction: Direction) -> None:
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        await self._gates[direction].wait()


@dataclass(eq=False)
class _Link:
    """One client's connection and the one to the server that it stands for."""

    task: asyncio.Task[None]
    writer: asyncio.StreamWriter
    behind: asyncio.StreamWriter | None = None
    reply_is_lost: bool = False

    def abort(self) -> None:
        for one in (self.writer, self.behind):
            if one is not None:
                one.transport.abort()
