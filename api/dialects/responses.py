"""OpenAI Responses: the log as response events, each with a `sequence_number`, and as a Response object.

The number is a pure function of the log: the n-th event of what the newest attempt says, counted from 0, plus a million
for each attempt that had spoken and was voided. So `starting_after` renders again and skips. This protocol cannot
unsay: an attempt that begins afresh after another was heard ends the stream with an error. Knows no HTTP, no Redis.
"""

from __future__ import annotations

import re
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
    Event,
    Failed,
    Queued,
    ReasoningDelta,
    RefusalDelta,
    SourceAdded,
    Started,
    Status,
    Terminal,
    TextDelta,
    ToolCallDelta,
    Usage,
    decode,
    outcome,
)
from shared.prompt import Message, Prompt

Json: TypeAlias = dict[str, Any]

PREFIX = "resp_"
ATTEMPT_NUMBERS = 1_000_000  # how far the numbers of two attempts that spoke are apart, for each millisecond between
PING = b": ping\n"  # one line: openai-python takes a blank line for an event once it is not the first
LAST_EVENTS: dict[Status, str] = {"completed": "response.completed", "failed": "response.failed"}
INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
ERROR_CODES = {"upstream_rate_limited": "rate_limit_exceeded"}  # OpenAI's list is closed; ours stands in `type`
SUPERSEDED = "the attempt this stream was following was lost and its words are void; retrieve the response again"
LAST_WORDS = {
    Ending.DRAINING: ("draining", "this server is going down; retrieve the response with `starting_after`"),
    Ending.GONE: ("gone", "the response was deleted or has expired"),
}


@dataclass(frozen=True)
class PartKind:
    """How a text that grows is called: its deltas, its field, its place, and the events around it."""

    name: str
    text_field: str
    index: str
    wrapper: str


PARTS = {
    "output_text": PartKind("response.output_text", "text", "content_index", "response.content_part"),
    "refusal": PartKind("response.refusal", "refusal", "content_index", "response.content_part"),
    "summary_text": PartKind(
        "response.reasoning_summary_text", "text", "summary_index", "response.reasoning_summary_part"
    ),
    "arguments": PartKind("response.function_call_arguments", "arguments", "", ""),
}

# What a Response says where the caller did not; in OpenAI's order.
DEFAULTS: Json = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_logprobs": 0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
    "user": None,
    "metadata": {},
    "safety_identifier": None,
    "prompt_cache_key": None,
}


@dataclass(frozen=True)
class Asked:
    """What the log does not hold: the generation's id, and what its caller asked (the fields of DEFAULTS)."""

    id: str = "0" * 32
    options: Json = field(default_factory=dict)


def options_of(prompt: Prompt, options: Json) -> Json:
    """The fields of DEFAULTS that an order says, also one that another protocol made."""
    said = {"temperature": prompt.temperature, "top_p": prompt.top_p, "max_output_tokens": prompt.max_tokens}
    known = {name: value for name, value in options.items() if name in DEFAULTS and value is not None}
    return {**{name: value for name, value in said.items() if value is not None}, **known}


def current(entries: Sequence[Entry]) -> list[Entry]:
    """What counts of a log: entry `0-1`, then all from the newest fresh start on."""
    starts = [n for n, entry in enumerate(entries) if _is_fresh(decode(entry.data))]
    return [*entries[:1], *entries[starts[-1] :]] if starts else list(entries)


def first_number(entries: Iterable[Entry]) -> int:
    """The number that the newest fresh attempt begins with. `entries` are the log's, up to its start.

    0 while nothing that was said is void. Else it rests on the attempt's time: a count of attempts would be handed out
    again by a store that lost one (a replica that was promoted), and a number would stand for two events."""
    first, created_at, has_spoken = 0, 0, False
    for entry in entries:
        match decode(entry.data):
            case Queued(created_at=created_at):
                pass
            case Started(mode="fresh", restored=restored) if has_spoken or restored:  # a silent one is not to be seen
                first, has_spoken = max(1, entry.position[0] - created_at) * ATTEMPT_NUMBERS, False
            case event:
                has_spoken = has_spoken or _speaks(event)
    return first


def _is_fresh(event: Event | None) -> bool:
    return isinstance(event, Started) and event.mode == "fresh"


