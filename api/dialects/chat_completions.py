"""OpenAI's Chat Completions: the chunks of a stream, and the whole completion.

No `id:` and no `retry:`, and a ping has no blank line of its own: openai-python takes any of them for an empty event.
It has no word for "what I said is void", so a fresh attempt after the first words ends the stream with an error.

Source: https://platform.openai.com/docs/api-reference/chat, and what its clients do (openai-python #2722).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

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
    Snapshot,
    SourceAdded,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
    decode,
)

ID_PREFIX = "chatcmpl-"
DONE = Frame(b"[DONE]")
ERROR_TYPES = {"upstream_rate_limited": "rate_limit_error", "cancelled": "cancelled"}
CANCELLED = "the generation was cancelled; what came before is not the whole answer"
SUPERSEDED = "the answer was begun anew, and what came before is void; send the request again for the new one"
ENDINGS = {
    Ending.DRAINING: (
        "draining",
        "this server is going down; the same request with the same Idempotency-Key, sent again, goes on",
    ),
    Ending.GONE: ("gone", "the log of this generation is gone; send the request again"),
}
# Line ends to many a client's `splitlines`, and raw in JSON: a frame's data must stay on its line.
LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


class ChatCompletions:
    """One stream. It always begins at the start: a chunk has no id to go on from."""

    media_type = sse.MEDIA_TYPE

    def __init__(self, generation_id: str, include_usage: bool = False) -> None:
        self._head: dict[str, Any] = {"id": ID_PREFIX + generation_id, "object": "chat.completion.chunk"}
        self._generation_id = generation_id
        self._include_usage = include_usage
        self._has_spoken = False
        self._calls: list[int] = []  # the upstream's numbers of the tool calls; ours are their places
        self._sources: list[SourceAdded] = []  # held back until something else comes
        self._sources_sent = 0

    def frames(self, entry: Entry) -> Iterable[Frame | Ending]:
        match decode(entry.data):
            case Queued(model=model, created_at=created_at):
                self._head |= {"created": created_at // 1000, "model": model}
                return (self._chunk({"role": "assistant", "content": ""}),)
            case Started(mode="fresh"):
                return self._afresh()
            case TextDelta(text=text) if text:
                return self._says({"content": text})
            case ReasoningDelta(text=text) if text:
                return self._says({"reasoning_content": text})
            case RefusalDelta(text=text) if text:
                return self._says({"refusal": text})
            case ToolCallDelta() as event:
                return self._says({"tool_calls": [self._tool_call(event)]})
            case SourceAdded(url=url) as event:
                if url:
                    self._sources.append(event)
                return ()
            case Completed() as event:
                return self._complete(event)
            case Failed(code=code, message=message):
                return (_frame(error(code, message)),)
            case Cancelled():
                return (_frame(error("cancelled", CANCELLED)),)
            case _:
                return ()

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        return render(self.frames, sse.encode, entries)

    def ping(self) -> bytes:
        return b": ping\n"

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        return sse.encode(_frame(error(*ENDINGS[ending]))) if ending in ENDINGS else None

    def _afresh(self) -> Iterable[Frame | Ending]:
        if self._has_spoken:
            return (_frame(error("attempt_superseded", SUPERSEDED)), Ending.STOP)
        self._sources = []
        return ()

    def _says(self, delta: dict[str, Any]) -> list[Frame]:
        self._has_spoken = True
        return [*self._held_back(), self._chunk(delta)]

    def _complete(self, event: Completed) -> list[Frame]:
        frames = [*self._held_back(), self._chunk({}, event.finish_reason)]
        if self._include_usage and event.usage is not None:
            frames.append(_frame({**self._head, "choices": [], "usage": usage(event.usage)}))
        return [*frames, DONE]

    def _held_back(self) -> list[Frame]:
        """The sources so far, in one delta: openai-node keeps the last list only, openai-python joins by `index`."""
        if not self._sources:
            return []
        numbered = enumerate(self._sources, self._sources_sent)
        annotations = [{"index": n, **citation(source.title, source.url or "")} for n, source in numbered]
        self._sources_sent += len(self._sources)
        self._sources = []
        return [self._chunk({"annotations": annotations})]

    def _tool_call(self, event: ToolCallDelta) -> dict[str, Any]:
        """A fragment. The first of a call has its id and type: clients join what comes again to what they have."""
        is_first = event.index not in self._calls
        if is_first:
            self._calls.append(event.index)
        index = self._calls.index(event.index)
        name = {"name": event.name or ""} if is_first or event.name else {}
        head = {"id": event.id or call_id(self._generation_id, index), "type": "function"} if is_first else {}
        return {"index": index, **head, "function": {**name, "arguments": event.arguments}}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> Frame:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        body = {**self._head, "choices": [choice]}
        if self._include_usage:
            body["usage"] = None
        return _frame(body)


def completion(generation_id: str, state: Snapshot) -> dict[str, Any]:
    """The chat.completion object of a generation that was completed."""
    message: dict[str, Any] = {"role": "assistant", "content": state.text, "refusal": state.refusal or None}
    if state.tool_calls or (state.refusal and not state.text):
        message["content"] = state.text or None
    if state.tool_calls:
        message["tool_calls"] = [_whole_call(generation_id, n, call) for n, call in enumerate(state.tool_calls)]
    if state.reasoning:
        message["reasoning_content"] = state.reasoning
    message["annotations"] = [citation(source["title"], source["url"]) for source in state.sources if source["url"]]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": state.finish_reason}
    return {
        "id": ID_PREFIX + generation_id,
        "object": "chat.completion",
        "created": (state.created_at or 0) // 1000,
        "model": state.model,
        "choices": [choice],
        **({"usage": usage(state.usage)} if state.usage else {}),
    }


def error(code: str, message: str) -> dict[str, Any]:
    """OpenAI's error object, as a frame of a stream and as the body of an answer."""
    return {"error": {"message": message, "type": ERROR_TYPES.get(code, "server_error"), "param": None, "code": code}}


def usage(counts: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
    }


def citation(title: str, url: str) -> dict[str, Any]:
    """A source as an annotation. It belongs to the whole answer: no words of it are marked. One without an address is
    not told: this protocol has no annotation but `url_citation`, and a client would make a link of it."""
    return {
        "type": "url_citation",
        "url_citation": {"start_index": 0, "end_index": 0, "title": title, "url": url},
    }


def call_id(generation_id: str, index: int) -> str:
    """The id of a tool call whose upstream gave none: results are matched by it."""
    return f"call_{generation_id}_{index}"


def _whole_call(generation_id: str, index: int, call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"] or "", "arguments": call["arguments"]}
    return {"id": call["id"] or call_id(generation_id, index), "type": "function", "function": function}


def _frame(body: dict[str, Any]) -> Frame:
    data = orjson.dumps(body)
    for raw, escaped in LINE_ENDS:
        data = data.replace(raw, escaped)
    return Frame(data)
