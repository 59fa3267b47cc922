"""Hold what readers heard against what a generation's log says. Pure: histories in, a list of violations out.

The promises (docs/protocol.md): each position once, in order, from one attempt at a time, then exactly one terminal
event; a resumed stream is byte for byte the rest of the full one; the words of two attempts are never spliced; a reader
can tell a finished answer from a truncated one. Every token of the upstream says whose it is (`<prompt>.<hit>.<n> `),
so that a splice, a hole or a double is to be seen in the words of any dialect.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.chaos.hearing import HEAR, TERMINALS, Block, Ending, Heard, native, responses

RETRY_LATER = (0, 503)  # no answer at all, or "come back"
FROM_THE_START = ("chat_completions", "ui_messages")
ATTEMPT_NUMBERS = 1_000_000  # of Responses: how far the numbers of two attempts that spoke are apart
OUTCOMES: dict[str, Ending] = {"completed": "complete", "failed": "failed", "cancelled": "cancelled"}


@dataclass
class Connection:
    """One request and its answer. `asked`: the cursor it named. `clean`: the body was ended properly, not broken off.
    `left`: the client went by itself."""

    asked: str = ""
    status: int = 0
    body: bytes = b""
    clean: bool = False
    left: bool = False


@dataclass
class History:
    """All that one client of one generation heard; `full` is the whole stream asked for once more after the end."""

    reader: str
    dialect: str
    connections: list[Connection] = field(default_factory=list)
    knows_the_end: bool = False
    full: Connection | None = None


@dataclass(frozen=True)
class Truth:
    """The log of a generation when all was over, what its order says, and how long a whole answer is, in tokens.
    `lost_a_tail`: the store went down meanwhile and may have come back without its newest writes, so readers may have
    seen what no log has now. What they saw must be the beginning of one answer all the same."""

    prompt: str
    tokens: int
    entries: Sequence[tuple[str, bytes]]
    status: str
    lost_a_tail: bool = False

    def answer(self, hit: int) -> str:
        return answer(self.prompt, hit, self.tokens)

    @property
    def attempts(self) -> list[str]:
        """What each attempt wrote, in the order of their starts."""
        said: list[str] = []
        for event in self.events:
            if event["type"] == "generation.started":
                said.append("")
            elif event["type"] == "text.delta" and said:
                said[-1] += event["text"]
        return said

    @property
    def events(self) -> list[dict]:
        return [json.loads(data) for _, data in self.entries]

    @property
    def words(self) -> str:
        return self.attempts[-1] if self.attempts else ""

    @property
    def failure(self) -> dict:
        last = self.events[-1] if self.entries else {}
        return last if last.get("type") == "generation.failed" else {}


def answer(prompt: str, hit: int, tokens: int) -> str:
    """What the upstream says to a prompt when it is asked for the `hit`th time."""
    return "".join(f"{prompt}.{hit}.{n} " for n in range(tokens))


def check(truth: Truth, histories: Iterable[History]) -> list[str]:
    """Every way in which the log and what was heard of it break a promise; empty when all was well."""
    found = [f"{truth.prompt} log: {what}" for what in _check_log(truth)]
    for history in histories:
        rules = (_check_connections, CHECKS[history.dialect])
        who = f"{truth.prompt} {history.dialect} {history.reader}"
        found += [f"{who}: {what}" for rule in rules for what in rule(truth, history)]
    return found


def count_events(histories: Iterable[History]) -> int:
    """How many frames (in plain text: tokens) were looked at."""
    heard = [
        (HEAR[history.dialect](connection.body), history.dialect)
        for history in histories
        for connection in (*history.connections, *([history.full] if history.full else []))
    ]
    return sum(one.words.count(" ") if dialect == "text" else len(one.frames) for one, dialect in heard)


# --- the log


def _check_log(truth: Truth) -> Iterator[str]:
    if not truth.entries:
        yield "it is not there"
        return
    yield from _check_positions([(entry_id, json.loads(data)["type"]) for entry_id, data in truth.entries])
    ends = [event["type"] for event in truth.events if event["type"] in TERMINALS]
    if len(ends) != 1:
        yield f"{len(ends)} terminal events"
    elif OUTCOMES.get(truth.status) != TERMINALS[ends[0]]:
        yield f"it ended with {ends[0]}, and the order says {truth.status}"
    hits: list[int] = []
    for words in truth.attempts:
        yield from _check_words(truth, words)
        hits += [hit] if (hit := _hit_of(words)) else []
    if len(set(hits)) != len(hits):
        yield f"two attempts have the words of one answer: {hits}"
    if truth.status == "completed" and not _is_whole(truth, truth.words):
        yield f"completed, and its last attempt is not a whole answer: {_shown(truth.words)}"
    if truth.failure.get("code") == "internal_error":
        yield "it failed with internal_error"


def _check_positions(seen: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Ids and event types: each position once, in order, each epoch from its beginning and without a hole."""
    if seen and seen[0] != ("0-1", "generation.queued"):
        yield f"it begins with {seen[0]}"
    before = (0, 1)
    for number, (entry_id, kind) in enumerate(seen):
        epoch, _, seq = entry_id.partition("-")
        position = (int(epoch), int(seq))
        if number and position <= before:
            yield f"{entry_id} came after {before[0]}-{before[1]}"
        elif number and position[0] == before[0] and position[1] != before[1] + 1:
            yield f"a hole between {before[0]}-{before[1]} and {entry_id}"
        elif position[0] != before[0] and position[1] != 0:
            yield f"epoch {position[0]} begins at {entry_id}"
        if (position[1] == 0) != (kind == "generation.started" or (kind in TERMINALS and position[1] == 0)):
            yield f"{entry_id} is a {kind}"
        if number and seen[number - 1][1] in TERMINALS:
            yield f"{entry_id} follows the terminal event"
        before = position


