"""LangChain's standard tests with its unmodified ChatOpenAI, through Chat Completions and through Responses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.environments import HERE, python_with, run
from tests.conformance.sensible import sensible_house
from tests.processes import Processes


@pytest.mark.timeout(900)
async def test_langchain_finds_a_chat_model(
    processes: Processes, redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    """Every standard test of LangChain passes that a model behind Chat Completions can pass, and ours beside them."""
    python = await python_with("langchain")
    async with sensible_house(processes, redis_url, key_prefix) as house:
        suite = ("pytest", HERE / "langchain_suite.py", "-q", "-rfs", "--tb=short", "--color=no", "--noconftest")
        options = ("-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", tmp_path, "-o", "asyncio_mode=auto")
        options += ("-o", "asyncio_default_test_loop_scope=session")  # ChatOpenAI keeps its connections
        url = house.apis[0].url + "/v1"
        code, said = await run(python, "-m", *suite, *options, cwd=tmp_path, REJOIN_URL=url, LANGSMITH_TRACING="false")
    print(said)
    assert code == 0, said[-6000:]
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None and int(passed[1]) >= 85, said[-2000:]
