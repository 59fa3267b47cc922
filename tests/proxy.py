"""A TCP proxy that goes wrong on purpose: between a client and a server, on loopback."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes everything on, but breaks the connection after `cut_after` bytes of the server's answer, when set."""

    port_behind: int
    cut_after: int | None = None
    port: int = 0
    cuts: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        behind_writer = None
        try:
            behind, behind_writer = await asyncio.open_connection("127.0.0.1", self.port_behind)
            sending = asyncio.create_task(_pass_on(reader, behind_writer))
            try:
                await self._answer(behind, writer)
            finally:
                sending.cancel()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for one in (writer, behind_writer):
                if one is not None:
                    one.transport.abort()

    async def _answer(self, behind: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.cut_after
        while data := await behind.read(65536):
            if left is not None and len(data) >= left:
                writer.write(data[:left])
                with suppress(ConnectionError):
                    await writer.drain()
                    writer.write_eof()
                self.cuts += 1
                return
            writer.write(data)
            await writer.drain()
            left = None if left is None else left - len(data)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
