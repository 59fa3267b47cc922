"""The vocabulary: every event a log can hold, to and from JSON, and the fold to a snapshot.

An event is one immutable thing that happened. Its JSON is made once, in the process that numbers it,
and is copied from there to the last client byte for byte: it always begins `{"type":"…"`, and never
holds a raw line break (JSON escapes them), so it can stand on a line of its own in any protocol.
Knows nothing of Redis, of HTTP, or of any client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import orjson

Status: TypeAlias = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
Position: TypeAlias = tuple[int, int]  # (epoch, seq), the two halves of an entry's id


class Entry(NamedTuple):
    """One line of a log: its Redis id `<epoch>-<seq>` and the event's JSON, both as stored."""

    id: bytes
    data: bytes

    @property
    def position(self) -> Position:
        return parse_id(self.id)


def parse_id(entry_id: bytes | str) -> Position:
    epoch, _, seq = entry_id.partition(b"-") if isinstance(entry_id, bytes) else entry_id.partition("-")
    return int(epoch), int(seq)


def format_id(position: Position) -> bytes:
    return b"%d-%d" % position


@dataclass(frozen=True, slots=True)
class Queued:
    """Always entry `0-1`. `created_at` in Unix milliseconds of Redis."""

    type: ClassVar[str] = "generation.queued"
    model: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Started:
    """A worker took the generation: always an entry `<epoch>-0`. `fresh` voids the output of every earlier
    attempt; `continued` goes on from the entry `continues`. `restored`: the store is another process than the one that
    wrote what is before, and may lack attempts that readers have seen."""

    type: ClassVar[str] = "generation.started"
    attempt: int
    provider: str
    mode: Literal["fresh", "continued"] = "fresh"
    continues: str | None = None
    restored: bool | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """`at`: Unix milliseconds, on the first output of an attempt only. `cursor`: the place in the upstream's own
    stream, where it has one that a worker can come back to."""

    type: ClassVar[str] = "text.delta"
    text: str
    at: int | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    type: ClassVar[str] = "reasoning.delta"
    text: str
    at: int | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class RefusalDelta:
    type: ClassVar[str] = "refusal.delta"
    text: str
    at: int | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """`id` and `name` come with the first fragment of a call, `arguments` is a fragment of JSON text."""

    type: ClassVar[str] = "tool_call.delta"
    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    at: int | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class UpstreamAccepted:
    """The upstream took the prompt under this id, before it said a word: a later attempt can ask for that answer again
    instead of paying for another."""

    type: ClassVar[str] = "upstream.accepted"
    id: str


@dataclass(frozen=True, slots=True)
class SourceAdded:
    """A retrieved document the answer may rest on."""

    type: ClassVar[str] = "source.added"
    id: str
    title: str
    url: str | None = None
    score: float | None = None
    snippet: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the upstream tells them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """The upstream said it was done. `at`: Unix milliseconds."""

    type: ClassVar[str] = "generation.completed"
    finish_reason: FinishReason
    usage: Usage | None = None
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """No complete answer will come. `retryable`: the same prompt may work if asked again."""

    type: ClassVar[str] = "generation.failed"
    code: str
    message: str
    retryable: bool = True
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """`by`: `caller` (cancel), `disconnect` (nobody was reading any more), `delete`."""

    type: ClassVar[str] = "generation.cancelled"
    by: str
    at: int | None = None


Delta: TypeAlias = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta
Output: TypeAlias = Delta | SourceAdded | UpstreamAccepted
Terminal: TypeAlias = Completed | Failed | Cancelled
Event: TypeAlias = Queued | Started | Output | Terminal

EVENTS: tuple[type[Event], ...] = (
    Queued,
    Started,
    TextDelta,
    ReasoningDelta,
    RefusalDelta,
    ToolCallDelta,
    SourceAdded,
    UpstreamAccepted,
    Completed,
    Failed,
    Cancelled,
)
TERMINAL = frozenset({Completed.type, Failed.type, Cancelled.type})
BY_TYPE: dict[str, type[Event]] = {cls.type: cls for cls in EVENTS}
_USAGE = tuple(f.name for f in fields(Usage))
_FIELDS = {cls: tuple(f.name for f in fields(cls)) for cls in EVENTS}
_TYPE_STARTS = len(b'{"type":"')
_OF_THE_GENERATION = b'{"type":"generation.'  # what every terminal event's JSON begins with, and no token's


