"""The Responses dialect as a function: numbers, items, the Response they amount to; bodies to prompts and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from api import sse
from api.dialects.responses import (
    ATTEMPT_NUMBERS,
    Asked,
    Responses,
    current,
    first_number,
    input_items,
    options_of,
    response,
)
from api.frames import Ending, Frame
from api.routes.responses import CreateResponse, messages_of
from shared.errors import BadRequest
from shared.events import (
    Completed,
    Entry,
    Event,
    Failed,
    Queued,
    ReasoningDelta,
    SourceAdded,
    Started,
    TextDelta,
    ToolCallDelta,
    decode,
    encode,
    format_id,
)
from shared.prompt import Message
from tests.unit.test_dialects import NAMES, golden
from tests.unit.test_sse import parse_event_stream

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
FIRST, SECOND = Started(1, "demo"), Started(2, "demo")


def log_of(*events: Event) -> list[Entry]:
    """A log as its writers number it: `0-1`, then an epoch for each start."""
    entries, position = [], (0, 1)
    for event in (Queued("m", 1_790_000_000_000), *events):
        if isinstance(event, Started):
            position = (position[0] + 1_000, 0)
        entries.append(Entry(format_id(position), encode(event)))
        position = (position[0], position[1] + 1)
    return entries


def sent(entries: Sequence[Entry], **options: Any) -> list[bytes]:
    """The events one connection is sent, each in its own bytes."""
    dialect, frames = Responses(**options), []
    for entry in entries:
        for frame in dialect.frames(entry):
            if not isinstance(frame, Frame):
                assert frame is Ending.STOP
                return frames
            frames.append(sse.encode(frame))
    return frames


def said(entries: Sequence[Entry], **options: Any) -> list[dict[str, Any]]:
    return [
        orjson.loads(event.data) for block in sent(entries, **options) for event in parse_event_stream(block).events
    ]


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


@pytest.mark.parametrize("name", NAMES)
def test_starting_after_every_number_is_the_exact_tail(name: str) -> None:
    """For every golden log and every number in it, what follows is byte for byte the rest of the full stream."""
    for entries, first in ((golden(name), 0), (current(golden(name)), 2500 * ATTEMPT_NUMBERS)):
        whole = sent(entries, first=first)
        for n in range(len(whole)):
            rest = sent(entries, after=first + n, first=first)
            assert rest == (whole[n + 1 :] or [block for block in whole[n:] if b"event: error" in block])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_contiguous_and_events_are_what_the_sdk_declares(name: str) -> None:
    """Each event passes openai-python's own types, with no field missing; numbers start at 0 and have no hole."""
    events = said(golden(name))
    for event in events:
        EVENT.validate_python(event, strict=True)
    numbers = [event["sequence_number"] for event in events if event["type"] != "error"]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_event_carries_what_a_retrieve_answers(name: str) -> None:
    """The Response folded from the log is the one the stream of its newest attempt ended with."""
    events = said(current(golden(name)))
    assert events[-1]["response"] == response(Asked(), golden(name))
    Response.model_validate(events[-1]["response"], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_items_done_are_the_output(name: str) -> None:
    """What was told item by item is the output of the Response, and deltas join to the texts."""
    events = said(current(golden(name)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    output = events[-1]["response"]["output"]
    assert sorted(done, key=lambda item: item["id"]) == sorted(output, key=lambda item: item["id"])
    for event in events:
        if event["type"] == "response.output_text.done":
            same = ("item_id", "content_index")
            deltas = [
                delta["delta"]
                for delta in events
                if delta["type"] == "response.output_text.delta" and all(delta[key] == event[key] for key in same)
            ]
            assert "".join(deltas) == event["text"]


def test_a_fresh_attempt_after_words_ends_with_an_error_and_repeats_the_number() -> None:
    """Who takes the error's number for the last one seen misses nothing; nothing follows it."""
    entries = log_of(FIRST, TextDelta("lost"), SECOND, TextDelta("kept"), Completed("stop"))
    events = said(entries)
    error = events[-1]
    assert error["type"] == "error" and error["code"] == error["error"]["code"] == "attempt_superseded"
    assert error["sequence_number"] == events[-2]["sequence_number"]
    assert error["message"] == error["error"]["message"]


def test_numbers_of_an_attempt_that_voids_words_rest_on_its_time() -> None:
    """Silent attempts count for nothing, and neither do sources that no words rested on."""
    source = SourceAdded("1", "T", "http://x")
    entries = log_of(
        FIRST,
        *(TextDelta("a"), Started(2, "demo", "continued", "1000-1"), TextDelta("b")),
        *(Started(3, "demo"), source, TextDelta("")),
        *(Started(4, "demo"), ReasoningDelta("c")),
        *(Started(5, "demo"), TextDelta("d"), Completed("stop")),
    )
    entries[0] = Entry(b"0-1", encode(Queued("m", 300)))
    starts = {n: place for place, entry in enumerate(entries) if (n := attempt_of(entry))}
    firsts = {n: first_number(entries[: place + 1]) for n, place in starts.items()}
    third, fifth = (3_000 - 300) * ATTEMPT_NUMBERS, (5_000 - 300) * ATTEMPT_NUMBERS
    epochs = [entries[place].position[0] for place in starts.values()]
    assert epochs == [1_000, 2_000, 3_000, 4_000, 5_000]
    assert firsts == {1: 0, 2: 0, 3: third, 4: third, 5: fifth}
    assert said(current(entries), first=fifth)[0]["sequence_number"] == fifth
    assert first_number(entries[:1]) == 0


def attempt_of(entry: Entry) -> int | None:
    event = decode(entry.data)
    return event.attempt if isinstance(event, Started) else None


def test_an_attempt_on_a_store_that_may_have_lost_one_does_not_begin_at_0() -> None:
    """The lost attempt had the numbers from 0 on, and clients may come back with one of them."""
    assert first_number(log_of(FIRST, SECOND)) == 0
    assert first_number(log_of(replace(FIRST, restored=True))) > 0


def test_an_attempt_without_words_is_not_to_be_seen() -> None:
    """A worker lost before its first word leaves no trace; the sources it found are not those of the next one."""
    silent = said(log_of(FIRST, SourceAdded("1", "T", "http://x"), SECOND, TextDelta("a"), Completed("stop")))
    assert silent == said(log_of(FIRST, TextDelta("a"), Completed("stop")))


def test_pings_and_last_words() -> None:
    """A ping is one comment line; a server that goes and a log that is gone are errors; else it breaks off."""
    dialect = Responses()
    for entry in log_of(FIRST, TextDelta("a")):
        list(dialect.frames(entry))
    assert dialect.ping() == b": ping\n"
    for ending, code in ((Ending.DRAINING, "draining"), (Ending.GONE, "gone")):
        last_words = dialect.ending(ending, 1000)
        assert last_words is not None and b"retry:" not in last_words
        (event,) = parse_event_stream(last_words).events
        error = orjson.loads(event.data)
        assert event.type == "error" and error["code"] == code and error["sequence_number"] == 5
    assert dialect.ending(Ending.ABORT, 1000) is None


def test_a_source_stands_where_the_words_are_when_it_is_found() -> None:
    """Found before the words, it is at their beginning; found amid them, where they have come to. One that has no
    address is cited as a file."""
    found = (
        SourceAdded("1", "One", "http://one"),
        SourceAdded("2", "Two", "http://two"),
        SourceAdded("a b/rules.pdf#12", "No address"),
    )
    events = said(
        log_of(FIRST, found[0], TextDelta("Water "), found[1], found[2], TextDelta("flows."), Completed("stop"))
    )
    notes = [event for event in events if event["type"] == "response.output_text.annotation.added"]
    url = {"type": "url_citation"}
    assert [(note["annotation_index"], note["annotation"]) for note in notes] == [
        (0, {**url, "url": "http://one", "title": "One", "start_index": 0, "end_index": 0}),
        (1, {**url, "url": "http://two", "title": "Two", "start_index": 6, "end_index": 6}),
        (2, {"type": "file_citation", "file_id": "a b/rules.pdf#12", "filename": "rules.pdf", "index": 6}),
    ]
    (item,) = events[-1]["response"]["output"]
    assert [note["annotation"] for note in notes] == item["content"][0]["annotations"]


def test_fragments_of_calls_may_come_in_turns() -> None:
    """Calls stay open until the end, each keeps its own item, and words after them are an item of their own."""
    events = said(
        log_of(
            FIRST,
            TextDelta("Before. "),
            ToolCallDelta(0, "call_0", "f", '{"a'),
            ToolCallDelta(1, "call_1", "g", "["),
            ToolCallDelta(0, arguments='":1}'),
            TextDelta("After."),
            ToolCallDelta(1, arguments="]"),
            Completed("tool_calls"),
        )
    )
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
    assert [item["arguments"] for item in output[1:3]] == ['{"a":1}', "[]"]
    assert len({item["id"] for item in output}) == 4
    assert types(events).index("output_item.done") < types(events).index("function_call_arguments.delta")


def test_half_a_call_is_never_called_done() -> None:
    """When an attempt fails amid the arguments, no client is told that they are complete."""
    events = said(log_of(FIRST, ToolCallDelta(0, "call_0", "f", '{"a'), Failed("upstream_reset", "broke")))
    assert "function_call_arguments.done" not in types(events)
    (item,) = events[-1]["response"]["output"]
    assert item["status"] == "incomplete" and events[-1]["type"] == "response.failed"


def test_events_of_a_newer_version_take_no_number() -> None:
    """What this api does not know is passed over, as it was when the stream was first rendered."""
    known = log_of(FIRST, TextDelta("a"), Completed("stop"))
    assert said([*known[:2], Entry(b"1000-9", b'{"type":"video.delta","frames":[1]}'), *known[2:]]) == said(known)


def body(**fields: Any) -> CreateResponse:
    return CreateResponse.model_validate({"input": "hello", **fields})


def test_items_become_turns_and_turns_items() -> None:
    """Every kind of item survives the way into a prompt and back; thoughts are left out."""
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is "}, _text("this?")]},
        {"role": "user", "content": [_text("See:"), {"type": "input_image", "image_url": "data:x", "detail": "low"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": "[]"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [_text("2")]},
    ]
    messages = messages_of(given)
    assert [message.role for message in messages] == ["developer", "user", "user", "assistant", "tool", "tool"]
    assert messages[1].content == "What is this?" and messages[3].content == "Wait."
    assert [call["id"] for call in messages[3].tool_calls or ()] == ["a", "b"]
    items = input_items("7" * 32, messages)
    assert messages_of(items) == messages
    ids = [item["id"] for item in items]
    page = {"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1], "has_more": False}
    assert len(ResponseItemList.model_validate(page).data) == len(set(ids)) == 8


def test_turns_of_other_protocols_become_items_whatever_is_in_them() -> None:
    """A prompt that was not made here may hold parts and calls of any shape; listing them does not fail."""
    odd = Message(role="user", content=[{"type": "input_audio", "audio": 1}, {"type": "image_url", "image_url": "x"}])
    calls = Message(role="assistant", tool_calls=[{}, {"id": 7, "function": "f"}])
    items = input_items("7" * 32, [odd, calls, Message(role="user")])
    assert [item["type"] for item in items] == ["message", "function_call", "function_call", "message"]
    page = {"object": "list", "data": items, "first_id": "a", "last_id": "b", "has_more": False}
    ResponseItemList.model_validate(page)


def _text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "computer_call_output"}, "input[0].type"),
        ({"role": "critic", "content": "x"}, "input[0].role"),
        ({"role": "user", "content": 7}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": ["x"]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, "input[0].content[0].image_url"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": 7, "output": ""}, "input[0].call_id"),
        ({"type": ["message"]}, "input[0].type"),
    ],
)
def test_a_wrong_item_is_named(item: dict[str, Any], param: str) -> None:
    """What is not understood is refused by its place, never passed on or dropped."""
    with pytest.raises(BadRequest) as error:
        messages_of([item])
    assert error.value.param == param


def test_a_body_becomes_a_prompt_in_the_providers_words() -> None:
    """Names and shapes of Responses turn into those of Chat Completions; history stands behind the instructions."""
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True, "description": None}
    asked = body(instructions="Be.", text={"format": schema, "verbosity": "low"}, reasoning={"effort": "high"})
    prompt = asked.to_prompt("default", [Message(role="user", content="earlier")])
    assert [message.content for message in prompt.messages] == ["Be.", "earlier", "hello"]
    assert prompt.model == "default" and prompt.reasoning_effort == "high"
    assert prompt.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
    }


