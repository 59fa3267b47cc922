"""What the fault tests share: a Valkey of their own, since they hurt it, and a house on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.conftest import environment
from tests.processes import Processes, Valkey, valkey
from tests.stack import Stack
from tests.upstream import Upstream


@pytest.fixture
def own_server(processes: Processes, tmp_path: Path) -> Iterator[Valkey]:
    """A server with an append-only file, which a test may kill, flush, freeze, or tell that the disk is full: the
    signal that comes with a file that may not grow is ignored."""
    one = valkey(processes, tmp_path / "valkey", append_only=True)
    one.argv = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh", *one.argv]
    one.start()
    yield one


@pytest.fixture
async def own_redis(own_server: Valkey) -> AsyncIterator[Redis]:
    """A client of that server, for the test itself."""
    client: Redis = Redis.from_url(own_server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def own_stack(processes: Processes, own_server: Valkey, upstream: Upstream) -> AsyncIterator[Stack]:
    """An empty house on that server."""
    one = Stack(processes, environment(own_server.url, "own", upstream))
    yield one
    await one.http.aclose()
    processes.end_all()
