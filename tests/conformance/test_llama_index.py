"""LlamaIndex's unmodified OpenAILike against `/v1/chat/completions`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.environments import HERE, python_with, run
from tests.conformance.sensible import sensible_house
from tests.processes import Processes


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", ["llama_index_suite.py", "openai_2_suite.py"])
async def test_llama_index_and_the_client_it_brings(
    processes: Processes, redis_url: str, key_prefix: str, tmp_path: Path, suite: str
) -> None:
    """Text, streams, reasoning, tools, structured output, errors and keys; its openai-python 2.x by itself as well."""
    python = await python_with("llama-index")
    async with sensible_house(processes, redis_url, key_prefix) as house:
        code, said = await run(python, HERE / suite, cwd=tmp_path, REJOIN_URL=house.apis[0].url + "/v1")
    assert code == 0 and "parts passed" in said, said[-6000:]
