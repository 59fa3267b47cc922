"""HTTP to a Rejoin: start, follow, look, cancel, list. One rule: what breaks is asked again, until patience ends.

Everything asked here is safe to ask twice: a start carries an Idempotency-Key, a stream goes on after its last event.
Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson

from shared import errors
from shared.errors import BadRequest, CallerError, Gone, OurError, SettingsError, Unavailable
from shared.events import Entry, decode, is_terminal

RETRY_SECONDS = 1.0  # the pause before rejoining, until the server has said another one
MAX_PAUSE_SECONDS = 15.0
STEADY_SECONDS = 2.0  # a connection that lasts this long is one, also when it says nothing
ANSWER_SECONDS = 15.0  # that a server has to begin its answer
SILENCE_SECONDS = 60.0  # four pings that did not come: the connection is dead, though nobody said so
PAGE = 100
ELSEWHERE = "another address: --url or REJOIN_URL"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
REFUSALS: dict[int, type[CallerError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.TooLarge,
    422: errors.Unprocessable,
}
LATER = (429, 502, 503, 504)  # the same request may work in a moment
EVENT_ID = re.compile(r"\d{1,15}-\d{1,15}")


@dataclass(frozen=True)
class Server:
    """Where the Rejoin is, the key it wants, and for how long a lost connection is tried again."""

    url: str
    key: str | None
    patience_seconds: float


class AtEnd(Exception):
    """Nothing follows the cursor: it was the terminal event."""


class Rejoin:
    """A client of one Rejoin. `on_lost(why, pause_seconds)` and `on_back()` are told how the connection is."""

    def __init__(
        self,
        server: Server,
        on_lost: Callable[[str, float], None] = lambda why, pause_seconds: None,
        on_back: Callable[[], None] = lambda: None,
        on_unknown: Callable[[str], None] = lambda after: None,
    ) -> None:
        """`on_unknown(after)` is told that the log has no event `after`, so that all of it follows.

        Raises SettingsError for an address or a key that cannot be one."""
        self.on_lost, self.on_back, self.on_unknown = on_lost, on_back, on_unknown
        self._has_key = bool(server.key)
        self._url = _address(server.url)
        self._patience_seconds = server.patience_seconds
        self._retry_seconds = RETRY_SECONDS
        self._has_answered = False  # a server that never did is a wrong address rather than an outage
        self._http = httpx2.AsyncClient(
            base_url=self._url,
            headers=_headers(server.key),
            timeout=ANSWER_SECONDS,
            trust_env=self._url.host not in LOOPBACK,  # a proxy has no business on this machine
        )

    async def __aenter__(self) -> Rejoin:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def start(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start a generation; what the api answered, its `id` among it."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        answer = await self._ask("POST", "/v1/generations", content=orjson.dumps(body), headers=key)
        return self._with(answer, "id", "status", "model", "created_at")

    async def snapshot(self, generation_id: str) -> dict[str, Any]:
        return self._with(await self._ask("GET", f"/v1/generations/{generation_id}"), "status")

    async def cancel(self, generation_id: str) -> dict[str, Any]:
        """End it; the final snapshot."""
        return self._with(await self._ask("POST", f"/v1/generations/{generation_id}/cancel"), "status")

    async def listing(self, limit: int, status: str | None) -> dict[str, Any]:
        """The caller's newest generations, at most `limit`, and whether there are more."""
        found: list[dict[str, Any]] = []
        has_more = True
        while has_more and len(found) < limit:
            query = {
                "limit": min(PAGE, limit - len(found)),
                "status": status,
                "after": found[-1]["id"] if found else None,
            }
            page = await self._ask("GET", "/v1/generations", params={k: v for k, v in query.items() if v is not None})
            found += self._with(page, "data", "has_more")["data"]
            has_more = page["has_more"]
        return {"data": found, "has_more": has_more}

    async def is_ready(self) -> str:
        """`ok`, or what is wrong, in a word or two. Asked once."""
        try:
            answer = (await self._http.get("/readyz", timeout=2)).json()
            return str(answer.get("status", "no Rejoin"))
        except httpx2.RequestError:
            return "no answer"
        except (ValueError, AttributeError):
            return "no Rejoin"

    async def follow(self, generation_id: str, after: str | None = None) -> AsyncGenerator[Entry]:
        """Each entry that follows `after`, once, up to the terminal one, over as many connections as it takes.

        Raises what the server refuses it with, and Unavailable when it could not be rejoined for too long."""
        outage = Outage(self._patience_seconds, lambda: self.on_back())
        unheard = after  # a cursor from elsewhere may be wrong; one from this very log is its own business
        while True:
            try:
                async with aclosing(self._one_connection(generation_id, after, unheard, outage)) as entries:
                    async for entry in entries:
                        after, unheard = entry.id.decode(), None
                        yield entry
                        if is_terminal(entry.data):
                            return
                why = "the stream ended early"
            except AtEnd:
                return
            except (httpx2.RequestError, TimeoutError) as error:
                why = self._lost(error)
            except Unavailable as error:
                why = error.message
            try:
                pause_seconds = outage.pause(self._retry_seconds, why)
            except Unavailable as error:
                go_on = f"rejoin join {generation_id}" + (f" --after {after}" if after else "")
                raise Unavailable(f"{error.message}; the answer may go on at the server: {go_on}") from None
            self.on_lost(why, pause_seconds)
            await asyncio.sleep(pause_seconds)

    async def _one_connection(
        self, generation_id: str, after: str | None, unheard: str | None, outage: Outage
    ) -> AsyncGenerator[Entry]:
        """The entries that one connection brings. The outage is over with the first, or when it has held for a while:
        one that ends at once without any was only to say "come back"."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        headers |= {"Last-Event-ID": after} if after else {}
        times = httpx2.Timeout(SILENCE_SECONDS, connect=ANSWER_SECONDS)
        path = f"/v1/generations/{generation_id}/events"
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(outage.limit(ANSWER_SECONDS)):
                opening = self._http.stream("GET", path, headers=headers, timeout=times)
                response = await stack.enter_async_context(opening)
            self._has_answered = True
            if response.status_code == 204:
                raise AtEnd
            if response.status_code != 200:
                await response.aread()
                self._judge(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise self._stranger("something else")
            resumed_from = response.headers.get("rejoin-resumed-from", after)
            if unheard and not unheard.startswith("0-") and resumed_from != unheard:
                self.on_unknown(unheard)
            stack.callback(asyncio.get_running_loop().call_later(STEADY_SECONDS, outage.end).cancel)
            async for block in httpx2.EventSource(response):
                if block.retry is not None:
                    self._retry_seconds = block.retry / 1000
                if block.data:
                    outage.end()
                    yield self._entry(block)

    async def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON object that answers a short request; an outage is waited for."""
        outage = Outage(self._patience_seconds)
        while True:
            retry_seconds = RETRY_SECONDS
            try:
                async with asyncio.timeout(outage.limit(ANSWER_SECONDS)):
                    response = await self._http.request(method, path, **request)
                self._has_answered = True
                return self._judge(response)
            except (httpx2.RequestError, TimeoutError) as error:
                why = self._lost(error)
            except Unavailable as error:
                why, retry_seconds = error.message, error.retry_after
            pause_seconds = outage.pause(retry_seconds, why)
            self.on_lost(why, pause_seconds)
            await asyncio.sleep(pause_seconds)

    def _lost(self, error: httpx2.RequestError | TimeoutError) -> str:
        """What happened, in a few words. Raises Unreachable where the server has never answered."""
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            why = "no answer in time"
        else:
            why = str(error) if isinstance(error, httpx2.ConnectError) else "the connection broke"
        if not self._has_answered and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise Unreachable(f"cannot reach {self._url} ({why}); is it up? `rejoin up` starts one here; {ELSEWHERE}")
        if not self._has_answered and isinstance(error, httpx2.RemoteProtocolError) and "disconnect" not in str(error):
            raise self._stranger("something that is no HTTP")
        return why

    def _judge(self, response: httpx2.Response) -> dict[str, Any]:
        """The answer's JSON object. Raises the error that a refusal is; Unavailable where the same may work later."""
        try:
            body = orjson.loads(response.content)
        except orjson.JSONDecodeError:
            body = None
        status = response.status_code
        if 200 <= status < 300 and isinstance(body, dict):
            return body
        if not isinstance(body, dict) or not body.keys() >= {"detail", "code"}:
            if status in LATER:
                raise Unavailable(f"the server answered {status}")
            raise self._stranger(str(status))
        message = str(body["detail"])
        if status in LATER:
            raise Unavailable(message, retry_after=_retry_after(response))
        if status == 410:
            raise Gone(message, outcome=str(body.get("outcome")))
        if status == 401:
            problem = "does not know the key that was sent" if self._has_key else "wants a key, and none was sent"
            message = f"{self._url} {problem}: set REJOIN_API_KEY to a key of that server"
        raise REFUSALS[status](message) if status in REFUSALS else OurError(f"the server answered {status}: {message}")

    def _entry(self, block: httpx2.ServerSentEvent) -> Entry:
        """Raises BadRequest for an event that no Rejoin writes."""
        data = block.data.encode()
        try:
            if EVENT_ID.fullmatch(block.id) and data.startswith(b'{"type":"'):
                decode(data)
                return Entry(block.id.encode(), data)
        except (ValueError, AttributeError, TypeError):
            pass
        raise self._stranger("something else")

    def _with(self, answer: dict[str, Any], *names: str) -> dict[str, Any]:
        """The answer, which has these. Raises BadRequest."""
        if not answer.keys() >= set(names):
            raise self._stranger("something else")
        return answer

    def _stranger(self, answer: str) -> BadRequest:
        return BadRequest(f"{self._url} answered {answer}: is that a Rejoin? Otherwise {ELSEWHERE}")


