"""Chapter 6: idempotency.

A POST whose answer was lost leaves its caller in doubt: was the generation started? With an Idempotency-Key it may
simply be sent again. The key is turned into the generation's id, so the second create finds what the first one made, on
any api, at the same moment or later, and the model is asked once.
"""

from __future__ import annotations

import asyncio
import uuid

from tests.stack import Stack
from tests.upstream import Script, Upstream

MODEL = "tour-again"


async def test_the_same_request_sent_again_is_the_same_generation(house: Stack, upstream: Upstream) -> None:
    """Ten creates at once, over both apis, are one generation and one call to the model."""
    upstream.script(MODEL, Script(count=10))
    key, asked_before = str(uuid.uuid4()), upstream.hits(MODEL)
    answers = await asyncio.gather(*(house.create(MODEL, key=key, api=house.apis[n % 2]) for n in range(10)))
    assert len({answer["id"] for answer in answers}) == 1
    await house.finished(answers[0])
    assert (await house.create(MODEL, key=key))["status"] == "completed"
    assert upstream.hits(MODEL) == asked_before + 1


async def test_a_key_stands_for_one_prompt_only(house: Stack, upstream: Upstream) -> None:
    """The same key with other words is a mistake, and is told so instead of being answered with the wrong text."""
    upstream.script(MODEL, Script(count=10))
    key = str(uuid.uuid4())
    await house.create(MODEL, "one question", key=key)
    assert await _refusal(house, "another question", key) == (409, "idempotency_conflict")


async def test_a_deleted_generation_does_not_come_back(house: Stack, upstream: Upstream) -> None:
    """After a delete its key is used up, as long as the tombstone stands."""
    upstream.script(MODEL, Script(count=10))
    key = str(uuid.uuid4())
    generation = await house.create(MODEL, "a secret", key=key)
    await house.http.delete(f"{house.apis[0].url}/v1/generations/{generation['id']}")
    assert await _refusal(house, "a secret", key) == (409, "deleted")


async def _refusal(house: Stack, prompt: str, key: str) -> tuple[int, str]:
    body = {"model": MODEL, "prompt": prompt}
    answer = await house.http.post(f"{house.apis[0].url}/v1/generations", json=body, headers={"Idempotency-Key": key})
    return answer.status_code, answer.json()["code"]
