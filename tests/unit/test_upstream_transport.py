"""The wire to an upstream against servers that say exactly what is written here, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import httpx2
import pytest

from shared.config import ModelRoute, Settings
from shared.errors import UpstreamError
from shared.events import Completed, TextDelta
from shared.prompt import Prompt
from tests.proxy import Proxy
from tests.upstream import Script, Upstream, delta, frame
from tests.waiting import wait_until
from worker.providers import build, upstream_transport
from worker.providers.upstream_transport import Body, Client, Transport

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
FINISH = frame(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
LOOPS = {"asyncio": {}, "uvloop": {"use_uvloop": True}}
Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module", params=LOOPS.values(), ids=LOOPS.keys())
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both loops: uvloop is what a worker runs on."""
    return "asyncio", request.param


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def serving(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that reads each request and lets `serve` answer it; gives its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.current_task())  # type: ignore[arg-type]
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(size.partition(b":")[2]))
                await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            tasks.discard(task)  # type: ignore[arg-type]

    server = await asyncio.start_server(one, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def saying(*parts: bytes, closes: bool = True) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if closes:
            writer.close()

    return serve


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def client(**options: object) -> AsyncIterator[Client]:
    async with Client(timeout=httpx2.Timeout(None, connect=5.0), **options) as one:  # type: ignore[arg-type]
        yield one


async def read(one: Client, port: int, scheme: str = "http", host: str = "127.0.0.1") -> tuple[int, bytes]:
    """The status and the whole body of an answer, read as the providers read it."""
    async with one.stream("POST", f"{scheme}://{host}:{port}/v1", json={"a": 1}) as response:
        body: Body = response.extensions["body"]
        parts = []
        while data := await body.read(asyncio.get_running_loop().time() + 5):
            parts.append(data)
        return response.status_code, b"".join(parts)


async def answer_of(*parts: bytes, closes: bool = True) -> tuple[int, bytes]:
    async with serving(saying(*parts, closes=closes)) as port, client() as one:
        return await read(one, port)


async def heard(port: int, **fields: object) -> list[object]:
    """What a provider makes of the server's answer."""
    times = {"first_token_seconds": 5.0, "inter_token_seconds": 5.0, "retry_seconds": 0.0}
    route = ModelRoute(
        **{"name": "m", "provider": "openai_compatible", "upstream_model": "m", **times},  # type: ignore[arg-type]
        base_url=f"http://127.0.0.1:{port}/v1",
    )
    one = build(Settings(_env_file=None), route)
    prompt = Prompt.model_validate({"model": "m", "messages": [{"role": "user", "content": "q"}]})
    try:
        return [event async for event in one.stream(prompt)]
    finally:
        await one.aclose()


# What is read


@pytest.mark.parametrize(
    "parts",
    [
        (CHUNKED, chunk(b"ab"), chunk(b"c"), b"0\r\n\r\n"),
        (CHUNKED + b"2;name=value\r\nab\r\n1 \r\nc\r\n0\r\nTrailer: x\r\n\r\n",),
        (HEAD + b"Content-Length: 3\r\n\r\nab", b"c"),
        (HEAD + b"\r\nab", b"c"),  # until the connection ends
        (b"HTTP/1.0 200 OK\r\n\r\nabc",),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + HEAD + b"Content-Length: 3\r\n\r\nabc",),
        (HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 3\n\nabc",),
        tuple(bytes([one]) for one in CHUNKED + chunk(b"abc") + b"0\r\n\r\n"),
    ],
)
async def test_every_way_to_frame_a_body_is_read(parts: tuple[bytes, ...]) -> None:
    """Chunked, counted, or until the end of the connection, after early hints too, however the bytes are cut."""
    assert await answer_of(*parts) == (200, b"abc")


async def test_what_came_before_a_break_is_read_before_it_is_told() -> None:
    """An answer that was whole when its connection was reset is whole, though both came in the same moment."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(delta(content="hello")) + chunk(FINISH))
        await writer.drain()
        reset(writer)

    async with serving(serve) as port:
        assert await heard(port) == [TextDelta("hello"), Completed("stop")]


@pytest.mark.parametrize(
    "parts",
    [
        (CHUNKED, chunk(b": x\n\n")),  # no end
        (CHUNKED, b"zz\r\ngarbage"),
        (CHUNKED, b"2\r\nabc\r\n"),
        (HEAD + b"Content-Length: 30\r\n\r\nab",),
        (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",),  # which of the two?
        (b"SSH-2.0-OpenSSH_9.9\r\n",),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",),
        (b"",),
    ],
)
async def test_what_is_no_whole_answer_is_a_broken_connection(parts: tuple[bytes, ...]) -> None:
    """A body without its end, chunks that are none, another protocol: never taken for an end like any other."""
    async with serving(saying(*parts)) as port:
        with pytest.raises(UpstreamError) as caught:
            await heard(port)
    assert caught.value.code == "upstream_reset"


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n", CHUNKED + chunk(b": x\n\n") + b"0\r\n"])
async def test_a_head_without_an_end_is_given_up(start: bytes) -> None:
    """Neither headers nor trailers fill the memory."""
    with pytest.raises(httpx2.RemoteProtocolError):
        await answer_of(start, *[b"X-More: " + b"x" * 8000 + b"\r\n"] * 100, closes=False)


async def test_an_upstream_that_nobody_reads_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound nothing is taken from the socket; once read on, all of it arrives."""
    monkeypatch.setattr(upstream_transport, "MAX_UNREAD_BYTES", 1000)
    size, sent = 20_000_000, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 100_000)
            sent += 100_000
            await writer.drain()

    async with serving(serve) as port, client() as one, one.stream("POST", f"http://127.0.0.1:{port}/", json=1) as got:
        body: Body = got.extensions["body"]
        before = -1
        while before != sent:  # until it is stuck
            before = sent
            await asyncio.sleep(0.1)
        assert sent < size
        read = 0
        while data := await body.read():
            read += len(data)
        assert read == size


