"""What upstreams stream, bytes to whole texts: server-sent events, their JSON, characters that come in two halves.

Shared by the providers that read HTTP. One rule: nothing that an upstream sends gets past as something else; what
cannot be read is one of UNREADABLE. Knows no protocol of any upstream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import orjson

from shared.config import MAX_EVENT_TEXT_CHARS, MAX_GENERATION_BYTES
from shared.events import Delta, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta

MAX_SSE_EVENT_BYTES = 4 * MAX_GENERATION_BYTES
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, RecursionError)  # not JSON, or of another shape
TextEvent: TypeAlias = type[TextDelta] | type[ReasoningDelta] | type[RefusalDelta]
Channel: TypeAlias = TextEvent | int  # a kind of text, or the number of a tool call, whose arguments are one
_LINE_END = re.compile(rb"\r\n|\n|\r")
_HALF = re.compile("[\ud800-\udfff]")


class ServerSentEvents:
    """The data of each event, out of bytes that may be cut anywhere (WHATWG HTML, section 9.2.6).

    Lines end with CR, LF or CRLF and with nothing else: U+2028 and its like are text."""

    def __init__(self) -> None:
        self._line = [b""]  # the parts of a line that has not ended
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False

    @property
    def unfinished_line(self) -> bytes:
        return b"".join(self._line)

    def cut_off(self) -> tuple[str, str]:
        """The problem with a stream that has ended here: a failure's code and detail."""
        return ("upstream_invalid", "a document") if _is_document(self.unfinished_line) else ("upstream_truncated", "")

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Raises ValueError for what cannot be an event stream, and for an event that has no end."""
        if self._line == [b""] and not self._data and not self._after_cr:
            return _plain(data) or self._events(data)
        return self._events(data)

    def _events(self, data: bytes) -> Iterator[bytes]:
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


def _plain(data: bytes) -> list[bytes]:
    """What `_events` gives for whole events of one line of data, as nearly all are, at a fraction of the cost; else
    nothing."""
    if not data.endswith(b"\n\n") or b"\r" in data:
        return []
    if data.startswith(b"data: ") and data.count(b"\n") == 2:
        return [data[6:-2]]
    events = data.split(b"\n\n")
    payloads = [event[6:] for event in events if event.startswith(b"data: ")]
    are_plain = len(payloads) == len(events) - 1 and data.count(b"\n") == 2 * len(payloads)
    return payloads if are_plain else []


class Characters:
    """Whole characters, out of texts of several channels that may cut an emoji in two halves."""

    def __init__(self) -> None:
        self._halves: dict[Channel, str] = {}

    @property
    def are_whole(self) -> bool:
        return not self._halves

    def whole(self, channel: Channel, text: str) -> str:
        """`text`, with the half that came before it, without the half it ends with."""
        if not self._halves and (text.isascii() or not _HALF.search(text)):
            return text
        text = self._halves.pop(channel, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[channel] = text[-1]
            text = text[:-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def leftovers(self) -> list[Delta]:
        """What is said for the halves that never found their mates."""
        return [delta(channel, "\ufffd") for channel in self._halves]


def delta(channel: Channel, text: str, cursor: int | None = None) -> Delta:
    """The event that `text` of a channel becomes."""
    if isinstance(channel, int):
        return ToolCallDelta(channel, arguments=text, cursor=cursor)
    return channel(text, cursor=cursor)


def encodable(text: str) -> str:
    """`text` with each half of a character replaced."""
    return _HALF.sub("\ufffd", text)


def parse(payload: bytes) -> dict[str, Any]:
    """The JSON object of one event. Raises ValueError or TypeError."""
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError:  # orjson refuses half a surrogate pair; the standard library takes it
        chunk = json.loads(payload)
    if not isinstance(chunk, dict):
        raise TypeError("not an object")
    return chunk


def count(counts: dict[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def pieces(text: str) -> list[str]:
    """Cut to at most MAX_EVENT_TEXT_CHARS each."""
    if len(text) <= MAX_EVENT_TEXT_CHARS:
        return [text] if text else []
    return [text[start : start + MAX_EVENT_TEXT_CHARS] for start in range(0, len(text), MAX_EVENT_TEXT_CHARS)]


def _is_document(line: bytes) -> bool:
    """HTML or JSON where an event stream should be: no field of an event begins so."""
    return line.lstrip()[:1] in (b"<", b"{", b"[")
