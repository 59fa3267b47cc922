"""The provider of background responses against its scripted upstream: what it asks, hears, takes up and stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import events
from shared.config import MAX_EVENT_TEXT_CHARS, ModelRoute, Settings
from shared.errors import UpstreamError
from shared.events import (
    Completed,
    Output,
    ReasoningDelta,
    RefusalDelta,
    SourceAdded,
    TextDelta,
    ToolCallDelta,
    UpstreamAccepted,
    Usage,
)
from shared.prompt import Prompt
from tests.responses_upstream import Background, ResponsesUpstream, arguments_delta, call_added, text_delta
from tests.waiting import wait_until
from worker.providers import Provider, Said, build, upstream_http
from worker.providers.openai_responses import Answer

KEY = "sk-never-to-be-shown"
QUESTION = "a question never to be shown"
FIRST = 3  # the number of the first chunk: the response is created, queued and in progress before
ID = "resp_" + "0" * 32


@pytest.fixture
async def upstream() -> AsyncIterator[ResponsesUpstream]:
    async with ResponsesUpstream() as one:
        yield one


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "FIRST_BACKOFF_SECONDS", 0.01)


def prompt(**fields: Any) -> Prompt:
    return Prompt.model_validate({"model": "m", "messages": [{"role": "user", "content": QUESTION}], **fields})


@asynccontextmanager
async def provider(base_url: str | None, **fields: Any) -> AsyncIterator[Provider]:
    times = {"first_token_seconds": 20.0, "inter_token_seconds": 20.0, "retry_seconds": 20.0}
    route = ModelRoute(**{"name": "m", "provider": "openai_responses", "upstream_model": "m", "base_url": base_url,
                          "api_key_env": "OPENAI_API_KEY", **times, **fields})  # fmt: skip
    one = build(Settings(_env_file=None, openai_api_key=KEY), route)
    try:
        yield one
    finally:
        await one.aclose()


async def ask(
    upstream: ResponsesUpstream, asked: Prompt | None = None, said: Said | None = None, **fields: Any
) -> list[Output | Completed]:
    async with provider(upstream.base_url, **fields) as one:
        return [event async for event in one.stream(asked or prompt(), said)]


async def answer_to(upstream: ResponsesUpstream, script: Background, **fields: Any) -> list[Output | Completed]:
    upstream.script("m", script)
    return await ask(upstream, **fields)


def text_of(outputs: Sequence[Any], kind: type = TextDelta) -> str:
    return "".join(event.text for event in outputs if isinstance(event, kind))


def heard(outputs: Sequence[Any]) -> dict[str, Any]:
    """What a reader of the log makes of it, however it was cut into events."""
    calls: dict[int, list[str]] = {}
    for event in outputs:
        if isinstance(event, ToolCallDelta):
            whole = calls.setdefault(event.index, ["", "", ""])
            for n, part in enumerate((event.id, event.name, event.arguments)):
                whole[n] += part or ""
    texts = {kind.__name__: text_of(outputs, kind) for kind in (TextDelta, ReasoningDelta, RefusalDelta)}
    return {**texts, "calls": calls, "sources": [event for event in outputs if isinstance(event, SourceAdded)]}


# What is heard


async def test_the_id_comes_first_and_each_delta_tells_its_place(upstream: ResponsesUpstream) -> None:
    """Before the first word the log learns how to come back; with each word, to where."""
    script = Background(count=300)
    accepted, *deltas, end = await answer_to(upstream, script)
    assert accepted == UpstreamAccepted(ID)
    assert text_of(deltas) == script.text(QUESTION)
    assert [event.cursor for event in deltas] == list(range(FIRST, FIRST + 300))  # type: ignore[union-attr]
    assert end == Completed("stop", Usage(7, 300, 307))


ANNOTATION = {"type": "url_citation", "url": "https://a.example/", "title": "A", "start_index": 0, "end_index": 1}


def added(annotation: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.output_text.annotation.added", "output_index": 0, "annotation": annotation}


EVERYTHING: list[str | dict[str, Any]] = [
    {"type": "response.reasoning_summary_part.added", "output_index": 0, "summary_index": 0},
    {"type": "response.reasoning_summary_text.delta", "output_index": 0, "summary_index": 0, "delta": "Hm."},
    {"type": "response.reasoning_summary_part.added", "output_index": 0, "summary_index": 1},
    {"type": "response.reasoning_summary_text.delta", "output_index": 0, "summary_index": 1, "delta": "Well."},
    {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0, "delta": " Indeed."},
    {"type": "response.output_item.added", "output_index": 1, "item": {"type": "message", "id": "msg_0"}},
    "The ",
    "x" * (2 * MAX_EVENT_TEXT_CHARS + 5),
    added(ANNOTATION),
    added(ANNOTATION),
    added({"type": "file_citation", "file_id": "f"}),
    "half \ud83d",
    "\udc4b whole",
    text_delta(""),
    {"type": "response.refusal.delta", "output_index": 1, "content_index": 1, "delta": "No."},
    {"type": "response.something_new.delta", "output_index": 1, "delta": "nobody knows it"},
    call_added(2, "call_a", "look"),
    arguments_delta(2, '{"x":'),
    call_added(3, "call_b", "find"),
    arguments_delta(2, "1}"),
    arguments_delta(3, "y" * (MAX_EVENT_TEXT_CHARS + 5)),
]


async def test_every_kind_of_output_has_its_event(upstream: ResponsesUpstream) -> None:
    """Thoughts, words, refusals, calls and cited pages; a page once, and what is of no kind we know not at all."""
    got = await answer_to(upstream, Background(chunks=EVERYTHING))
    assert heard(got) == {
        "ReasoningDelta": "Hm.\n\nWell. Indeed.",
        "TextDelta": "The " + "x" * (2 * MAX_EVENT_TEXT_CHARS + 5) + "half 👋 whole",
        "RefusalDelta": "No.",
        "calls": {0: ["call_a", "look", '{"x":1}'], 1: ["call_b", "find", "y" * (MAX_EVENT_TEXT_CHARS + 5)]},
        "sources": [SourceAdded("https://a.example/", "A", "https://a.example/")],
    }
    assert isinstance(got[-1], Completed) and got[-1].finish_reason == "tool_calls"


async def test_a_long_delta_tells_its_place_with_its_last_piece(upstream: ResponsesUpstream) -> None:
    """Who has a piece of it only must not ask for what follows the whole of it; so with half a character."""
    _, *deltas, _ = await answer_to(
        upstream, Background(chunks=["x" * (2 * MAX_EVENT_TEXT_CHARS + 5), "a\ud83d", "\udc4b"])
    )
    told = [(len(event.text), event.cursor) for event in deltas]  # type: ignore[union-attr]
    size = MAX_EVENT_TEXT_CHARS
    assert told == [(size, None), (size, None), (5, FIRST), (1, None), (1, FIRST + 2)]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"type": "response.completed"}, "stop"),
        ({"type": "response.completed", "response": {"output": [{"type": "function_call"}]}}, "tool_calls"),
        (
            {"type": "response.incomplete", "response": {"incomplete_details": {"reason": "max_output_tokens"}}},
            "length",
        ),
        (
            {"type": "response.incomplete", "response": {"incomplete_details": {"reason": "content_filter"}}},
            "content_filter",
        ),
        ({"type": "response.incomplete", "response": {"incomplete_details": None}}, "length"),
    ],
)
async def test_every_end_has_its_finish_reason(upstream: ResponsesUpstream, end: Any, reason: str) -> None:
    """An answer that was cut short says why."""
    got = await answer_to(upstream, Background(count=1, end=end))
    assert isinstance(got[-1], Completed) and got[-1].finish_reason == reason


async def test_the_details_of_usage_are_kept(upstream: ResponsesUpstream) -> None:
    """Cached and reasoning tokens are counted, and a missing total is added up."""
    usage = {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4},
             "output_tokens_details": {"reasoning_tokens": 3}}  # fmt: skip
    end = {"type": "response.completed", "response": {"usage": usage}}
    got = await answer_to(upstream, Background(count=1, end=end))
    assert got[-1] == Completed("stop", Usage(10, 5, 15, cached_tokens=4, reasoning_tokens=3))


# What is sent


async def test_everything_the_prompt_says_is_sent(upstream: ResponsesUpstream) -> None:
    """Each turn becomes items and each option has its place; seed, names and metadata stay here."""
    function = {"name": "look", "parameters": {"type": "object"}}
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "briefer"},
        {
            "role": "user",
            "name": "zoë",
            "content": [
                {"type": "text", "text": "hé"},
                {"type": "image_url", "image_url": {"url": "https://a.example/i.png"}},
                {"type": "file", "file": {"file_data": "data:", "filename": "f"}},
            ],
        },
        {"role": "assistant", "content": "I look", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "a"},
    ]
    asked = prompt(
        messages=messages, temperature=0.5, top_p=0.9, max_tokens=90, seed=3, metadata={"k": "v"},
        tools=[{"type": "function", "function": function}, {"type": "function", "function": {"name": "bare"}}],
        tool_choice={"type": "function", "function": {"name": "look"}}, parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": schema}, reasoning_effort="low",
    )  # fmt: skip
    await ask(upstream, asked, upstream_model="real")
    (one,) = upstream.generations
    assert one.body == {
        "model": "real",
        "input": [
            {"role": "system", "content": "be brief"},
            {"role": "developer", "content": "briefer"},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "hé"},
                    {"type": "input_image", "image_url": "https://a.example/i.png", "detail": "auto"},
                    {"type": "input_file", "file_data": "data:", "filename": "f"},
                ],
            },
            {"role": "assistant", "content": "I look"},
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "found"},
        ],
        "stream": True,
        "background": True,
        "store": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 90,
        "tools": [
            {"type": "function", **function, "strict": False},
            {"type": "function", "name": "bare", "parameters": {"type": "object", "properties": {}}, "strict": False},
        ],
        "tool_choice": {"type": "function", "name": "look"},
        "text": {"format": {"type": "json_schema", **schema}},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
    }
    assert one.headers["authorization"] == f"Bearer {KEY}"
    assert len(one.headers["idempotency-key"]) == 32


async def test_what_was_not_said_is_not_sent(upstream: ResponsesUpstream) -> None:
    """The upstream's own defaults apply."""
    await ask(upstream, prompt(tool_choice="auto", response_format={"type": "json_object"}))
    (one,) = upstream.generations
    fixed = {"model": "m", "input": [{"role": "user", "content": QUESTION}], "stream": True, "background": True}
    own = {"tool_choice": "auto", "text": {"format": {"type": "json_object"}}}
    assert one.body == {**fixed, "store": True, **own}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop": ["x"]}, "`stop`"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "'custom'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "'allowed_tools'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio'"),
    ],
)
async def test_what_responses_have_no_place_for_is_refused_by_name(
    upstream: ResponsesUpstream, fields: dict[str, Any], named: str
) -> None:
    """What would change the answer is not left out in silence, and nothing is asked."""
    with pytest.raises(UpstreamError, match=named) as caught:
        await ask(upstream, prompt(**fields))
    assert (caught.value.code, caught.value.retryable) == ("upstream_unsupported", False)
    assert upstream.generations == []


