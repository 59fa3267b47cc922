"""openai-node against `/v1/responses`: create, streams and their helper, resuming, tools, cancel, errors."""

from __future__ import annotations

import pytest

from tests.conformance.environments import node_with, run
from tests.stack import Stack
from tests.upstream import Script, Upstream

CALL = {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}


@pytest.mark.timeout(900)
async def test_openai_node_finds_responses(house: Stack, upstream: Upstream) -> None:
    """The program responses.mjs, whose every test must pass."""
    node, folder = await node_with("responses_node")
    words = Script(
        chunks=["The ", "café\u2028", "日本語 ", "👩\u200d👩\u200d👧 ", "data: x\n\n", "\x85", "line\r\n"] * 3
    )
    upstream.script("node-words", words)
    upstream.script(
        "node-tools",
        Script(
            reasoning=["Let me ", "think."],
            chunks=["Looking."],
            tool_calls=[{"index": 0, **CALL}, {"index": 0, "function": {"arguments": '"Paris"}'}}],
            finish_reason="tool_calls",
        ),
    )
    upstream.script("node-refusal", Script(chunks=[], refusal=["I can", "not."]))
    upstream.script("node-length", Script(chunks=["Half"], finish_reason="length"))
    upstream.script("node-failed", Script(chunks=["Half"], cut_at=1))
    upstream.script("node-stalls", Script(chunks=["word ", "never"], stall_at=1))
    urls = {"REJOIN_URL": house.apis[0].url + "/v1", "REJOIN_OTHER_URL": house.apis[1].url + "/v1"}
    code, said = await run(node, folder / "responses.mjs", cwd=folder, **urls, REJOIN_TEXT=words.text())
    assert code == 0 and "9 tests passed" in said, said[-6000:]
    await upstream.wait_closed("node-stalls")