def _speaks(event: Event | None) -> bool:
    """Whether an event says something to the client by itself: a source waits for the words that rest on it."""
    match event:
        case TextDelta(text=text) | ReasoningDelta(text=text) | RefusalDelta(text=text):
            return bool(text)
        case _:
            return isinstance(event, ToolCallDelta)


class Responses:
    """One stream. `after`: the last number the client has; `first`: that of the stream's first event."""

    media_type = sse.MEDIA_TYPE

    def __init__(self, asked: Asked | None = None, *, after: int = -1, first: int = 0) -> None:
        self._answer = Answer(asked or Asked())
        self._after = after
        self._next = first

    def frames(self, entry: Entry) -> Iterator[Frame | Ending]:
        event = decode(entry.data)
        if _is_fresh(event) and self._answer.has_spoken:
            yield self._error("attempt_superseded", SUPERSEDED)
            yield Ending.STOP
            return
        for said in self._answer.add(event):
            number, self._next = self._next, self._next + 1
            if number > self._after:
                yield _frame({**said, "sequence_number": number})

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        return render(self.frames, sse.encode, entries)

    def ping(self) -> bytes:
        return PING

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        return sse.encode(self.last_words(ending)) if ending in LAST_WORDS else None

    def last_words(self, ending: Ending) -> Frame:
        """What there is to say when the server goes, or the log has gone."""
        return self._error(*LAST_WORDS[ending])

    def _error(self, code: str, message: str) -> Frame:
        """An end that is not in the log. It repeats the last number: who goes on from it misses nothing."""
        return _frame(error_event(code, message, max(self._next - 1, 0)))


def error_event(code: str, message: str, number: int, *, kind: str = "server_error", param: str | None = None) -> Json:
    """An error as OpenAI's SDKs declare it (flat) and as its servers send it (nested)."""
    flat = {"code": code, "message": message, "param": param}
    return {"type": "error", **flat, "error": {"type": kind, **flat}, "sequence_number": number}


def response(asked: Asked, entries: Sequence[Entry]) -> Json:
    """The Response object that a log, or its beginning, amounts to."""
    answer = Answer(asked)
    for entry in current(entries):
        for _ in answer.add(decode(entry.data)):
            pass
    return answer.response()


def _frame(event: Json) -> Frame:
    return Frame(orjson.dumps(event), str(event["type"]).encode())


@dataclass
class Part:
    """A text that grows. Its deltas are called `name`.delta, and it stands in its item at `at` of `index`."""

    type: str
    at: int
    pieces: list[str] = field(default_factory=list)
    annotations: list[Json] = field(default_factory=list)
    is_open: bool = True

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def body(self) -> Json:
        body = {"type": self.type, PARTS[self.type].text_field: self.text}
        return {**body, "annotations": list(self.annotations), "logprobs": []} if self.type == "output_text" else body