# How it comes back


async def test_whatever_the_log_has_it_gets_exactly_the_rest(upstream: ResponsesUpstream) -> None:
    """A log cut behind any of its events, pieces of a long delta too, and the rest of it are the whole answer."""
    whole = await answer_to(upstream, Background(chunks=EVERYTHING))
    outputs = [event for event in whole if not isinstance(event, Completed)]
    (one,) = upstream.generations
    async with provider(upstream.base_url) as again:
        for cut in range(1, len(outputs) + 1):
            said = Said(outputs[:cut])
            assert again.can_continue(prompt(), said)
            rest = [event async for event in again.stream(prompt(), said)]
            assert rest[-1] == whole[-1]
            assert heard([*outputs[:cut], *rest]) == heard(whole), cut
            assert not any(isinstance(event, UpstreamAccepted) for event in rest)
    assert upstream.generations == [one] and len(upstream.posts) == 1
    asked_after = [start for start in one.starts if start is not None]
    assert asked_after == sorted(asked_after) and len(set(asked_after)) > 5


async def test_it_asks_behind_the_last_event_that_the_log_has_whole(upstream: ResponsesUpstream) -> None:
    """Nothing that came whole is sent again; of a long delta that came in part, the rest is heard."""
    size = MAX_EVENT_TEXT_CHARS
    accepted, *deltas, end = await answer_to(upstream, Background(chunks=["a", "x" * size + "y" * size + "z", "b"]))
    said = Said([accepted, *deltas[:2]])  # type: ignore[list-item]
    assert await ask(upstream, said=said) == [TextDelta("y" * size), *deltas[3:], end]
    assert upstream.only("m").starts == [FIRST]


