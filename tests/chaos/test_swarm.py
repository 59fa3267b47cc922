"""The clients of the fault suite where nothing goes wrong but the answer: each learns how it ended, and is right."""

from __future__ import annotations

import asyncio
import random

import pytest
from redis.asyncio import Redis

from tests.chaos.checker import History, answer, check, count_events
from tests.chaos.mixed import truth_of
from tests.chaos.swarm import CLIENTS, Question, Swarm
from tests.stack import Stack
from tests.upstream import Script, Upstream

TOKENS = 60


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled"])
async def test_clients_of_every_dialect_learn_how_an_answer_ended(
    house: Stack, upstream: Upstream, outcome: str
) -> None:
    """Restless ones, over two apis: whole, broken off by the model's server, or cancelled."""
    tokens = [f"{token} " for token in answer("p1", 1, TOKENS).split()]
    upstream.script(outcome, Script(chunks=tokens, pace_seconds=0.01, cut_at=None if outcome != "failed" else 30))
    swarm = Swarm(lambda: [api.url for api in house.apis], random.Random(5))
    question = Question(outcome, "p1", f"key-{outcome}")
    generation_id = await swarm.create(question)
    histories = [History("r", dialect) for dialect in CLIENTS]
    reading = asyncio.gather(*(swarm.read(question, generation_id, history, 60) for history in histories))
    if outcome == "cancelled":
        await upstream.wait_sent(outcome, 20)
        await house.cancel({"cancel_url": f"/v1/generations/{generation_id}/cancel"})
    await reading
    redis = Redis.from_url(house.env["REDIS_URL"])
    truth = await truth_of(redis, house.env["REJOIN_KEY_PREFIX"], "p1", generation_id, TOKENS)
    await redis.aclose()
    assert truth.status == outcome
    assert check(truth, histories) == []
    assert count_events(histories) > 6 * 20
    assert not swarm.lost_patience
