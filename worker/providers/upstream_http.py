"""One upstream over HTTP: the connections, when to ask again, and every failure under a stable code.

Shared by the providers that speak a protocol of OpenAI's. The openai SDK sends the requests and holds the connections;
its retries, its redirects and its reading of streams are not used. No error message carries a body, a prompt or a key.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeAlias, TypeVar

import httpx2  # the openai SDK's own client
import openai

from shared.config import ModelRoute, Settings, upstream_key
from shared.errors import SettingsError, UpstreamError
from shared.prompt import Prompt
from worker.providers.upstream_transport import Client

OPENAI_URL = "https://api.openai.com/v1"
CONNECT_SECONDS = 10.0
MAX_TRIES = 4
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 5.0
LINGER_SECONDS = 0.1  # when all is said: for the end, so that the connection can be used again

# code: (what happened and what to do, may the same prompt work later)
FAILURES: dict[str, tuple[str, bool]] = {
    "missing_key": ("there is no key for its upstream: set {detail}, or a base URL that needs none", False),
    "upstream_unreachable": ("its upstream could not be reached ({detail}): check that it runs, and its URL", True),
    "upstream_timeout_first_token": ("its upstream sent no token within {detail}: try again later", True),
    "upstream_timeout_inter_token": ("its upstream fell silent for {detail} amid the answer: try again", True),
    "upstream_rate_limited": ("its upstream limits our requests ({detail}): try again later", True),
    "upstream_unauthorized": ("its upstream refused our key ({detail}): check the key and what it may use", False),
    "upstream_rejected": (
        "its upstream rejected the request ({detail}): check its URL, the model name and the options",
        False,
    ),
    "upstream_unsupported": ("its upstream's protocol has no place for {detail}: leave it out", False),
    "upstream_unavailable": ("its upstream is in trouble ({detail}): try again later", True),
    "upstream_error": ("its upstream reported an error amid the stream: try again", True),
    "upstream_cancelled": ("the answer was cancelled at its upstream: try again", True),
    "upstream_lost_response": (
        "its upstream does not have the rest of the answer that it had begun: try again",
        True,
    ),
    "upstream_invalid": ("its upstream sent another thing than the stream it should ({detail}): check its URL", True),
    "upstream_reset": ("the connection to its upstream broke ({detail}): try again", True),
    "upstream_truncated": ("its upstream ended the stream without a finish reason: try again", True),
}
RETRIED = frozenset({"upstream_rate_limited", "upstream_unavailable", "upstream_unreachable", "upstream_reset"})
BROKEN = (httpx2.ReadError, httpx2.WriteError, httpx2.CloseError, httpx2.RemoteProtocolError)
STATUS_CODES = {401: "upstream_unauthorized", 403: "upstream_unauthorized", 429: "upstream_rate_limited"}
NOT_STREAMS = ("text/html", "application/json")
T = TypeVar("T")
Request: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]  # what the SDK answers, its body unread


def base_url_of(settings: Settings, route: ModelRoute) -> str:
    """Raises SettingsError where the base URL is none. A missing key shows when it is needed."""
    base_url = route.base_url or settings.openai_base_url or OPENAI_URL
    try:
        parsed = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SettingsError(f"model {route.name!r}: its base URL must be like {OPENAI_URL}")
    return base_url


class Chunks(Protocol):
    """The bytes of a stream, as they come."""

    async def read(self, deadline: float) -> bytes:
        """The next of them, or none at the end. Raises TimeoutError at `deadline`, and httpx2.HTTPError."""


class Decoded:
    """The bytes as httpx2 reads them: out of what nobody asked for, a compressed stream, or from behind a proxy."""

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks

    async def read(self, deadline: float) -> bytes:
        async with asyncio.timeout_at(deadline):
            return await anext(self._chunks, b"")

    async def aclose(self) -> None:
        await self._chunks.aclose()


class UpstreamHTTP:
    """One upstream and the connections to it. Every method raises UpstreamError with a code of FAILURES."""

    def __init__(self, settings: Settings, route: ModelRoute) -> None:
        base_url = base_url_of(settings, route)
        self._route = route
        self.is_openai = f".{httpx2.URL(base_url).host}".endswith(".api.openai.com")
        ours = self.is_openai or base_url == settings.openai_base_url
        # The OpenAI key goes to another host only where a route names its variable.
        key = upstream_key(settings, route) if ours or route.api_key_env else None
        self._has_key = key is not None
        self.client = openai.AsyncOpenAI(
            api_key=key or "none",  # the SDK wants one; servers without keys do not look at it
            base_url=base_url,
            max_retries=0,  # the SDK's two hidden retries would multiply with ours
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            default_headers={"Accept-Encoding": "identity"},  # a compressed stream is a delayed stream
            http_client=Client(
                follow_redirects=False,  # the prompt and the key go to the configured host and to no other
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
                event_hooks={"response": [_judge]},
            ),
        )

    async def aclose(self) -> None:
        await self.client.close()

    def require_key(self, prompt: Prompt) -> None:
        if self.is_openai and not self._has_key:
            raise failure(prompt.model, "missing_key", self._route.api_key_env or "OPENAI_API_KEY")

    async def open(self, model: str, request: Request, connection: AsyncExitStack) -> tuple[Chunks, float]:
        """Send, again if the upstream asks for it or cannot be reached, and tell by when a token must come."""

        async def send(deadline: float) -> tuple[Chunks, float]:
            return await self.stream(model, request, connection, deadline), deadline

        return await self.retried(send)

    async def retried(self, send: Callable[[float], Awaitable[T]]) -> T:
        """What `send` answers, given by when the first token must come; again after a failure that may pass.

        All tries share `retry_seconds`; what was asked in Retry-After beyond that fails at once."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + self._route.retry_seconds
        tries = 0
        while True:
            tries += 1
            try:
                return await send(clock() + self._route.first_token_seconds)
            except UpstreamError as error:
                delay = (error.retry_after or 0.0) + backoff_seconds(tries)
                if error.code not in RETRIED or tries == MAX_TRIES or clock() + delay > give_up_at:
                    raise
            await asyncio.sleep(delay)

    async def stream(self, model: str, request: Request, connection: AsyncExitStack, deadline: float) -> Chunks:
        """Send once; the bytes of the stream that comes back, none of which was read."""
        response = await self.send(model, request, connection, deadline)
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type in NOT_STREAMS:
            raise failure(model, "upstream_invalid", content_type)
        if "body" in response.extensions and "content-encoding" not in response.headers:
            chunks: Chunks = response.extensions["body"]
            return chunks
        decoded = Decoded(response.aiter_bytes())
        connection.push_async_callback(decoded.aclose)
        return decoded

    async def send(self, model: str, request: Request, connection: AsyncExitStack, deadline: float) -> httpx2.Response:
        """Send once; the answer, its body unread."""
        try:
            async with asyncio.timeout_at(deadline):
                answer = await connection.enter_async_context(request())
        except TimeoutError:
            raise self._timeout(model, started=False) from None
        except openai.APIConnectionError as error:
            raise broken(model, error.__cause__) from None
        except Refused as refused:
            raise failure(model, *refused.args) from None
        response: httpx2.Response = answer.http_response
        return response

    async def next(self, model: str, chunks: AsyncGenerator[bytes, None], deadline: float, *, started: bool) -> bytes:
        """The next bytes of a body as httpx2 gives it, or none at its end."""
        return await self.read(model, Decoded(chunks), deadline, started=started)

    async def read(self, model: str, chunks: Chunks, deadline: float, *, started: bool) -> bytes:
        """The next bytes of a stream, or none at its end."""
        try:
            return await chunks.read(deadline)
        except TimeoutError:
            raise self._timeout(model, started) from None
        except httpx2.HTTPError as error:
            raise broken(model, error) from None

    def _timeout(self, model: str, started: bool) -> UpstreamError:
        if started:
            return failure(model, "upstream_timeout_inter_token", f"{self._route.inter_token_seconds:g} s")
        return failure(model, "upstream_timeout_first_token", f"{self._route.first_token_seconds:g} s")


