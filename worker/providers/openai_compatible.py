"""The upstream that speaks OpenAI's Chat Completions: OpenAI itself, vLLM, Ollama, a gateway.

One rule: an answer is complete when a finish reason was seen, and every other end is an UpstreamError with a
stable code. The openai SDK sends the request and holds the connections; the bytes that come back are read here,
because its stream takes a cut, an HTML page and an error for a normal end.
Knows nothing of logs, jobs or clients. No error message carries a body, a prompt or a key.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias

import httpx2  # the openai SDK's own transport
import openai
import orjson

from shared.config import MAX_EVENT_TEXT_CHARS, MAX_GENERATION_BYTES, ModelRoute, Settings, upstream_key
from shared.errors import SettingsError, UpstreamError
from shared.events import Completed, FinishReason, Output, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta, Usage
from shared.prompt import Prompt
from worker.providers import Said

OPENAI_URL = "https://api.openai.com/v1"
CONNECT_SECONDS = 10.0
MAX_TRIES = 4
FIRST_BACKOFF_SECONDS = 0.5
SETTLE_SECONDS = 2.0  # after the finish reason: for usage, [DONE] and the end
LINGER_SECONDS = 0.1  # when all is said: for the end, so that the connection can be used again
MAX_SSE_EVENT_BYTES = 4 * MAX_GENERATION_BYTES

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
    "upstream_unavailable": ("its upstream is in trouble ({detail}): try again later", True),
    "upstream_error": ("its upstream reported an error amid the stream: try again", True),
    "upstream_invalid": ("its upstream sent what is not a chat completion stream ({detail}): check its URL", True),
    "upstream_reset": ("the connection to its upstream broke ({detail}): try again", True),
    "upstream_truncated": ("its upstream ended the stream without a finish reason: try again", True),
}
RETRIED = frozenset({"upstream_rate_limited", "upstream_unavailable", "upstream_unreachable", "upstream_reset"})
BROKEN = (httpx2.ReadError, httpx2.WriteError, httpx2.CloseError, httpx2.RemoteProtocolError)
STATUS_CODES = {401: "upstream_unauthorized", 403: "upstream_unauthorized", 429: "upstream_rate_limited"}
NOT_STREAMS = ("text/html", "application/json")
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
TextEvent: TypeAlias = type[TextDelta] | type[ReasoningDelta] | type[RefusalDelta]


def build(settings: Settings, route: ModelRoute) -> OpenAICompatible:
    """Raises SettingsError where the base URL is none. A missing key shows when it is needed."""
    base_url = route.base_url or settings.openai_base_url or OPENAI_URL
    try:
        parsed = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SettingsError(f"model {route.name!r}: its base URL must be like {OPENAI_URL}")
    return OpenAICompatible(settings, route, base_url)


class OpenAICompatible:
    """One upstream and the connections to it."""

    def __init__(self, settings: Settings, route: ModelRoute, base_url: str) -> None:
        self._route = route
        self._is_openai = f".{httpx2.URL(base_url).host}".endswith(".api.openai.com")
        ours = self._is_openai or base_url == settings.openai_base_url
        # The OpenAI key goes to another host only where a route names its variable.
        key = upstream_key(settings, route) if ours or route.api_key_env else None
        self._has_key = key is not None
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # the SDK wants one; servers without keys do not look at it
            base_url=base_url,
            max_retries=0,  # the SDK's two hidden retries would multiply with ours
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            default_headers={"Accept-Encoding": "identity"},  # a compressed stream is a delayed stream
            http_client=httpx2.AsyncClient(
                follow_redirects=False,  # the prompt and the key go to the configured host and to no other
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
                event_hooks={"response": [_judge]},
            ),
        )
        self._create = self._client.chat.completions.with_streaming_response.create  # imports much, so not at a request

    async def aclose(self) -> None:
        await self._client.close()

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """Where the route says how, and as far as it was all text: thoughts, calls and a schema cannot be taken up."""
        return self._route.continuation != "none" and said.is_text_only and prompt.response_format is None

    async def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncGenerator[Output | Completed, None]:
        """The events of one answer. Raises UpstreamError with a code of FAILURES.

        Cancelling the task closes the connection wherever it waits; a consumer that stops early on its own
        closes this generator (`contextlib.aclosing`)."""
        if self._is_openai and not self._has_key:
            raise _failure(prompt.model, "missing_key", self._route.api_key_env or "OPENAI_API_KEY")
        clock = asyncio.get_running_loop().time
        body = _body(prompt, self._route, self._is_openai)
        if said is not None:
            if prompt.max_tokens is not None and prompt.max_tokens <= len(said.outputs):
                yield Completed("length")
                return
            _go_on(body, self._route, said)
        answer = Answer("".join(said.texts()) if said and self._route.repeats_prefix else "")
        async with AsyncExitStack() as connection:
            chunks, deadline = await self._open(prompt.model, body, connection)
            while data := await self._next(prompt.model, chunks, answer, deadline):
                outputs = answer.read(data)
                for output in outputs:
                    yield output
                if answer.problem:
                    break
                # The wait is counted from here, not from the read: a slow consumer is not the upstream's silence.
                if answer.is_whole:
                    deadline = min(deadline, clock() + LINGER_SECONDS)
                elif answer.finished_now:
                    deadline = clock() + SETTLE_SECONDS
                elif outputs and not answer.finish_reason:
                    deadline = clock() + self._route.inter_token_seconds
        if answer.finish_reason is None:
            raise _failure(prompt.model, *(answer.problem or answer.cut_off()))
        for output in answer.leftovers():
            yield output
        yield Completed(answer.finish_reason, answer.usage)

    async def _open(
        self, model: str, body: dict[str, Any], connection: AsyncExitStack
    ) -> tuple[AsyncGenerator[bytes, None], float]:
        """Send, again if the upstream asks for it or cannot be reached, and tell by when a token must come.

        All tries share `retry_seconds`; what was asked in Retry-After beyond that fails at once."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + self._route.retry_seconds
        tries = 0
        while True:
            tries += 1
            deadline = clock() + self._route.first_token_seconds
            try:
                return await self._send(model, body, connection, deadline), deadline
            except UpstreamError as error:
                delay = (error.retry_after or 0.0) + _backoff_seconds(tries)
                if error.code not in RETRIED or tries == MAX_TRIES or clock() + delay > give_up_at:
                    raise
            await asyncio.sleep(delay)

    async def _send(
        self, model: str, body: dict[str, Any], connection: AsyncExitStack, deadline: float
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with asyncio.timeout_at(deadline):
                response = await connection.enter_async_context(self._create(**body))
        except TimeoutError:
            raise self._timeout(model, started=False) from None
        except openai.APIConnectionError as error:
            raise _broken(model, error.__cause__) from None
        except Refused as refused:
            raise _failure(model, *refused.args) from None
        chunks: AsyncGenerator[bytes, None] = response.http_response.aiter_bytes()
        connection.push_async_callback(chunks.aclose)
        return chunks

    async def _next(self, model: str, chunks: AsyncGenerator[bytes, None], answer: Answer, deadline: float) -> bytes:
        """The next bytes, or none at the end. Once all is said, a cut and a silence are an end like any other."""
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(chunks, b"")
        except TimeoutError:
            failure = self._timeout(model, answer.started)
        except httpx2.HTTPError as error:
            failure = _broken(model, error)
        if answer.finish_reason is None and not answer.is_whole:
            raise failure
        return b""

    def _timeout(self, model: str, started: bool) -> UpstreamError:
        if started:
            return _failure(model, "upstream_timeout_inter_token", f"{self._route.inter_token_seconds:g} s")
        return _failure(model, "upstream_timeout_first_token", f"{self._route.first_token_seconds:g} s")


class Refused(Exception):
    """A response that cannot become a stream. Its arguments: the failure's code, detail and retry_after."""


async def _judge(response: httpx2.Response) -> None:
    """Raise Refused before any of the body is read: it may be long, or have no end."""
    status = response.status_code
    if status >= 300:
        code = STATUS_CODES.get(status, "upstream_unavailable" if status >= 500 else "upstream_rejected")
        retry_after = retry_after_seconds(response.headers.get("retry-after"), datetime.now(UTC))
        raise Refused(code, f"HTTP {status}", retry_after)
    content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in NOT_STREAMS:
        raise Refused("upstream_invalid", content_type)


def _failure(model: str, code: str, detail: str = "", retry_after: float | None = None) -> UpstreamError:
    text, retryable = FAILURES[code]
    message = f"model {model[:80]!r}: {text.format(detail=detail)}"
    return UpstreamError(message, code=code, retryable=retryable, retry_after=retry_after)


def _broken(model: str, cause: BaseException | None) -> UpstreamError:
    code = "upstream_reset" if isinstance(cause, BROKEN) else "upstream_unreachable"
    return _failure(model, code, type(cause).__name__)


class Answer:
    """What was read of one answer so far. `problem`, once set, is a failure's code and detail; after a finish
    reason it does not matter any more. `repeated`: a beginning that was said before and comes again; it is left out."""

    def __init__(self, repeated: str = "") -> None:
        self._repeated = repeated
        self.started = False
        self.finish_reason: FinishReason | None = None
        self.finished_now = False
        self.usage: Usage | None = None
        self.problem: tuple[str, str] | None = None
        self._done = False
        self._sse = ServerSentEvents()
        self._halves: dict[tuple[TextEvent | None, int], str] = {}  # None: the arguments of a tool call
        self._named: set[tuple[int, str]] = set()

    @property
    def is_whole(self) -> bool:
        return self._done or (self.finish_reason is not None and self.usage is not None)

    def read(self, data: bytes) -> list[Output]:
        """The outputs in the next bytes, up to the first problem with them."""
        outputs: list[Output] = []
        had_finished = self.finish_reason is not None
        try:
            for payload in self._sse.feed(data):
                if payload == b"[DONE]":
                    self._done = True
                elif not self._done:
                    outputs += self._chunk(_parse(payload))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # not JSON, or of another shape
            self.problem = ("upstream_invalid", type(error).__name__)
        self.finished_now = not had_finished and self.finish_reason is not None
        self.started = self.started or bool(outputs)
        return outputs

    def cut_off(self) -> tuple[str, str]:
        """The problem with a stream that has ended here."""
        if _is_document(self._sse.unfinished_line):
            return "upstream_invalid", "a document"
        return "upstream_truncated", ""

    def leftovers(self) -> list[Output]:
        """Halves of characters that never found their mates."""
        return [event("\ufffd") if event else ToolCallDelta(index, arguments="\ufffd") for event, index in self._halves]

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[Output]:
        if chunk.get("error"):
            self.problem = ("upstream_error", "")
            self._done = True
            return
        if usage := chunk.get("usage"):
            self.usage = _usage(usage)
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0):
                continue
            if delta := choice.get("delta"):
                yield from self._delta(delta)
            if reason := choice.get("finish_reason"):
                self.finish_reason = self.finish_reason or FINISH_REASONS.get(reason, "stop")

    def _delta(self, delta: dict[str, Any]) -> Iterator[Output]:
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            yield from self._text(ReasoningDelta, reasoning)
        if content := delta.get("content"):
            yield from self._text(TextDelta, content)
        if refusal := delta.get("refusal"):
            yield from self._text(RefusalDelta, refusal)
        for position, call in enumerate(delta.get("tool_calls") or ()):
            yield from self._tool_call(call, position)

    def _text(self, event: TextEvent, text: str) -> Iterator[Output]:
        whole = self._whole(event, 0, text)
        for piece in _pieces(self._new(whole) if event is TextDelta else whole):
            yield event(piece)

    def _new(self, text: str) -> str:
        """`text` without what is left of the repeated beginning. Raises ValueError where it is another beginning."""
        known = min(len(text), len(self._repeated))
        if text[:known] != self._repeated[:known]:
            raise ValueError("another beginning than the one to go on from")
        self._repeated = self._repeated[known:]
        return text[known:]

    def _tool_call(self, call: dict[str, Any], position: int) -> Iterator[Output]:
        index = call.get("index", position)
        if type(index) is not int or not 0 <= index < 1024:
            raise ValueError("tool call index")
        function = call.get("function") or {}
        call_id, name = self._once(index, "id", call.get("id")), self._once(index, "name", function.get("name"))
        first, *rest = _pieces(self._whole(None, index, function.get("arguments") or "")) or [""]
        if call_id or name or first:
            yield ToolCallDelta(index, call_id, name, first)
        for piece in rest:
            yield ToolCallDelta(index, arguments=piece)

    def _once(self, index: int, field: str, value: str | None) -> str | None:
        """Some upstreams repeat a call's id and name in every fragment; the vocabulary says them once."""
        if not value or (index, field) in self._named:
            return None
        self._named.add((index, field))
        return _HALF.sub("\ufffd", value)

    def _whole(self, event: TextEvent | None, index: int, text: str) -> str:
        """`text` in whole characters: an emoji's two halves may come in two chunks."""
        key = (event, index)
        if not self._halves and not _HALF.search(text):
            return text
        text = self._halves.pop(key, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[key] = text[-1]
            text = text[:-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class ServerSentEvents:
    """The data of each event, out of bytes that may be cut anywhere (WHATWG HTML, section 9.2.6).

    Lines end with CR, LF or CRLF and with nothing else: U+2028 and its like are text."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the parts of a line that has not ended
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False

    @property
    def unfinished_line(self) -> bytes:
        return b"".join(self._line)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises ValueError for what cannot be an event stream, and for an event that has no end."""
        for line in self._lines(data):
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line:
                if self._data:
                    yield b"\n".join(self._data)
                self._data, self._size = [], 0
            elif _is_document(line):
                raise ValueError("a document")

    def _lines(self, data: bytes) -> Iterator[bytes]:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return
        self._after_cr = data.endswith(b"\r")
        start, *more = _LINE_END.split(data)
        self._size += len(data)
        self._line.append(start)
        for following in more:
            yield b"".join(self._line)
            self._line = [following]
        if self._size > MAX_SSE_EVENT_BYTES:
            raise ValueError("an event without an end")


_LINE_END = re.compile(rb"\r\n|\n|\r")
_HALF = re.compile("[\ud800-\udfff]")


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


def _backoff_seconds(tries: int) -> float:
    """Doubling, with jitter, so that those refused together do not come back together."""
    return FIRST_BACKOFF_SECONDS * 2.0 ** (tries - 1) * random.uniform(0.5, 1.0)


def _body(prompt: Prompt, route: ModelRoute, is_openai: bool) -> dict[str, Any]:
    """The Chat Completions request. `metadata` is the caller's label on our log: it stays here, and OpenAI
    takes it only together with `store`, which would keep the prompt there."""
    asked = {
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "max_completion_tokens" if is_openai else "max_tokens": prompt.max_tokens,  # few others know the new name
        "stop": prompt.stop,
        "seed": prompt.seed,
        "tools": prompt.tools,
        "tool_choice": prompt.tool_choice,
        "response_format": prompt.response_format,
        "parallel_tool_calls": prompt.parallel_tool_calls,
        "reasoning_effort": prompt.reasoning_effort,
    }
    return {
        "model": prompt.model if route.upstream_model == "*" else route.upstream_model,
        "messages": [message.model_dump(exclude_none=True) for message in prompt.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in asked.items() if value is not None},
    }


def _go_on(body: dict[str, Any], route: ModelRoute, said: Said) -> None:
    """Have the upstream go on with what was said, as vLLM and SGLang, or Mistral and DeepSeek, want to be asked.

    A delta is at least one token, so of `max_tokens` at most what was left is asked for, and perhaps a little more."""
    begun: dict[str, Any] = {"role": "assistant", "content": "".join(said.texts())}
    if route.continuation == "prefix":
        begun["prefix"] = True
    else:
        body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
    body["messages"] = [*body["messages"], begun]
    for limit in ("max_tokens", "max_completion_tokens"):
        if limit in body:
            body[limit] -= len(said.outputs)


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError:  # orjson refuses half a surrogate pair; the standard library takes it
        chunk = json.loads(payload)
    if not isinstance(chunk, dict):
        raise TypeError("not an object")
    return chunk


def _usage(usage: dict[str, Any]) -> Usage:
    read, written = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    return Usage(
        read,
        written,
        _count(usage, "total_tokens") or read + written,
        cached_tokens=_count(usage.get("prompt_tokens_details") or {}, "cached_tokens"),
        reasoning_tokens=_count(usage.get("completion_tokens_details") or {}, "reasoning_tokens"),
    )


def _count(counts: dict[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _pieces(text: str) -> list[str]:
    """Cut to at most MAX_EVENT_TEXT_CHARS each."""
    if len(text) <= MAX_EVENT_TEXT_CHARS:
        return [text] if text else []
    return [text[start : start + MAX_EVENT_TEXT_CHARS] for start in range(0, len(text), MAX_EVENT_TEXT_CHARS)]


def _is_document(line: bytes) -> bool:
    """HTML or JSON where an event stream should be: no field of an event begins so."""
    return line.lstrip()[:1] in (b"<", b"{", b"[")
