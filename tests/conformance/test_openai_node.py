"""openai-node against `/v1/chat/completions`: create, streams and its helpers, tools, errors, keys."""

from __future__ import annotations

import pytest

from tests.conformance.environments import node_with, run
from tests.conformance.sensible import sensible_house
from tests.processes import Processes


@pytest.mark.timeout(900)
async def test_openai_node_finds_chat_completions(processes: Processes, redis_url: str, key_prefix: str) -> None:
    """The program chat_completions.mjs, whose every test must pass."""
    node, folder = await node_with("openai_node")
    async with sensible_house(processes, redis_url, key_prefix) as house:
        program = folder / "chat_completions.mjs"
        code, said = await run(node, program, cwd=folder, REJOIN_URL=house.apis[0].url + "/v1")
    assert code == 0 and "tests passed" in said, said[-6000:]