async def test_a_compressed_stream_that_nobody_asked_for_is_read() -> None:
    """An upstream that compresses all the same is understood."""
    body = gzip.compress(delta(content="hello") + FINISH)
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with serving(saying(head, body)) as port:
        assert await heard(port) == [TextDelta("hello"), Completed("stop")]


async def test_a_silence_ends_at_the_newest_deadline() -> None:
    """The deadline of the last read counts, be it later or earlier than that of the one before."""
    go = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _ in range(2):
            await go.acquire()
            writer.write(chunk(b"a"))

    async with serving(serve) as port, client() as one, one.stream("POST", f"http://127.0.0.1:{port}/", json=1) as got:
        body: Body = got.extensions["body"]
        clock = asyncio.get_running_loop().time
        for before, seconds in ((60.0, 0.05), (0.5, 1.0)):
            reading = asyncio.create_task(body.read(clock() + before))
            go.release()
            assert await reading == b"a"
            began = clock()
            async with asyncio.timeout(10):
                with pytest.raises(TimeoutError):
                    await body.read(began + seconds)
            assert clock() - began >= seconds - 0.01
        for late in (0.0, -1.0):
            with pytest.raises(TimeoutError):
                await body.read(clock() + late)


# The connections


async def test_a_connection_is_used_again_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers read to their end leave connections for the next requests, as many as are allowed, as long as allowed."""
    serve = saying(HEAD + b"Content-Length: 1\r\n\r\na", closes=False)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=2, keepalive_expiry=0.2)
    async with serving(serve) as port, client(limits=limits) as one:
        transport = one._transport
        assert isinstance(transport, Transport)
        await read(one, port)
        (first,) = transport._open
        await read(one, port)
        assert transport._open == {first}
        await asyncio.gather(*(read(one, port) for _ in range(5)))
        await wait_until(lambda: len(transport._open) == 2)
        await wait_until(lambda: not transport._open)


@pytest.mark.parametrize(
    "more", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", b"garbage", b"HTTP/1.1 200 OK\r\nContent-Le"]
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_answer_that_nobody_asked_for_is_nobodys(more: bytes, at_once: bool) -> None:
    """What follows an answer on its connection is never taken for the answer to the next request."""
    numbers = iter(range(10))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = HEAD + b"Content-Length: 1\r\n\r\n%d" % next(numbers)
        writer.write(answer + more if at_once else answer)
        if not at_once:
            await asyncio.sleep(0.05)  # by when the answer has been read
            writer.write(more)

    async with serving(serve) as port, client() as one:
        assert await read(one, port) == (200, b"0")
        await wait_until(lambda: not one._transport._open)  # type: ignore[attr-defined]
        assert await read(one, port) == (200, b"1")


async def test_a_connection_the_upstream_has_closed_is_not_used() -> None:
    """An idle connection that was closed over there is forgotten."""
    async with serving(saying(HEAD + b"Content-Length: 1\r\n\r\na")) as port, client() as one:
        for _ in range(3):
            assert await read(one, port) == (200, b"a")
            await wait_until(lambda: not one._transport._open)  # type: ignore[attr-defined]


@pytest.mark.parametrize("header", [{"X-Key": "a\r\nX-Other: b"}, {"X-Key": "a\nb"}, {"Transfer-Encoding": "chunked"}])
async def test_a_request_is_one_request(header: dict[str, str]) -> None:
    """A header that would be another one on the wire is not sent."""
    async with serving(saying()) as port, client() as one:
        with pytest.raises(httpx2.LocalProtocolError):
            await one.post(f"http://127.0.0.1:{port}/", json=1, headers=header)


# Proxies


async def test_a_proxy_of_the_environment_is_used_and_no_proxy_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY leads everything over it, except for what NO_PROXY names; the answer is the same."""
    async with Upstream(default=Script(chunks=["hello"])) as upstream, Proxy(upstream.port) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with client() as one:
            assert not isinstance(one._transport_for_url(httpx2.URL("http://127.0.0.1:9/")), Transport)
            assert isinstance(one._transport_for_url(httpx2.URL("https://127.0.0.1:9/")), Transport)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert (await heard(upstream.port))[0] == TextDelta("hello")
        assert proxy.open_connections == 0


