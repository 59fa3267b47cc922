"""The openai SDK for Python, unmodified and strict, against /v1/responses: asked, left, rejoined."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.stack import Api, Stack, gather_bounded
from tests.upstream import Script, Upstream

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


def client(api: Api) -> AsyncOpenAI:
    """The SDK as its users have it, but that it checks all it is sent against its own types."""
    return AsyncOpenAI(
        base_url=api.url + "/v1", api_key="none", max_retries=0, timeout=30, _strict_response_validation=True
    )


async def numbered(stream: Any) -> list[Any]:
    """All events of a stream."""
    return [event async for event in stream]


def dumped(events: list[Any]) -> list[dict[str, Any]]:
    return [event.model_dump() for event in events]


async def test_create_waits_for_the_whole_answer(house: Stack, upstream: Upstream) -> None:
    """Without a stream, a create gives the complete Response, usage and all that was asked."""
    script = Script(count=30)
    upstream.script("responses-whole", script)
    async with client(house.apis[0]) as openai_client:
        answer = await openai_client.responses.create(
            model="responses-whole",
            input="hello",
            instructions="Be brief.",
            metadata={"of": "test"},
            temperature=0.5,
            max_output_tokens=99,
            reasoning={"effort": "low"},
            parallel_tool_calls=False,
            text={"format": {"type": "json_schema", "name": "any", "schema": {"type": "object"}}},
        )
        assert answer.status == "completed" and answer.output_text == script.text("hello")
        assert answer.usage is not None and answer.usage.total_tokens == 37
        assert answer.instructions == "Be brief." and answer.metadata == {"of": "test"}
        assert answer.temperature == 0.5 and answer.max_output_tokens == 99 and answer.parallel_tool_calls is False
        assert await openai_client.responses.retrieve(answer.id) == answer
    (asked,) = (request.body for request in upstream.requests_of("responses-whole"))
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    assert asked["max_tokens"] == 99 and asked["temperature"] == 0.5 and asked["parallel_tool_calls"] is False
    assert asked["reasoning_effort"] == "low"
    assert asked["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "any", "schema": {"type": "object"}},
    }


async def test_a_stream_is_the_sequence_of_the_protocol(house: Stack, upstream: Upstream) -> None:
    """Events come in OpenAI's order, numbered from 0 without a hole, and the last one has the whole Response."""
    script = Script(chunks=["Hello ", "world."])
    upstream.script("responses-stream", script)
    async with client(house.apis[0]) as openai_client:
        events = await numbered(
            await openai_client.responses.create(model="responses-stream", input="hello", stream=True)
        )
        assert [event.type for event in events] == [
            "response.created",
            "response.queued",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].response == await openai_client.responses.retrieve(events[0].response.id)


async def test_every_word_arrives_as_it_was_said(house: Stack, upstream: Upstream) -> None:
    """Line separators, NULs, emoji and lookalikes of SSE fields come through the SDK's parser unchanged."""
    script = Script(count=200)
    upstream.script("responses-odd", script)
    async with client(house.apis[0]) as openai_client:
        stream = await openai_client.responses.create(model="responses-odd", input="odd", stream=True)
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
    assert text == script.text("odd")


async def test_the_stream_helper_gives_the_final_response(house: Stack, upstream: Upstream) -> None:
    """`responses.stream()` accumulates the events to the Response that was sent; so does one that is found again."""
    script = Script(reasoning=["Well, ", "now."], count=20)
    upstream.script("responses-helper", script)
    async with client(house.apis[0]) as openai_client:
        async with openai_client.responses.stream(model="responses-helper", input="hello") as stream:
            final = await stream.get_final_response()
        assert final.output_text == script.text("hello")
        assert [item.type for item in final.output] == ["reasoning", "message"]
        async with openai_client.responses.stream(response_id=final.id, starting_after=4) as stream:
            rest = await numbered(stream)
        assert rest[0].sequence_number == 5
        async with openai_client.responses.stream(response_id=final.id) as stream:
            assert (await stream.get_final_response()).output == final.output


