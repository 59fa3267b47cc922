"""The AI SDK's UI message stream: what every stream keeps to, and how a chat's messages become a prompt."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.chats import Chats
from api.dialects.ui_messages import UiMessages
from api.frames import Ending
from api.routes.ui_messages import SendMessages
from shared.errors import BadRequest
from shared.event_log import EventLog
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
    TextDelta,
    ToolCallDelta,
    encode,
    fold,
    format_id,
)
from shared.redis import Client
from tests.unit.test_dialects import NAMES, golden

GENERATION_ID = "0123456789abcdef" * 2
OPENS = {"text-start", "reasoning-start", "tool-input-start"}
CLOSES = {"text-end", "reasoning-end", "tool-input-available", "tool-input-error"}
LAST = {"finish", "error", "abort"}
# Every chunk type that `ai` 6 has and this dialect sends.
KNOWN_TO_6 = OPENS | CLOSES | LAST | {"start", "start-step", "finish-step", "text-delta", "reasoning-delta"}
KNOWN_TO_6 |= {"tool-input-delta", "source-url", "source-document"}


def chunks_of(entries: list[Entry], **options: Any) -> list[dict[str, Any]]:
    """All that one connection is sent, `[DONE]` and endings as they are."""
    dialect, chunks = UiMessages(GENERATION_ID, **options), []
    for entry in entries:
        for frame in dialect.frames(entry):
            if isinstance(frame, Ending):
                assert frame is Ending.STOP
                return chunks
            assert frame.id == frame.event == b"" and b"\n" not in frame.data and b"\r" not in frame.data
            chunks.append({"type": "[DONE]"} if frame.data == b"[DONE]" else orjson.loads(frame.data))
    return chunks


def log_of(*events: Event) -> list[Entry]:
    """A log with these events: queued, then each start begins an epoch."""
    entries, epoch, seq = [Entry(b"0-1", encode(Queued("m", 1)))], 1, 0
    for event in events:
        epoch, seq = (epoch + 1, 0) if isinstance(event, Started) else (epoch, seq + 1)
        entries.append(Entry(format_id((epoch, seq)), encode(event)))
    return entries


def check(chunks: list[dict[str, Any]]) -> None:
    """What `processUIMessageStream` insists on: a start first, deltas and ends only for what was begun, one end."""
    assert chunks[0]["type"] == "start" and [chunk["type"] for chunk in chunks].count("start") == 1
    opened: dict[str, str] = {}
    for chunk in chunks:
        kind, key = chunk["type"], chunk.get("toolCallId") or chunk.get("id")
        if kind in OPENS:
            assert key not in opened
            opened[key] = kind.rpartition("-")[0]
        elif kind in CLOSES:
            assert opened.pop(key) == kind.rpartition("-")[0]
        elif kind.endswith("-delta"):
            assert opened[key] == kind.rpartition("-")[0]
        elif kind == "reset-step":
            opened.clear()
    ends = [n for n, chunk in enumerate(chunks) if chunk["type"] in LAST]
    assert len(ends) <= 1
    if ends:
        assert [chunk["type"] for chunk in chunks[ends[0] + 1 :]] == ["[DONE]"]
        assert chunks[ends[0]]["type"] != "finish" or opened == {}


def shown(chunks: list[dict[str, Any]]) -> str:
    """The text that a client has in the end."""
    text = ""
    for chunk in chunks:
        text = "" if chunk["type"] == "reset-step" else text + (chunk["delta"] if chunk["type"] == "text-delta" else "")
    return text


@pytest.mark.parametrize("can_reset_step", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_stream_is_one_the_sdk_accepts(name: str, can_reset_step: bool) -> None:
    """Parts begin before they go on and end once, and a stream has at most one end of its own."""
    chunks = chunks_of(golden(name), can_reset_step=can_reset_step)
    check(chunks)
    assert chunks[-1]["type"] == "[DONE]"
    assert {chunk["type"] for chunk in chunks[:-1]} <= KNOWN_TO_6 | ({"reset-step"} if can_reset_step else set())


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_resets_steps_has_all_the_words_in_the_end(name: str) -> None:
    """With the opt-in every log ends as its snapshot says."""
    state, chunks = fold(golden(name)), chunks_of(golden(name), can_reset_step=True)
    assert shown(chunks) == state.text + state.refusal
    outcome = {"failed": "error", "cancelled": "abort"}.get(state.status, "finish")
    assert chunks[-2]["type"] == outcome


words = st.text(max_size=5)
outputs = st.one_of(
    st.builds(TextDelta, words),
    st.builds(RefusalDelta, words),
    st.builds(ReasoningDelta, words),
    st.builds(
        ToolCallDelta,
        st.integers(0, 2),
        st.none(),
        st.sampled_from([None, "look", "find"]),
        st.sampled_from(["", "{", "}", '{"a":1}', "[" * 600 + "]" * 600]),
    ),
    st.builds(SourceAdded, words, words, st.sampled_from([None, "https://example.org/"])),
)
starts = st.builds(Started, st.just(1), st.just("p"), st.sampled_from(["fresh", "continued"]))
ends = st.sampled_from([Completed("stop"), Completed("length"), Failed("c", "m"), Cancelled("caller")])


@given(st.lists(st.one_of(outputs, outputs, starts), max_size=12), ends, st.booleans())
def test_whatever_a_log_says_the_stream_is_one_the_sdk_accepts(
    said: list[Event], end: Event, can_reset_step: bool
) -> None:
    """Any events in any order, many attempts, half a call: never a chunk the client throws at."""
    check(chunks_of(log_of(Started(1, "p"), *said, end), can_reset_step=can_reset_step))


def test_a_fresh_attempt_after_words_ends_the_stream_unless_steps_can_be_reset() -> None:
    """A client of `ai` 6 is told that its words are void, and nothing follows."""
    log = log_of(Started(1, "p"), TextDelta("one"), Started(2, "p"), TextDelta("two"), Completed("stop"))
    told = [chunk["type"] for chunk in chunks_of(log)]
    assert told[-3:] == ["text-end", "error", "[DONE]"]
    assert shown(chunks_of(log, can_reset_step=True)) == "two"


def test_ids_come_from_the_generation() -> None:
    """The message has the generation's id, unless it goes on with a message the client has."""
    start = chunks_of(log_of())[0]
    assert start["messageId"] == f"msg_{GENERATION_ID}"
    assert start["messageMetadata"] == {"generationId": GENERATION_ID, "model": "m", "createdAt": 1}
    assert chunks_of(log_of(), message_id="a1")[0]["messageId"] == "a1"