def encode(event: Event) -> bytes:
    """The event's JSON, `type` first, what was not said left out. Raises TypeError on a lone surrogate."""
    body: dict[str, Any] = {"type": event.type}
    for name in _FIELDS[type(event)]:
        value = getattr(event, name)
        if value is not None:
            body[name] = value
    return orjson.dumps(body)


def decode(data: bytes) -> Event | None:
    """The event of a log entry, or None when its type or its shape is of a newer version than this reader."""
    body = orjson.loads(data)
    cls = BY_TYPE.get(body.get("type", ""))
    if cls is None:
        return None
    known = {name: body[name] for name in _FIELDS[cls] if name in body}
    try:
        if known.get("usage") is not None:
            known["usage"] = Usage(**{name: known["usage"][name] for name in _USAGE if name in known["usage"]})
        return cls(**known)
    except TypeError:
        return None


def type_of(data: bytes) -> bytes:
    """The type, sliced out of the JSON without parsing it."""
    return data[_TYPE_STARTS : data.index(b'"', _TYPE_STARTS)]


def is_terminal(data: bytes) -> bool:
    return data.startswith(_OF_THE_GENERATION) and type_of(data).decode() in TERMINAL


def outcome(event: Terminal) -> Status:
    match event:
        case Completed(finish_reason="length" | "content_filter"):
            return "incomplete"
        case Completed():
            return "completed"
        case Failed():
            return "failed"
        case Cancelled():
            return "cancelled"


@dataclass
class Snapshot:
    """The state of a generation: the fold over its log so far. `add` takes the entries in order.
    Times are Unix milliseconds; `last_event_id` is where a reader goes on from."""

    status: Status = "queued"
    model: str = ""
    attempt: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    error: dict[str, Any] | None = None
    created_at: int | None = None
    started_at: int | None = None
    first_token_at: int | None = None
    finished_at: int | None = None
    last_event_id: str | None = None
    _pieces: dict[type[Event], list[str]] = field(default_factory=lambda: defaultdict(list), repr=False)
    _calls: dict[int, list[ToolCallDelta]] = field(default_factory=lambda: defaultdict(list), repr=False)

    @property
    def text(self) -> str:
        return "".join(self._pieces[TextDelta])

    @property
    def reasoning(self) -> str:
        return "".join(self._pieces[ReasoningDelta])

    @property
    def refusal(self) -> str:
        return "".join(self._pieces[RefusalDelta])

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """`index`, `id`, `name` and the whole `arguments` of each call, in the order in which they began."""
        return [
            {
                "index": index,
                "id": next((part.id for part in reversed(parts) if part.id), None),
                "name": next((part.name for part in reversed(parts) if part.name), None),
                "arguments": "".join(part.arguments for part in parts),
            }
            for index, parts in self._calls.items()
        ]

    def add(self, entry: Entry) -> None:
        self.last_event_id = entry.id.decode()
        match decode(entry.data):
            case Queued() as event:
                self.model, self.created_at = event.model, event.created_at
            case Started() as event:
                self._start(event, entry.position[0])
            case TextDelta() | ReasoningDelta() | RefusalDelta() as event:
                self._pieces[type(event)].append(event.text)
                self._first(event.at)
            case ToolCallDelta() as event:
                self._calls[event.index].append(event)
                self._first(event.at)
            case SourceAdded() as event:
                self.sources.append(asdict(event))
            case UpstreamAccepted():  # for workers
                pass
            case Completed() | Failed() | Cancelled() as event:
                self._finish(event)
            case None:  # an event of a newer version: a reader skips what it does not know
                pass

    def _start(self, event: Started, epoch: int) -> None:
        self.status, self.attempt, self.started_at = "in_progress", event.attempt, epoch
        if event.mode == "fresh":
            self._pieces.clear()
            self._calls.clear()
            self.sources, self.first_token_at = [], None

    def _first(self, at: int | None) -> None:
        if self.first_token_at is None:
            self.first_token_at = at

    def _finish(self, event: Terminal) -> None:
        self.status, self.finished_at = outcome(event), event.at
        if isinstance(event, Completed):
            self.finish_reason, self.usage = event.finish_reason, event.usage
        if isinstance(event, Failed):
            self.error = {"code": event.code, "message": event.message, "retryable": event.retryable}


def fold(entries: Iterable[Entry]) -> Snapshot:
    """The snapshot of a log, or of its beginning."""
    snapshot = Snapshot()
    for entry in entries:
        snapshot.add(entry)
    return snapshot
