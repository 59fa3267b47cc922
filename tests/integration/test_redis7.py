"""Valkey is no requirement: the main job against Debian's redis-server 7."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.processes import Processes, valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

REDIS = shutil.which("redis-server")


@pytest.mark.skipif(REDIS is None, reason="redis-server is not on the PATH: apt-get install redis-server")
async def test_the_main_job_on_redis_7(processes: Processes, upstream: Upstream, tmp_path: Path) -> None:
    """Start, stream, leave, rejoin, cancel, lose a worker, lose the store: the same on Redis 7."""
    server = valkey(processes, tmp_path / "redis", append_only=True, binary=REDIS)
    server.start()
    script = Script(count=150, pace_seconds=0.02)
    upstream.script("redis7", script)
    stack = Stack(processes, environment(server.url, "redis7", upstream))
    await stack.api()
    worker = await stack.worker()
    generation, cancelled = await stack.create("redis7"), await stack.create("redis7")
    reader = stack.reader(generation)
    await reader.connect(stop_after=20)
    await stack.reader(cancelled).connect(stop_after=5)
    assert (await stack.cancel(cancelled))["status"] == "cancelled"
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 40)
    await server.kill()
    server.start()
    await wait_until(lambda: len(reader.blocks) > 60)
    await worker.kill()
    await stack.worker()
    await reading
    check_history(reader.blocks)
    assert reader.text == script.text("hello")
    assert (await stack.snapshot(generation))["attempt"] == 2
    await stack.http.aclose()
