"""Chat Completions: the sequence of chunks, what a body becomes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api.dialects.chat_completions import ChatCompletions, call_id, completion
from api.frames import Ending, Frame
from api.routes.chat_completions import TAKEN, CreateChatCompletion
from shared.errors import Unprocessable
from shared.events import (
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
    Usage,
    encode,
    fold,
    format_id,
)
from tests.unit.test_dialects import NAMES, golden

ID = "0123456789abcdef" * 2
HELLO = [{"role": "user", "content": "hello"}]


def log_of(*events: Event) -> list[Entry]:
    """A log: queued, and one attempt that says these."""
    head = Entry(b"0-1", encode(Queued("m", 1_790_000_000_999)))
    return [head, *(Entry(format_id((7, n)), encode(event)) for n, event in enumerate((Started(1, "p"), *events)))]


def rendered(entries: Iterable[Entry], include_usage: bool = False) -> list[Frame | Ending]:
    """What a relay is given: nothing is asked for after an ending."""
    dialect = ChatCompletions(ID, include_usage)
    frames: list[Frame | Ending] = []
    for entry in entries:
        frames += dialect.frames(entry)
        if isinstance(frames[-1], Ending):
            break
    return frames


def bodies(entries: Iterable[Entry], include_usage: bool = False) -> list[Any]:
    """The JSON of each frame that has any."""
    frames = rendered(entries, include_usage)
    return [orjson.loads(frame.data) for frame in frames if isinstance(frame, Frame) and frame.data != b"[DONE]"]


def deltas(entries: Iterable[Entry]) -> list[Any]:
    return [body["choices"][0]["delta"] for body in bodies(entries)]


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_a_chunk_or_an_error(name: str, include_usage: bool) -> None:
    """OpenAI's own types validate each chunk; `[DONE]` stands at the end of an answer, and nowhere else."""
    frames = rendered(golden(name), include_usage)
    last = frames[-1]
    for frame in frames[:-1] if last in (Ending.STOP, Frame(b"[DONE]")) else frames:
        assert isinstance(frame, Frame) and not frame.id and not frame.event and frame.data != b"[DONE]"
        if b'"error"' not in frame.data[:9]:
            chunk = ChatCompletionChunk.model_validate_json(frame.data, strict=True)
            assert (chunk.id, chunk.created) == (f"chatcmpl-{ID}", 1_790_000_000)
    assert (last == Frame(b"[DONE]")) == (fold(golden(name)).finish_reason is not None and name != "two_attempts")


@pytest.mark.parametrize("name", [name for name in NAMES if fold(golden(name)).finish_reason])
def test_the_whole_completion_is_one_of_openai(name: str) -> None:
    """The object that is not streamed is valid by OpenAI's own types, and has all the words."""
    state = fold(golden(name))
    whole = ChatCompletion.model_validate_json(orjson.dumps(completion(ID, state)), strict=True)
    assert whole.id == f"chatcmpl-{ID}" and whole.choices[0].finish_reason == state.finish_reason
    assert whole.choices[0].message.content == state.text
    assert whole.choices[0].message.refusal == (state.refusal or None)


def test_usage_is_last_and_only_when_asked_for() -> None:
    """With `include_usage` every chunk has the field, and one without choices has the numbers."""
    entries = log_of(TextDelta("a"), Completed("stop", Usage(1, 2, 3)))
    assert all("usage" not in body for body in bodies(entries))
    *others, last = bodies(entries, include_usage=True)
    assert [body["usage"] for body in others] == [None] * 3
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 3
    assert bodies(log_of(Completed("stop")), include_usage=True)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_tool_call_begins_once() -> None:
    """Its first fragment has index, id, type and name, the rest index and arguments; indexes have no holes."""
    events = (ToolCallDelta(3, "c", "f", "{"), ToolCallDelta(5, None, "g"), ToolCallDelta(3, arguments="}"))
    fragments = [delta["tool_calls"][0] for delta in deltas(log_of(*events))[1:]]
    assert fragments == [
        {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}},
        {"index": 1, "id": call_id(ID, 1), "type": "function", "function": {"name": "g", "arguments": ""}},
        {"index": 0, "function": {"arguments": "}"}},
    ]
    message = completion(ID, fold(log_of(*events)))["choices"][0]["message"]
    assert [call["id"] for call in message["tool_calls"]] == ["c", call_id(ID, 1)] and message["content"] is None


def test_sources_are_gathered_into_one_delta() -> None:
    """They come before the words that follow them, numbered on over the whole answer."""
    one, two, three = (SourceAdded(str(n), f"title {n}", f"https://example.org/{n}") for n in range(3))
    first, words, second = deltas(log_of(one, two, TextDelta("a"), three, Completed("stop")))[1:4]
    assert [annotation["index"] for annotation in first["annotations"]] == [0, 1] and words == {"content": "a"}
    assert [annotation["index"] for annotation in second["annotations"]] == [2]
    assert first["annotations"][1]["url_citation"]["title"] == "title 1"


