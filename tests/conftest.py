"""The real parts every suite stands on: a Valkey server, a key prefix per test, processes, the scripted upstream.

The key-leak fixture holds every key a test left against the table of `shared.redis`: a kind nobody declared, or a
generation's key without a time to live, fails the test.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis as sync_redis

from shared.config import Settings
from shared.event_log import EventLog
from shared.jobs import Jobs
from shared.redis import Client, Keys, connect
from tests.processes import Process, Processes, Valkey, valkey
from tests.stack import Stack
from tests.upstream import Upstream


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One Valkey for all tests that do not hurt it."""
    processes = Processes(tmp_path_factory.mktemp("valkey-log"))
    one = valkey(processes, tmp_path_factory.mktemp("valkey"))
    one.start()
    yield one
    processes.end_all()


@pytest.fixture
def redis_url(server: Valkey) -> str:
    return server.url


@pytest.fixture
def key_prefix(redis_url: str) -> Iterator[str]:
    """A prefix of this test's own; afterwards no key may be there that the table does not know."""
    prefix = f"t{uuid.uuid4().hex[:8]}"
    yield prefix
    client = sync_redis.Redis.from_url(redis_url)
    try:
        leaks = key_leaks(client, prefix)
        for key in client.scan_iter(f"*{prefix}*", count=1000):
            client.delete(key)
    finally:
        client.close()
    assert not leaks, f"keys that shared.redis does not declare, or without a time to live: {leaks}"


def key_leaks(client: sync_redis.Redis, prefix: str) -> list[str]:
    """The keys under a prefix that break the table of `Keys.kinds`."""
    kinds = Keys(prefix).kinds()
    leaks = []
    for key in client.scan_iter(f"*{prefix}*", count=1000):
        name = key.decode()
        kind = next((kind for kind in kinds if re.fullmatch(kind.pattern, name)), None)
        lives = client.pttl(key)  # -2: gone meanwhile, -1: for ever
        if lives == -2:
            continue
        if kind is None or client.type(key).decode() not in (kind.redis_type, "none"):
            leaks.append(name)
        elif kind.lives is not None and lives == -1:
            leaks.append(f"{name} (no time to live)")
    return leaks


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    """Settings of this test, from nothing but their defaults."""
    return Settings(_env_file=None, redis_url=redis_url, key_prefix=key_prefix)


@pytest.fixture
async def redis(settings: Settings) -> AsyncIterator[Client]:
    client = connect(settings.redis_url, connections=4)
    yield client
    await client.aclose()


@pytest.fixture
def event_log(redis: Client, settings: Settings) -> EventLog:
    return EventLog(redis, settings)


@pytest.fixture
def jobs(redis: Client, event_log: EventLog) -> Jobs:
    return Jobs(redis, event_log.keys)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """The processes of one test; all are ended when it ends."""
    folder = tmp_path / "log"
    folder.mkdir()
    one = Processes(folder)
    yield one
    one.end_all()


@pytest.fixture(scope="session")
async def upstream() -> AsyncIterator[Upstream]:
    """The scripted model server; each test scripts models of its own names."""
    async with Upstream() as one:
        yield one


def environment(redis_url: str, key_prefix: str, upstream: Upstream) -> dict[str, str]:
    """What the api and worker processes of a test are told."""
    return {
        "REDIS_URL": redis_url,
        "REJOIN_KEY_PREFIX": key_prefix,
        "OPENAI_BASE_URL": upstream.base_url,
        "OPENAI_API_KEY": "sk-test-key-of-the-upstream",
        "REJOIN_DEMO_WORDS_PER_SECOND": "200",
    }


@pytest.fixture
def rejoin_env(redis_url: str, key_prefix: str, upstream: Upstream) -> dict[str, str]:
    return environment(redis_url, key_prefix, upstream)


@pytest.fixture
async def stack(processes: Processes, rejoin_env: dict[str, str]) -> AsyncIterator[Stack]:
    """An empty house of this test's own: it starts the apis and workers it needs, and may hurt them."""
    one = Stack(processes, rejoin_env)
    yield one
    await one.http.aclose()
    processes.end_all()


@pytest.fixture(scope="session")
async def house(server: Valkey, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Two apis and one worker that all gentle tests share."""
    processes = Processes(tmp_path_factory.mktemp("house"))
    prefix = f"house{uuid.uuid4().hex[:8]}"
    one = Stack(processes, environment(server.url, prefix, upstream))
    try:
        await one.api()
        await one.api()
        await one.worker()
        yield one
    finally:
        await one.http.aclose()
        processes.end_all()
    client = sync_redis.Redis.from_url(server.url)
    leaks = key_leaks(client, prefix)
    client.close()
    assert not leaks, f"keys that shared.redis does not declare, or without a time to live: {leaks}"


@dataclass
class RejoinUp:
    """A running `rejoin up`."""

    process: Process
    url: str
    data: Path


async def start_rejoin_up(processes: Processes, data: Path, *arguments: str, **env: str) -> RejoinUp:
    """`rejoin up` on a free port, from a folder of its own, as a newcomer runs it: no Redis, no key."""
    argv = [sys.executable, "-m", "cli", "up", "--port", "0", "--data", str(data), *arguments]
    process = await processes.start("rejoin-up", argv, env)
    return RejoinUp(process, await process.says(r"ready (http://\S+)", timeout=40), data)


@pytest.fixture(scope="session")
async def rejoin_up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RejoinUp]:
    """One `rejoin up` with the demo model for the browser's tests."""
    processes = Processes(tmp_path_factory.mktemp("up-log"))
    try:
        yield await start_rejoin_up(processes, tmp_path_factory.mktemp("up"), REJOIN_DEMO_WORDS_PER_SECOND="40")
    finally:
        processes.end_all()