class Refused(Exception):
    """A response that is a failure. Its arguments: the failure's code, detail and retry_after."""


async def _judge(response: httpx2.Response) -> None:
    """Raise Refused before any of the body is read: it may be long, or have no end."""
    status = response.status_code
    if status >= 300:
        code = STATUS_CODES.get(status, "upstream_unavailable" if status >= 500 else "upstream_rejected")
        retry_after = retry_after_seconds(response.headers.get("retry-after"), datetime.now(UTC))
        raise Refused(code, f"HTTP {status}", retry_after)


def failure(model: str, code: str, detail: str = "", retry_after: float | None = None) -> UpstreamError:
    text, retryable = FAILURES[code]
    message = f"model {model[:80]!r}: {text.format(detail=detail)}"
    return UpstreamError(message, code=code, retryable=retryable, retry_after=retry_after)


def broken(model: str, cause: BaseException | None) -> UpstreamError:
    code = "upstream_reset" if isinstance(cause, BROKEN) else "upstream_unreachable"
    return failure(model, code, type(cause).__name__)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """The delay in a Retry-After header, given in seconds or as a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value.strip()):
        return float(value)
    try:
        at: datetime = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds())


def backoff_seconds(tries: int) -> float:
    """Doubling up to a bound, with jitter, so that those refused together do not come back together."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** (tries - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