# --- what is true in every dialect


def _check_connections(truth: Truth, history: History) -> Iterator[str]:
    if not history.knows_the_end:
        yield "it never learned how the generation ended"
    for number, connection in enumerate(history.connections):
        heard = _hear(truth, history, connection)
        where = f"connection {number}"
        if connection.status not in (200, *RETRY_LATER, *ALLOWED[history.dialect]):
            yield f"{where}: status {connection.status} {connection.body[:200]!r}"
        if connection.status != 200:
            continue
        if heard.follows:
            yield f"{where}: after its end came {heard.follows!r}"
        if connection.clean and not connection.left and not _ends_honestly(truth, history.dialect, heard):
            yield f"{where}: truncated and yet ended properly, after {_shown(heard.words)!r}"
        if heard.ending == "complete" and truth.status != "completed":
            yield f"{where}: told complete, and the generation is {truth.status}"
        if heard.ending in ("failed", "cancelled") and heard.ending != OUTCOMES.get(truth.status):
            yield f"{where}: told {heard.ending} ({heard.code}), and the generation is {truth.status}"
        if heard.ending == "failed" and heard.code != truth.failure.get("code"):
            yield f"{where}: told {heard.code}, and the log says {truth.failure.get('code')}"
        if heard.ending in ("gone", "unsaid"):
            yield f"{where}: ended as {heard.ending}"


def _ends_honestly(truth: Truth, dialect: str, heard: Heard) -> bool:
    if dialect == "text":  # the one word it has for the end is the end
        return truth.status == "completed" and _counts(truth, heard.words)
    return heard.ending in (("complete", "failed", "cancelled", "retry") if dialect in NATIVE else ENDINGS)


NATIVE = ("native", "snapshot")
ENDINGS = ("complete", "failed", "cancelled", "superseded", "draining", "gone")
ALLOWED = {
    "native": (204,),  # an EventSource takes any other status for final, so it is promised none
    "snapshot": (204,),
    "text": (),
    "chat_completions": (),
    "responses": (409,),
    "ui_messages": (204,),
}