async def test_background_is_queued_at_once_and_resumed_at_every_number(house: Stack, upstream: Upstream) -> None:
    """From every sequence number, on either api, the SDK gets exactly the events that it has not seen."""
    script = Script(reasoning=["Think."], count=30, first_delay_seconds=0.3)
    upstream.script("responses-resume", script)
    async with client(house.apis[0]) as first, client(house.apis[1]) as second:
        queued = await first.responses.create(model="responses-resume", input="hello", background=True)
        assert queued.status in ("queued", "in_progress") and queued.background is True and queued.output == []
        whole = dumped(await numbered(await second.responses.retrieve(queued.id, stream=True)))
        assert [event["sequence_number"] for event in whole] == list(range(len(whole)))

        async def resume(n: int) -> None:
            one = (first, second)[n % 2]
            stream = await one.responses.retrieve(queued.id, stream=True, starting_after=n)
            assert dumped(await numbered(stream)) == whole[n + 1 :], f"starting after {n}"

        await gather_bounded(8, *(resume(n) for n in range(len(whole))))


async def test_a_running_background_stream_is_left_and_rejoined_on_another_api(
    house: Stack, upstream: Upstream
) -> None:
    """A client that leaves amid the words and comes back elsewhere misses nothing and hears nothing twice."""
    script = Script(count=60, pace_seconds=0.02)
    upstream.script("responses-running", script)
    async with client(house.apis[0]) as first, client(house.apis[1]) as second:
        stream = await first.responses.create(model="responses-running", input="hello", background=True, stream=True)
        seen: list[Any] = []
        async for event in stream:
            seen.append(event)
            if len(seen) == 20:
                await stream.close()
                break
        rest = await second.responses.retrieve(
            seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
        )
        seen += await numbered(rest)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        assert text == script.text("hello") == seen[-1].response.output_text


async def test_an_attempt_lost_with_its_worker_ends_the_stream_and_numbers_the_next_million(
    stack: Stack, upstream: Upstream
) -> None:
    """After `kill -9` of the worker a stream ends with an error; the next attempt has numbers of its own, and from
    the old ones there is no way on."""
    script = Script(chunks=["lost "] * 5, stall_at=5), Script(chunks=["kept "] * 4)
    upstream.script("responses-killed", *script)
    api = await stack.api(REJOIN_LEASE_SECONDS="1")
    worker = await stack.worker(REJOIN_LEASE_SECONDS="1")
    async with client(api) as openai_client:
        stream = await openai_client.responses.create(
            model="responses-killed", input="hello", background=True, stream=True
        )
        seen: list[Any] = []
        with pytest.raises(openai.APIError, match="void") as error:
            async for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta" and len(seen) == 10:
                    await worker.kill()
                    await stack.worker(REJOIN_LEASE_SECONDS="1")
        assert error.value.code == "attempt_superseded"
        response_id = seen[0].response.id
        for n in (0, 5, seen[-1].sequence_number):
            with pytest.raises(openai.ConflictError) as conflict:
                await openai_client.responses.retrieve(response_id, stream=True, starting_after=n)
            assert conflict.value.code == "attempt_superseded"
        again = await numbered(await openai_client.responses.retrieve(response_id, stream=True))
        first = again[0].sequence_number
        assert first >= 1_000_000 and first % 1_000_000 == 0
        assert [event.sequence_number for event in again] == list(range(first, first + len(again)))
        assert again[-1].response.output_text == "kept " * 4
        for n in range(len(again)):
            stream = await openai_client.responses.retrieve(response_id, stream=True, starting_after=first + n)
            assert dumped(await numbered(stream)) == dumped(again[n + 1 :])
        assert (await openai_client.responses.retrieve(response_id)).output_text == "kept " * 4


