"""openai-python against `/v1/chat/completions`, every answer validated strictly by its own types."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.stack import Stack
from tests.upstream import Script, Upstream

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLS = (
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": '}},
    {"index": 0, "function": {"arguments": '"Paris"}'}},
    {"index": 1, "id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
)


def options(house: Stack, api: int = 0) -> dict[str, Any]:
    return {
        "base_url": house.apis[api].url + "/v1",
        "api_key": "any",
        "max_retries": 0,
        "timeout": 30,
        "_strict_response_validation": True,
    }


@pytest.fixture
async def client(house: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(**options(house)) as one:
        yield one


async def chunks_of(stream: Any) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in stream]


def generation_of(completion_id: str) -> str:
    return completion_id.removeprefix("chatcmpl-")


async def test_create_is_the_whole_answer(client: AsyncOpenAI, upstream: Upstream) -> None:
    """A completion that is not streamed has text, finish reason, usage, time and model."""
    script = Script(count=30)
    upstream.script("whole", script)
    answer = await client.chat.completions.create(model="whole", messages=HELLO)
    assert answer.choices[0].message.content == script.text("hello")
    assert answer.choices[0].finish_reason == "stop" and answer.model == "whole"
    assert answer.usage is not None and answer.usage.completion_tokens == 30
    assert answer.created > 1_700_000_000


async def test_a_stream_is_role_then_words_then_finish(client: AsyncOpenAI, upstream: Upstream) -> None:
    """Every chunk has the same id, time and model; there is no usage where none was asked for."""
    script = Script(count=30)
    upstream.script("streamed", script)
    chunks = await chunks_of(await client.chat.completions.create(model="streamed", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == script.text("hello")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_last_when_asked_for(client: AsyncOpenAI, upstream: Upstream) -> None:
    """`include_usage` adds one chunk without choices at the end."""
    upstream.script("counted", Script(count=5))
    stream = await client.chat.completions.create(
        model="counted", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *others, last = await chunks_of(stream)
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 12
    assert all(chunk.usage is None and chunk.choices for chunk in others)


async def test_the_stream_helper_accumulates_everything(client: AsyncOpenAI, upstream: Upstream) -> None:
    """`.stream()` joins text, refusal, reasoning, tool calls and usage to the completion that `create` gives."""
    upstream.script("all", Script(count=5, reasoning=("Hm, ", "well."), refusal=("No", "."), tool_calls=CALLS))
    asked: Any = {"model": "all", "messages": HELLO, "tools": [WEATHER]}
    async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type async for event in stream}
        streamed = await stream.get_final_completion()
    assert kinds >= {"chunk", "content.delta", "content.done", "refusal.delta", "refusal.done"}
    assert kinds >= {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"}
    whole = (await client.chat.completions.create(**asked)).choices[0].message
    message = streamed.choices[0].message
    for one in (message, whole):
        assert one.content and one.refusal == "No." and one.model_extra is not None
        assert one.model_extra["reasoning_content"] == "Hm, well."
        calls: list[Any] = list(one.tool_calls or ())
        assert [(call.id, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("call_1", "weather", {"city": "Paris"}),
            ("call_2", "weather", {"city": "Rome"}),
        ]
    assert message.content == whole.content
    assert streamed.usage is not None and streamed.usage.completion_tokens == 13


async def test_an_answer_can_be_sent_back(client: AsyncOpenAI, upstream: Upstream) -> None:
    """A message of an answer, dumped as it is, is a turn of the next request, and so are tool results."""
    upstream.script("turns", Script(count=1, tool_calls=CALLS[:3], finish_reason="tool_calls"))
    first = await client.chat.completions.create(model="turns", messages=HELLO, tools=[WEATHER])
    assert first.choices[0].finish_reason == "tool_calls"
    turns: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "hello"}]},
        first.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    await client.chat.completions.create(model="turns", messages=turns, parallel_tool_calls=False)
    sent = upstream.requests_of("turns")[-1].body
    assert sent["parallel_tool_calls"] is False
    assert sent["messages"][:2] == turns[:2] and sent["messages"][3] == turns[3]
    assert sent["messages"][2]["tool_calls"] == first.choices[0].message.model_dump()["tool_calls"]
    assert sent["messages"][2].keys() <= {"role", "content", "tool_calls"}


async def test_parse_reads_a_structured_answer(client: AsyncOpenAI, upstream: Upstream) -> None:
    """`.parse()` gets its JSON schema through to the model, and its typed answer back."""
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    upstream.script("typed", Script(chunks=['{"na', 'me": "Paris"}']))
    answer = await client.chat.completions.parse(model="typed", messages=HELLO, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris")
    assert upstream.requests_of("typed")[-1].body["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize(
    ("reason", "raised"),
    [("length", openai.LengthFinishReasonError), ("content_filter", openai.ContentFilterFinishReasonError)],
)
async def test_an_answer_cut_short_says_so(
    client: AsyncOpenAI, upstream: Upstream, reason: str, raised: type[Exception]
) -> None:
    """The finish reason of the model is the client's, and the helper raises its own error for it."""
    upstream.script(reason, Script(count=3, finish_reason=reason))
    answer = await client.chat.completions.create(model=reason, messages=HELLO)
    assert answer.choices[0].finish_reason == reason
    async with client.chat.completions.stream(model=reason, messages=HELLO) as stream:
        with pytest.raises(raised):
            await stream.get_final_completion()