@dataclass
class Item:
    """One item of the output. `fields` are those of its JSON that never change."""

    fields: Json
    index: int
    call_index: int | None = None
    status: str = "in_progress"
    parts: list[Part] = field(default_factory=list)

    @property
    def type(self) -> str:
        return str(self.fields["type"])

    def body(self) -> Json:
        parts = [part.body() for part in self.parts]
        match self.type:
            case "reasoning":
                return {**self.fields, "summary": parts, "status": self.status}
            case "message":
                return {**self.fields, "status": self.status, "content": parts}
            case _:
                arguments = "".join(part.text for part in self.parts)
                return {**self.fields, "arguments": arguments, "status": self.status}

    def add(self, kind: str, text: str) -> Iterator[Json]:
        if not self.parts or self.parts[-1].type != kind:
            yield from self.open_part(kind)
        part = self.parts[-1]
        part.pieces.append(text)
        yield self._about(part, f"{PARTS[kind].name}.delta", delta=text, **_logprobs(kind))

    def open_part(self, kind: str) -> Iterator[Json]:
        yield from self._close_part()
        part = Part(kind, len(self.parts))
        self.parts.append(part)
        if PARTS[kind].wrapper:
            yield self._about(part, f"{PARTS[kind].wrapper}.added", part=part.body())

    def cite(self, source: Json) -> Json:
        """Say that the words so far, or those that begin here, rest on a source."""
        part = self.parts[-1]
        at, number = sum(map(len, part.pieces)), len(part.annotations)
        place = {"index": at} if source["type"] == "file_citation" else {"start_index": at, "end_index": at}
        part.annotations.append({**source, **place})
        name = "response.output_text.annotation.added"
        return self._about(part, name, annotation_index=number, annotation=part.annotations[-1])

    def close(self, status: str) -> Iterator[Json]:
        if self.status != "in_progress":
            return
        if self.type != "function_call" or status == "completed":  # half of the arguments are none
            yield from self._close_part()
        self.status = status
        yield self.event("response.output_item.done")

    def event(self, name: str) -> Json:
        return {"type": name, "output_index": self.index, "item": self.body()}

    def _close_part(self) -> Iterator[Json]:
        part = self.parts[-1] if self.parts else None
        if part is None or not part.is_open:
            return
        part.is_open = False
        kind = PARTS[part.type]
        name = {"name": self.fields["name"]} if self.type == "function_call" else {}
        yield self._about(part, f"{kind.name}.done", **name, **{kind.text_field: part.text}, **_logprobs(part.type))
        if kind.wrapper:
            yield self._about(part, f"{kind.wrapper}.done", part=part.body())

    def _about(self, about: Part, name: str, /, **more: Any) -> Json:
        index = PARTS[about.type].index
        at = {index: about.at} if index else {}
        return {"type": name, "item_id": self.fields["id"], "output_index": self.index, **at, **more}


def _logprobs(kind: str) -> Json:
    return {"logprobs": []} if kind == "output_text" else {}