async def test_cancel_closes_the_upstream_and_keeps_the_words(house: Stack, upstream: Upstream) -> None:
    """A cancel reaches the model's server; the stream ends with what was said, and a second cancel says the same."""
    upstream.script("responses-cancel", Script(chunks=["one ", "two "], stall_at=2))
    async with client(house.apis[0]) as first, client(house.apis[1]) as second:
        stream = await first.responses.create(model="responses-cancel", input="hello", background=True, stream=True)
        seen: list[Any] = []
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta" and event.delta == "two ":
                cancelled = await second.responses.cancel(seen[0].response.id)
                assert cancelled.status == "cancelled" and cancelled.output_text == "one two "
        await upstream.wait_closed("responses-cancel")
        assert seen[-1].type == "response.incomplete" and seen[-1].response == cancelled
        assert cancelled.output[0].status == "incomplete"  # type: ignore[union-attr]
        assert await first.responses.cancel(cancelled.id) == cancelled


async def test_leaving_ends_what_was_not_in_the_background(stack: Stack, upstream: Upstream) -> None:
    """As with OpenAI, a stream that is closed ends its generation; one in the background goes on to its end."""
    upstream.script("responses-left", Script(chunks=["word "] * 3, stall_at=2))
    upstream.script("responses-stays", Script(chunks=["word "] * 3, stall_at=2))
    api = await stack.api(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    await stack.worker(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    async with client(api) as openai_client:
        left = await openai_client.responses.create(model="responses-left", input="hello", stream=True)
        stays = await openai_client.responses.create(
            model="responses-stays", input="hello", stream=True, background=True
        )
        ids = []
        for stream in (left, stays):
            async for event in stream:
                if event.type == "response.created":
                    ids.append(event.response.id)
                if event.type == "response.output_text.delta":
                    await stream.close()
                    break
        await upstream.wait_closed("responses-left", timeout=20)
        assert (await openai_client.responses.retrieve(ids[0])).status == "cancelled"
        assert (await openai_client.responses.retrieve(ids[1])).status == "in_progress"
        upstream.release("responses-stays")
        rest = await numbered(await openai_client.responses.retrieve(ids[1], stream=True))
        assert rest[-1].response.output_text == "word " * 3


async def test_delete_erases_and_nothing_is_found_again(house: Stack, upstream: Upstream) -> None:
    """A deleted response is unknown: to retrieve, to go on from, to cancel and to delete again."""
    upstream.script("responses-deleted", Script(count=3))
    async with client(house.apis[0]) as openai_client:
        answer = await openai_client.responses.create(model="responses-deleted", input="hello")
        await openai_client.responses.delete(answer.id)
        for again in (
            openai_client.responses.retrieve(answer.id),
            openai_client.responses.cancel(answer.id),
            openai_client.responses.delete(answer.id),
            openai_client.responses.create(input="hello", previous_response_id=answer.id),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                await again
            assert error.value.code == "response_not_found"
        other = await openai_client.responses.create(model="responses-deleted", input="hello")
    answered = await house.http.delete(f"{house.apis[0].url}/v1/responses/{other.id}")
    assert answered.json() == {"id": other.id, "object": "response", "deleted": True}


async def test_a_conversation_goes_on_from_the_response_before(house: Stack, upstream: Upstream) -> None:
    """`previous_response_id` puts all earlier turns before the new one; instructions are not carried over."""
    upstream.script("responses-turns", Script(chunks=["first answer"]), Script(chunks=["second answer"]), Script())
    async with client(house.apis[0]) as openai_client:
        create = openai_client.responses.create
        one = await create(model="responses-turns", input="first question", instructions="Old rules.")
        two = await create(
            model="responses-turns", input="second question", instructions="New rules.", previous_response_id=one.id
        )
        three = await create(model="responses-turns", input="third question", previous_response_id=two.id)
        assert three.previous_response_id == two.id
        listed = openai_client.responses.input_items.list(three.id, limit=2, order="asc")
        items: list[Any] = [item async for item in listed]  # over all pages
    assert upstream.requests_of("responses-turns")[1].body["messages"][0]["content"] == "New rules."
    assert upstream.requests_of("responses-turns")[2].body["messages"] == [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "second answer"},
        {"role": "user", "content": "third question"},
    ]
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "first question"),
        ("assistant", "first answer"),
        ("user", "second question"),
        ("assistant", "second answer"),
        ("user", "third question"),
    ]
    assert len({item.id for item in items}) == 5


