"""The AI SDK's UI message stream, version 1: what `useChat` reads.

Only chunk types that `ai` 6 knows, since it refuses a stream with any other; a client of `ai` 7 may opt in to
`reset-step`, and then sees a fresh attempt take the place of a lost one. There is no cursor: a client that comes back
is sent the current attempt from its start, under the same message id.
Source: https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from api import sse
from api.frames import Ending, Frame, render
from shared.events import (
    Cancelled,
    Completed,
    Entry,
    Failed,
    Queued,
    ReasoningDelta,
    RefusalDelta,
    SourceAdded,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
    decode,
)

HEADERS = {"x-vercel-ai-ui-message-stream": "v1"}
NOBODY = "0" * 32
VOIDED = "The worker that wrote this answer was lost, and the answer was begun again. Resume to read the new one."
BAD_ARGUMENTS = "The arguments of this call are not valid JSON."
FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool-calls", "content_filter": "content-filter"}
ABORT_REASONS = {"caller": "stopped", "disconnect": "nobody was reading", "delete": "deleted"}
Words: TypeAlias = TextDelta | RefusalDelta | ReasoningDelta
# A refusal is text to this protocol; the finish reason tells it apart.
PART_OF: dict[type[Words], str] = {TextDelta: "text", RefusalDelta: "text", ReasoningDelta: "reasoning"}


@dataclass
class _Call:
    """A tool call as it is put together. It is told from when its name is known."""

    id: str
    name: str | None = None
    arguments: str = ""
    untold: str = ""


@dataclass
class _Step:
    """What one attempt has said so far."""

    parts: int = 0
    open: tuple[type[Words], str] | None = None  # the kind and the id of the part that deltas go to
    calls: dict[int, _Call] = field(default_factory=dict)
    has_spoken: bool = False


class UiMessages:
    media_type = sse.MEDIA_TYPE

    def __init__(
        self, generation_id: str = NOBODY, *, message_id: str | None = None, can_reset_step: bool = False
    ) -> None:
        self._generation_id = generation_id
        self._message_id = message_id or f"msg_{generation_id}"
        self._can_reset_step = can_reset_step
        self._step: _Step | None = None

    def frames(self, entry: Entry) -> Iterable[Frame | Ending]:
        match decode(entry.data):
            case Queued(model=model, created_at=created_at):
                metadata = {"generationId": self._generation_id, "model": model, "createdAt": created_at}
                yield _chunk("start", messageId=self._message_id, messageMetadata=metadata)
            case Started(mode="fresh"):
                yield from self._fresh()
            case TextDelta(text=text) | RefusalDelta(text=text) | ReasoningDelta(text=text) as event if text:
                yield from self._words(type(event), text)
            case ToolCallDelta() as event:
                yield from self._tool_call(event)
            case SourceAdded() as event:
                yield from self._source(event)
            case Completed() as event:
                yield from self._completed(event)
            case Failed(message=message):
                yield from self._last(_chunk("error", errorText=message))
            case Cancelled(by=by):
                yield from self._last(_chunk("abort", reason=ABORT_REASONS.get(by, by)))
            case _:
                pass

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        return render(self.frames, sse.encode, entries)

    def ping(self) -> bytes:
        return sse.PING

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        return None  # a clean end would be taken for the end of the answer; a broken one can be resumed

    def _fresh(self) -> Iterator[Frame | Ending]:
        before, self._step = self._step, _Step()
        if before is None:
            yield _chunk("start-step")
        elif not before.has_spoken:
            pass
        elif self._can_reset_step:
            yield _chunk("reset-step")
        else:
            self._step = before
            yield from self._last(_chunk("error", errorText=VOIDED))
            yield Ending.STOP

    def _saying(self) -> _Step:
        self._step = self._step or _Step()
        self._step.has_spoken = True
        return self._step

    def _words(self, kind: type[Words], text: str) -> Iterator[Frame]:
        step = self._saying()
        if step.open is None or step.open[0] is not kind:
            yield from self._close()
            step.open = (kind, str(step.parts))
            step.parts += 1
            yield _chunk(f"{PART_OF[kind]}-start", id=step.open[1])
        yield _chunk(f"{PART_OF[kind]}-delta", id=step.open[1], delta=text)

    def _close(self) -> Iterator[Frame]:
        """End the part that deltas go to, if there is one."""
        if self._step and self._step.open:
            (kind, part_id), self._step.open = self._step.open, None
            yield _chunk(f"{PART_OF[kind]}-end", id=part_id)

    def _tool_call(self, event: ToolCallDelta) -> Iterator[Frame]:
        step = self._saying()
        yield from self._close()
        of_ours = f"call_{self._generation_id[:16]}_{event.index}"
        call = step.calls.setdefault(event.index, _Call(event.id or of_ours))
        if call.name is None and event.name:
            call.name = event.name
            yield _chunk("tool-input-start", toolCallId=call.id, toolName=call.name)
        call.arguments += event.arguments
        call.untold += event.arguments
        if call.name is not None and call.untold:
            yield _chunk("tool-input-delta", toolCallId=call.id, inputTextDelta=call.untold)
            call.untold = ""

    def _source(self, event: SourceAdded) -> Iterator[Frame]:
        self._saying()
        ours = {name: value for name in ("score", "snippet") if (value := getattr(event, name)) is not None}
        extra = {"providerMetadata": {"rejoin": ours}} if ours else {}
        if event.url:
            yield _chunk("source-url", sourceId=event.id, url=event.url, title=event.title, **extra)
        else:
            yield _chunk("source-document", sourceId=event.id, mediaType="text/plain", title=event.title, **extra)

    def _completed(self, event: Completed) -> Iterator[Frame]:
        yield from self._close()
        for call in self._step.calls.values() if self._step else ():
            yield from _whole_call(call)
        if self._step is not None:
            yield _chunk("finish-step")
        metadata = {"messageMetadata": {"usage": _usage(event.usage)}} if event.usage else {}
        yield _chunk("finish", finishReason=FINISH_REASONS.get(event.finish_reason, "other"), **metadata)
        yield Frame(b"[DONE]")

    def _last(self, chunk: Frame) -> Iterator[Frame]:
        yield from self._close()
        yield chunk
        yield Frame(b"[DONE]")


def _whole_call(call: _Call) -> Iterator[Frame]:
    name = call.name or "unknown"
    if call.name is None:
        yield _chunk("tool-input-start", toolCallId=call.id, toolName=name)
    try:
        asked = orjson.loads(call.arguments or "{}")
        yield _chunk("tool-input-available", toolCallId=call.id, toolName=name, input=asked)
    except (orjson.JSONDecodeError, TypeError):  # TypeError: nested deeper than can be written again
        told = {"toolCallId": call.id, "toolName": name, "input": call.arguments}
        yield _chunk("tool-input-error", **told, errorText=BAD_ARGUMENTS)


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "inputTokens": usage.input_tokens,
        "outputTokens": usage.output_tokens,
        "totalTokens": usage.total_tokens,
        "cachedInputTokens": usage.cached_tokens,
        "reasoningTokens": usage.reasoning_tokens,
    }


def _chunk(kind: str, **fields: Any) -> Frame:
    return Frame(orjson.dumps({"type": kind, **fields}))