async def test_without_an_id_there_is_no_way_back() -> None:
    """A log that has no id of its upstream is begun afresh."""
    async with provider("http://127.0.0.1:9/v1") as one:
        assert not one.can_continue(prompt(), Said([]))
        assert not one.can_continue(prompt(), Said([TextDelta("a")]))
        assert one.can_continue(prompt(), Said([UpstreamAccepted(ID)]))


@pytest.mark.parametrize("status", [400, 404, 409, 410])
async def test_an_answer_that_is_gone_there_is_not_spliced(upstream: ResponsesUpstream, status: int) -> None:
    """The upstream has lost it: that is said, and asking again may help."""
    upstream.script("m", Background(attach_status=status))
    accepted, *deltas, _ = await ask(upstream)
    with pytest.raises(UpstreamError) as caught:
        await ask(upstream, said=Said([accepted, *deltas[:3]]))  # type: ignore[list-item]
    assert (caught.value.code, caught.value.retryable) == ("upstream_lost_response", True)
    assert len(upstream.posts) == 1 and len(upstream.only("m").starts) == 1


async def test_other_words_than_those_in_the_log_are_not_spliced(upstream: ResponsesUpstream) -> None:
    """The log has a beginning that the upstream does not know."""
    await answer_to(upstream, Background(chunks=["Once upon ", "a time"]))
    for before in ("Upon ", "Once upon a time and"):
        with pytest.raises(UpstreamError) as caught:
            await ask(upstream, said=Said([UpstreamAccepted(ID), TextDelta(before)]))
        assert caught.value.code == "upstream_invalid"