async def test_going_on_from_what_is_not_there_or_not_done_is_refused(house: Stack, upstream: Upstream) -> None:
    """An unknown previous response is 404, a running one 409, and both name the parameter."""
    upstream.script("responses-unfinished", Script(chunks=["a", "b"], stall_at=1))
    async with client(house.apis[0]) as openai_client:
        running = await openai_client.responses.create(model="responses-unfinished", input="hi", background=True)
        for previous, kind in ((f"resp_{'0' * 32}", openai.NotFoundError), (running.id, openai.ConflictError)):
            with pytest.raises(kind) as error:
                await openai_client.responses.create(input="hello", previous_response_id=previous)
            assert error.value.param == "previous_response_id"
        await openai_client.responses.cancel(running.id)


async def test_tools_are_called_and_their_output_goes_back(house: Stack, upstream: Upstream) -> None:
    """Function calls stream with their arguments, and come back in the next turn as the model made them."""
    fragments = (
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}},
        {"index": 0, "function": {"arguments": '"Paris"}'}},
        {"index": 1, "id": "call_b", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    )
    calls = Script(chunks=["Let me see."], tool_calls=fragments, finish_reason="tool_calls")
    upstream.script("responses-tools", calls, Script(chunks=["Sunny."]))
    async with client(house.apis[0]) as openai_client:
        async with openai_client.responses.stream(
            model="responses-tools", input="hello", tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}
        ) as stream:
            final = await stream.get_final_response()
        assert final.status == "completed" and [tool.type for tool in final.tools] == ["function"]
        assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
        made = [item for item in final.output if item.type == "function_call"]
        assert [(call.call_id, call.name, call.arguments, call.status) for call in made] == [
            ("call_a", "weather", '{"city":"Paris"}', "completed"),
            ("call_b", "weather", "{}", "completed"),
        ]
        outputs: Any = [
            {"type": "function_call_output", "call_id": call.call_id, "output": f"sun {n}"}
            for n, call in enumerate(made)
        ]
        by_id = await openai_client.responses.create(
            model="responses-tools", input=outputs, previous_response_id=final.id
        )
        by_hand = await openai_client.responses.create(
            model="responses-tools",
            input=[{"role": "user", "content": "hello"}, *(item.model_dump() for item in final.output), *outputs],
        )
        references: Any = [{"type": "item_reference", "id": item.id} for item in final.output]
        by_reference = await openai_client.responses.create(
            model="responses-tools", input=[{"role": "user", "content": "hello"}, *references, *outputs]
        )
        with pytest.raises(openai.NotFoundError) as unknown:
            await openai_client.responses.create(input=[{"type": "item_reference", "id": f"msg_{'0' * 32}_0"}])
        assert unknown.value.param == "input[0].id"
        items = [item async for item in openai_client.responses.input_items.list(by_id.id, order="asc")]
        assert [item.type for item in items] == [
            *("message", "message", "function_call", "function_call"),
            *("function_call_output", "function_call_output"),
        ]
    assert by_id.output_text == by_hand.output_text == by_reference.output_text == "Sunny."
    first, second, third, fourth = (request.body for request in upstream.requests_of("responses-tools"))
    told = {name: WEATHER[name] for name in ("name", "description", "parameters", "strict")}
    assert first["tools"] == [{"type": "function", "function": told}]
    assert first["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert second["messages"] == third["messages"] == fourth["messages"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in second["messages"][1]["tool_calls"]] == ["call_a", "call_b"]


async def test_reasoning_and_refusals_are_told_as_what_they_are(house: Stack, upstream: Upstream) -> None:
    """Reasoning is an item of its own with a summary, a refusal a part of the message."""
    upstream.script("responses-refusal", Script(reasoning=["I should ", "not."], chunks=[], refusal=["I can", "not."]))
    async with client(house.apis[0]) as openai_client:
        stream = await openai_client.responses.create(model="responses-refusal", input="hello", stream=True)
        events = await numbered(stream)
    thought = [event.delta for event in events if event.type == "response.reasoning_summary_text.delta"]
    refused = [event.delta for event in events if event.type == "response.refusal.delta"]
    assert ("".join(thought), "".join(refused)) == ("I should not.", "I cannot.")
    reasoning, message = events[-1].response.output
    assert reasoning.summary[0].text == "I should not." and reasoning.status == "completed"
    assert message.content[0].type == "refusal" and message.content[0].refusal == "I cannot."


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_an_answer_cut_short_says_why(house: Stack, upstream: Upstream, finish: str, reason: str) -> None:
    """A limit or a filter makes the response incomplete, with the reason, streamed or not."""
    upstream.script(f"responses-{finish}", Script(chunks=["Half"], finish_reason=finish))
    async with client(house.apis[0]) as openai_client:
        stream = await openai_client.responses.create(model=f"responses-{finish}", input="hello", stream=True)
        last = (await numbered(stream))[-1]
        assert last.type == "response.incomplete" and last.response.output_text == "Half"
        whole = await openai_client.responses.create(model=f"responses-{finish}", input="hello")
        for answer in (last.response, whole):
            assert answer.status == "incomplete" and answer.incomplete_details.reason == reason


async def test_a_failed_generation_is_a_failed_response(house: Stack, upstream: Upstream) -> None:
    """When the model's server fails, the Response says so with a code, after the words that came; no error frame."""
    upstream.script("responses-failed", Script(chunks=["Half an"], cut_at=1))
    async with client(house.apis[0]) as openai_client:
        stream = await openai_client.responses.create(model="responses-failed", input="hello", stream=True)
        last = (await numbered(stream))[-1]
        whole = await openai_client.responses.create(model="responses-failed", input="hello")
    assert last.type == "response.failed"
    for answer in (last.response, whole):
        assert answer.status == "failed" and answer.error.code == "server_error" and answer.output_text == "Half an"
        assert answer.error.type == "upstream_reset"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"background": True, "store": False}, "store"),
        ({"temperature": 3}, "temperature"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": [{"type": "computer_call_output", "call_id": "c"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": []}, "input"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_its_name(house: Stack, body: Any, param: str) -> None:
    """A field that would change the answer and is not done here is a 400 that names it, before anything is started."""
    async with client(house.apis[0]) as openai_client:
        with pytest.raises(openai.BadRequestError) as error:
            await openai_client.responses.create(**{"model": "responses-refused", "input": "hello", **body})
    assert error.value.param == param


