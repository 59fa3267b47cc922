"""The wire to an upstream: HTTP/1.1 under the openai SDK's client, one connection for each request at a time.

A chunk wakes whoever waits for it, with nothing between; httpx2's own transport reads it through a dozen layers. One
rule: what came before a break is read before the break is told. Errors are httpx2's. Proxies stay with httpx2's
transport. Knows nothing of what is asked or answered.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any, TypeAlias, cast

import aiohappyeyeballs
import httptools
import httpx2

MAX_HEAD_BYTES = 100 * 1024  # of anything that is no body: a head, trailers, the extensions of a chunk
MAX_UNREAD_BYTES = 64 * 1024  # of a body: beyond it nothing more is read from the socket
NEXT_ADDRESS_SECONDS = 0.25  # for one address of a host, before the next is tried as well (RFC 8305)
CLOCK_SECONDS = 0.001  # how exact uvloop's timers are
Origin: TypeAlias = tuple[str, str, int]
Headers: TypeAlias = list[tuple[bytes, bytes]]
# What httpx2's own parser forgives as well, and an answer cannot be mistaken for another by.
LENIENCIES = {"lenient_optional_cr_before_lf": True, "lenient_spaces_after_chunk_size": True}
_BREAKS = re.compile(rb"[\r\n\0]")


class Client(httpx2.AsyncClient):
    """httpx2's client; to where no proxy leads it sends over `Transport`."""

    def _init_transport(
        self,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx2.Limits | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> httpx2.AsyncBaseTransport:
        context = httpx2.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
        return transport or Transport(context, limits or httpx2.Limits())


class Transport(httpx2.AsyncBaseTransport):
    """The connections: as many as are asked for, some of which are kept a while for the next request."""

    def __init__(self, context: ssl.SSLContext, limits: httpx2.Limits) -> None:
        context.set_alpn_protocols(["http/1.1"])
        self._context = context
        self._limits = limits
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, its body unread; `extensions["body"]` is the Body itself. Raises httpx2.TransportError."""
        sent = _packed(request, await request.aread())
        origin = _origin(request.url)
        seconds = request.extensions.get("timeout", {}).get("connect")
        connection = self._kept(origin) or await self._connect(origin, seconds)
        try:
            status, headers, body = await connection.ask(sent)
        except BaseException:
            connection.abort()
            raise
        extensions = {"http_version": b"HTTP/1.1", "body": body}
        return httpx2.Response(status, headers=headers, stream=body, extensions=extensions)

    async def aclose(self) -> None:
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # in which their sockets are closed

    def _kept(self, origin: Origin) -> Connection | None:
        for connection in reversed(self._idle):
            if connection.origin == origin and connection.is_usable:
                self._idle.remove(connection)
                return connection
        return None

    async def _connect(self, origin: Origin, seconds: float | None) -> Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        context, name = (self._context, host) if scheme == "https" else (None, None)
        try:
            async with asyncio.timeout(seconds):
                addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)
                connection = Connection(self, origin)
                try:
                    await loop.create_connection(lambda: connection, sock=sock, ssl=context, server_hostname=name)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise httpx2.ConnectTimeout("no connection in time") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: uvloop, of a socket that has just failed
            raise httpx2.ConnectError(type(error).__name__) from error
        return connection

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def free(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end, if there is room."""
        most = self._limits.max_keepalive_connections
        if most is not None and len(self._idle) >= most:
            connection.abort()
        else:
            self._idle.append(connection)
            connection.rest(self._limits.keepalive_expiry)


class Connection(asyncio.Protocol):
    """One socket: writes a request, and hands its answer to a Body."""

    def __init__(self, owner: Transport, origin: Origin) -> None:
        self.origin = origin
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**LENIENCIES)
        self._asked: asyncio.Future[None] | None = None  # until the head is there, or never comes
        self._status, self._headers = 0, Headers()
        self._body: Body | None = None
        self._error: httpx2.TransportError | None = None
        self._bytes_without_body = 0
        self._is_paused = self._is_reusable = False
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        return not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, Headers, Body]:
        """Send, and wait for the head of the answer: status, headers, and the body that is to come."""
        self.rest(None)
        self._headers, self._body, self._is_reusable, self._bytes_without_body = [], None, False, 0
        self._asked = self._loop.create_future()
        self._transport.write(request)
        await self._asked
        if self._body is None:
            raise self._error or httpx2.ReadError("the connection was closed")
        return self._status, self._headers, self._body

    def release(self, body: Body) -> None:
        """Nobody reads this body any more: what can be used again is kept, the rest closed at once."""
        if self._is_reusable and body.is_over and body is self._body:
            self.resume()
            self._owner.free(self)
        else:
            self.abort()

    def rest(self, seconds: float | None) -> None:
        """Close after so long without another request; `None`: never."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = None if seconds is None else self._loop.call_later(seconds, self.abort)

    def abort(self) -> None:
        """Close now: what was not sent yet has no reader any more."""
        self._is_reusable = False
        self._transport.abort()

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    # --- the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, though not by class
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._asked is None or (self._body is not None and self._body.is_over):  # an answer to nothing
            self.abort()
            return
        self._bytes_without_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(httpx2.RemoteProtocolError(type(error).__name__))
            return
        if self._bytes_without_body > MAX_HEAD_BYTES:
            self._break(httpx2.RemoteProtocolError("a head without an end"))

    def connection_lost(self, error: Exception | None) -> None:
        self.rest(None)
        self._owner.lost(self)
        if error is not None:
            self._break(httpx2.ReadError(type(error).__name__))
        elif self._body is not None and not _is_framed(self._headers):
            self._body.end()  # such a body goes on until the connection ends
        else:
            self._break(httpx2.RemoteProtocolError("the connection ended before the answer did"))

    def _break(self, error: httpx2.TransportError) -> None:
        self._error = error
        if self._body is not None:
            self._body.end(error)
        self._answer()
        self.abort()

    def _answer(self) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)

    # --- the parser's side

    def on_message_begin(self) -> None:
        self._is_reusable = False  # after an answer's end: this one answers nothing

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._body is None:  # what follows a body is no header of ours
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status < 200:  # informational: the answer follows
            self._headers = []
        elif self._body is None:
            self._body = Body(self, self._loop)
            self._answer()

    def on_body(self, data: bytes) -> None:
        self._bytes_without_body = 0
        if self._body is not None and self._body.add(data) > MAX_UNREAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._body is not None and not self._body.is_over:
            self._is_reusable = self._parser.should_keep_alive()
            self._body.end()


class Body(httpx2.AsyncByteStream):
    """The body of one answer, read by one task. It times its silences with one timer, not with one for each chunk."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.is_over = False
        self._connection: Connection | None = connection
        self._loop = loop
        self._unread: list[bytes] = []
        self._size = 0
        self._error: httpx2.TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, deadline: float = math.inf) -> bytes:
        """The next bytes, or none at the end. Raises TimeoutError where there are none by `deadline`, a time of the
        loop's clock; and httpx2.TransportError where the connection broke."""
        if not self._unread and not self.is_over:
            self._deadline = deadline
            if deadline < math.inf and (self._timer is None or self._timer.when() > deadline):
                self._set_timer()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._unread:
            data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
            self._unread.clear()
            self._size = 0
            if self._connection is not None:
                self._connection.resume()
            return data
        if not self.is_over:
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(self)

    def add(self, data: bytes) -> int:
        """The bytes that are not read yet, with these."""
        if not self.is_over:
            self._unread.append(data)
            self._size += len(data)
            self._wake()
        return self._size

    def end(self, error: httpx2.TransportError | None = None) -> None:
        if not self.is_over:
            self.is_over, self._error = True, error
            self._wake()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        """The timer's: time is up, or was put off since it was set."""
        self._timer = None
        if self._waiter is not None and self._loop.time() + CLOCK_SECONDS < self._deadline < math.inf:
            self._set_timer()
        elif self._deadline < math.inf:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _origin(url: httpx2.URL) -> Origin:
    return url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)


def _packed(request: httpx2.Request, body: bytes) -> bytes:
    """The request as it goes over the wire. Raises httpx2.LocalProtocolError for what would be another one there."""
    start = request.method.encode("ascii") + b" " + request.url.raw_path
    if _BREAKS.search(start) or any(_BREAKS.search(part) for pair in request.headers.raw for part in pair):
        raise httpx2.LocalProtocolError("a line break in a header")
    if "transfer-encoding" in request.headers:
        raise httpx2.LocalProtocolError("a request of unknown length")
    lines = [start + b" HTTP/1.1", *(name + b": " + value for name, value in request.headers.raw)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _is_framed(headers: list[tuple[bytes, bytes]]) -> bool:
    """Does the answer itself say where it ends (RFC 9112, section 6.3)? Otherwise the connection does."""
    return any(
        name.lower() == b"content-length" or (name.lower() == b"transfer-encoding" and b"chunked" in value.lower())
        for name, value in headers
    )
