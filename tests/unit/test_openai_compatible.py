"""The OpenAI-compatible provider against the scripted upstream: what it hears, how it fails, when it lets go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import events
from shared.config import MAX_EVENT_TEXT_CHARS, ModelRoute, Settings
from shared.errors import SettingsError, UpstreamError
from shared.events import Completed, Output, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta, Usage
from shared.prompt import Prompt
from tests.upstream import Script, Upstream, delta, frame, words
from tests.waiting import wait_until
from worker.providers import Provider, Said, build, openai_compatible, upstream_events, upstream_http
from worker.providers.openai_compatible import Answer
from worker.providers.upstream_events import ServerSentEvents
from worker.providers.upstream_http import retry_after_seconds

KEY = "sk-never-to-be-shown"
QUESTION = "a question never to be shown"
FINISH = frame(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as one:
        yield one


def prompt(**fields: Any) -> Prompt:
    return Prompt.model_validate({"model": "m", "messages": [{"role": "user", "content": QUESTION}], **fields})


def route(base_url: str | None, **fields: Any) -> ModelRoute:
    times = {"first_token_seconds": 5.0, "inter_token_seconds": 5.0, "retry_seconds": 0.0}
    return ModelRoute(**{"name": "m", "provider": "openai_compatible", "upstream_model": "m", "base_url": base_url,
                         "api_key_env": "OPENAI_API_KEY", **times, **fields})  # fmt: skip


@asynccontextmanager
async def provider(base_url: str | None, key: str | None = KEY, **fields: Any) -> AsyncIterator[Provider]:
    settings = Settings(_env_file=None, openai_api_key=key, openai_base_url=None)
    one = build(settings, route(base_url, **fields))
    try:
        yield one
    finally:
        await one.aclose()


async def ask(base_url: str, asked: Prompt | None = None, **fields: Any) -> list[Output | Completed]:
    async with provider(base_url, **fields) as one:
        return [event async for event in one.stream(asked or prompt())]


async def answer_to(upstream: Upstream, script: Script, **fields: Any) -> list[Output | Completed]:
    upstream.script("m", script)
    return await ask(upstream.base_url, **fields)


def text_of(outputs: list[Any], kind: type = TextDelta) -> str:
    return "".join(event.text for event in outputs if isinstance(event, kind))


# What is heard


async def test_the_text_arrives_exactly_and_ends_with_the_finish_reason_and_usage(upstream: Upstream) -> None:
    """Every character the upstream sends arrives, odd ones too, and then the reason and the counts."""
    script = Script(count=300)
    got = await answer_to(upstream, script)
    assert text_of(got) == script.text(QUESTION)
    assert got[-1] == Completed("stop", Usage(7, 300, 307))
    await upstream.wait_closed("m")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_is_heard_under_both_its_names(upstream: Upstream, field: str) -> None:
    """Upstreams name reasoning in two ways, and both become reasoning events before the text."""
    got = await answer_to(upstream, Script(reasoning=["Let me", " see"], reasoning_field=field, chunks=["yes"]))
    assert got[:3] == [ReasoningDelta("Let me"), ReasoningDelta(" see"), TextDelta("yes")]


async def test_a_refusal_is_no_text(upstream: Upstream) -> None:
    """A refusal has events of its own."""
    got = await answer_to(upstream, Script(chunks=(), refusal=["I must", " not"]))
    assert text_of(got, RefusalDelta) == "I must not" and text_of(got) == ""


async def test_tool_calls_keep_their_fragments_and_say_id_and_name_once(upstream: Upstream) -> None:
    """Arguments are handed on as they come; a repeated id or name is dropped."""
    calls = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "look", "arguments": ""}},
        {"index": 0, "id": "a", "function": {"name": "look", "arguments": '{"x":'}},
        {"index": 0, "function": {"arguments": "1}"}},
        {"index": 1, "id": "b", "function": {"name": "find", "arguments": "{}"}},
        {"index": 1, "function": {}},
    ]
    got = await answer_to(upstream, Script(chunks=(), tool_calls=calls, finish_reason="tool_calls", usage=False))
    assert got == [
        ToolCallDelta(0, "a", "look", ""),
        ToolCallDelta(0, arguments='{"x":'),
        ToolCallDelta(0, arguments="1}"),
        ToolCallDelta(1, "b", "find", "{}"),
        Completed("tool_calls"),
    ]


@pytest.mark.parametrize(
    ("said", "meant"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "tool_calls"), ("content_filter", "content_filter"),
     ("function_call", "tool_calls"), ("eos_token", "stop")],
)  # fmt: skip
async def test_every_finish_reason_becomes_one_of_ours(upstream: Upstream, said: str, meant: str) -> None:
    """A reason nobody knows still means that the upstream was done."""
    got = await answer_to(upstream, Script(count=1, finish_reason=said))
    assert isinstance(got[-1], Completed) and got[-1].finish_reason == meant


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(("usage", "expected"), [(True, Usage(7, 2, 9)), ("last", Usage(7, 2, 9)), (False, None)])
async def test_usage_may_come_alone_or_last_or_never(upstream: Upstream, usage: Any, expected: Any, done: bool) -> None:
    """Wherever the counts are, and with or without [DONE], the answer is complete."""
    got = await answer_to(upstream, Script(chunks=["a", "b"], usage=usage, done=done))
    assert got == [TextDelta("a"), TextDelta("b"), Completed("stop", expected)]


def test_the_details_of_usage_are_kept() -> None:
    """Cached and reasoning tokens are counted, and a missing total is added up."""
    counts = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4},
              "completion_tokens_details": {"reasoning_tokens": 3}}  # fmt: skip
    answer = Answer()
    answer.read(frame(choices=[], usage=counts))
    assert answer.usage == Usage(10, 5, 15, cached_tokens=4, reasoning_tokens=3)


async def test_empty_deltas_and_comments_say_nothing(upstream: Upstream) -> None:
    """A role, an empty delta and a keep-alive comment are not events."""
    chunks = [b": keep-alive\n\n", delta(role="assistant"), delta(content=""), delta(content=None), "x", delta()]
    got = await answer_to(upstream, Script(chunks=chunks, usage=False))
    assert got == [TextDelta("x"), Completed("stop")]


async def test_one_huge_delta_becomes_many_events(upstream: Upstream) -> None:
    """Five megabytes in one delta arrive whole, in events of a bounded size."""
    huge = "".join(words(1_000_000, "huge"))[:5_000_000]
    got = await answer_to(upstream, Script(chunks=[huge]))
    assert text_of(got) == huge
    assert max(len(event.text) for event in got if isinstance(event, TextDelta)) == MAX_EVENT_TEXT_CHARS


def half(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text.encode()


async def test_a_character_cut_in_half_is_joined(upstream: Upstream) -> None:
    """The two halves of an emoji, escaped in two chunks, become the emoji."""
    got = await answer_to(upstream, Script(chunks=[half(r"a\ud83d"), half(r"\udc4b b")], usage=False))
    assert got == [TextDelta("a"), TextDelta("👋 b"), Completed("stop")]


async def test_half_a_character_without_its_mate_is_replaced(upstream: Upstream) -> None:
    """A lone half becomes U+FFFD wherever it stands, so that every event can be encoded."""
    got = await answer_to(upstream, Script(chunks=[half(r"\udc4b"), half(r"a\ud83d"), "b", half(r"\ud83d")]))
    assert text_of(got) == "\ufffda\ufffdb\ufffd"
    assert all(events.encode(event) for event in got)


# What is sent


async def test_everything_the_prompt_says_is_sent(upstream: Upstream) -> None:
    """Each option reaches the upstream under its own name; what was not said is left out; metadata stays here."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "default": None}}}
    options = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "stop": ["x"], "seed": 3, "tools": [tool],
               "tool_choice": "auto", "response_format": {"type": "json_object"}}  # fmt: skip
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hé"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "a"},
    ]
    await ask(upstream.base_url, prompt(messages=messages, metadata={"k": "v"}, **options), upstream_model="real")
    (request,) = upstream.requests
    assert request.body == {
        "model": "real",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_the_fallback_route_sends_the_name_that_was_asked_for(upstream: Upstream) -> None:
    """One provider for every other name asks, and fails, under the name of each prompt."""
    upstream.script("refused", Script(status=404))
    async with provider(upstream.base_url, name="*", upstream_model="*") as one:
        assert [event async for event in one.stream(prompt(model="asked"))]
        with pytest.raises(UpstreamError, match="model 'refused'"):
            await anext(aiter(one.stream(prompt(model="refused"))))
    assert [request.model for request in upstream.requests] == ["asked", "refused"]


async def test_a_key_goes_to_no_other_host(upstream: Upstream) -> None:
    """A route to a server of one's own that names no key variable does not get the OpenAI key."""
    await ask(upstream.base_url, api_key_env=None)
    assert KEY not in str(upstream.requests[0].headers)


async def test_a_server_without_keys_needs_none(upstream: Upstream) -> None:
    """A local model answers although no key is set anywhere."""
    assert await ask(upstream.base_url, key=None)


async def test_a_redirect_is_not_followed(upstream: Upstream) -> None:
    """Neither the key nor the prompt goes where a redirect points."""
    async with Upstream() as other:
        location = {"Location": f"{other.base_url}/chat/completions"}
        with pytest.raises(UpstreamError):
            await answer_to(upstream, Script(status=307, headers=location))
        assert other.requests == []


@pytest.mark.parametrize("base_url", [None, "https://api.openai.com/v1/", "https://eu.api.openai.com/v1"])
@pytest.mark.parametrize("variable", [None, "MY_MODEL_KEY"])
async def test_a_missing_key_names_its_variable(variable: str | None, base_url: str | None) -> None:
    """OpenAI itself is not asked without a key, and the message says what to set."""
    async with provider(base_url, key=None, api_key_env=variable) as one:
        with pytest.raises(UpstreamError, match=variable or "OPENAI_API_KEY") as caught:
            await anext(aiter(one.stream(prompt())))
    assert (caught.value.code, caught.value.retryable) == ("missing_key", False)


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:port/v1", "127.0.0.1:8000/v1", "http://"])
def test_a_base_url_that_is_none_stops_the_start(base_url: str) -> None:
    """What can never be reached is a wrong setting."""
    with pytest.raises(SettingsError, match="base URL"):
        build(Settings(_env_file=None), route(base_url))


async def test_a_connection_is_used_again(upstream: Upstream) -> None:
    """When the upstream keeps connections, the next request goes over the same one."""
    upstream.script("m", Script(count=2, keep_alive=True))
    async with provider(upstream.base_url) as one:
        for _ in range(3):
            assert [event async for event in one.stream(prompt())]
        assert upstream.open_sockets == 1
    assert upstream.hits("m") == 3


# How it fails

PAGE = b"<html><body>a body never to be shown</body></html>"
COMMENTS = (b": still here\n\n",) * 100
FAILURES: dict[str, tuple[Script, str, bool]] = {
    "the key is wrong": (Script(status=401), "upstream_unauthorized", False),
    "the key may not": (Script(status=403), "upstream_unauthorized", False),
    "the request is wrong": (Script(status=400), "upstream_rejected", False),
    "no such model": (Script(status=404), "upstream_rejected", False),
    "a redirect": (Script(status=307, headers={"Location": "/elsewhere"}), "upstream_rejected", False),
    "too many requests": (Script(status=429), "upstream_rate_limited", True),
    "an internal error": (Script(status=500, body=PAGE), "upstream_unavailable", True),
    "overloaded": (Script(status=503), "upstream_unavailable", True),
    "a page": (Script(body=PAGE, headers={"Content-Type": "text/html; charset=utf-8"}), "upstream_invalid", True),
    "a page called a stream": (Script(html=True), "upstream_invalid", True),
    "a page without lines": (
        Script(body=PAGE, headers={"Content-Type": "text/event-stream"}),
        "upstream_invalid",
        True,
    ),
    "a whole completion": (Script(body=b'{"choices":[]}'), "upstream_invalid", True),
    "bad JSON at once": (Script(bad_json_at=0), "upstream_invalid", True),
    "bad JSON amid": (Script(bad_json_at=5), "upstream_invalid", True),
    "another shape": (Script(chunks=[delta(content=["no", "text"])]), "upstream_invalid", True),
    "not an object": (Script(chunks=[b"data: [1]\n\n"]), "upstream_invalid", True),
    "bytes that are not UTF-8": (Script(chunks=[half("x").replace(b"x", b"\xff")]), "upstream_invalid", True),
    "an error event at once": (Script(error_at=0), "upstream_error", True),
    "an error event amid": (Script(error_at=5), "upstream_error", True),
    "a reset": (Script(cut_at=5), "upstream_reset", True),
    "a reset at once": (Script(cut_at_byte=0), "upstream_reset", True),
    "a cut body": (Script(cut_at=5, cut="close"), "upstream_reset", True),
    "a cut amid a character": (Script(chunks=["🌊" * 50], cut_at_byte=400), "upstream_reset", True),
    "an early end": (Script(cut_at=5, cut="end"), "upstream_truncated", True),
    "an end amid a line": (Script(cut_at_byte=500, cut="end"), "upstream_truncated", True),
    "no finish reason": (Script(finish_reason=None, done=False), "upstream_truncated", True),
    "done without a finish reason": (Script(finish_reason=None), "upstream_truncated", True),
    "done, then silence": (Script(chunks=["x", b"data: [DONE]\n\n"], stall_at=2), "upstream_truncated", True),
    "no headers": (Script(stall_headers=True), "upstream_timeout_first_token", True),
    "no first token": (Script(stall_at=0), "upstream_timeout_first_token", True),
    "comments, no token": (Script(chunks=COMMENTS, pace_seconds=0.02), "upstream_timeout_first_token", True),
    "silence amid": (Script(stall_at=5), "upstream_timeout_inter_token", True),
    "comments amid": (Script(chunks=("x", *COMMENTS), pace_seconds=0.02), "upstream_timeout_inter_token", True),
}


@pytest.mark.parametrize(("script", "code", "retryable"), FAILURES.values(), ids=FAILURES.keys())
async def test_every_failure_has_its_code(upstream: Upstream, script: Script, code: str, retryable: bool) -> None:
    """However an upstream fails, the error is typed, tells no secret, comes once, and leaves no socket open."""
    upstream.script("m", script)
    patience = 0.3 if code.startswith("upstream_timeout") else 10
    async with provider(upstream.base_url, first_token_seconds=patience, inter_token_seconds=patience) as one:
        with pytest.raises(UpstreamError) as caught:
            async for event in one.stream(prompt()):
                assert not isinstance(event, Completed)
        await upstream.wait_closed("m", timeout=1)
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert "'m'" in caught.value.message
    assert not any(secret in caught.value.message for secret in (KEY, QUESTION, "never to be shown", "secret", "<"))
    assert upstream.hits("m") == 1
    assert upstream.open_sockets == 0


async def test_what_was_said_before_a_failure_is_heard(upstream: Upstream) -> None:
    """The outputs that came before the failure are handed on before it."""
    upstream.script("m", Script(chunks=["a", "b"], error_at=2))
    got = []
    async with provider(upstream.base_url) as one:
        with pytest.raises(UpstreamError):
            async for event in one.stream(prompt()):
                got.append(event)
    assert got == [TextDelta("a"), TextDelta("b")]


async def test_nobody_listening_is_unreachable() -> None:
    """A refused connection is told as an upstream that cannot be reached."""
    async with Upstream() as gone:
        pass
    with pytest.raises(UpstreamError) as caught:
        await ask(gone.base_url)
    assert caught.value.code == "upstream_unreachable"


@pytest.mark.parametrize("after", [FINISH + b"data: {nonsense\n\n", FINISH + frame(error={"message": "late"})])
async def test_a_finish_reason_excuses_what_comes_after(upstream: Upstream, after: bytes) -> None:
    """Once the upstream said it was done, nonsense and errors do not undo the answer."""
    got = await answer_to(upstream, Script(chunks=["x", after], finish_reason=None))
    assert got == [TextDelta("x"), Completed("stop")]


async def test_silence_after_the_finish_reason_is_not_waited_out(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream that neither counts nor ends holds the answer up for a bounded time only."""
    monkeypatch.setattr(openai_compatible, "SETTLE_SECONDS", 0.1)
    async with asyncio.timeout(2):
        got = await answer_to(upstream, Script(chunks=["x"], stall_end=True))
    assert got == [TextDelta("x"), Completed("stop")]
    await upstream.wait_closed("m", timeout=1)


# When it asks again


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "FIRST_BACKOFF_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_passing_trouble_is_outlived(upstream: Upstream, status: int) -> None:
    """Before anything was said, a refusal that may pass is met with another try."""
    script = Script(status=status, fail_first=3, chunks=["x"])
    got = await answer_to(upstream, script, retry_seconds=5.0)
    assert got[0] == TextDelta("x") and upstream.hits("m") == 4


@pytest.mark.usefixtures("quick")
async def test_there_are_four_tries_at_most(upstream: Upstream) -> None:
    """A budget of time does not turn into a flood of requests."""
    with pytest.raises(UpstreamError):
        await answer_to(upstream, Script(status=500), retry_seconds=60.0)
    assert upstream.hits("m") == 4


@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_before_the_answer_is_tried_again() -> None:
    """A server that hangs up on the request is asked again, and then told as a broken connection."""
    calls = []

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        with pytest.raises(UpstreamError) as caught:
            await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", retry_seconds=60.0)
    assert (caught.value.code, len(calls)) == ("upstream_reset", 4)


@pytest.mark.usefixtures("quick")
async def test_retry_after_is_obeyed(upstream: Upstream) -> None:
    """The second request does not come before the time the upstream asked for."""
    script = Script(status=429, headers={"Retry-After": "0.5"}, fail_first=1, count=1)
    await answer_to(upstream, script, retry_seconds=5.0)
    first, second = upstream.requests
    assert 0.5 <= second.opened_at - first.opened_at < 1.5


async def test_a_retry_after_beyond_the_budget_fails_at_once(upstream: Upstream) -> None:
    """Waiting longer than we may is not begun, and the time asked for is handed on."""
    async with asyncio.timeout(2):
        with pytest.raises(UpstreamError) as caught:
            await answer_to(upstream, Script(status=429, headers={"Retry-After": "60"}), retry_seconds=30.0)
    assert caught.value.retry_after == 60.0 and upstream.hits("m") == 1


@pytest.mark.parametrize("script", [Script(error_at=1), Script(cut_at=1), Script(bad_json_at=1)])
async def test_nothing_is_asked_again_once_something_was_said(upstream: Upstream, script: Script) -> None:
    """After the first visible output there is no second request, whatever budget is left."""
    with pytest.raises(UpstreamError):
        await answer_to(upstream, script, retry_seconds=30.0)
    assert upstream.hits("m") == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), (" 1.5 ", 1.5), ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0), ("soon", None), ("-1", None),
     ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0), ("nan", None), ("9" * 400, None)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    """Both forms of the header are understood, a time gone by is now, and nonsense is not there."""
    assert retry_after_seconds(value, datetime(2015, 10, 21, 7, 28, 0, tzinfo=UTC)) == seconds


# When it lets go

MOMENTS: dict[str, tuple[Script, int | None]] = {
    "before the headers": (Script(stall_headers=True), None),
    "before the first token": (Script(stall_at=0), None),
    "amid the stream": (Script(count=10_000, pace_seconds=0.001), 10),
    "amid a flood": (Script(count=200_000), 100),
    "in silence": (Script(stall_at=5), 5),
    "after the finish reason": (Script(count=2, stall_end=True), 2),
}


@pytest.mark.parametrize(("script", "heard"), MOMENTS.values(), ids=MOMENTS.keys())
async def test_cancelling_closes_the_upstream_at_once(upstream: Upstream, script: Script, heard: int | None) -> None:
    """Whenever its task is cancelled, the connection is gone within a quarter of a second."""
    upstream.script("m", script)
    got: list[object] = []

    async def follow(one: Provider) -> None:
        async with aclosing(one.stream(prompt())) as stream:  # type: ignore[type-var]
            async for event in stream:
                got.append(event)
                await asyncio.sleep(0)

    async with provider(upstream.base_url) as one:
        task = asyncio.create_task(follow(one))
        await upstream.wait_hits("m")
        if heard:
            await wait_until(lambda: len(got) >= heard, every=0.001)
        cancelled_at = asyncio.get_running_loop().time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.wait_closed("m", timeout=1)
        (request,) = upstream.requests
        assert request.closed_at and request.left_early and upstream.open_sockets == 0
        assert request.closed_at - cancelled_at < 0.25


async def test_leaving_the_loop_closes_the_upstream(upstream: Upstream) -> None:
    """A consumer that has had enough closes the generator, and with it the connection."""
    upstream.script("m", Script(count=10_000, pace_seconds=0.001))
    async with provider(upstream.base_url) as one:
        async with aclosing(one.stream(prompt())) as stream:  # type: ignore[type-var]
            await anext(stream)
        await upstream.wait_closed("m", timeout=0.25)
    assert upstream.requests[0].left_early


async def test_a_slow_consumer_is_not_taken_for_a_silent_upstream(upstream: Upstream) -> None:
    """The wait for the next token begins when we ask for it."""
    upstream.script("m", Script(chunks=["a", "b"]))
    got = []
    async with provider(upstream.base_url, inter_token_seconds=0.05) as one:
        async for event in one.stream(prompt()):
            got.append(event)
            if len(got) == 1:
                await asyncio.sleep(0.15)  # the slowness itself, not a wait for anything
    assert got[:2] == [TextDelta("a"), TextDelta("b")] and isinstance(got[-1], Completed)


async def test_many_streams_run_at_once(upstream: Upstream) -> None:
    """A hundred and fifty answers over one provider arrive whole and leave no socket open."""
    upstream.script("m", Script(count=30, pace_seconds=0.005))
    async with provider(upstream.base_url, first_token_seconds=60, inter_token_seconds=60) as one:  # a busy machine

        async def text(number: int) -> str:
            question = prompt(messages=[{"role": "user", "content": f"question {number}"}])
            return text_of([event async for event in one.stream(question)])

        texts = await asyncio.gather(*map(text, range(150)))
    assert texts == ["".join(words(30, f"question {number}")) for number in range(150)]
    await upstream.wait_closed("m")


# However the bytes are cut

stream_bytes = st.lists(
    st.sampled_from([b"data: ", b"data:", b"x", b": c", b"\r", b"\n", b"\r\n", b"\n\n", "🌊\u2028é".encode(),
                     b"event: e", b"\x0b\x0c\x1c\x85"]),
    max_size=40,
).map(b"".join)  # fmt: skip


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


@given(stream_bytes, st.lists(st.integers(0, 10_000), max_size=20))
def test_events_do_not_depend_on_how_the_bytes_are_cut(data: bytes, places: list[int]) -> None:
    """The same bytes give the same events, wherever the network cuts them, inside a character or a CRLF too."""
    whole, parts = ServerSentEvents(), ServerSentEvents()
    assert [event for part in cut(data, places) for event in parts.feed(part)] == list(whole.feed(data))
    assert parts.unfinished_line == whole.unfinished_line


@given(st.lists(st.text(min_size=1), min_size=1), st.sampled_from(["\n", "\r", "\r\n"]), st.booleans(), st.data())
def test_an_answer_does_not_depend_on_how_the_bytes_are_cut(
    texts: list[str], line_end: str, ascii_only: bool, data: st.DataObject
) -> None:
    """Any text, escaped or not, with any line end, cut anywhere, is the same text."""
    chunks = [json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=ascii_only) for text in texts]
    raw = "".join(f"data: {chunk}{line_end}{line_end}" for chunk in chunks).encode("utf-8", "surrogatepass")
    answer = Answer()
    places = data.draw(st.lists(st.integers(0, len(raw)), max_size=20))
    outputs = [output for part in cut(raw, places) for output in answer.read(part)]
    assert answer.problem is None
    assert text_of(outputs) == "".join(texts)


shapes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "content", "tool_calls", "function", "arguments", "usage", "index",
                             "id", "name", "finish_reason", "prompt_tokens", "prompt_tokens_details", "error"]),
            inner, max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(shapes)
def test_no_shape_of_json_gets_past(shape: Any) -> None:
    """Whatever JSON an upstream sends, it is heard as events that can be encoded, or is a typed problem."""
    answer = Answer()
    for output in answer.read(b"data: " + json.dumps(shape).encode() + b"\n\n"):
        assert events.encode(output)
    assert events.encode(Completed(answer.finish_reason or "stop", answer.usage))
    assert answer.problem is None or answer.problem[0] in upstream_http.FAILURES


def test_an_event_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that never ends does not fill the memory."""
    monkeypatch.setattr(upstream_events, "MAX_SSE_EVENT_BYTES", 1000)
    answer = Answer()
    answer.read(b"data: " + b"x" * 900)
    assert answer.problem is None
    answer.read(b"x" * 200)
    assert answer.problem and answer.problem[0] == "upstream_invalid"


# Going on with what a lost worker began


HOW_TO_GO_ON = [
    {"continuation": "continue_final_message"},
    {"continuation": "prefix"},
    {"continuation": "prefix", "repeats_prefix": True},
]


def said(*texts: str) -> Said:
    return Said([TextDelta(text) for text in texts])


async def go_on(upstream: Upstream, script: Script, before: Said, asked: Prompt | None = None, **fields: Any) -> Any:
    upstream.script("m", script)
    async with provider(upstream.base_url, **fields) as one:
        return [event async for event in one.stream(asked or prompt(), before)]


@pytest.mark.parametrize("fields", HOW_TO_GO_ON)
async def test_an_answer_is_taken_up_where_it_was_left(upstream: Upstream, fields: dict[str, Any]) -> None:
    """The upstream is given the words that were said, as it wants them, and only what follows them is heard."""
    script = Script(count=50, repeats_prefix=bool(fields.get("repeats_prefix")))
    words = [chunk for chunk in script.outputs(QUESTION) if isinstance(chunk, str)]
    got = await go_on(upstream, script, said(*words[:20]), **fields)
    assert text_of(got) == "".join(words[20:])
    assert isinstance(got[-1], Completed)
    body = upstream.requests_of("m")[-1].body
    assert body["messages"][-1]["content"] == "".join(words[:20])
    assert body.get("add_generation_prompt", True) is (fields["continuation"] == "prefix")


async def test_another_beginning_than_the_one_that_was_said_is_no_answer(upstream: Upstream) -> None:
    """An upstream that should repeat the words and begins anew would be spliced to them."""
    with pytest.raises(UpstreamError) as failure:
        before, anew = said("Once "), delta(content="Upon ")
        script = Script(chunks=["Once ", anew], repeats_prefix=False)
        await go_on(upstream, script, before, continuation="prefix", repeats_prefix=True)
    assert failure.value.code == "upstream_invalid"


async def test_what_was_said_counts_against_the_limit(upstream: Upstream) -> None:
    """Of ten tokens four were said: six are asked for. When all were said, nobody is asked."""
    before, fields = said("a", "b", "c", "d"), {"continuation": "prefix"}
    await go_on(upstream, Script(chunks=["a", "b", "c", "d", "e"]), before, prompt(max_tokens=10), **fields)
    assert upstream.requests_of("m")[-1].body["max_tokens"] == 6
    hits = upstream.hits("m")
    assert await go_on(upstream, Script(), before, prompt(max_tokens=4), **fields) == [Completed("length")]
    assert upstream.hits("m") == hits


async def test_only_plain_text_can_be_taken_up() -> None:
    """Thoughts, calls, refusals, a schema to keep to, and a route that does not say how: a fresh start."""
    text = TextDelta("Once ")
    async with provider(None, continuation="prefix") as one:
        assert one.can_continue(prompt(), Said([text]))
        for outputs in ([], [ReasoningDelta("hm"), text], [text, ToolCallDelta(0)], [RefusalDelta("no")]):
            assert not one.can_continue(prompt(), Said(outputs))
        assert not one.can_continue(prompt(response_format={"type": "json_object"}), Said([text]))
    async with provider(None) as one:
        assert not one.can_continue(prompt(), Said([text]))