async def test_the_same_idempotency_key_is_the_same_response(house: Stack, upstream: Upstream) -> None:
    """A repeated POST with its key attaches to the generation that is there, and hears it from the beginning."""
    script = Script(count=20, pace_seconds=0.02)
    upstream.script("responses-key", script)
    async with client(house.apis[0]) as first, client(house.apis[1]) as second:
        ask: Any = {
            "model": "responses-key",
            "input": "hello",
            "stream": True,
            "extra_headers": {"Idempotency-Key": "responses-conformance-1"},
        }
        stream = await first.responses.create(**ask)
        async for event in stream:
            if event.type == "response.output_text.delta":
                await stream.close()
                break
        events = await numbered(await second.responses.create(**ask))
    assert events[-1].response.output_text == script.text("hello") and upstream.hits("responses-key") == 1


async def test_what_was_not_to_be_stored_is_not_found(house: Stack, upstream: Upstream) -> None:
    """`store: false` answers, and is neither retrieved nor gone on from."""
    upstream.script("responses-store", Script(chunks=["Said."]))
    async with client(house.apis[0]) as openai_client:
        answer = await openai_client.responses.create(model="responses-store", input="hello", store=False)
        assert answer.output_text == "Said." and answer.store is False  # type: ignore[attr-defined]
        for again in (
            openai_client.responses.retrieve(answer.id),
            openai_client.responses.create(input="hello", previous_response_id=answer.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await again


async def test_pings_are_nothing_to_the_sdk(stack: Stack, upstream: Upstream) -> None:
    """Pings keep the connection of a slow model open, and are no events to the SDK's parser."""
    upstream.script("responses-slow", Script(chunks=["At ", "last."], stall_at=1))
    api = await stack.api(REJOIN_PING_SECONDS="0.1")
    await stack.worker()
    async with client(api) as openai_client:
        stream = await openai_client.responses.create(
            model="responses-slow", input="hello", stream=True, background=True
        )
        events: list[Any] = []
        async for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta" and event.delta == "At ":
                await pinged(api, events[0].response.id, 3)
                upstream.release("responses-slow")
        assert events[-1].response.output_text == "At last."


async def pinged(api: Api, response_id: str, times: int) -> None:
    """Until another reader of the same response has seen so many pings, and only in the form that harms nobody."""
    body = b""
    async with (
        httpx2.AsyncClient(timeout=30, trust_env=False) as http,
        http.stream("GET", f"{api.url}/v1/responses/{response_id}?stream=true") as answer,
    ):
        async for piece in answer.aiter_bytes():
            body += piece
            if body.count(b": ping\n") >= times:
                break
    assert b": ping\n\n" not in body and b"\nid:" not in body and b"retry:" not in body


async def test_other_tenants_find_nothing(stack: Stack, upstream: Upstream) -> None:
    """A response of one key is unknown to another: to retrieve, to follow, to stop, to erase, to go on from."""
    keys = {"alice": "key-of-alice", "bob": "key-of-bob"}
    pairs = ",".join(f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in keys.items())
    api = await stack.api(REJOIN_API_KEYS=pairs, REJOIN_SECRET="secret-of-the-responses-tests")
    await stack.worker()
    upstream.script("responses-alice", Script(chunks=["Mine."]))
    async with client(api).copy(api_key=keys["alice"]) as alice, client(api).copy(api_key=keys["bob"]) as bob:
        made = await alice.responses.create(model="responses-alice", input="hello")
        for theirs in (
            bob.responses.retrieve(made.id),
            bob.responses.retrieve(made.id, stream=True),
            bob.responses.cancel(made.id),
            bob.responses.delete(made.id),
            bob.responses.input_items.list(made.id),
            bob.responses.create(input="and?", previous_response_id=made.id),
            bob.responses.create(input=[{"type": "item_reference", "id": made.output[0].id or ""}]),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                await theirs
            assert error.value.code == "response_not_found"
        assert (await alice.responses.retrieve(made.id)).output_text == "Mine."
    async with client(api) as nobody:
        with pytest.raises(openai.AuthenticationError):
            await nobody.responses.create(model="responses-alice", input="hello")


async def test_a_websocket_answers_one_turn_after_another(house: Stack, upstream: Upstream) -> None:
    """Over `responses.connect()` come the same events as over HTTP; a wrong frame costs only its answer."""
    pytest.importorskip("websockets", reason="NOT TESTED over a WebSocket: install `websockets`")
    script = Script(chunks=["One ", "answer."])
    upstream.script("responses-socket", script)
    async with client(house.apis[0]) as openai_client, openai_client.responses.connect() as connection:
        previous: str | None = None
        for n in range(2):
            await connection.response.create(model="responses-socket", input=f"q{n}", previous_response_id=previous)
            events = await until_last(connection)
            assert [event.sequence_number for event in events] == list(range(11))
            assert events[-1].type == "response.completed" and events[-1].response.output_text == "One answer."
            previous = events[-1].response.id
            again = await numbered(await openai_client.responses.retrieve(previous, stream=True))
            assert dumped(again) == [event.model_dump(exclude={"stream_id"}) for event in events]
        await connection.response.create(model="responses-socket", input="hello", tools=[{"type": "web_search"}])
        (refused,) = await until_last(connection)
        assert refused.type == "error" and refused.status == 400 and refused.error.param == "tools[0].type"
        await connection.response.create(model="responses-socket", input="hello")
        assert (await until_last(connection))[-1].type == "response.completed"
    assert len(upstream.requests_of("responses-socket")[1].body["messages"]) == 3


async def test_lanes_of_a_websocket_answer_at_once(house: Stack, upstream: Upstream) -> None:
    """Two `stream_id`s share a socket without waiting for each other; a busy lane refuses another turn."""
    pytest.importorskip("websockets", reason="NOT TESTED over a WebSocket: install `websockets`")
    upstream.script("responses-lane-stalls", Script(chunks=["slow ", "end"], stall_at=1))
    upstream.script("responses-lane", Script(chunks=["quick"]))
    async with client(house.apis[0]) as openai_client, openai_client.responses.connect() as connection:
        create: Any = connection.response.create
        await create(model="responses-lane-stalls", input="hello", stream_id="a")
        await upstream.wait_sent("responses-lane-stalls", 1)
        await create(model="responses-lane", input="hello", stream_id="b")
        await create(model="responses-lane", input="hello", stream_id="a")
        seen = [event async for event in taking(connection, lambda event: event.type == "response.completed")]
        assert seen[-1].stream_id == "b" and seen[-1].response.output_text == "quick"
        if not any(event.type == "error" for event in seen):
            seen += [event async for event in taking(connection, lambda event: event.type == "error")]
        refused = [(event.error.code, event.stream_id) for event in seen if event.type == "error"]
        assert refused == [("lane_busy", "a")]
        upstream.release("responses-lane-stalls")
        rest = [event async for event in taking(connection, lambda event: event.type == "response.completed")]
        assert rest[-1].stream_id == "a" and rest[-1].response.output_text == "slow end"


async def test_closing_a_websocket_leaves_its_answers(stack: Stack, upstream: Upstream) -> None:
    """A client that closes its socket is a reader that leaves: the generation is cancelled."""
    pytest.importorskip("websockets", reason="NOT TESTED over a WebSocket: install `websockets`")
    upstream.script("responses-socket-left", Script(chunks=["word ", "never"], stall_at=1))
    api = await stack.api(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    await stack.worker(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    async with client(api) as openai_client:
        async with openai_client.responses.connect() as connection:
            await connection.response.create(model="responses-socket-left", input="hello")
            taken = taking(connection, lambda event: event.type == "response.output_text.delta")
            seen = [event async for event in taken]
        await upstream.wait_closed("responses-socket-left", timeout=20)
        assert (await openai_client.responses.retrieve(seen[0].response.id)).status == "cancelled"


async def test_a_stopping_server_closes_its_websockets(stack: Stack, upstream: Upstream) -> None:
    """On SIGTERM a socket amid an answer is closed as for a restart, never in silence, and the server ends."""
    websockets = pytest.importorskip("websockets", reason="NOT TESTED over a WebSocket: install `websockets`")
    upstream.script("responses-socket-drained", Script(chunks=["word ", "never"], stall_at=1))
    api = await stack.api()
    await stack.worker()
    async with client(api) as openai_client, openai_client.responses.connect() as connection:
        await connection.response.create(model="responses-socket-drained", input="hello")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            async for event in taking(connection, lambda event: event.type == "error"):
                if event.type == "response.output_text.delta":
                    api.process.signal(signal.SIGTERM)
        assert closed.value.rcvd.code == 1012
        assert await api.process.wait(timeout=15) == 0


async def taking(connection: Any, is_last: Any) -> Any:
    """The events of a socket up to one that is asked for."""
    async with asyncio.timeout(20):
        while True:
            event = await connection.recv()
            yield event
            if is_last(event):
                return


async def until_last(connection: Any) -> list[Any]:
    """The events of one answer."""
    ends = ("response.completed", "error")
    return [event async for event in taking(connection, lambda event: event.type in ends)]