@pytest.mark.parametrize("numbered_from", [0, 1_000_000])
def test_a_new_attempt_of_the_upstream_is_not_spliced(numbered_from: int) -> None:
    """Read from its start, a stream without the event that the log ends with is of another answer."""
    answer = Answer(Said([UpstreamAccepted(ID), ToolCallDelta(0, "a", "look", cursor=50)]))
    assert answer.seen is None
    others = [call_added(0, "b", "find"), arguments_delta(0, "{}"), {"type": "response.completed", "response": {}}]
    outputs: list[Any] = []
    for number, event in enumerate(others, numbered_from):
        outputs += answer.read(b"data: " + json.dumps({**event, "sequence_number": number}).encode() + b"\n\n")
    assert answer.problem == ("upstream_lost_response", "") and answer.is_over and answer.end is None
    assert outputs == []


# What it outlives within one attempt


@pytest.mark.parametrize("cut", ["reset", "end"])
async def test_a_connection_may_break_behind_any_event(upstream: ResponsesUpstream, cut: Any) -> None:
    """One response, one answer, every word once, although each of its connections breaks."""
    chunks = [*"abc", "x" * (MAX_EVENT_TEXT_CHARS + 5), "half \ud83d", "\udc4b", "end"]
    for place in range(1, FIRST + len(chunks) + 1):
        model = f"m{place}"
        upstream.script(model, Background(chunks=chunks, cuts=(place, place + 2), cut=cut))
        got = await ask(upstream, prompt(model=model), upstream_model="*")
        assert heard(got)["TextDelta"] == "abc" + "x" * (MAX_EVENT_TEXT_CHARS + 5) + "half 👋end"
        assert [type(event) for event in got].count(UpstreamAccepted) == 1
        one = upstream.only(model)
        assert one.generated == len(chunks) and one.cancels == 0
        assert one.starts[:1] == [place - 1]


