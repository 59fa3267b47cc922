"""A request sent twice is one generation and one bill, whichever api hears it, and however often."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import httpx2

from tests.integration.test_bad_input import problem
from tests.stack import Stack
from tests.upstream import Script, Upstream


def new_key() -> str:
    return f"key-{uuid.uuid4().hex}"


async def post(house: Stack, key: str, body: dict[str, Any] | bytes, api: int = 0) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = house.apis[api].url + "/v1/generations"
    return await house.http.post(url, content=content, headers={"Idempotency-Key": key})


async def test_50_posts_at_once_are_one_generation_and_one_upstream_call(house: Stack, upstream: Upstream) -> None:
    """Over two apis: one id, one call to the upstream, one text for everybody."""
    script = Script(count=40, pace_seconds=0.005)
    upstream.script("once", script)
    key, body = new_key(), {"model": "once", "prompt": "hello"}
    answers = await asyncio.gather(*(post(house, key, body, n % 2) for n in range(50)))
    assert {answer.status_code for answer in answers} == {202}
    (generation_id,) = {answer.json()["id"] for answer in answers}
    assert {answer.headers["location"] for answer in answers} == {f"/v1/generations/{generation_id}"}
    readers = [house.reader(answer.json(), house.apis[n % 2]) for n, answer in enumerate(answers)]
    await asyncio.gather(*(reader.read_to_end() for reader in readers))
    assert {reader.text for reader in readers} == {script.text("hello")}
    assert len({reader.raw for reader in readers}) == 1
    after = await house.create("once", "the next one")
    await house.finished(after)  # the queue was served past whatever else might have waited in it
    assert upstream.hits("once") == 2


async def test_the_generation_is_listed_once(house: Stack) -> None:
    """Repeats leave no trace in the list."""
    key = new_key()
    ids = {(await post(house, key, {"model": "listed", "prompt": "x"}, n % 2)).json()["id"] for n in range(4)}
    listed = (await house.http.get(house.apis[0].url + "/v1/generations?limit=100")).json()["data"]
    assert [one["id"] for one in listed if one["id"] in ids] == [*ids]


async def test_the_same_key_with_another_body_is_a_conflict(house: Stack, upstream: Upstream) -> None:
    """409 for any other prompt, model or option, from either api; the first request's generation goes on unharmed."""
    key, body = new_key(), {"model": "conflict", "prompt": "hello"}
    first = (await post(house, key, body)).json()
    others = [
        {**body, "prompt": "hello!"},
        {**body, "model": "demo"},
        {**body, "temperature": 0.5},
        {**body, "seed": 1},
    ]
    for n, other in enumerate(others):
        told = problem(await post(house, key, other, n % 2), 409, "idempotency_conflict")
        assert "hello" not in told["detail"] and first["id"] not in told["detail"]
    assert (await post(house, key, body)).json()["id"] == first["id"]
    assert (await house.finished(first))["status"] == "completed"
    assert upstream.hits("conflict") == 1


async def test_a_bad_body_does_not_use_the_key_up(house: Stack) -> None:
    """A refused request may be corrected and sent again under its key."""
    key = new_key()
    problem(await post(house, key, {"model": "demo", "prompt": "x", "seed": "x"}), 422)
    assert (await post(house, key, {"model": "demo", "prompt": "x", "seed": 1})).status_code == 202


async def test_the_same_request_in_other_words_is_the_same(house: Stack) -> None:
    """What counts is what is asked: not the order of fields, not spaces, not `prompt` for `messages`."""
    key = new_key()
    spellings: list[dict[str, Any] | bytes] = [
        {"model": "spelled", "prompt": "café", "seed": 1},
        '{ "seed": 1,\n "prompt": "café", "model": "spelled" }'.encode(),
        b'{"seed":1,"prompt":"caf\\u00e9","model":"spelled","temperature":null}',
        {"model": "spelled", "messages": [{"role": "user", "content": "café"}], "seed": 1},
    ]
    answers = [await post(house, key, body, n % 2) for n, body in enumerate(spellings)]
    assert [answer.status_code for answer in answers] == [202] * len(spellings)
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_keys_that_differ_in_one_character_are_two_generations(house: Stack) -> None:
    """Case and inner spaces count; the longest key is taken as it is."""
    key, body = new_key(), {"model": "demo", "prompt": "x"}
    long = key + "k" * (255 - len(key))
    keys = [key, key.upper(), key + " x", key + "  x", long, long[:-1]]
    ids = [(await post(house, one, body)).json()["id"] for one in keys]
    assert len(set(ids)) == len(keys)


async def test_a_key_is_used_up_by_a_delete(house: Stack) -> None:
    """The words are erased and must not be made again by a late repeat: 409, for any body."""
    key, body = new_key(), {"model": "erased", "prompt": "x"}
    generation = (await post(house, key, body)).json()
    await house.finished(generation)
    assert (await house.http.delete(f"{house.apis[0].url}/v1/generations/{generation['id']}")).status_code == 204
    problem(await post(house, key, body, 1), 409, "deleted")
    problem(await post(house, key, {**body, "prompt": "y"}), 409, "deleted")


async def test_a_repeat_after_the_end_is_the_ended_generation(house: Stack, upstream: Upstream) -> None:
    """A client that lost the answer to its POST asks again, and finds what there is; nothing runs twice."""
    key, body = new_key(), {"model": "late-repeat", "prompt": "x"}
    first = (await post(house, key, body)).json()
    assert first["status"] == "queued"
    await house.finished(first)
    again = (await post(house, key, body, 1)).json()
    assert (again["id"], again["status"]) == (first["id"], "completed")
    assert again["created_at"] == first["created_at"]
    full = await house.reader(again).read_to_end()
    assert full.text == Script().text("x")
    assert upstream.hits("late-repeat") == 1


async def test_without_a_key_every_post_is_a_generation(house: Stack, upstream: Upstream) -> None:
    """The same body twice is asked twice."""
    first, second = await house.create("keyless"), await house.create("keyless")
    assert first["id"] != second["id"]
    await house.finished(first)
    await house.finished(second)
    assert upstream.hits("keyless") == 2
