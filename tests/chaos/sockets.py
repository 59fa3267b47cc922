"""Readers as light as can be, for thousands of them: a socket each, and the bytes that came."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

_RETRY = re.compile(rb"retry: (\d+)\n\n")
ESTABLISHED = "01"  # as /proc/net/tcp says it


class Raw(asyncio.Protocol):
    """One connection of an EventSource, unparsed. Times are monotonic."""

    def __init__(self, request: bytes) -> None:
        self.received = bytearray()
        self.first_event_at: float | None = None
        self.closed_at: float | None = None
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.first_event_at is None and b"\ndata: " in self.received:
            self.first_event_at = time.monotonic()
        if self.is_complete:  # HTTP keeps the connection; an EventSource has what it waited for
            self._close()

    def connection_lost(self, error: Exception | None) -> None:
        self._close()

    @property
    def status(self) -> int:
        return int(self.received[9:12] or b"0")

    @property
    def retries(self) -> list[int]:
        """Every `retry:` that came, in milliseconds."""
        return [int(found[1]) for found in _RETRY.finditer(self.received)]

    @property
    def is_complete(self) -> bool:
        """Was the body ended properly?"""
        return self.received.endswith(b"\r\n0\r\n\r\n")

    def _close(self) -> None:
        self.closed_at = self.closed_at or time.monotonic()
        self.transport.close()


def request_for(url: str, last_event_id: str = "") -> bytes:
    parts = urlsplit(url)
    resume = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id else ""
    return f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n{resume}\r\n".encode()


async def join(url: str, last_event_id: str = "", until: Callable[[Raw], bool] = lambda _: False) -> Raw:
    """Connect, again and again while the server's door is too full to knock at, and ask."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    while True:
        with suppress(OSError):
            _, raw = await loop.create_connection(
                lambda: Raw(request_for(url, last_event_id)), parts.hostname, parts.port
            )
            return raw
        await asyncio.sleep(0.1)


def deaf_socket(url: str) -> socket.socket:
    """A client that asks and never reads, with as little room for what comes as the system allows."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.connect((parts.hostname, parts.port))
    sock.sendall(request_for(url))
    return sock


def connections_to(port: int, pid: int) -> int:
    """How many connections to a local port a process holds."""
    return sum(remote == port for _, remote in _connections(pid))


def clients_of(port: int, pid: int) -> set[int]:
    """The ports of the clients whose connections to its port a process holds."""
    return {remote for local, remote in _connections(pid) if local == port}


def _connections(pid: int) -> list[tuple[int, int]]:
    """The local and the remote port of each connection of a process."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [
        (int(line[1].rpartition(":")[2], 16), int(line[2].rpartition(":")[2], 16))
        for line in lines
        if line[9] in inodes and line[3] == ESTABLISHED
    ]
