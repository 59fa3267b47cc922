"""The checker itself: right histories are right, and each kind of wrong one is found, wherever it can happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from api.dialects import DIALECTS
from api.frames import Ending
from shared.events import Completed, Entry, Failed, Queued, Started, TextDelta, encode
from tests.chaos.checker import Connection, History, Truth, answer, check, count_events
from tests.chaos.faults import KINDS, schedule
from tests.chaos.swarm import CLIENTS

ID = "0" * 31 + "1"
TOKENS = 12
RETRY = b"retry: 1000\n\n"
Log = list[tuple[str, bytes]]


def attempt(epoch: int, number: int, hit: int, tokens: int = TOKENS) -> Log:
    """The entries of one attempt that said so many tokens of one answer."""
    said = [TextDelta(f"p1.{hit}.{n} ") for n in range(tokens)]
    return [
        (f"{epoch}-{seq}", encode(event)) for seq, event in enumerate([Started(number, "openai_compatible"), *said])
    ]


def ended(log: Log, event: Completed | Failed) -> Log:
    epoch, _, seq = log[-1][0].partition("-")
    return [*log, (f"{epoch}-{int(seq) + 1}", encode(event))]


QUEUED: Log = [("0-1", encode(Queued("any", 1)))]
LOST = attempt(100, 1, 1, 5)  # the first attempt said five tokens
DONE = ended(attempt(200, 2, 2), Completed("stop"))
FAILED = ended(attempt(200, 2, 2, 3), Failed("upstream_reset", "the connection broke"))
LOG = [*QUEUED, *LOST, *DONE]


def truth(log: Log = LOG, status: str = "completed") -> Truth:
    return Truth("p1", TOKENS, log, status)


def said(dialect: str, log: Log, ending: Ending | None = None) -> bytes:
    """What an api sends of these entries in one connection, with the ending it puts there itself."""
    renderer = DIALECTS["native" if dialect == "snapshot" else dialect](ID)
    body = RETRY if dialect in ("native", "snapshot") else b""
    sent, stopped = renderer.render([Entry(entry_id.encode(), data) for entry_id, data in log])
    return body + sent + ((not stopped and ending and renderer.ending(ending, 1000)) or b"")


CURRENT = [*QUEUED, *DONE]  # what a reader is sent that comes when the second attempt is there
OLD = [*QUEUED, *LOST]


def resumed_responses() -> list[Connection]:
    """Left after event 6, resumed there."""
    blocks = said("responses", CURRENT).split(b"\n\n")[:-1]
    first, rest = (b"".join(block + b"\n\n" for block in part) for part in (blocks[:7], blocks[7:]))
    return [Connection(status=200, body=first, left=True), Connection("6", 200, rest, clean=True)]


def history(dialect: str, connections: list[Connection], log: Log = CURRENT) -> History:
    full = Connection(status=200, body=said(dialect, log), clean=True)
    return History("r0", dialect, connections, True, None if dialect in ("native", "snapshot") else full)


def whole(dialect: str, log: Log = CURRENT) -> History:
    return history(dialect, [Connection(status=200, body=said(dialect, log), clean=True)], log)


def violations(*histories: History, of: Truth | None = None) -> str:
    return "\n".join(check(of or truth(), histories))


# --- right


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_right_history_has_no_violation(dialect: str) -> None:
    """A reader of the whole answer, in each dialect; and its events are counted."""
    one = whole(dialect)
    assert violations(one) == ""
    assert count_events([one]) >= TOKENS


@pytest.mark.parametrize("dialect", CLIENTS)
def test_breaking_off_at_any_byte_and_asking_again_is_right(dialect: str) -> None:
    """Where a dialect begins at the start again; native goes on after the last whole block."""
    body = said(dialect, CURRENT)
    for cut in range(0, len(body), 7):
        first = Connection(status=200, body=body[:cut], left=cut % 2 == 0)
        if dialect in ("native", "snapshot"):
            seen = max(body[:cut].count(b"\n\n") - 1, 0)
            rest = Connection(status=200, body=RETRY + said(dialect, CURRENT[seen:]).removeprefix(RETRY), clean=True)
        else:
            rest = Connection(status=200, body=body, clean=True)
        assert violations(history(dialect, [first, rest])) == "", cut


@pytest.mark.parametrize("dialect", ["chat_completions", "responses", "ui_messages", "text", "native"])
def test_an_answer_begun_anew_is_right_when_the_reader_is_told(dialect: str) -> None:
    """It followed the lost attempt, was told so (or broken off), and read the other one."""
    told = Connection(status=200, body=said(dialect, LOG), clean=dialect != "text")
    then = [] if dialect == "native" else [Connection(status=200, body=renumbered(dialect), clean=True)]
    one = history(dialect, [told, *then])
    if one.full and dialect == "responses":
        one.full.body = renumbered(dialect)
    assert violations(one) == ""


def renumbered(dialect: str) -> bytes:
    """The current attempt as it is sent once an attempt that had spoken was voided."""
    body = said(dialect, CURRENT)
    for number in range(60, -1, -1) if dialect == "responses" else ():
        body = body.replace(b'"sequence_number":%d}' % number, b'"sequence_number":%d}' % (1_000_000 + number))
    return body


def test_responses_resumed_after_a_number_are_right() -> None:
    """`starting_after` gives exactly what follows."""
    assert violations(history("responses", resumed_responses())) == ""


@pytest.mark.parametrize("dialect", ["chat_completions", "responses"])
def test_a_server_that_goes_down_and_says_so_is_right(dialect: str) -> None:
    """Its last frame is no event of the log, and does not count as one."""
    connections = [
        Connection(status=200, body=said(dialect, CURRENT[:6], Ending.DRAINING), clean=True),
        Connection(status=200, body=said(dialect, CURRENT), clean=True),
    ]
    assert violations(history(dialect, connections)) == ""


@pytest.mark.parametrize("dialect", CLIENTS)
def test_an_honest_failure_is_right(dialect: str) -> None:
    """The reader is told, or broken off where the dialect has no word for it."""
    log = [*QUEUED, *FAILED]
    one = history(dialect, [Connection(status=200, body=said(dialect, log), clean=dialect != "text")], log)
    assert violations(one, of=truth([*QUEUED, *LOST, *FAILED], "failed")) == ""


@pytest.mark.parametrize("dialect", CLIENTS)
def test_what_a_store_lost_with_its_tail_is_right_only_then(dialect: str) -> None:
    """An attempt that readers saw, even to its end, is not in the log of a store that died without it. In Responses the
    next one does not begin at 0 again."""
    seen = [*QUEUED, *ended(attempt(100, 1, 1), Completed("stop"))]
    connections = [Connection(status=200, body=said(dialect, seen), clean=True)]
    one = history(dialect, connections)
    if one.full and dialect == "responses":
        one.full.body = renumbered(dialect)
    assert violations(one, of=truth(CURRENT)) != ""
    assert violations(one, of=replace(truth(CURRENT), lost_a_tail=True)) == ""


# --- wrong logs

WRONG_LOGS: dict[str, tuple[Log, str, str]] = {
    "no log": ([], "completed", "it is not there"),
    "no end": (LOG[:-1], "in_progress", "0 terminal events"),
    "two ends": ([*LOG, ("300-0", encode(Completed("stop")))], "completed", "2 terminal events"),
    "something after the end": ([*LOG, *attempt(300, 3, 3, 2)], "completed", "follows the terminal event"),
    "a hole": ([*LOG[:9], *LOG[10:]], "completed", "a hole between"),
    "a double": ([*LOG[:9], LOG[8], *LOG[9:]], "completed", "came after"),
    "an epoch without its beginning": ([*QUEUED, *DONE[1:]], "completed", "epoch 200 begins at 200-1"),
    "no queued": (LOG[1:], "completed", "it begins with"),
    "another status": (LOG, "failed", "the order says failed"),
    "a splice": (
        [*QUEUED, *attempt(200, 2, 2)[:5], *ended(attempt(200, 1, 1), Completed("stop"))[5:]],
        "completed",
        "spl",
    ),
    "one answer in two attempts": (
        [*QUEUED, *attempt(100, 1, 2, 5), *DONE],
        "completed",
        "two attempts have the words of one answer",
    ),
    "truncated": ([*QUEUED, *ended(attempt(200, 1, 1, 5), Completed("stop"))], "completed", "is not a whole answer"),
    "our mistake": (
        [*QUEUED, *ended(attempt(200, 1, 1, 5), Failed("internal_error", "x"))],
        "failed",
        "internal_error",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LOGS)
def test_a_wrong_log_is_found(wrong: str) -> None:
    """Each promise about the log, broken."""
    log, status, finding = WRONG_LOGS[wrong]
    assert finding in violations(of=truth(log, status))


# --- wrong in any dialect


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_truncated_stream_that_was_ended_properly_is_found(dialect: str) -> None:
    """Half of the answer, then a clean end: no client could tell. Broken off instead, it is right."""
    half = said(dialect, CURRENT[:8])
    connections = [Connection(status=200, body=half, clean=True), *whole(dialect).connections]
    if dialect in ("native", "snapshot"):
        connections[1] = Connection(status=200, body=RETRY + said(dialect, CURRENT[8:]).removeprefix(RETRY), clean=True)
    assert "truncated and yet ended properly" in violations(history(dialect, connections))
    connections[0].clean = False
    assert violations(history(dialect, connections)) == ""


@pytest.mark.parametrize("dialect", CLIENTS)
@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("splice", lambda words: [*words[:5], *(word.replace("p1.2.", "p1.1.") for word in words[5:])]),
        ("hole", lambda words: [*words[:5], *words[6:]]),
        ("double", lambda words: [*words[:5], words[4], *words[5:]]),
    ],
)
def test_words_spliced_lost_or_doubled_are_found(
    dialect: str, kind: str, spoil: Callable[[list[str]], list[str]]
) -> None:
    """In the words themselves, whatever the frames around them look like."""
    tokens = [f"{token} " for token in answer("p1", 2, TOKENS).split()]
    events = [Started(2, "openai_compatible"), *map(TextDelta, spoil(tokens)), Completed("stop")]
    log = [*QUEUED, *((f"200-{seq}", encode(event)) for seq, event in enumerate(events))]
    assert "spliced, with a hole or doubled" in violations(whole(dialect, log))


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_void_answer_told_as_complete_is_found(dialect: str) -> None:
    """The whole text of the first attempt, while the second one counts."""
    log = [*QUEUED, *ended(attempt(100, 1, 1), Completed("stop"))]
    of = truth([*QUEUED, *attempt(100, 1, 1), *DONE])
    assert violations(whole(dialect, log), of=of) != ""


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_failure_told_as_complete_is_found(dialect: str) -> None:
    """The log says failed."""
    of = truth([*QUEUED, *LOST, *ended(attempt(200, 2, 2), Failed("upstream_reset", "broke"))], "failed")
    assert violations(whole(dialect), of=of) != ""


@pytest.mark.parametrize("dialect", [dialect for dialect in CLIENTS if dialect != "text"])  # it has no word for it
def test_a_completion_told_as_failed_is_found(dialect: str) -> None:
    """The log says completed."""
    assert violations(whole(dialect, [*QUEUED, *FAILED])) != ""


@pytest.mark.parametrize("dialect", CLIENTS)
def test_an_answer_of_500_is_found(dialect: str) -> None:
    """And one of 503, or none at all, is not."""
    one = whole(dialect)
    one.connections[:0] = [Connection(), Connection(status=503, body=b"{}", clean=True)]
    assert violations(one) == ""
    one.connections[:0] = [Connection(status=500, body=b"{}", clean=True)]
    assert "status 500" in violations(one)


@pytest.mark.parametrize("dialect", CLIENTS)
def test_a_reader_that_never_learned_the_end_is_found(dialect: str) -> None:
    """Broken off, and no more."""
    one = history(dialect, [Connection(status=200, body=said(dialect, CURRENT[:8]))])
    one.knows_the_end = False
    assert "never learned how the generation ended" in violations(one)


@pytest.mark.parametrize("dialect", ["native", "chat_completions", "responses", "ui_messages"])
def test_another_byte_in_a_second_reading_is_found(dialect: str) -> None:
    """Two readings of one attempt differ in a place that is no word."""
    one = whole(dialect)
    other = Connection(status=200, body=one.connections[0].body.replace(b'"any"', b'"others"'), clean=True)
    if dialect == "native":
        one.connections = [other]
    else:
        one.connections.append(other)
    assert violations(one) != ""


@pytest.mark.parametrize("dialect", ["chat_completions", "responses", "ui_messages"])
def test_what_follows_the_end_is_found(dialect: str) -> None:
    """One more frame after the last."""
    one = whole(dialect)
    one.connections[0].body += said(dialect, CURRENT)
    assert "after its end came" in violations(one)


@pytest.mark.parametrize("dialect", ["chat_completions", "ui_messages", "responses"])
def test_superseded_without_another_attempt_is_found(dialect: str) -> None:
    """Told that its words are void, and they are those that count."""
    log = [*QUEUED, *attempt(200, 1, 2)[:6], *attempt(300, 2, 3)]
    told = Connection(status=200, body=said(dialect, log), clean=True)
    one = whole(dialect)
    one.connections.insert(0, told)
    assert "told superseded" in violations(one)


# --- wrong in one dialect


def native_blocks() -> list[bytes]:
    return [block + b"\n\n" for block in said("native", CURRENT).split(b"\n\n")[:-1]]


WRONG_NATIVE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a hole": (lambda blocks: [*blocks[:6], *blocks[7:]], "a hole between"),
    "a double": (lambda blocks: [*blocks[:6], blocks[5], *blocks[6:]], "came after"),
    "out of order": (lambda blocks: [*blocks[:5], blocks[6], blocks[5], *blocks[7:]], "came after"),
    "another byte": (lambda blocks: [*blocks[:5], blocks[5].replace(b"}", b" }", 1), *blocks[6:]], "as it stands"),
    "of another log": (
        lambda blocks: [*blocks[:2], *(b.replace(b"id: 200-", b"id: 201-") for b in blocks[2:])],
        "is not in the log",
    ),
    "no retry": (lambda blocks: blocks[1:], "did not begin with retry:"),
    "the end twice": (lambda blocks: [*blocks, blocks[-1]], "came after"),
    "no beginning": (lambda blocks: [blocks[0], *blocks[2:]], "it begins with"),
}


@pytest.mark.parametrize("wrong", WRONG_NATIVE)
def test_a_wrong_native_stream_is_found(wrong: str) -> None:
    """Each promise about positions, broken."""
    spoil, finding = WRONG_NATIVE[wrong]
    body = b"".join(spoil(native_blocks()))
    assert finding in violations(history("native", [Connection(status=200, body=body, clean=True)]))


def test_204_before_the_end_is_found() -> None:
    """An EventSource would stop there."""
    connections = [Connection(status=200, body=said("native", CURRENT[:5])), Connection("200-3", 204, clean=True)]
    assert "204 before the end" in violations(history("native", connections))


def snapshot(words: str, at: str = "200-4") -> Connection:
    body = {"type": "snapshot", "text": words, "status": "in_progress", "last_event_id": at}
    block = b"id: %b\nevent: snapshot\ndata: %b\n\n" % (at.encode(), json.dumps(body).encode())
    rest = [pair for pair in DONE if int(pair[0].split("-")[1]) > 4]
    return Connection(status=200, body=RETRY + block + said("native", rest).removeprefix(RETRY), clean=True)


def test_a_snapshot_that_is_not_what_the_log_said_is_found() -> None:
    """Four tokens at 200-4, and neither three nor five."""
    assert violations(history("snapshot", [snapshot(answer("p1", 2, 4))])) == ""
    assert "the snapshot at 200-4" in violations(history("snapshot", [snapshot(answer("p1", 2, 3))]))
    assert "the snapshot at 200-4" in violations(history("snapshot", [snapshot(answer("p1", 2, 5))]))
    assert "a hole" in violations(history("snapshot", [snapshot(answer("p1", 2, 3), "200-3")]))


def test_a_wrong_resumption_of_responses_is_found() -> None:
    """One event too early, one too late, and a refusal without a reason."""
    first, second = resumed_responses()
    early = replace(second, asked="5")
    late = replace(second, body=second.body.split(b"\n\n", 1)[1])
    assert "after 5 it was given 7" in violations(history("responses", [first, early]))
    assert "after 6 it was given 8" in violations(history("responses", [first, late]))
    refused = Connection("6", 409, b'{"error": {"code": "other"}}', clean=True)
    assert "refused" in violations(history("responses", [first, refused, second]))


def test_a_stream_that_cannot_be_heard_again_is_found() -> None:
    """After the end the whole answer is there for every later reader."""
    for dialect in ("chat_completions", "responses", "ui_messages"):
        one = whole(dialect)
        one.full = Connection(status=503)
        assert "could not be heard once more" in violations(one)


# --- the schedule


def test_the_same_seed_gives_the_same_faults() -> None:
    """And another seed others; every kind is among the first."""
    faults = schedule(7, 100, workers=3, apis=2, pause=1)
    assert faults == schedule(7, 100, workers=3, apis=2, pause=1)
    assert faults != schedule(8, 100, workers=3, apis=2, pause=1)
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