def test_a_call_whose_name_comes_late_is_told_from_then_on() -> None:
    """Fragments before the name are kept back, none is lost."""
    log = log_of(
        Started(1, "p"),
        ToolCallDelta(0, "c1", None, '{"a"'),
        ToolCallDelta(0, None, "look", ":1}"),
        Completed("tool_calls"),
    )
    told = chunks_of(log)[2:-3]
    assert told == [
        {"type": "tool-input-start", "toolCallId": "c1", "toolName": "look"},
        {"type": "tool-input-delta", "toolCallId": "c1", "inputTextDelta": '{"a":1}'},
        {"type": "tool-input-available", "toolCallId": "c1", "toolName": "look", "input": {"a": 1}},
    ]


@pytest.mark.parametrize(("arguments", "kind"), [("", "available"), ("{", "error"), ("[" * 600 + "]" * 600, "error")])
def test_arguments_are_parsed_at_the_end(arguments: str, kind: str) -> None:
    """No arguments are an empty object; what is not JSON, or too deep to be said again, is an error of the call."""
    log = log_of(Started(1, "p"), ToolCallDelta(0, "c1", "look", arguments), Completed("tool_calls"))
    told = next(chunk for chunk in chunks_of(log) if chunk["type"] == f"tool-input-{kind}")
    assert told["input"] == (arguments if kind == "error" else {})


def test_pings_are_comments_and_early_ends_are_aborts() -> None:
    """A clean end would be taken for the end of the answer, so there is none before it."""
    dialect = UiMessages()
    assert dialect.ping().startswith(b":") and dialect.ping().endswith(b"\n\n")
    assert all(dialect.ending(ending, 1000) is None for ending in Ending)


# ---- Messages ----


def messages_of(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = SendMessages.model_validate({"id": "c", "messages": list(turns)}).to_prompt("demo")
    return [message.model_dump(exclude_none=True) for message in prompt.messages]


def turn(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"{role}-1", "role": role, "parts": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_texts_and_pictures_become_content() -> None:
    """A text alone is a string; with a picture it is a list of parts."""
    picture = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AAAA", "filename": "a.png"}
    assert messages_of(turn("system", text("Be "), text("brief.")), turn("user", text("Hi"), picture)) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        },
    ]
    assert messages_of(turn("user", text("Hi"), {"type": "data-mood", "data": 1})) == [
        {"role": "user", "content": "Hi"}
    ]


