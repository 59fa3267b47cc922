"""Dialects, byte for byte: the golden logs of tests/logs through every dialect, against the transcripts beside them.

A transcript is all that a client gets that reads the whole log; `[aborted]` on a last line of its own is a connection
broken off. After a change that is meant, or for a new dialect or log:

    python -m tests.unit.test_dialects        # writes tests/logs/transcripts; read the diff before you commit it
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from api import sse
from api.dialects import DIALECTS
from api.dialects.native import Native
from api.frames import Ending, render
from shared.events import Entry, Snapshot, Started, decode, fold, format_id, is_terminal, parse_id, type_of
from tests.unit.test_sse import parse_event_stream

LOGS = Path(__file__).parents[1] / "logs"
NAMES = sorted(path.stem for path in LOGS.glob("*.jsonl"))
ABORTED = b"\n[aborted]\n"


def golden(name: str) -> list[Entry]:
    """The entries of a golden log, the events' JSON as `shared.events.encode` makes it."""
    lines = map(orjson.loads, (LOGS / f"{name}.jsonl").read_bytes().splitlines())
    return [Entry(line["id"].encode(), orjson.dumps(line["event"])) for line in lines]


def transcript(dialect_name: str, entries: list[Entry]) -> bytes:
    """What one connection is sent for these entries, its end included where it is not a clean one."""
    sent, ending = DIALECTS[dialect_name]("0" * 32).render(entries)
    return sent if ending in (None, Ending.STOP) else sent + ABORTED


def transcript_path(dialect_name: str, name: str) -> Path:
    return LOGS / "transcripts" / f"{name}.{dialect_name}.txt"


def write_transcripts() -> None:
    for dialect_name in DIALECTS:
        for name in NAMES:
            transcript_path(dialect_name, name).write_bytes(transcript(dialect_name, golden(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_a_dialect_says_exactly_its_transcript(dialect_name: str, name: str) -> None:
    """What the clients of today understand is what they are sent tomorrow."""
    path = transcript_path(dialect_name, name)
    assert path.exists(), "no transcript: run `python -m tests.unit.test_dialects`, read what it wrote, and add it"
    assert transcript(dialect_name, golden(name)) == path.read_bytes()


def test_every_transcript_belongs_to_a_log_and_a_dialect() -> None:
    """None is left over from a log or a dialect that is no more."""
    known = {transcript_path(dialect_name, name) for dialect_name in DIALECTS for name in NAMES}
    assert set((LOGS / "transcripts").iterdir()) == known


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_log_is_one_the_protocol_allows(name: str) -> None:
    """Known events in their own bytes, ids in order and without a hole, one terminal event, at the end."""
    entries = golden(name)
    assert entries[0].id == b"0-1"
    positions = [entry.position for entry in entries]
    assert positions == sorted(set(positions))
    for before, after in pairwise(positions):
        assert after == (before[0], before[1] + 1) or after[1] == 0
    assert [is_terminal(entry.data) for entry in entries] == [False] * (len(entries) - 1) + [True]
    for entry in entries:
        event = decode(entry.data)
        assert event is not None and orjson.loads(entry.data)["type"] == event.type
        if isinstance(event, Started) and event.continues:
            assert parse_id(event.continues) == positions[positions.index(entry.position) - 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_a_dialect_is_deterministic(dialect_name: str, name: str) -> None:
    """No clock and no chance: the same log is the same bytes, also for the next connection."""
    assert transcript(dialect_name, golden(name)) == transcript(dialect_name, golden(name))


@pytest.mark.parametrize("name", NAMES)
def test_native_resumed_at_every_cursor_is_the_exact_tail(name: str) -> None:
    """What was sent before a cut and what is sent after it are the whole, at every event."""
    entries = golden(name)
    whole = transcript("native", entries)
    for at in range(len(entries) + 1):
        assert transcript("native", entries[:at]) + transcript("native", entries[at:]) == whole


@pytest.mark.parametrize("name", NAMES)
def test_native_is_the_log_to_an_event_source(name: str) -> None:
    """A parser of the standard gets every event: its type, its JSON untouched, and its id as the one to go on from."""
    seen = parse_event_stream(transcript("native", golden(name)))
    assert [(event.last_event_id, event.type, event.data) for event in seen.events] == [
        (entry.id.decode(), type_of(entry.data).decode(), entry.data.decode()) for entry in golden(name)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_native_carries_all_of_the_snapshot(name: str) -> None:
    """Who folds what the stream said has the state the api would tell."""
    seen = parse_event_stream(transcript("native", golden(name)))
    state = Snapshot()
    for event in seen.events:
        state.add(Entry(event.last_event_id.encode(), event.data.encode()))
    assert state == fold(golden(name))


def voids_words(entries: list[Entry]) -> bool:
    """Whether an attempt begins afresh after another had said something."""
    starts = [n for n, entry in enumerate(entries) if decode(entry.data) == Started(2, "openai_compatible")]
    return any(fold(entries[:n]).text for n in starts)


@pytest.mark.parametrize("name", NAMES)
def test_text_ends_cleanly_exactly_when_it_is_the_answer(name: str) -> None:
    """A body that is not broken off is the whole text of the generation; any other is broken off."""
    entries = golden(name)
    state, sent = fold(entries), transcript("text", entries)
    if state.status in ("completed", "incomplete") and not voids_words(entries):
        assert sent == state.text.encode()
    else:
        assert sent.endswith(ABORTED)


def test_text_pings_and_last_words_are_nothing() -> None:
    """Plain text has no word that is not the answer's."""
    text = DIALECTS["text"]("")
    assert text.ping() == b""
    assert all(text.ending(ending, 1000) is None for ending in Ending)


def test_native_pings_and_last_words_are_no_events() -> None:
    """A ping is a comment; an early end says when to come back, and moves no cursor."""
    native = DIALECTS["native"]("")
    entry = Entry(format_id((7, 7)), b'{"type":"text.delta","text":"x"}')
    event, _ = native.render([entry])
    for ending in (Ending.DRAINING, Ending.GONE):
        last_words = native.ending(ending, 1234)
        assert last_words is not None
        seen = parse_event_stream(event + native.ping() + last_words)
        assert len(seen.events) == 1 and seen.last_event_id == "7-7" and seen.retry_milliseconds == 1234


def test_an_event_of_a_newer_version_is_passed_on_or_passed_over() -> None:
    """Native clients get what this api does not know, under its id; plain text skips it."""
    entry = Entry(b"7-7", b'{"type":"video.delta","frames":[1]}')
    assert (
        transcript("native", [entry]) == b'id: 7-7\nevent: video.delta\ndata: {"type":"video.delta","frames":[1]}\n\n'
    )
    assert transcript("text", [entry]) == b""


if __name__ == "__main__":
    write_transcripts()


@pytest.mark.parametrize("name", NAMES)
def test_native_renders_what_its_frames_say(name: str) -> None:
    """Its short cut past the frames gives the same bytes as they do."""
    entries = golden(name)
    native = Native()
    assert native.render(entries) == render(native.frames, sse.encode, entries)