def test_the_response_says_what_was_asked_and_the_defaults_of_the_rest() -> None:
    """The options that are kept come back; an order that another protocol made shows what its prompt says."""
    asked = body(
        temperature=0.5, text={"verbosity": "low"}, tools=[{"type": "function", "name": "f"}], metadata={"a": "b"}
    )
    prompt = asked.to_prompt("m", [])
    for options in (asked.options(), {}):
        told = response(Asked("7" * 32, options_of(prompt, options)), log_of(FIRST))
        Response.model_validate(told, strict=True)
        assert told["temperature"] == 0.5 and told["top_p"] == 1.0 and told["status"] == "in_progress"
        assert told["text"]["format"] == {"type": "text"} and told["id"] == "resp_" + "7" * 32
    assert response(Asked("7" * 32, asked.options()), log_of())["tools"] == [
        {"parameters": None, "strict": None, "type": "function", "name": "f"}
    ]


@pytest.mark.parametrize("taken", [{"n": 1}, {"top_logprobs": 0}, {"include": ["reasoning.encrypted_content"]}])
def test_what_sdks_ask_of_their_own_accord_is_taken(taken: dict[str, Any]) -> None:
    """A value that asks for nothing more than what is done anyway is no reason to refuse."""
    assert body(**taken, truncation="auto", service_tier="auto").to_prompt("m", []).last_user_text() == "hello"