async def test_a_silent_connection_is_opened_again(upstream: ResponsesUpstream) -> None:
    """Before the first word and amid them, a stream that says nothing is left for another."""
    script = Background(count=10, stalls=(FIRST, FIRST + 4))
    got = await answer_to(upstream, script, first_token_seconds=0.3, inter_token_seconds=0.3)
    assert text_of(got) == script.text(QUESTION)
    starts = upstream.only("m").starts  # more of them on a machine that is itself silent for a while
    assert len(starts) >= 2 and starts[0] == FIRST - 1 and len(upstream.posts) == 1


async def test_an_upstream_that_is_in_trouble_is_asked_again(upstream: ResponsesUpstream) -> None:
    """To come back is free: it is tried for as long as the budget lasts."""
    script = Background(count=10, cuts=(FIRST + 2,), attach_status=503, fail_first=6)
    got = await answer_to(upstream, script)
    assert text_of(got) == script.text(QUESTION)
    assert len(upstream.only("m").starts) == 7


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Background(count=10, cuts=[FIRST + 2] * 1000), "upstream_reset"),
        (Background(count=10, cuts=[FIRST + 2] * 1000, cut="end"), "upstream_truncated"),
        (Background(count=10, stalls=[FIRST + 2] * 1000), "upstream_timeout_inter_token"),
        (Background(count=10, stalls=[FIRST] * 1000), "upstream_timeout_first_token"),
        (Background(count=10, cuts=(FIRST + 2,), attach_status=500), "upstream_unavailable"),
    ],
)
async def test_the_budget_ends(upstream: ResponsesUpstream, script: Background, code: str) -> None:
    """An upstream that says nothing more fails the answer with what was wrong last."""
    with pytest.raises(UpstreamError) as caught:
        await answer_to(upstream, script, retry_seconds=0.5, first_token_seconds=0.3, inter_token_seconds=0.3)
    assert (caught.value.code, caught.value.retryable) == (code, True)
    assert len(upstream.posts) == 1 and len(upstream.only("m").starts) >= 1


async def test_without_a_budget_nothing_is_opened_again(upstream: ResponsesUpstream) -> None:
    """`retry_seconds = 0` means no retries."""
    with pytest.raises(UpstreamError):
        await answer_to(upstream, Background(cuts=(FIRST + 2,)), retry_seconds=0)
    assert upstream.only("m").starts == []


