"""The upstream that speaks OpenAI's Responses in background mode: OpenAI itself, another Rejoin.

Such an upstream goes on without us, so nothing that breaks here costs its words: whoever lost the stream comes back to
the same response, behind the last event it has. One rule: what cannot be had from exactly there is a failure, never
spliced. And one duty: to close the connection stops nothing there, so `abandon` says it.
Knows nothing of logs, jobs or clients. What is sent is in `responses_request`, what is heard in `Answer`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from shared.config import MAX_EVENT_TEXT_CHARS, ModelRoute, Settings
from shared.errors import UpstreamError
from shared.events import (
    Completed,
    FinishReason,
    Output,
    ReasoningDelta,
    RefusalDelta,
    SourceAdded,
    TextDelta,
    ToolCallDelta,
    UpstreamAccepted,
    Usage,
)
from shared.prompt import Prompt
from worker.providers import Said
from worker.providers.responses_request import body_of
from worker.providers.upstream_events import (
    UNREADABLE,
    Channel,
    Characters,
    ServerSentEvents,
    TextEvent,
    count,
    delta,
    encodable,
    parse,
    pieces,
)
from worker.providers.upstream_http import (
    LINGER_SECONDS,
    RETRIED,
    Chunks,
    Request,
    UpstreamHTTP,
    backoff_seconds,
    failure,
)

Json: TypeAlias = dict[str, Any]

ABANDON_SECONDS = 2.0  # for telling the upstream to stop, with a second try
ABANDON_PAUSE_SECONDS = 0.2
DISOWN_SECONDS = 5.0  # for the id of a response that is to be stopped
COME_BACK = RETRIED | {"upstream_timeout_first_token", "upstream_timeout_inter_token", "upstream_truncated"}
TEXTS: dict[str, TextEvent] = {
    "response.output_text.delta": TextDelta,
    "response.reasoning_summary_text.delta": ReasoningDelta,
    "response.reasoning_text.delta": ReasoningDelta,
    "response.refusal.delta": RefusalDelta,
}
INCOMPLETE: dict[str, FinishReason] = {"max_output_tokens": "length", "content_filter": "content_filter"}
# How an upstream names what went wrong, where it is not `upstream_error`; the last three are another Rejoin's.
ERRORS = {
    "rate_limit_exceeded": "upstream_rate_limited",
    "draining": "upstream_unavailable",
    "attempt_superseded": "upstream_lost_response",
    "gone": "upstream_lost_response",
}
_BLAMES_REQUEST = re.compile(r"[a-z_]*(invalid|image|unsupported)[a-z_]*")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:.=~-]{0,511}")


def build(settings: Settings, route: ModelRoute) -> OpenAIResponses:
    """Raises SettingsError where the base URL is none. A missing key shows when it is needed."""
    return OpenAIResponses(UpstreamHTTP(settings, route), route)


class OpenAIResponses:
    """One upstream, asked for responses that go on in the background."""

    def __init__(self, http: UpstreamHTTP, route: ModelRoute) -> None:
        self._http = http
        self._route = route
        responses = http.client.responses.with_streaming_response  # imports much: not at a request
        self._create, self._retrieve, self._cancel = responses.create, responses.retrieve, responses.cancel
        self._disowned: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        await asyncio.gather(*self._disowned)
        await self._http.aclose()

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """As soon as the upstream has told its id: everything else it can be asked for again."""
        return said.accepted_id is not None

    async def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncGenerator[Output | Completed, None]:
        """The events of one answer, the upstream's id first. Raises UpstreamError with a code of FAILURES.

        A connection that breaks or falls silent is opened again behind the last event, as long as `retry_seconds` in
        a row; before the id is known that is not possible, and the answer fails. Cancelling the task closes the
        connection at once, after the id was told; before, it stays open for that, up to DISOWN_SECONDS."""
        self._http.require_key(prompt)
        answer = Answer(said)
        body = {} if answer.id else body_of(prompt, self._route)
        patience = Patience(self._route.retry_seconds)
        while answer.end is None:
            try:
                async with aclosing(self._listen(prompt.model, body, answer)) as outputs:
                    async for output in outputs:
                        yield output
            except UpstreamError as error:
                if answer.id is None or answer.is_over or error.code not in COME_BACK:
                    raise
                await patience.wait(error, answer.heard)
        for output in answer.leftovers():
            yield output
        yield answer.end

    async def abandon(self, upstream_id: str) -> None:
        """Have the upstream stop. That it has ended already, or never heard of it, is as good."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + ABANDON_SECONDS
        while True:
            try:
                async with AsyncExitStack() as connection:
                    await self._http.send(self._route.name, partial(self._cancel, upstream_id), connection, give_up_at)
                return
            except UpstreamError as error:
                if error.code == "upstream_rejected":
                    return
                if error.code not in RETRIED or clock() + ABANDON_PAUSE_SECONDS > give_up_at:
                    raise
            await asyncio.sleep(ABANDON_PAUSE_SECONDS)

    async def _listen(self, model: str, body: Json, answer: Answer) -> AsyncGenerator[Output, None]:
        """What one connection brings. Raises UpstreamError unless the answer's end came."""
        clock = asyncio.get_running_loop().time
        answer.begin_stream()
        stream = await (self._begin(model, body, answer) if answer.id is None else self._come_back(model, answer))
        async with stream.connection:
            for output in stream.outputs:
                yield output
            if stream.failure:
                raise stream.failure
            deadline = clock() + self._route.inter_token_seconds if answer.heard else stream.deadline
            while answer.problem is None and (data := await self._next(model, stream.chunks, answer, deadline)):
                heard = answer.heard
                for output in answer.read(data):
                    yield output
                # The wait is counted from here, not from the read: a slow consumer is not the upstream's silence.
                if answer.end is not None:
                    deadline = min(deadline, clock() + LINGER_SECONDS)
                elif answer.heard > heard:
                    deadline = clock() + self._route.inter_token_seconds
        if answer.end is None:
            raise failure(model, *(answer.problem or answer.cut_off()))

    async def _begin(self, model: str, body: Json, answer: Answer) -> Stream:
        """A new response, read up to its id. Who leaves before that leaves something nobody knows: it is stopped."""
        # A request that is sent again is not a second response, where the upstream knows the header.
        once = {"Idempotency-Key": secrets.token_hex(16)}
        request = partial(self._create, **body, extra_headers=once)

        async def send(deadline: float) -> Stream:
            beginning = asyncio.create_task(self._read_id(model, request, answer, deadline))
            try:
                return await asyncio.shield(beginning)
            except asyncio.CancelledError:
                disowning = asyncio.create_task(self._disown(beginning, answer))
                self._disowned.add(disowning)
                disowning.add_done_callback(self._disowned.discard)
                raise

        return await self._http.retried(send)

    async def _read_id(self, model: str, request: Request, answer: Answer, deadline: float) -> Stream:
        """The stream of a response up to its id, or to its first words where it tells none."""
        async with AsyncExitStack() as connection:
            chunks = await self._http.stream(model, request, connection, deadline)
            outputs: list[Output] = []
            broken = None
            try:
                while not outputs and answer.problem is None and answer.end is None:
                    data = await self._http.read(model, chunks, deadline, started=False)
                    if not data:
                        break
                    outputs = answer.read(data)
            except UpstreamError as error:  # the response has begun: to send again would begin another
                broken = error
            return Stream(connection.pop_all(), chunks, deadline, outputs, broken)
        raise AssertionError("an exit stack of a stream swallows nothing")

    async def _disown(self, beginning: asyncio.Task[Stream], answer: Answer) -> None:
        """The log has no id of this response, so no other worker can come back to it, whatever it was left for."""
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(DISOWN_SECONDS):
                stream = await beginning
            async with stream.connection:
                if answer.id is not None:
                    await self.abandon(answer.id)

    async def _come_back(self, model: str, answer: Answer) -> Stream:
        """The stream of what follows the last event that was seen."""
        assert answer.id is not None
        seconds = self._route.inter_token_seconds if answer.started else self._route.first_token_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        after = {} if answer.seen is None else {"starting_after": answer.seen}
        request = partial(self._retrieve, answer.id, stream=True, **after)
        async with AsyncExitStack() as connection:
            try:
                chunks = await self._http.stream(model, request, connection, deadline)
            except UpstreamError as error:
                if error.code == "upstream_rejected":  # 404 and 410: it is gone; any other says as little
                    raise failure(model, "upstream_lost_response") from None
                raise
            return Stream(connection.pop_all(), chunks, deadline)
        raise AssertionError("an exit stack of a stream swallows nothing")

    async def _next(self, model: str, chunks: Chunks, answer: Answer, deadline: float) -> bytes:
        """The next bytes, or none at the end. Once all is said, a cut and a silence are an end like any other."""
        try:
            return await self._http.read(model, chunks, deadline, started=answer.started)
        except UpstreamError:
            if answer.end is None:
                raise
            return b""