class Answer:
    """What one attempt has said so far: the output items, and the Response around them."""

    def __init__(self, asked: Asked) -> None:
        self.has_spoken = False
        self._asked = asked
        self._status: Status = "queued"
        self._model = ""
        self._created_at = 0
        self._usage: Usage | None = None
        self._end: Terminal | None = None
        self._items: list[Item] = []
        self._sources: list[Json] = []  # that no words rest on yet

    def add(self, event: Event | None) -> Iterator[Json]:
        """The response events of one event of the log, without their numbers."""
        self.has_spoken = self.has_spoken or _speaks(event)
        match event:
            case Queued():
                self._model, self._created_at = event.model, event.created_at // 1000
                yield self._lifecycle("response.created")
                yield self._lifecycle("response.queued")
            case Started():
                yield from self._start(event)
            case ReasoningDelta(text=text) if text:
                yield from self._say("reasoning", "summary_text", text)
            case TextDelta(text=text) if text:
                yield from self._say("message", "output_text", text)
            case RefusalDelta(text=text) if text:
                yield from self._say("message", "refusal", text)
            case ToolCallDelta():
                yield from self._call(event)
            case SourceAdded(url=url) if url:
                yield from self._cite({"type": "url_citation", "url": url, "title": event.title})
            case SourceAdded():
                yield from self._cite({"type": "file_citation", "file_id": event.id, "filename": _file_name(event.id)})
            case Completed() | Failed() | Cancelled():
                yield from self._finish(event)

    def response(self) -> Json:
        status = self._status
        head: Json = {"id": PREFIX + self._asked.id, "object": "response", "created_at": self._created_at}
        head |= {"status": status, "completed_at": None, "error": None, "incomplete_details": None}
        match self._end:
            case Completed(at=at) if status == "completed":
                head["completed_at"] = None if at is None else at // 1000
            case Completed(finish_reason=reason):
                head["incomplete_details"] = {"reason": INCOMPLETE_REASONS[reason]}
            case Failed(code=code, message=message):
                head["error"] = {"code": ERROR_CODES.get(code, "server_error"), "message": message, "type": code}
        output = [item.body() for item in self._items]
        usage = None if self._usage is None else _usage(self._usage)
        return {**head, "model": self._model, **DEFAULTS, **self._asked.options, "output": output, "usage": usage}

    def _lifecycle(self, name: str) -> Json:
        return {"type": name, "response": self.response()}

    def _start(self, event: Started) -> Iterator[Json]:
        if _is_fresh(event):
            self._sources = []
        if self._status == "queued":  # an attempt that follows one without words is not to be seen
            self._status = "in_progress"
            yield self._lifecycle("response.in_progress")

    def _say(self, item_type: str, kind: str, text: str) -> Iterator[Json]:
        item = self._items[-1] if self._items else None
        if item is None or item.type != item_type:
            at = len(self._items)
            name, more = ("rs", {}) if item_type == "reasoning" else ("msg", {"role": "assistant"})
            item = Item({"type": item_type, "id": f"{name}_{self._asked.id}_{at}", **more}, at)
            yield from self._open(item)
        if kind == "output_text" and self._sources:
            if self._open_text() is None:
                yield from item.open_part(kind)
            yield from map(item.cite, self._sources)
            self._sources = []
        yield from item.add(kind, text)

    def _cite(self, source: Json) -> Iterator[Json]:
        item = self._open_text()
        if item is None:
            self._sources.append(source)
        else:
            yield item.cite(source)

    def _open_text(self) -> Item | None:
        """The item whose text goes on, if the last thing said was text."""
        item = self._items[-1] if self._items else None
        return item if item and item.parts and item.parts[-1].type == "output_text" else None

    def _call(self, event: ToolCallDelta) -> Iterator[Json]:
        item = next((item for item in self._items if item.call_index == event.index), None)
        if item is None:
            at = len(self._items)
            call_id = event.id or f"call_{self._asked.id}_{event.index}"
            fields = {"type": "function_call", "id": f"fc_{self._asked.id}_{at}"}
            item = Item({**fields, "call_id": call_id, "name": event.name or ""}, at, event.index)
            yield from self._open(item)
            yield from item.open_part("arguments")
        if event.arguments:
            yield from item.add("arguments", event.arguments)

    def _open(self, item: Item) -> Iterator[Json]:
        """A new item ends the one before, but for calls: fragments of several may come in turns."""
        if self._items and self._items[-1].type != "function_call":
            yield from self._items[-1].close("completed")
        self._items.append(item)
        yield item.event("response.output_item.added")

    def _finish(self, event: Terminal) -> Iterator[Json]:
        self._status, self._end = outcome(event), event
        if isinstance(event, Completed):
            self._usage = event.usage
        for item in self._items:
            yield from item.close("completed" if self._status == "completed" else "incomplete")
        yield self._lifecycle(LAST_EVENTS.get(self._status, "response.incomplete"))


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def input_items(generation_id: str, messages: Sequence[Message]) -> list[Json]:
    """What a model was given, as the items of a Responses conversation, oldest first."""
    items = [item for message in messages for item in _items_of(message)]
    names = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
    return [
        {"id": f"{names[item['type']]}_{generation_id}_in{n}", **item, "status": "completed"}
        for n, item in enumerate(items)
    ]


def _items_of(message: Message) -> Iterator[Json]:
    if message.role == "tool":
        yield {"type": "function_call_output", "call_id": message.tool_call_id or "", "output": message.text()}
        return
    if message.role == "assistant":
        if text := message.text():
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            yield {"type": "message", "role": "assistant", "content": [part]}
        for call in message.tool_calls or ():
            function = call.get("function")
            yield {
                "type": "function_call",
                "call_id": _text(call, "id"),
                "name": _text(function, "name"),
                "arguments": _text(function, "arguments"),
            }
        return
    parts = message.content if isinstance(message.content, list) else [{"type": "text", "text": message.content or ""}]
    yield {"type": "message", "role": message.role, "content": [_input_part(part) for part in parts]}


def _input_part(part: Json) -> Json:
    """Text and images are told as they are; of what another protocol took besides, only that it was there."""
    if part.get("type") == "image_url":
        image = part.get("image_url")
        return {"type": "input_image", "image_url": _text(image, "url"), "detail": _text(image, "detail") or "auto"}
    return {"type": "input_text", "text": _text(part, "text")}


def _text(of: Any, name: str) -> str:
    """A string in JSON that another protocol's caller may have sent as anything."""
    value = of.get(name) if isinstance(of, dict) else None
    return value if isinstance(value, str) else ""


def _file_name(source_id: str) -> str:
    """The name of a document's file: the id of a source is its path, and `#` with the number of the passage."""
    return re.sub(r"#\d+$", "", source_id).rsplit("/", 1)[-1]