async def test_the_synchronous_client_reads_the_same(house: Stack, upstream: Upstream) -> None:
    """`OpenAI` gets what `AsyncOpenAI` gets."""
    script = Script(count=20)
    upstream.script("sync", script)

    def ask() -> tuple[str, str]:
        with OpenAI(**options(house)) as client:
            stream = client.chat.completions.create(model="sync", messages=HELLO, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole = client.chat.completions.create(model="sync", messages=HELLO).choices[0].message.content
            return streamed, whole or ""

    assert await asyncio.to_thread(ask) == (script.text("hello"),) * 2


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools.0.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0.role"),
    ],
)
async def test_what_cannot_be_done_is_a_bad_request(client: AsyncOpenAI, asked: Any, param: str) -> None:
    """A value that would be ignored in vain is refused, and the error names it."""
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**{"model": "demo", "messages": HELLO, **asked})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


async def test_what_changes_nothing_is_taken(client: AsyncOpenAI, upstream: Upstream) -> None:
    """Fields that are harmless to leave out are accepted, and the model is not told of them."""
    upstream.script("fields", Script(count=1))
    await client.chat.completions.create(
        model="fields",
        messages=HELLO,
        n=1,
        logprobs=False,
        presence_penalty=0,
        store=False,
        user="ann",
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="low",
        reasoning_effort="low",
        max_completion_tokens=9,
        stop=["x"],
        seed=1,
        temperature=0.5,
        top_p=0.5,
        metadata={"a": "b"},
        tool_choice=None,
        modalities=["text"],
        extra_body={"top_k": 7, "base_url": "http://127.0.0.1:1/v1", "max_tokens": 8},
    )
    sent = upstream.requests_of("fields")[-1].body
    assert {name: sent[name] for name in sent if name not in ("messages", "stream", "stream_options")} == {
        "model": "fields",
        "max_tokens": 9,
        "stop": ["x"],
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "reasoning_effort": "low",
    }


async def test_no_model_is_the_default_model(client: AsyncOpenAI) -> None:
    """An empty name, or none, asks the deployment's own."""
    answer = await client.chat.completions.create(model="", messages=HELLO, max_tokens=3)
    assert answer.model == "demo"


@pytest.mark.parametrize(
    ("script", "status", "code", "retry"),
    [
        (Script(status=429, headers={"Retry-After": "600"}), 429, "upstream_rate_limited", "true"),
        (Script(status=401), 502, "upstream_unauthorized", "false"),
        (Script(status=400), 502, "upstream_rejected", "false"),
        (Script(count=3, error_at=1), 502, "upstream_error", "true"),
    ],
)
async def test_a_failed_generation_is_a_typed_error(
    client: AsyncOpenAI, upstream: Upstream, script: Script, status: int, code: str, retry: str
) -> None:
    """What the upstream did decides the status and whether the SDK sends the request again; no words of it leak."""
    model = f"fails-{code}"
    upstream.script(model, script)
    with pytest.raises(openai.APIStatusError) as failed:
        await client.chat.completions.create(model=model, messages=HELLO)
    assert failed.value.status_code == status and failed.value.code == code
    assert failed.value.response.headers["x-should-retry"] == retry
    assert "secret" not in failed.value.message
    assert isinstance(failed.value, openai.RateLimitError if status == 429 else openai.InternalServerError)


async def test_an_error_amid_the_stream_is_raised(client: AsyncOpenAI, upstream: Upstream) -> None:
    """The words that came are given out, then APIError with the code; never a quiet end."""
    upstream.script("breaks", Script(count=5, error_at=3))
    stream = await client.chat.completions.create(model="breaks", messages=HELLO, stream=True)
    seen = []
    with pytest.raises(openai.APIError) as failed:
        async for chunk in stream:
            seen.append(chunk)
    assert failed.value.code == "upstream_error" and len(seen) >= 2
    assert all(choice.finish_reason is None for chunk in seen for choice in chunk.choices)