@dataclass(frozen=True)
class Stream:
    """An open connection, the bytes that are to come, and by when the next token must; what was read of it already."""

    connection: AsyncExitStack
    chunks: Chunks
    deadline: float
    outputs: Sequence[Output] = ()
    failure: UpstreamError | None = None


class Patience:
    """For how long in a row an upstream may be away before its answer is given up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._heard = -1
        self._tries = 0
        self._give_up_at = 0.0

    async def wait(self, error: UpstreamError, heard: int) -> None:
        """Sleep a little more after each failure in a row. Raises the failure when there were enough of them.

        `heard`: how many events came so far; one more, and the count begins anew."""
        clock = asyncio.get_running_loop().time
        if heard > self._heard:
            self._heard, self._tries, self._give_up_at = heard, 0, clock() + self._seconds
        self._tries += 1
        delay = (error.retry_after or 0.0) + backoff_seconds(self._tries)
        if clock() + delay > self._give_up_at:
            raise error
        await asyncio.sleep(delay)


class Answer:
    """What was read of one response so far, over all its connections, and what the log had of it before.

    The log tells, with the `cursor` of its last deltas, which of the upstream's events it has whole: those that follow
    are asked for. What it has beyond, pieces of a delta that was too long for one event, is left out once more,
    character by character. `problem`, once set, is a failure's code and detail."""

    def __init__(self, said: Said | None = None) -> None:
        outputs = said.outputs if said else ()
        self.id = said.accepted_id if said else None
        self.end: Completed | None = None
        self.problem: tuple[str, str] | None = None
        self.is_over = False  # the response itself has failed, not only its stream
        self.heard = 0  # events that told something new
        self.started = any(not isinstance(event, UpstreamAccepted) for event in outputs)
        self._known, beyond = _known(outputs)
        self._repeated, self._named = _texts(beyond), {event.index for event in _calls(beyond) if event.id}
        self._sources = {event.id for event in outputs if isinstance(event, SourceAdded)}
        self._calls: dict[int, int] = {}  # by their place in the output: their number among the calls
        # Which call is which stands in events the log has already: with calls, all is read again from the start.
        self.seen: int | None = None if self._known < 0 or any(_calls(outputs)) else self._known
        self._characters = Characters()
        self._sse = ServerSentEvents()

    def begin_stream(self) -> None:
        """A new connection: half an event of the one before is nothing."""
        self._sse, self.problem = ServerSentEvents(), None

    def read(self, data: bytes) -> list[Output]:
        """The outputs in the next bytes, up to the first problem with them."""
        outputs: list[Output] = []
        try:
            for payload in self._sse.feed(data):
                if payload != b"[DONE]" and self.end is None and self.problem is None:
                    outputs += self._event(parse(payload))
        except UNREADABLE as error:
            self.problem = ("upstream_invalid", type(error).__name__)
        self.heard += sum(not isinstance(output, UpstreamAccepted) for output in outputs)
        self.started = self.started or self.heard > 0
        return outputs

    def cut_off(self) -> tuple[str, str]:
        """The problem with a stream that has ended here."""
        return self._sse.cut_off()

    def leftovers(self) -> Sequence[Output]:
        """Halves of characters that never found their mates."""
        return self._characters.leftovers()

    def _event(self, event: Json) -> Iterator[Output]:
        number, kind = event.get("sequence_number"), event.get("type")
        if kind != "error" and type(number) is int and not self._is_next(number):
            return
        match kind:
            case "response.created" | "response.queued" | "response.in_progress":
                yield from self._accept(event["response"])
            case "response.output_item.added" if event["item"].get("type") == "function_call":
                yield from self._call(event, number)
            case "response.function_call_arguments.delta":
                yield from self._say(self._number_of(event), event["delta"], number)
            case "response.reasoning_summary_part.added" if event.get("summary_index"):
                yield from self._say(ReasoningDelta, "\n\n", number)  # between two paragraphs
            case "response.output_text.annotation.added":
                yield from self._cite(event["annotation"])
            case "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled":
                self._finish(kind.removeprefix("response."), event["response"])
            case "error":  # it may repeat a number
                self._fail(event.get("code") or (event.get("error") or {}).get("code"))
            case str() if kind in TEXTS:
                yield from self._say(TEXTS[kind], event["delta"], number)

    def _is_next(self, number: int) -> bool:
        """Note that the event with this number came; False where it had come before."""
        if not 0 <= number < 2**53:
            raise ValueError("sequence_number")
        before = -1 if self.seen is None else self.seen
        if before < self._known < number:  # the last event that the log has is not in this stream
            self._lose()
        if number <= before or self.problem:
            return False
        self.seen = number
        return True

    def _lose(self) -> None:
        """This is another answer than the one to go on with."""
        self.problem, self.is_over = ("upstream_lost_response", ""), True

    def _accept(self, response: Json) -> Iterator[Output]:
        """The id, once. An upstream that says it does not work in the background cannot be come back to."""
        given = response.get("id")
        if response.get("background") is False or given == self.id:
            return
        if self.id is not None or not isinstance(given, str) or not _ID.fullmatch(given):
            raise ValueError("another id")
        self.id = given
        yield UpstreamAccepted(given)

    def _say(self, channel: Channel, text: str, number: int | None) -> Iterator[Output]:
        if number is None:
            raise ValueError("words that cannot be come back to")
        whole = self._characters.whole(channel, text)
        *parts, last = pieces(self._beyond(channel, whole) if number > self._known else "") or [""]
        for part in parts:
            yield delta(channel, part)
        if last:  # with it all of this event is said, unless half a character is kept back
            yield delta(channel, last, number if self._characters.are_whole else None)

    def _beyond(self, channel: Channel, text: str) -> str:
        """`text` without what the log has of it. Raises ValueError where the log has another one."""
        repeated = self._repeated.get(channel, "")
        known = min(len(text), len(repeated))
        if text[:known] != repeated[:known]:
            raise ValueError("another text than the one to go on from")
        self._repeated[channel] = repeated[known:]
        return text[known:]

    def _call(self, event: Json, number: int | None) -> Iterator[Output]:
        if number is None:
            raise ValueError("a call that cannot be come back to")
        item, index = event["item"], len(self._calls)
        self._calls[event["output_index"]] = index
        if number > self._known and index not in self._named:
            cursor = number if self._characters.are_whole else None
            call_id, name = encodable(item.get("call_id") or ""), encodable(item.get("name") or "")
            yield ToolCallDelta(index, call_id or None, name or None, cursor=cursor)

    def _number_of(self, event: Json) -> int:
        number = self._calls.get(event["output_index"])
        if number is None:
            raise ValueError("arguments of no call")
        return number

    def _cite(self, annotation: Json) -> Iterator[Output]:
        """A page, once, however often it is cited."""
        url = annotation.get("url")
        if annotation.get("type") == "url_citation" and url:
            url = encodable(url)[:MAX_EVENT_TEXT_CHARS]
            if url not in self._sources:
                self._sources.add(url)
                yield SourceAdded(url, encodable(annotation.get("title") or url)[:MAX_EVENT_TEXT_CHARS], url)

    def _finish(self, kind: str, response: Json) -> None:
        if kind == "failed":
            return self._fail((response.get("error") or {}).get("code"))
        if kind == "cancelled" or response.get("status") == "cancelled":
            self.problem, self.is_over = ("upstream_cancelled", ""), True
            return None
        if self.seen is not None and self.seen < self._known:
            return self._lose()
        if any(self._repeated.values()):
            raise ValueError("a shorter text than the one to go on from")
        self.end = Completed(self._finish_reason(kind, response), _usage(response.get("usage")))
        return None

    def _finish_reason(self, kind: str, response: Json) -> FinishReason:
        if kind == "incomplete":
            return INCOMPLETE.get(str((response.get("incomplete_details") or {}).get("reason")), "length")
        has_calls = any(item.get("type") == "function_call" for item in response.get("output") or ())
        return "tool_calls" if has_calls or self._calls else "stop"

    def _fail(self, given: Any) -> None:
        """Only a server that goes down has failed us without the response having failed."""
        given = given if isinstance(given, str) else ""
        rejected = _BLAMES_REQUEST.fullmatch(given) is not None
        code = "upstream_rejected" if rejected else ERRORS.get(given, "upstream_error")
        self.problem = (code, given if rejected else "the stream said so")
        self.is_over = code != "upstream_unavailable"