def _check_words(truth: Truth, words: str) -> Iterator[str]:
    """The words of one attempt are the beginning of one answer."""
    hit = _hit_of(words)
    if words and not (hit and truth.answer(hit).startswith(words)):
        yield f"spliced, with a hole or doubled: {_shown(_around_the_fault(truth, words, hit))!r}"


def _hit_of(words: str) -> int | None:
    """Which answer the words are of; None while too little of it is there."""
    parts = words.split(" ")[0].split(".")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None


def _around_the_fault(truth: Truth, words: str, hit: int | None) -> str:
    whole = truth.answer(hit or 1)
    at = next((n for n, (a, b) in enumerate(zip(words, whole, strict=False)) if a != b), min(len(words), len(whole)))
    return words[max(0, at - 40) : at + 40]


def _is_whole(truth: Truth, words: str) -> bool:
    hit = _hit_of(words)
    return hit is not None and words == truth.answer(hit)


def _counts(truth: Truth, words: str) -> bool:
    """Are these the words that the log ended with? The end itself may be what the store lost."""
    return words == truth.words or (truth.lost_a_tail and _is_whole(truth, words))


def _is_final(truth: Truth, words: str) -> bool:
    """Do the words belong to the attempt that counts?"""
    return _hit_of(words) == _hit_of(truth.words)


def _shown(words: str) -> str:
    return words if len(words) < 120 else f"{words[:60]}…{words[-60:]}"


# --- native SSE


def _check_native(truth: Truth, history: History) -> Iterator[str]:
    log = dict(truth.entries)
    blocks: list[Block] = []
    for number, connection in enumerate(history.connections):
        if connection.status == 200 and connection.body and not connection.body.startswith(b"retry: "):
            yield f"connection {number} did not begin with retry:"
        if connection.status == 204 and not _has_ended(blocks):
            yield f"connection {number}: 204 before the end"
        blocks += native(connection.body).blocks
    if history.dialect == "snapshot" and blocks and blocks[0].fields["event"] == "snapshot":
        yield from _check_snapshot(truth, blocks[0])
        head, blocks = [("0-1", "generation.queued")], blocks[1:]
        yield from _check_sequel(head, truth, [*_snapshot_ids(history), *_ids(blocks)])
    else:
        yield from _check_positions(_ids(blocks))
    for block in blocks:
        entry_id = block.fields["id"]
        if entry_id not in log:
            if not (truth.lost_a_tail and _is_of_a_lost_tail(entry_id, log)):
                yield f"{entry_id} is not in the log: {block.raw!r}"
        elif block.raw != b"id: %b\nevent: %b\ndata: %b\n\n" % (
            entry_id.encode(),
            json.loads(log[entry_id])["type"].encode(),
            log[entry_id],
        ):
            yield f"{entry_id} is not as it stands in the log: {block.raw!r}"
    yield from _check_folds(truth, blocks, has_all=history.dialect == "native")


def _is_of_a_lost_tail(entry_id: str, log: Iterable[str]) -> bool:
    """Nothing that stands in the log came after it in its epoch."""
    epoch, _, seq = entry_id.partition("-")
    return not any(one.startswith(f"{epoch}-") and int(one.split("-")[1]) > int(seq) for one in log)


def _ids(blocks: Iterable[Block]) -> list[tuple[str, str]]:
    return [(block.fields["id"], block.fields["event"]) for block in blocks]


def _has_ended(blocks: Sequence[Block]) -> bool:
    return bool(blocks) and (blocks[-1].fields["event"] in TERMINALS or blocks[-1].json.get("status") in OUTCOMES)


def _snapshot_ids(history: History) -> list[tuple[str, str]]:
    blocks = [block for connection in history.connections for block in native(connection.body).blocks]
    return [(blocks[0].fields["id"], "snapshot")]


def _check_sequel(head: list[tuple[str, str]], truth: Truth, seen: list[tuple[str, str]]) -> Iterator[str]:
    """What follows a snapshot continues the log where the snapshot ends."""
    kinds = {entry_id: json.loads(data)["type"] for entry_id, data in truth.entries}
    first = seen[0][0]
    if first not in kinds:
        yield f"the snapshot ends at {first}, which is not in the log"
        return
    before = [(entry_id, kind) for entry_id, kind in kinds.items() if entry_id.split("-")[0] == first.split("-")[0]]
    until = [pair for pair in before if int(pair[0].split("-")[1]) <= int(first.split("-")[1])]
    yield from _check_positions([*(head if first != "0-1" else []), *until, *seen[1:]])