async def test_an_answer_from_behind_a_proxy_is_read() -> None:
    """The scripted upstream in the place of a proxy: it is asked for a whole address."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split(b"\r\n")[0])
        writer.write(CHUNKED + chunk(delta(content="hello")) + chunk(FINISH) + b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.MonkeyPatch.context() as patch:
            for name in ("no_proxy", "NO_PROXY", "http_proxy"):
                patch.delenv(name, raising=False)
            patch.setenv("HTTP_PROXY", address)
            assert await heard(9) == [TextDelta("hello"), Completed("stop")]
    assert asked == [b"POST http://127.0.0.1:9/v1/chat/completions HTTP/1.1"]


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `localhost`, signed by itself, and its key in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "both.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return folder


async def test_a_certificate_is_checked(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of nobody's is refused, SSL_CERT_FILE says whose to trust, and it must be the one of this host."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "both.pem")
    serve = saying(HEAD + b"Content-Length: 1\r\n\r\na", closes=False)
    async with serving(serve, context) as port:
        async with client() as one:
            with pytest.raises(httpx2.ConnectError):
                await read(one, port, "https", "localhost")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        async with client() as one:
            assert await read(one, port, "https", "localhost") == (200, b"a")
            with pytest.raises(httpx2.ConnectError):
                await read(one, port, "https", "127.0.0.1")


async def test_a_server_that_says_nothing_at_the_handshake_is_given_up() -> None:
    """The time to connect includes TLS."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with Client(timeout=httpx2.Timeout(None, connect=0.2)) as one:
            with pytest.raises(httpx2.ConnectTimeout):
                await one.post(url, json=1)