def test_a_source_without_an_address_is_no_annotation() -> None:
    """There is none but `url_citation`, and a client would make a link of an empty one; the others are numbered on."""
    one, two = (SourceAdded(str(n), f"title {n}", f"https://example.org/{n}") for n in range(2))
    log = log_of(one, SourceAdded("a.pdf#1", "no address"), two, TextDelta("a"), Completed("stop"))
    for notes in (
        deltas(log)[1]["annotations"],
        completion(ID, fold(log))["choices"][0]["message"]["annotations"],
    ):
        assert [note["url_citation"]["url"] for note in notes] == [one.url, two.url]
    assert [note["index"] for note in deltas(log)[1]["annotations"]] == [0, 1]
    alone = log_of(SourceAdded("a.pdf#1", "no address"), TextDelta("a"), Completed("stop"))
    assert [delta for delta in deltas(alone) if "annotations" in delta] == []


def test_a_silent_attempt_is_invisible() -> None:
    """Nothing was said, so nothing is void: sources that were held back are forgotten with it."""
    silent = log_of(SourceAdded("1", "old"))
    again = [Entry(b"9-0", encode(Started(2, "p"))), Entry(b"9-1", encode(TextDelta("new")))]
    assert deltas([*silent, *again]) == [{"role": "assistant", "content": ""}, {"content": "new"}]


@pytest.mark.parametrize("said", [TextDelta("a"), ReasoningDelta("a"), RefusalDelta("a"), ToolCallDelta(0, "c", "f")])
def test_what_was_said_cannot_be_unsaid(said: Event) -> None:
    """A fresh attempt after any output ends the stream with an error, and nothing of it follows."""
    again = [Entry(b"9-0", encode(Started(2, "p"))), Entry(b"9-1", encode(TextDelta("new")))]
    dialect = ChatCompletions(ID)
    for entry in log_of(said):
        list(dialect.frames(entry))
    frame, ending = dialect.frames(again[0])
    assert isinstance(frame, Frame) and orjson.loads(frame.data)["error"]["code"] == "attempt_superseded"
    assert ending is Ending.STOP


def test_a_rate_limit_is_one_to_the_client() -> None:
    """The type of an error is OpenAI's where there is one."""
    last = bodies(log_of(Failed("upstream_rate_limited", "later")))[-1]
    assert last == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "upstream_rate_limited"}
    }


def test_early_endings_are_errors_and_a_ping_is_half_a_block() -> None:
    """What the log does not say is said as an error; openai-python takes a blank line after a ping for an event."""
    dialect = ChatCompletions(ID)
    for ending, code in ((Ending.DRAINING, b'"draining"'), (Ending.GONE, b'"gone"')):
        last_words = dialect.ending(ending, 1000)
        assert last_words is not None and last_words.startswith(b'data: {"error":') and code in last_words
        assert b"retry:" not in last_words
    assert dialect.ending(Ending.ABORT, 1000) is None
    assert dialect.ping() == b": ping\n"


@given(st.text(min_size=1))
def test_a_frame_is_one_line_to_everybody(text: str) -> None:
    """Also to clients that split lines at more than a line feed; and what they read is what was written."""
    frame = rendered(log_of(TextDelta(text)))[-1]
    assert isinstance(frame, Frame) and len(frame.data.decode().splitlines()) == 1
    assert orjson.loads(frame.data)["choices"][0]["delta"] == {"content": text}


# ---- Bodies ----


def body(**fields: Any) -> CreateChatCompletion:
    return CreateChatCompletion.model_validate({"model": "m", "messages": HELLO, **fields})


def test_a_body_becomes_a_prompt() -> None:
    """What Prompt carries is carried, the new name of a limit before the old one, and the rest is left out."""
    asked = {"temperature": 0.5, "top_p": 0.5, "seed": 1, "metadata": {"a": "b"}, "tool_choice": "auto"}
    asked |= {"response_format": {"type": "json_object"}, "reasoning_effort": "low", "parallel_tool_calls": False}
    prompt = body(**asked, max_tokens=1, max_completion_tokens=2, stop=[], tools=[], top_k=3, user="u").to_prompt("d")
    assert prompt.model_dump(exclude_none=True) == {"model": "m", "messages": HELLO, "max_tokens": 2, **asked}


@pytest.mark.parametrize("model", [None, ""])
def test_no_model_is_the_default(model: str | None) -> None:
    """So a client that insists on a name and one that has none both get an answer."""
    assert body(model=model).to_prompt("default").model == "default"


def test_a_message_keeps_what_a_model_is_told() -> None:
    """What SDKs put into an answer's message is dropped; a refusal that was an answer is its content."""
    dumped = {"role": "assistant", "content": None, "refusal": "No.", "annotations": [], "audio": None}
    answer = {**dumped, "tool_calls": [], "function_call": None, "reasoning_content": "Hm."}
    (message,) = body(messages=[answer]).to_prompt("d").messages
    assert message.model_dump(exclude_none=True) == {"role": "assistant", "content": "No."}


@pytest.mark.parametrize("name", TAKEN)
def test_null_and_the_usual_value_are_taken(name: str) -> None:
    """SDKs send what changes nothing; only what would change the answer is refused, by name."""
    for value in (None, *TAKEN[name]):
        body(**{name: value}).to_prompt("d")
    with pytest.raises(Unprocessable) as refused:
        body(**{name: {"other": "value"}}).to_prompt("d")
    assert refused.value.param == name
