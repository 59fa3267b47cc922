"""The wire format of Server-Sent Events, held against a parser that follows the HTML Standard word by word."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api import sse
from api.frames import Frame
from shared.errors import BadRequest
from shared.events import TextDelta, encode, format_id

FORGERY = "\n\nevent: generation.completed\ndata: {}\n\n"


@dataclass(frozen=True)
class Event:
    """One dispatched event: what an EventSource hands to its listeners."""

    type: str
    data: str
    last_event_id: str


@dataclass
class Seen:
    """What a client has after it read a stream."""

    events: list[Event] = field(default_factory=list)
    last_event_id: str = ""
    retry_milliseconds: int | None = None


def parse_event_stream(stream: bytes) -> Seen:
    """HTML Standard, 9.2.5 and 9.2.6: decode, split into lines, interpret each, dispatch at an empty one.

    Shares no code with ours, so that it cannot share a mistake."""
    seen, data, event_type, last_id = Seen(), "", "", ""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unfinished = re.split("\r\n|\r|\n", text)
    for line in lines:
        if line == "":
            seen.last_event_id = last_id
            if data != "":
                seen.events.append(Event(event_type or "message", data.removesuffix("\n"), last_id))
            data = event_type = ""
            continue
        if line.startswith(":"):
            continue
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ") if colon else ""
        if name == "event":
            event_type = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            seen.retry_milliseconds = int(value)
    return seen


def test_the_parser_reads_the_examples_of_the_standard() -> None:
    """The standard's own examples, so that what follows rests on something."""
    stock = parse_event_stream(b"data: YHOO\ndata: +2\ndata: 10\n\n")
    assert [event.data for event in stock.events] == ["YHOO\n+2\n10"]
    four = parse_event_stream(
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n"
    )
    assert [(event.data, event.last_event_id) for event in four.events] == [("first event", "1"), ("second event", "")]
    assert len(parse_event_stream(b"data\n\ndata\ndata\n\ndata:").events) == 2
    same = parse_event_stream(b"data:test\r\n\r\ndata: test\r\r")
    assert [event.data for event in same.events] == ["test", "test"]


# --- encode


def test_an_event_is_exactly_these_bytes() -> None:
    """Id, event, data, each on a line; fields that are not given are left out."""
    assert sse.encode(Frame(b"{}", b"text.delta", b"7-1")) == b"id: 7-1\nevent: text.delta\ndata: {}\n\n"
    assert sse.encode(Frame(b"{}")) == b"data: {}\n\n"
    assert sse.retry(1500) == b"retry: 1500\n\n"
    assert sse.comment("on its way") == b": on its way\n\n"
    assert sse.PING == b":\n\n"


positions = st.tuples(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
pieces = st.lists(
    st.sampled_from(["\n", "\r", "\0", "\u2028", "data: {}", "event: x", "id: 9-9", ":", "retry: 1", "👋"])
)
tokens = st.one_of(st.text(), pieces.map("".join))


@settings(deadline=None)
@given(st.lists(st.tuples(positions, tokens, st.sampled_from(["", "ping", "retry", "comment"]))))
@example([((7, 1), FORGERY, "")])
@example([((7, 1), FORGERY.replace("\n", "\r"), "ping"), ((7, 2), FORGERY.replace("\n", "\r\n"), "retry")])
@example([((7, 1), FORGERY.replace("\n", "\u2028"), ""), ((7, 2), "\ufeff", ""), ((7, 3), "", "")])
def test_no_token_can_forge_an_event(said: list[tuple[tuple[int, int], str, str]]) -> None:
    """Whatever a model says: as many events as were sent, each of its type, with its id, with its words unchanged."""
    between = {"": b"", "ping": sse.PING, "retry": sse.retry(5), "comment": sse.comment("x")}
    stream = b"".join(
        sse.encode(Frame(encode(TextDelta(text)), b"text.delta", format_id(position))) + between[noise]
        for position, text, noise in said
    )
    events = parse_event_stream(stream).events
    assert [event.type for event in events] == ["text.delta"] * len(said)
    assert [event.last_event_id for event in events] == [format_id(position).decode() for position, _, _ in said]
    assert [json.loads(event.data) for event in events] == [{"type": "text.delta", "text": text} for _, text, _ in said]


@settings(deadline=None)
@given(tokens, st.data())
def test_a_stream_cut_anywhere_is_the_events_before_the_cut(text: str, data: st.DataObject) -> None:
    """Half an event counts for nothing: neither does it come, nor does it move the cursor."""
    first, second = (sse.encode(Frame(encode(TextDelta(text)), b"text.delta", id)) for id in (b"7-1", b"7-2"))
    at = data.draw(st.integers(0, len(second) - 1))
    seen = parse_event_stream(first + second[:at])
    assert len(seen.events) == 1 and seen.last_event_id == "7-1"


# --- cursor


@settings(deadline=None)
@given(positions)
def test_an_id_of_ours_is_a_cursor(position: tuple[int, int]) -> None:
    """Every id there can be comes back as the position it was, from the header and from the query."""
    given_id = format_id(position).decode()
    assert sse.cursor(given_id, None) == sse.cursor(None, given_id) == position


@pytest.mark.parametrize("nothing", [None, ""])
def test_nothing_is_no_cursor(nothing: str | None) -> None:
    """A reader that has nothing yet, and an EventSource whose last id was reset."""
    assert sse.cursor(nothing, nothing) is None


def test_the_header_counts_before_the_query() -> None:
    """An EventSource reconnects to the URL it began with: what it has seen since is in the header."""
    assert sse.cursor("7-2", "7-1") == (7, 2)
    assert sse.cursor("", "7-1") == (7, 1)
    with pytest.raises(BadRequest):
        sse.cursor("nonsense", "7-1")


def is_ours(text: str) -> bool:
    """What an id looks like, said another way than by a pattern."""
    halves = text.split("-")
    return len(halves) == 2 and all(
        0 < len(half) <= 15 and set(half) <= set("0123456789") and (half == "0" or half[0] != "0") for half in halves
    )


@settings(deadline=None)
@given(st.one_of(st.text(min_size=1), st.from_regex(r"\A[\d\-+ ]{1,40}\n?\Z")))
@example("9999999999999999999-0")
@example("1-9999999999999999")
@example("0-1\n")
@example("١-١")
@example("1٢-1")
@example("01-1")
@example("-")
@example("+")
@example("$")
@example("1-1\0")
@example("1-1; DROP")
def test_anything_else_is_a_bad_cursor(text: str) -> None:
    """Refused with the code, and without its own words."""
    if is_ours(text):
        assert format_id(sse.cursor(text, None) or (-1, -1)).decode() == text
        return
    with pytest.raises(BadRequest) as caught:
        sse.cursor(text, None)
    assert caught.value.code == "bad_cursor"
    assert len(text) < 8 or text not in caught.value.message