def _known(outputs: Sequence[Output]) -> tuple[int, Sequence[Output]]:
    """The number of the last event that the log has whole, -1 for none, and what it has beyond that."""
    for place in range(len(outputs) - 1, -1, -1):
        event = outputs[place]
        if not isinstance(event, SourceAdded | UpstreamAccepted) and event.cursor is not None:
            return event.cursor, outputs[place + 1 :]
    return -1, outputs


def _calls(outputs: Sequence[Output]) -> Iterator[ToolCallDelta]:
    return (event for event in outputs if isinstance(event, ToolCallDelta))


def _texts(outputs: Sequence[Output]) -> dict[Channel, str]:
    texts: dict[Channel, str] = {}
    for event in outputs:
        if isinstance(event, ToolCallDelta):
            texts[event.index] = texts.get(event.index, "") + event.arguments
        elif not isinstance(event, SourceAdded | UpstreamAccepted):
            texts[type(event)] = texts.get(type(event), "") + event.text
    return texts


def _usage(usage: Json | None) -> Usage | None:
    if not usage:
        return None
    read, written = count(usage, "input_tokens"), count(usage, "output_tokens")
    return Usage(
        read,
        written,
        count(usage, "total_tokens") or read + written,
        cached_tokens=count(usage.get("input_tokens_details") or {}, "cached_tokens"),
        reasoning_tokens=count(usage.get("output_tokens_details") or {}, "reasoning_tokens"),
    )