def _check_snapshot(truth: Truth, block: Block) -> Iterator[str]:
    words = ""
    for (entry_id, _), event in zip(truth.entries, truth.events, strict=True):
        if event["type"] == "generation.started":
            words = ""
        elif event["type"] == "text.delta":
            words += event["text"]
        if entry_id == block.fields["id"]:
            if block.json["text"] != words:
                yield f"the snapshot at {entry_id} says {_shown(block.json['text'])!r}, the log {_shown(words)!r}"
            return
    yield f"the snapshot ends at {block.fields['id']}, which is not in the log"


def _check_folds(truth: Truth, blocks: Sequence[Block], has_all: bool) -> Iterator[str]:
    """The words as a client adds them up, attempt by attempt."""
    words = ""
    for block in blocks:
        event = block.json
        if event["type"] == "generation.started" and event["mode"] == "fresh":
            words, has_all = "", True
        elif event["type"] == "text.delta":
            words += event["text"]
            if has_all and not truth.answer(_hit_of(words) or 1).startswith(words):
                yield from _check_words(truth, words)
                return
    if _has_ended(blocks) and has_all and not _counts(truth, words):
        yield f"in the end it has {_shown(words)!r}, the log {_shown(truth.words)!r}"


# --- plain text


def _check_text(truth: Truth, history: History) -> Iterator[str]:
    for number, connection in enumerate(history.connections):
        if connection.status == 200:
            words = connection.body.decode()
            yield from (f"connection {number}: {what}" for what in _check_beginning(truth, words))


def _check_beginning(truth: Truth, words: str) -> Iterator[str]:
    """As `_check_words`, for words that may break off amid a token; and some attempt in the log said them."""
    found = list(_check_words(truth, words)) if _hit_of(words) else []
    yield from found
    if words and not found and not truth.lost_a_tail and not any(said.startswith(words) for said in truth.attempts):
        yield f"no attempt said {_shown(words)!r}"


# --- Chat Completions and UI messages: every connection begins at the start


def _check_from_the_start(truth: Truth, history: History) -> Iterator[str]:
    readings: dict[int | None, list[list[bytes]]] = defaultdict(list)
    full = history.full
    for number, connection in enumerate((*history.connections, *([full] if full else []))):
        heard = _hear(truth, history, connection)
        for what in (*_check_beginning(truth, heard.words), *_check_claim(truth, heard)):
            yield f"connection {number}: {what}"
        if heard.words or not heard.ending:
            readings[_hit_of(heard.words)].append(_comparable(heard))
    if full is None or _hear(truth, history, full).ending != OUTCOMES.get(truth.status):
        yield "it could not be heard once more after the end"
    wordless = readings.pop(None, [])
    for group in readings.values() or [[]]:
        yield from _check_same(group + wordless)


def _check_claim(truth: Truth, heard: Heard) -> Iterator[str]:
    if heard.ending == "complete" and not _counts(truth, heard.words):
        yield f"told complete with {_shown(heard.words)!r}, the log has {_shown(truth.words)!r}"
    if heard.ending == "superseded" and (not heard.words or _is_final(truth, heard.words)):
        yield f"told superseded, and {_shown(heard.words)!r} is what counts"


def _comparable(heard: Heard) -> list[bytes]:
    """The frames without an ending that is not of the log: UI messages close the part before they say so."""
    if heard.ending == "superseded":
        closing = [number for number, raw in enumerate(heard.frames) if b'"text-end"' in raw]
        return heard.frames[: closing[-1]] if closing else heard.frames
    return heard.frames