def test_tools_become_calls_and_outcomes() -> None:
    """Each step is an assistant's message and its tools' messages; calls without an outcome are left out."""
    call = {"type": "tool-look", "toolCallId": "c1", "state": "output-available", "input": {"a": 1}, "output": [1]}
    failed = {"type": "tool-look", "toolCallId": "c2", "state": "output-error", "rawInput": "{", "errorText": "bad"}
    denied = {
        "type": "dynamic-tool",
        "toolName": "find",
        "toolCallId": "c3",
        "state": "output-denied",
        "input": {},
        "approval": {"id": "1", "approved": False, "reason": "no"},
    }
    pending = {"type": "tool-look", "toolCallId": "c4", "state": "input-available", "input": {}}
    step, thought = {"type": "step-start"}, {"type": "reasoning", "text": "hm"}
    source = {"type": "source-url", "sourceId": "s", "url": "https://example.org/"}

    def function(call_id: str, name: str, arguments: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert messages_of(
        turn("user", text("go")),
        turn(
            "assistant", step, thought, text("Let me."), call, failed, step, denied, pending, step, source, text("So.")
        ),
    )[1:] == [
        {
            "role": "assistant",
            "content": "Let me.",
            "tool_calls": [function("c1", "look", '{"a":1}'), function("c2", "look", "{")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "[1]"},
        {"role": "tool", "tool_call_id": "c2", "content": "bad"},
        {"role": "assistant", "tool_calls": [function("c3", "find", "{}")]},
        {"role": "tool", "tool_call_id": "c3", "content": "no"},
        {"role": "assistant", "content": "So."},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "url": "https://example.org/"},
        {"type": 7},
        {},
        {"type": "text"},
        {"type": "file", "mediaType": "application/pdf", "url": "data:application/pdf;base64,AAAA"},
        {"type": "file", "mediaType": "image/png", "url": "blob:https://example.org/1"},
        {"type": "file", "url": "https://example.org/"},
        {"type": "reasoning", "text": "only thoughts"},
    ],
)
def test_what_cannot_be_understood_is_refused(part: dict[str, Any]) -> None:
    """No part of a user's message is dropped without a word."""
    with pytest.raises(BadRequest):
        messages_of(turn("user", part))


def test_one_message_is_a_prompt_too() -> None:
    """`message` in place of `messages`: that alone is the prompt; both or neither is an error."""
    one = turn("user", text("Hi"))
    body = SendMessages.model_validate({"id": "c", "message": one, "model": "m", "seed": 7, "theirs": {}})
    prompt = body.to_prompt("demo")
    assert (prompt.model, prompt.seed, prompt.messages[0].content) == ("m", 7, "Hi")
    for wrong in ({}, {"message": one, "messages": [one]}, {"messages": []}):
        with pytest.raises(ValueError):
            SendMessages.model_validate({"id": "c", **wrong})


def test_an_answer_to_tools_goes_on_in_its_message() -> None:
    """A last message of the assistant's is the one that the answer belongs to."""
    asked, answer = turn("user", text("Hi")), turn("assistant", text("Let me."))
    assert SendMessages.model_validate({"id": "c", "messages": [asked, answer]}).message_id() == "assistant-1"
    assert SendMessages.model_validate({"id": "c", "messages": [answer, asked]}).message_id() is None


# ---- Chats ----


async def test_a_chat_points_at_its_newest_generation(redis: Client, event_log: EventLog) -> None:
    """Pointing tells the one before, once; tenants do not see each other's chats; the pointer has a time to live."""
    chats = Chats(redis, event_log.keys, 60)
    assert await chats.point("a", "chat", "1" * 32) is None
    assert await chats.point("a", "chat", "1" * 32) is None, "a repeated request is no other generation"
    assert await chats.point("a", "chat", "2" * 32) == "1" * 32
    assert await chats.find("a", "chat") == "2" * 32
    assert await chats.find("b", "chat") is None
    assert 0 < await redis.ttl(event_log.keys.chat("a", "chat")) <= 60