async def test_a_cancel_is_an_error_to_who_listens(house: Stack, client: AsyncOpenAI, upstream: Upstream) -> None:
    """A stream that someone cancels ends with the code `cancelled`; asked for afterwards it is a conflict."""
    upstream.script("cancelled", Script(count=50, stall_at=3))
    stream = await client.chat.completions.create(model="cancelled", messages=HELLO, stream=True)
    first = await anext(aiter(stream))
    await upstream.wait_sent("cancelled", 3)
    await house.http.post(f"{house.apis[1].url}/v1/generations/{generation_of(first.id)}/cancel")
    with pytest.raises(openai.APIError) as failed:
        await chunks_of(stream)
    assert failed.value.code == "cancelled"
    with pytest.raises(openai.ConflictError) as conflict:
        await client.chat.completions.retrieve(first.id)
    assert conflict.value.code == "cancelled"


async def test_who_leaves_ends_the_generation(stack: Stack, upstream: Upstream) -> None:
    """Without an Idempotency-Key, closing the stream or not waiting for the whole closes the model's connection."""
    upstream.script("left", Script(count=50, stall_at=3))
    await stack.api(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    await stack.worker(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    async with AsyncOpenAI(**options(stack)) as client:
        waiting = asyncio.create_task(client.chat.completions.create(model="left", messages=HELLO))
        await upstream.wait_hits("left")
        stream = await client.chat.completions.create(model="left", messages=HELLO, stream=True)
        first = await anext(aiter(stream))
        await upstream.wait_hits("left", 2)
        assert upstream.open_requests("left") == 2
        waiting.cancel()
        await stream.close()
        await upstream.wait_closed("left", timeout=30)
        assert (await stack.finished({"id": generation_of(first.id)}))["status"] == "cancelled"


async def test_who_leaves_with_a_key_finds_it_again(house: Stack, upstream: Upstream) -> None:
    """The same request with the same Idempotency-Key attaches, on any api, and hears it from the beginning."""
    script = Script(count=40, stall_at=20)
    upstream.script("rejoined", script)
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    asked: Any = {"model": "rejoined", "messages": HELLO, "extra_headers": headers}
    async with AsyncOpenAI(**options(house, 0)) as here, AsyncOpenAI(**options(house, 1)) as there:
        stream = await here.chat.completions.create(**asked, stream=True)
        first = await anext(aiter(stream))
        await stream.close()
        again = aiter(await there.chat.completions.create(**asked, stream=True))
        assert await anext(again) == first
        waiting = asyncio.create_task(here.chat.completions.create(**asked))
        upstream.release("rejoined")
        rest = [chunk async for chunk in again]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == script.text("hello")
        whole = await waiting
        assert whole.id == first.id and whole.choices[0].message.content == script.text("hello")
    assert upstream.hits("rejoined") == 1


async def test_a_key_used_for_another_request_is_a_conflict(client: AsyncOpenAI, upstream: Upstream) -> None:
    """The error says so, and tells the SDK not to try again."""
    upstream.script("keyed", Script(count=1))
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    await client.chat.completions.create(model="keyed", messages=HELLO, extra_headers=headers)
    with pytest.raises(openai.ConflictError) as conflict:
        await client.chat.completions.create(model="keyed", messages=HELLO, seed=2, extra_headers=headers)
    assert conflict.value.code == "idempotency_conflict"
    assert conflict.value.response.headers["x-should-retry"] == "false"


async def test_a_completion_is_found_by_its_id_and_erased(client: AsyncOpenAI, upstream: Upstream) -> None:
    """`retrieve` waits for the end and gives what `create` would; after `delete` it is gone."""
    upstream.script("stored", Script(count=20, stall_at=10))
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    stream = await client.chat.completions.create(model="stored", messages=HELLO, stream=True, extra_headers=headers)
    first = await anext(aiter(stream))
    waiting = asyncio.create_task(client.chat.completions.retrieve(first.id))
    upstream.release("stored")
    text = "".join([chunk.choices[0].delta.content or "" for chunk in await chunks_of(stream)])
    stored = await waiting
    assert (stored.id, stored.created, stored.model) == (first.id, first.created, first.model)
    assert stored.choices[0].message.content == text
    deleted = await client.chat.completions.delete(first.id)
    assert deleted.deleted and deleted.id == first.id and deleted.object == "chat.completion.deleted"
    with pytest.raises(openai.APIStatusError) as gone:
        await client.chat.completions.retrieve(first.id)
    assert gone.value.status_code == 410


async def test_an_unknown_id_is_not_found(client: AsyncOpenAI) -> None:
    """Of an id that is nobody's, and of one that is none."""
    for unknown in ("chatcmpl-" + "0" * 32, "chatcmpl-x"):
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.retrieve(unknown)


async def test_keys_and_models_raise_their_typed_errors(stack: Stack) -> None:
    """No key or a wrong one: AuthenticationError. A model that is not there: NotFoundError. A full queue: 429."""
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # SHA-256 of "secret"
    await stack.api(
        REJOIN_API_KEYS=f"ann:{digest}", REJOIN_SECRET="x" * 32, REJOIN_MAX_QUEUED="1", OPENAI_BASE_URL="",
        OPENAI_API_KEY="",
    )  # fmt: skip
    async with AsyncOpenAI(**options(stack)) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model="demo", messages=HELLO)
    async with AsyncOpenAI(**{**options(stack), "api_key": "secret"}) as ann:
        with pytest.raises(openai.NotFoundError) as unknown:
            await ann.chat.completions.create(model="no-such", messages=HELLO)
        assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
        first = await ann.chat.completions.create(model="demo", messages=HELLO, stream=True)
        with pytest.raises(openai.RateLimitError) as full:
            await ann.chat.completions.create(model="demo", messages=HELLO)
        assert full.value.code == "queue_full"
        await first.close()


async def test_a_lost_worker_is_an_error_and_the_same_request_again_the_answer(
    stack: Stack, upstream: Upstream
) -> None:
    """A fresh attempt cannot unsay words that were sent: the stream fails, and the key leads to the new answer."""
    upstream.script("lost", Script(count=10, stall_at=5), Script(count=10))
    await stack.api(REJOIN_LEASE_SECONDS="1")
    worker = await stack.worker(REJOIN_LEASE_SECONDS="1")
    asked: Any = {"model": "lost", "messages": HELLO, "extra_headers": {"Idempotency-Key": uuid.uuid4().hex}}
    async with AsyncOpenAI(**options(stack)) as client:
        stream = aiter(await client.chat.completions.create(**asked, stream=True))
        await anext(stream)
        assert (await anext(stream)).choices[0].delta.content
        await worker.kill()
        await stack.worker(REJOIN_LEASE_SECONDS="1")
        with pytest.raises(openai.APIError) as superseded:
            await chunks_of(stream)
        assert superseded.value.code == "attempt_superseded"
        answer = await client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == Script(count=10).text("hello")


async def test_a_killed_server_is_no_clean_end(stack: Stack, upstream: Upstream) -> None:
    """The connection breaks, the client raises, and the key finds the generation on another api."""
    script = Script(count=10, stall_at=5)
    upstream.script("killed", script)
    api, _ = await stack.api(), await stack.api()
    await stack.worker()
    asked: Any = {"model": "killed", "messages": HELLO, "extra_headers": {"Idempotency-Key": uuid.uuid4().hex}}
    async with AsyncOpenAI(**options(stack, 0)) as here, AsyncOpenAI(**options(stack, 1)) as there:
        stream = aiter(await here.chat.completions.create(**asked, stream=True))
        await anext(stream)
        await api.process.kill()
        with pytest.raises(openai.APIConnectionError):
            await chunks_of(stream)
        upstream.release("killed")
        answer = await there.chat.completions.create(**asked)
        assert answer.choices[0].message.content == script.text("hello")


async def test_a_server_that_goes_down_says_so(stack: Stack, upstream: Upstream) -> None:
    """A drain ends a stream with an error frame, and an answer that is waited for with 503."""
    upstream.script("drained", Script(count=10, stall_at=5))
    api = await stack.api()
    await stack.worker()
    async with AsyncOpenAI(**options(stack)) as client:
        stream = aiter(await client.chat.completions.create(model="drained", messages=HELLO, stream=True))
        await anext(stream)
        waiting = asyncio.create_task(client.chat.completions.create(model="drained", messages=HELLO))
        await upstream.wait_hits("drained", 2)
        api.process.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as drained:
            await chunks_of(stream)
        assert drained.value.code == "draining"
        with pytest.raises(openai.InternalServerError) as unavailable:
            await waiting
        assert unavailable.value.status_code == 503 and unavailable.value.code == "draining"


async def test_pings_are_no_events(stack: Stack, upstream: Upstream) -> None:
    """A stream that is silent for long gets comments, and the client does not mistake them for chunks."""
    script = Script(count=6, pace_seconds=0.35)
    upstream.script("pinged", script)
    await stack.api(REJOIN_PING_SECONDS="0.1")
    await stack.worker()
    async with AsyncOpenAI(**options(stack)) as client:
        chunks = await chunks_of(await client.chat.completions.create(model="pinged", messages=HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == script.text("hello")
        raw = await client.chat.completions.with_raw_response.create(model="pinged", messages=HELLO, stream=True)
        body = (await raw.http_response.aread()).decode()
        assert ": ping\ndata: " in body and "\nid:" not in body and "retry:" not in body