def _hear(truth: Truth, history: History, connection: Connection) -> Heard:
    """As `HEAR`. UI messages have one word for a failure and for an answer begun anew: the log can tell which."""
    heard = HEAR[history.dialect](connection.body)
    if history.dialect == "ui_messages" and heard.ending == "error":
        if heard.code == truth.failure.get("message"):
            heard.end("failed", truth.failure["code"])
        else:
            heard.end("superseded")
    return heard


def _check_same(readings: list[list[bytes]]) -> Iterator[str]:
    """Of two readings of one attempt, one is the beginning of the other, byte for byte."""
    longest = max(readings, key=len, default=[])
    for reading in readings:
        for number, (mine, other) in enumerate(zip(reading, longest, strict=False)):
            if mine != other:
                yield f"frame {number} is {mine!r} in one reading and {other!r} in another"
                break


# --- Responses: numbered events, resumed after any number


def _check_responses(truth: Truth, history: History) -> Iterator[str]:
    connections = (*history.connections, *([history.full] if history.full else []))
    for at, connection in enumerate(connections):
        numbers = [block.json["sequence_number"] for block in responses(connection.body).blocks]
        for what in (*_check_numbers(connection, numbers), *_check_refusal(connection)):
            yield f"connection {at}: {what}"
    for run in _runs(connections):
        yield from _check_run(truth, run)
    yield from _check_one_event_for_each_number(connections)
    if history.full is None or responses(history.full.body).ending != OUTCOMES.get(truth.status):
        yield "it could not be heard once more after the end"


def _runs(connections: Iterable[Connection]) -> list[list[Connection]]:
    """What a client puts together: a stream from the start, and those that were resumed from it."""
    runs: list[list[Connection]] = []
    for connection in connections:
        if connection.asked and runs:
            runs[-1].append(connection)
        else:
            runs.append([connection])
    return runs


def _check_run(truth: Truth, run: Sequence[Connection]) -> Iterator[str]:
    """Its events, put together: no hole, no double, one attempt, and what it was told in the end."""
    heard = responses(b"".join(block.raw for connection in run for block in responses(connection.body).blocks))
    numbers = [block.json["sequence_number"] for block in heard.blocks]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        yield f"put together, the numbers have a hole or a double: {numbers[:3]} to {numbers[-3:]}"
    heard.ending = heard.ending or responses(run[-1].body).ending
    yield from _check_beginning(truth, heard.words)
    yield from _check_claim(truth, heard)
    if heard.ending == "complete" and not _counts(truth, _output_text(heard)):
        yield f"its last Response says {_shown(_output_text(heard))!r}"


def _check_one_event_for_each_number(connections: Iterable[Connection]) -> Iterator[str]:
    """Whoever asks, whenever: the n-th event is the same, byte for byte."""
    events: dict[int, bytes] = {}
    for connection in connections:
        for block in responses(connection.body).blocks:
            number = block.json["sequence_number"]
            if events.setdefault(number, block.raw) != block.raw:
                yield f"event {number} is {block.raw!r} in one reading and {events[number]!r} in another"


def _check_numbers(connection: Connection, numbers: list[int]) -> Iterator[str]:
    if not numbers:
        return
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        yield f"its numbers have a hole: {numbers[:3]} to {numbers[-3:]}"
    if connection.asked and numbers[0] != int(connection.asked) + 1:
        yield f"after {connection.asked} it was given {numbers[0]}"
    if not connection.asked and numbers[0] % ATTEMPT_NUMBERS:
        yield f"from the start it was given {numbers[0]}"


def _check_refusal(connection: Connection) -> Iterator[str]:
    if connection.status == 409 and not (connection.asked and b"attempt_superseded" in connection.body):
        yield f"refused: {connection.body[:200]!r}"


def _output_text(heard: Heard) -> str:
    output = heard.blocks[-1].json["response"]["output"]
    return "".join(part["text"] for item in output for part in item["content"])


CHECKS: dict[str, Callable[[Truth, History], Iterator[str]]] = {
    "native": _check_native,
    "snapshot": _check_native,
    "text": _check_text,
    **dict.fromkeys(FROM_THE_START, _check_from_the_start),
    "responses": _check_responses,
}
