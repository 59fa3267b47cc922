"""The vocabulary: to and from JSON, and the fold to a snapshot."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from shared.events import (
    BY_TYPE,
    EVENTS,
    TERMINAL,
    Cancelled,
    Completed,
    Entry,
    Event,
    Failed,
    Queued,
    ReasoningDelta,
    RefusalDelta,
    Snapshot,
    SourceAdded,
    Started,
    TextDelta,
    ToolCallDelta,
    UpstreamAccepted,
    Usage,
    decode,
    encode,
    fold,
    format_id,
    is_terminal,
    outcome,
    parse_id,
    type_of,
)

words = st.text()
numbers = st.integers(0, 2**53)
said_or_not = st.none() | words
at = st.none() | numbers
usages = st.none() | st.builds(Usage, numbers, numbers, numbers, numbers, numbers)
EVENT_STRATEGIES: dict[type[Event], st.SearchStrategy[Any]] = {
    Queued: st.builds(Queued, words, numbers),
    Started: st.builds(
        Started, numbers, words, st.sampled_from(["fresh", "continued"]), said_or_not, st.none() | st.just(True)
    ),
    TextDelta: st.builds(TextDelta, words, at, at),
    ReasoningDelta: st.builds(ReasoningDelta, words, at, at),
    RefusalDelta: st.builds(RefusalDelta, words, at, at),
    ToolCallDelta: st.builds(ToolCallDelta, numbers, said_or_not, said_or_not, words, at, at),
    UpstreamAccepted: st.builds(UpstreamAccepted, words),
    SourceAdded: st.builds(
        SourceAdded,
        words,
        words,
        said_or_not,
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
        said_or_not,
    ),
    Completed: st.builds(Completed, st.sampled_from(["stop", "length", "tool_calls", "content_filter"]), usages, at),
    Failed: st.builds(Failed, words, words, st.booleans(), at),
    Cancelled: st.builds(Cancelled, words, at),
}
events = st.one_of([EVENT_STRATEGIES[cls] for cls in EVENTS])


def log(*events: Event, epoch: int = 7) -> list[Entry]:
    """A log of `generation.queued` and these events; each `generation.started` begins a new epoch."""
    entries = [Entry(b"0-1", encode(Queued("demo", 1000)))]
    seq = -1
    for event in events:
        epoch, seq = (epoch + 1, 0) if isinstance(event, Started) else (epoch, seq + 1)
        entries.append(Entry(format_id((epoch, seq)), encode(event)))
    return entries


# --- JSON


@given(events)
@example(TextDelta("\r\n\n\u2028\u2029\x85\x00\x1b\ufeff🦜e\u0301"))
@example(TextDelta('"}\n\nevent: generation.completed\ndata: {}'))
def test_an_event_survives_its_json(event: Event) -> None:
    """What is decoded is what was encoded, to the last character."""
    assert decode(encode(event)) == event


@given(events)
def test_the_json_begins_with_the_type_and_is_one_line(event: Event) -> None:
    """Readers slice the type out without parsing, and a line of any protocol can carry an event."""
    data = encode(event)
    assert data.startswith(b'{"type":"%s"' % event.type.encode())
    assert type_of(data).decode() == event.type
    assert is_terminal(data) == (event.type in TERMINAL)
    assert b"\n" not in data and b"\r" not in data and b"\x00" not in data


def test_every_event_has_a_type_of_its_own() -> None:
    """Types are noun.action, and none stands for two events."""
    assert len(BY_TYPE) == len(EVENTS) == len(EVENT_STRATEGIES)
    assert all(name.count(".") == 1 for name in BY_TYPE)


def test_what_was_not_said_is_left_out() -> None:
    """The JSON of a token is no longer than it must be."""
    assert encode(TextDelta("a")) == b'{"type":"text.delta","text":"a"}'
    assert encode(ToolCallDelta(0, arguments="{")) == b'{"type":"tool_call.delta","index":0,"arguments":"{"}'


@pytest.mark.parametrize("event", [TextDelta("\ud83e"), ToolCallDelta(0, name="\udd9c"), Failed("code", "\ud800")])
def test_a_lone_surrogate_is_refused(event: Event) -> None:
    """Half a character cannot be written as UTF-8: the one who has it must wait for the other half."""
    with pytest.raises(TypeError):
        encode(event)


def test_an_event_of_a_newer_version_is_skipped() -> None:
    """An unknown type, or a known one without what we need, is None to this reader."""
    assert decode(b'{"type":"image.delta","data":"..."}') is None
    assert decode(b'{"kind":"text.delta"}') is None
    assert decode(b'{"type":"text.delta"}') is None


def test_fields_of_a_newer_version_are_ignored() -> None:
    """A known event with more in it is still that event."""
    assert decode(b'{"type":"text.delta","text":"a","color":"red"}') == TextDelta("a")
    usage = b'{"input_tokens":1,"output_tokens":2,"total_tokens":3,"audio_tokens":4}'
    completed = decode(b'{"type":"generation.completed","finish_reason":"stop","usage":' + usage + b"}")
    assert completed == Completed("stop", Usage(1, 2, 3))


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_an_id_survives_its_bytes(epoch: int, seq: int) -> None:
    """`<epoch>-<seq>`, in digits and nothing else."""
    entry_id = format_id((epoch, seq))
    assert parse_id(entry_id) == parse_id(entry_id.decode()) == (epoch, seq)
    assert entry_id.replace(b"-", b"").isdigit()


# --- the fold


def test_the_empty_log_is_a_queued_generation() -> None:
    """Nothing was said yet."""
    assert fold([]) == Snapshot()


def test_the_fold_tells_the_whole_story() -> None:
    """Model, attempt, words of every kind, times, end."""
    usage = Usage(3, 2, 5)
    snapshot = fold(
        log(
            Started(1, "demo"),
            ReasoningDelta("Hm", at=8100),
            ReasoningDelta("m."),
            TextDelta("Hel", at=8200),
            TextDelta("lo"),
            RefusalDelta("No"),
            SourceAdded("1", "Title", score=0.5),
            Completed("stop", usage, at=9000),
        )
    )
    assert (snapshot.status, snapshot.model, snapshot.attempt) == ("completed", "demo", 1)
    assert (snapshot.text, snapshot.reasoning, snapshot.refusal) == ("Hello", "Hmm.", "No")
    assert snapshot.sources == [{"id": "1", "title": "Title", "url": None, "score": 0.5, "snippet": None}]
    assert (snapshot.finish_reason, snapshot.usage, snapshot.error) == ("stop", usage, None)
    assert (snapshot.created_at, snapshot.started_at, snapshot.finished_at) == (1000, 8, 9000)
    assert snapshot.first_token_at == 8100
    assert snapshot.last_event_id == "8-7"


def test_a_fresh_start_voids_all_earlier_output() -> None:
    """Two attempts are never spliced."""
    voided = [TextDelta("old", at=1), ReasoningDelta("old"), RefusalDelta("old"), ToolCallDelta(0, "c", "f", "{}")]
    snapshot = fold(
        log(Started(1, "demo"), *voided, SourceAdded("1", "old"), Started(2, "demo"), TextDelta("new", at=2))
    )
    assert (snapshot.text, snapshot.reasoning, snapshot.refusal) == ("new", "", "")
    assert (snapshot.tool_calls, snapshot.sources) == ([], [])
    assert (snapshot.attempt, snapshot.first_token_at, snapshot.status) == (2, 2, "in_progress")


def test_a_continued_start_voids_nothing() -> None:
    """The second attempt goes on where the first stopped."""
    entries = log(
        Started(1, "demo"), TextDelta("Hel", at=1), Started(2, "demo", "continued", "8-1"), TextDelta("lo", at=2)
    )
    snapshot = fold(entries)
    assert (snapshot.text, snapshot.attempt, snapshot.first_token_at) == ("Hello", 2, 1)


def test_a_terminal_event_voids_nothing() -> None:
    """What was said before the end stays said."""
    snapshot = fold(log(Started(1, "demo"), TextDelta("Hel"), Failed("upstream_error", "It broke off.", False, at=5)))
    assert (snapshot.text, snapshot.status, snapshot.finished_at) == ("Hel", "failed", 5)
    assert snapshot.error == {"code": "upstream_error", "message": "It broke off.", "retryable": False}


def test_fragments_of_a_tool_call_merge_by_their_index() -> None:
    """Two calls may be spoken in turns."""
    snapshot = fold(
        log(
            Started(1, "demo"),
            ToolCallDelta(0, "call_a", "weather", '{"ci'),
            ToolCallDelta(1, "call_b", "time"),
            ToolCallDelta(0, arguments='ty":1}'),
            ToolCallDelta(1, arguments="{}"),
        )
    )
    assert snapshot.tool_calls == [
        {"index": 0, "id": "call_a", "name": "weather", "arguments": '{"city":1}'},
        {"index": 1, "id": "call_b", "name": "time", "arguments": "{}"},
    ]


def test_a_tool_call_is_output_too() -> None:
    """The time of the first token is the time of the first output of any kind."""
    assert fold(log(Started(1, "demo"), ToolCallDelta(0, "a", "f", at=5), TextDelta("x", at=6))).first_token_at == 5


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Completed("stop"), "completed"),
        (Completed("tool_calls"), "completed"),
        (Completed("length"), "incomplete"),
        (Completed("content_filter"), "incomplete"),
        (Failed("upstream_error", "It broke off."), "failed"),
        (Cancelled("caller"), "cancelled"),
    ],
)
def test_a_terminal_event_decides_the_status(event: Completed | Failed | Cancelled, status: str) -> None:
    """Statuses are OpenAI's; what was cut off is `incomplete`."""
    assert outcome(event) == fold(log(Started(1, "demo"), event)).status == status


def test_the_fold_skips_what_it_does_not_know() -> None:
    """An event of a newer version only moves the cursor."""
    entries = [*log(Started(1, "demo"), TextDelta("a")), Entry(b"8-2", b'{"type":"image.delta"}')]
    snapshot = fold(entries)
    assert (snapshot.text, snapshot.last_event_id) == ("a", "8-2")


@given(st.lists(events, max_size=12), st.integers(0, 12))
def test_a_fold_can_be_taken_up_anywhere(told: list[Event], cut: int) -> None:
    """Folding the beginning and then adding the rest is folding all of it."""
    entries = log(*told)
    snapshot = fold(entries[:cut])
    for entry in entries[cut:]:
        snapshot.add(entry)
    assert snapshot == fold(entries)