async def test_a_draining_rejoin_is_come_back_to(upstream: ResponsesUpstream) -> None:
    """It says that it goes down, with the number of the last event again; the response goes on."""
    answer = Answer()
    created = {"type": "response.created", "response": {"id": ID}, "sequence_number": 0}
    draining = {"type": "error", "code": "draining", "sequence_number": 0}
    for event in (created, draining):
        answer.read(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert answer.problem == ("upstream_unavailable", "the stream said so") and not answer.is_over


async def test_one_that_does_not_work_in_the_background_is_not_come_back_to(upstream: ResponsesUpstream) -> None:
    """It says so itself; then the log gets no id, and a broken connection is the end."""
    script = Background(count=10, cuts=(FIRST + 2,), response={"background": False})
    with pytest.raises(UpstreamError) as caught:
        await answer_to(upstream, script)
    assert caught.value.code == "upstream_reset" and upstream.only("m").starts == []


# How it fails


def failed(code: str | None, kind: str = "response.failed") -> dict[str, Any]:
    return {"type": kind, "response": {"error": code and {"code": code, "message": "never to be shown"}}}


ERROR = {"type": "error", "code": "server_error", "message": "never to be shown"}
FAILURES: dict[str, tuple[Background, str, bool]] = {
    "the key is wrong": (Background(status=401), "upstream_unauthorized", False),
    "the request is wrong": (Background(status=400), "upstream_rejected", False),
    "too many requests": (Background(status=429), "upstream_rate_limited", True),
    "overloaded": (Background(status=503), "upstream_unavailable", True),
    "the response failed": (Background(end=failed("server_error")), "upstream_error", True),
    "it failed for no reason": (Background(end=failed(None)), "upstream_error", True),
    "it was limited": (Background(end=failed("rate_limit_exceeded")), "upstream_rate_limited", True),
    "the prompt is invalid": (Background(end=failed("invalid_prompt")), "upstream_rejected", False),
    "an image is too large": (Background(end=failed("image_too_large")), "upstream_rejected", False),
    "an error amid": (Background(chunks=["a", ERROR, "b"]), "upstream_error", True),
    "an attempt superseded": (
        Background(chunks=["a", {"type": "error", "code": "attempt_superseded"}]),
        "upstream_lost_response",
        True,
    ),
    "cancelled there": (Background(end={"type": "response.cancelled"}), "upstream_cancelled", True),
    "cancelled at a Rejoin": (
        Background(end={"type": "response.incomplete", "response": {"status": "cancelled"}}),
        "upstream_cancelled",
        True,
    ),
    "no numbers": (Background(numbered=False), "upstream_invalid", True),
    "no text": (Background(chunks=[{**text_delta(""), "delta": 5}]), "upstream_invalid", True),
    "no item": (Background(chunks=[{"type": "response.output_item.added"}]), "upstream_invalid", True),
    "arguments of no call": (Background(chunks=[arguments_delta(0, "{}")]), "upstream_invalid", True),
    "another id": (
        Background(chunks=[{"type": "response.in_progress", "response": {"id": "resp_other"}}]),
        "upstream_invalid",
        True,
    ),
    "an id that is none": (Background(response={"id": "../files"}), "upstream_invalid", True),
}


@pytest.mark.parametrize(("script", "code", "retryable"), FAILURES.values(), ids=FAILURES.keys())
async def test_every_failure_has_its_code(
    upstream: ResponsesUpstream, script: Background, code: str, retryable: bool
) -> None:
    """However it fails, the error is typed and tells no secret; a response that has failed is not asked for again."""
    retry_seconds = 0 if script.status != 200 else 20
    with pytest.raises(UpstreamError) as caught:
        await answer_to(upstream, script, retry_seconds=retry_seconds)
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert not any(secret in caught.value.message for secret in (KEY, QUESTION, "never to be shown"))
    assert len(upstream.posts) == 1 and upstream.returns == 0


async def test_a_refused_request_is_sent_again_under_the_same_key(upstream: ResponsesUpstream) -> None:
    """A trouble that passes is outlived before there is a response, too."""
    got = await answer_to(upstream, Background(count=3, status=503, fail_first=2))
    assert isinstance(got[-1], Completed) and len(upstream.posts) == 3


async def test_nobody_listening_is_unreachable() -> None:
    """A refused connection is told as an upstream that cannot be reached."""
    async with ResponsesUpstream() as gone:
        pass
    with pytest.raises(UpstreamError) as caught:
        await ask(gone, retry_seconds=0)
    assert caught.value.code == "upstream_unreachable"


shapes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "item", "type", "delta", "output_index", "call_id", "name", "annotation", "url",
                             "response", "usage", "error", "code", "status", "output", "incomplete_details"]),
            inner, max_size=6,
        )
    ),
    max_leaves=20,
)  # fmt: skip
kinds = st.sampled_from(
    ["response.created", "response.output_text.delta", "response.output_item.added", "response.completed", "error",
     "response.function_call_arguments.delta", "response.output_text.annotation.added", "response.incomplete",
     "response.failed", "response.reasoning_summary_part.added"]
)  # fmt: skip


