"""npm's `eventsource` against the native stream: it rejoins by itself, and stops by itself at the end."""

from __future__ import annotations

import json
import random

import pytest

from tests.conformance.environments import node_with, run
from tests.proxy import Proxy
from tests.stack import Stack
from tests.upstream import Script, Upstream


@pytest.mark.timeout(300)
async def test_eventsource_rejoins_and_stops_by_itself(house: Stack, upstream: Upstream) -> None:
    """Its connections are cut every few hundred bytes; it hears each event once, and 204 ends it."""
    node, folder = await node_with("eventsource_node")
    script = Script(count=60, pace_seconds=0.03)
    upstream.script("eventsource", script)
    generation = await house.create("eventsource")
    chance = random.Random(1)
    async with Proxy(house.apis[0].port, cut_after=chance.randrange(900, 2500)) as proxy:
        url = f"http://127.0.0.1:{proxy.port}{generation['events_url']}"
        code, said = await run(node, folder / "follow.mjs", cwd=folder, EVENTS_URL=url)
        assert proxy.cuts > 0
    assert code == 0, said
    heard = json.loads(said.strip("\n").split("\n")[-1])
    assert heard["text"] == script.text("hello")
    assert len(set(heard["ids"])) == len(heard["ids"]) and heard["opened"] > 1
    assert heard["terminal"] == "generation.completed"