class Unreachable(OurError):
    """There has not been a server at that address since we began."""


class Outage:
    """Times without a connection: how long one may last, and the pause before the next try."""

    def __init__(self, patience_seconds: float, on_end: Callable[[], None] = lambda: None) -> None:
        self._patience_seconds = patience_seconds
        self._on_end = on_end
        self._tries = 0
        self._ends = float("inf")

    def limit(self, seconds: float) -> float:
        """How long one try may take: not much longer than the outage may."""
        return min(seconds, max(self._ends - time.monotonic(), 1.0))

    def pause(self, retry_seconds: float, why: str) -> float:
        """At first what the server said, then longer and jittered, so that not all clients come at once.

        Raises Unavailable when it has lasted too long."""
        now, pause_seconds = time.monotonic(), retry_seconds
        if not self._tries:
            self._ends = now + self._patience_seconds
        elif now >= self._ends:
            raise Unavailable(f"no way through for {self._patience_seconds:g} s: {why}")
        else:
            longest = max(retry_seconds, MAX_PAUSE_SECONDS)
            pause_seconds = min(retry_seconds * 2 ** min(self._tries, 10), longest) * random.uniform(0.5, 1)
        self._tries += 1
        return min(pause_seconds, max(self._ends - now, 0.05))

    def end(self) -> None:
        """There is a connection; harmless where there was one."""
        if self._tries:
            self._tries, self._ends = 0, float("inf")
            self._on_end()


def _retry_after(response: httpx2.Response) -> int:
    said = response.headers.get("retry-after", "")
    return int(said) if re.fullmatch(r"\d{1,4}", said) else 1


def _address(url: str) -> httpx2.URL:
    """Raises SettingsError, which shows the value unless there may be a password in it."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    where = "--url or REJOIN_URL"
    if "@" in url:
        raise SettingsError(f"{where}: write http://host:port, without a user; a key goes to REJOIN_API_KEY")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        right = f"http://{url}" if re.fullmatch(r"[A-Za-z0-9.-]+(:\d{1,4})?", url) else "http://127.0.0.1:8000"
        raise SettingsError(f"{where}: {url!r} is no address of a server; write one like {right}")
    if re.search(r"/v1/?$", parsed.path):
        right = re.sub(r"/v1/?$", "", url)
        raise SettingsError(f"{where}: {url!r}: leave out /v1, which is for OpenAI's clients; write {right}")
    return parsed


def _headers(key: str | None) -> dict[str, str]:
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise SettingsError("REJOIN_API_KEY: a key has printable ASCII characters only, and no spaces")
    return {"Authorization": f"Bearer {key}"} if key else {}