@given(shapes, kinds, st.integers(0, 5) | st.none() | st.text(max_size=2))
def test_no_shape_of_json_gets_past(shape: Any, kind: str, number: Any) -> None:
    """Whatever JSON an upstream sends, it is heard as events that can be encoded, or is a typed problem."""
    answer = Answer()
    more = shape if isinstance(shape, dict) else {"delta": shape, "response": shape, "item": shape}
    event = {**more, "type": kind, "sequence_number": number}
    for output in answer.read(b"data: " + json.dumps(event).encode() + b"\n\n"):
        assert events.encode(output)
    if answer.end is not None:
        assert events.encode(answer.end)
    assert answer.problem is None or answer.problem[0] in upstream_http.FAILURES


# When it lets go


async def test_to_leave_is_not_to_stop(upstream: ResponsesUpstream) -> None:
    """Cancelling the task closes the connection at once, and the response goes on for whoever comes back."""
    upstream.script("m", Background(count=40, hold_at=20))
    got: list[Any] = []

    async def follow(one: Provider) -> None:
        async with aclosing(one.stream(prompt())) as stream:  # type: ignore[type-var]
            async for event in stream:
                got.append(event)

    async with provider(upstream.base_url) as one:
        task = asyncio.create_task(follow(one))
        await wait_until(lambda: len(got) == 21)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.wait_left("m")
        response = upstream.only("m")
        assert response.cancels == 0 and not response.is_over
        response.released.set()
        rest = [event async for event in one.stream(prompt(), Said(got))]
    assert text_of([*got, *rest]) == Background(count=40).text(QUESTION)
    assert response.generated == 40


async def test_who_leaves_before_the_id_is_told_leaves_nothing_running(upstream: ResponsesUpstream) -> None:
    """No log has that id, so nobody could come back to the response or stop it: it is stopped as soon as it has one."""
    upstream.script("m", Background(count=10_000, pace_seconds=0.02, silent_at_first=True))
    async with provider(upstream.base_url) as one:
        task = asyncio.create_task(anext(aiter(one.stream(prompt()))))  # type: ignore[arg-type]
        await wait_until(lambda: upstream.of("m"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        upstream.only("m").released.set()
    assert upstream.only("m").status == "cancelled", "closing the provider waited for it"


async def test_a_beginning_that_breaks_is_not_begun_again(upstream: ResponsesUpstream) -> None:
    """The response runs, but nobody knows its name: to ask again would pay for a second one."""
    with pytest.raises(UpstreamError) as caught:
        await answer_to(upstream, Background(cuts=(0,)))
    assert caught.value.code == "upstream_reset" and len(upstream.posts) == 1


async def test_to_abandon_is_to_stop(upstream: ResponsesUpstream) -> None:
    """The upstream is told; a second time, of one that is over and of one it never knew, nothing is wrong."""
    upstream.script("m", Background(hold_at=2))
    async with provider(upstream.base_url) as one:
        async with aclosing(one.stream(prompt())) as stream:  # type: ignore[type-var]
            accepted = await anext(stream)
        assert isinstance(accepted, UpstreamAccepted)
        await one.abandon(accepted.id)
        assert upstream.only("m").status == "cancelled"
        await one.abandon(accepted.id)
        await one.abandon("resp_unknown")


async def test_an_upstream_that_cannot_be_told_is_not_waited_for() -> None:
    """It fails as unreachable within its bound."""
    async with ResponsesUpstream() as gone:
        pass
    async with provider(gone.base_url) as one:
        with pytest.raises(UpstreamError):
            async with asyncio.timeout(10):
                await one.abandon(ID)
