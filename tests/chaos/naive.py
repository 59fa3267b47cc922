"""Negative controls: systems that are wrong on purpose, which the checker has to find out, or it proves nothing.

1. A naive writer: `XADD *`, no fence. A worker that was thought dead goes on beside its successor.
2. Epochs that are counted instead of taken from the clock, in a failover that lost the tail: the promoted replica hands
   out an epoch again that readers have already seen. The same failover with Rejoin's own epochs must show nothing.

The readers are real: all dialects, over HTTP, through a real api. Only the writers are made here.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from redis.asyncio import Redis

from shared import lua
from shared.config import Settings
from shared.event_log import Append, EventLog, Hint
from shared.events import Completed, TextDelta, encode
from shared.redis import AWAY, Keys
from tests.chaos.checker import History, answer, check, count_events
from tests.chaos.house import house
from tests.chaos.mixed import truth_of
from tests.chaos.report import Row, Say
from tests.chaos.swarm import CLIENTS, Question, Swarm
from tests.processes import Processes, Valkey, valkey
from tests.proxy import Proxy
from tests.stack import Stack
from tests.waiting import wait_until

PREFIX = "naive"
TOKENS = 20
READER_SECONDS = 60.0
COMPLETED = encode(Completed("stop"))


async def run(say: Say, quick: bool) -> list[Row]:
    """One row for each control."""
    rows = []
    for what, control, is_wrong in CONTROLS:
        found, events = await control()
        say(f"{what}: {len(found)} violations in {events} events{', the first: ' + found[0][:300] if found else ''}")
        goal = "found" if is_wrong else "none"
        rows.append(Row("negative controls", what, f"{len(found)} violations", goal, bool(found) == is_wrong))
    return rows


# --- readers


@dataclass
class Readers:
    """One client of each dialect on one generation, all there before the story begins."""

    swarm: Swarm
    question: Question
    generation_id: str
    histories: list[History]
    reading: list[asyncio.Task[History]]

    async def have_heard(self, words: str) -> None:
        """Until each of them got bytes with these words."""
        marker = words.strip().encode()

        def look() -> bool:
            bodies = [history.connections[-1].body if history.connections else b"" for history in self.histories]
            return all(marker in body for body in bodies)

        await wait_until(look, timeout=READER_SECONDS)

    async def violations(self, redis: Redis, *, lost_a_tail: bool = False) -> tuple[list[str], int]:
        """What the checker says to all they heard, and how many events that were."""
        await asyncio.gather(*self.reading)
        truth = await truth_of(redis, PREFIX, self.question.prompt, self.generation_id, TOKENS, lost_a_tail)
        return check(truth, self.histories), count_events(self.histories)


@asynccontextmanager
async def readers(urls: Sequence[str]) -> AsyncIterator[Readers]:
    """They stay connected for as long as they are let."""
    swarm = Swarm(lambda: urls, random.Random(1), restless=0.0)
    question = Question("nobody", "p1", "key-1")
    generation_id = await swarm.create(question)
    histories = [History("r", dialect) for dialect in CLIENTS]
    reading = [
        asyncio.create_task(swarm.read(question, generation_id, history, READER_SECONDS)) for history in histories
    ]
    try:
        yield Readers(swarm, question, generation_id, histories, reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def _said(hit: int, start: int, end: int) -> list[bytes]:
    tokens = answer("p1", hit, TOKENS).split()
    return [encode(TextDelta(f"{token} ")) for token in tokens[start:end]]


# --- 1: no fence, no numbers


async def naive_writer() -> tuple[list[str], int]:
    """A worker pauses, another one takes over and begins again, the first one wakes: both write."""
    async with house({"REJOIN_KEY_PREFIX": PREFIX}, apis=1, workers=0) as home:
        redis = Redis.from_url(home.store.url)
        async with readers([home.apis[0].url]) as crowd:

            async def write(events: Sequence[bytes]) -> None:
                for event in events:
                    await redis.xadd(Keys(PREFIX).log(crowd.generation_id), {"data": event})

            await write(_said(1, 0, 8))
            await crowd.have_heard("p1.1.7 ")
            await write(_said(2, 0, 5))  # the second worker
            await write(_said(1, 8, 12))  # the first one, awake again
            await write(_said(2, 5, TOKENS))
            await redis.hset(Keys(PREFIX).order(crowd.generation_id), "status", "completed")  # type: ignore[misc]
            await write([COMPLETED])
            found = await crowd.violations(redis)
        await redis.aclose()
        return found


# --- 2: the epochs, in a failover that loses the tail


@dataclass
class Pair:
    """A primary, its replica, the line between them, and the address at which clients find whoever is the primary."""

    primary: Valkey
    replica: Valkey
    line: Proxy
    door: Proxy

    async def replicated(self, key: str) -> None:
        """Until the replica has as much of a log as the primary."""
        first, second = Redis.from_url(self.primary.url), Redis.from_url(self.replica.url)

        async def look() -> bool:
            return await first.xlen(key) == await second.xlen(key) > 0

        await wait_until(look, timeout=30)
        await first.aclose()
        await second.aclose()

    async def fail_over(self) -> None:
        """What the replica has not got by now is lost."""
        redis = Redis.from_url(self.replica.url)
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        await redis.aclose()
        await self.primary.kill()
        self.door.port_behind = self.replica.port
        self.door.cut()


@asynccontextmanager
async def pair(processes: Processes, folder: Path) -> AsyncIterator[Pair]:
    primary = valkey(processes, folder / "primary")
    primary.start()
    async with Proxy(primary.port) as line, Proxy(primary.port) as door:
        replica = valkey(processes, folder / "replica")
        replica.argv += ["--replicaof", "127.0.0.1", str(line.port)]
        await asyncio.to_thread(replica.start)
        yield Pair(primary, replica, line, door)


def counted(name: str) -> str:
    """The scripts with the one change: an epoch is the one before and one more."""
    by_the_clock = "return math.max(epoch + 1, now)"
    source = ORIGINAL(name)
    assert source.count(by_the_clock) == 1, "the scripts take their epochs in another way now"
    return source.replace(by_the_clock, "return epoch + 1")


ORIGINAL = lua.source


async def lossy_failover(source: Callable[[str], str]) -> tuple[list[str], int]:
    """The second attempt is written to the primary and read by all; the replica, which never got it, takes over, and a
    third attempt is made there."""
    async with AsyncExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="rejoin-chaos-")))
        processes = Processes(folder)
        opened.callback(processes.end_all)
        two = await opened.enter_async_context(pair(processes, folder))
        url = f"redis://127.0.0.1:{two.door.port}/0"
        stack = Stack(processes, {"REDIS_URL": url, "REJOIN_KEY_PREFIX": PREFIX, "REJOIN_LEASE_SECONDS": "60"})
        opened.push_async_callback(stack.http.aclose)
        stack.env["OPENAI_BASE_URL"] = "http://127.0.0.1:9/v1"  # any name is a model; nobody asks it
        api = await stack.api()
        redis = Redis.from_url(url)
        opened.push_async_callback(redis.aclose)
        crowd = await opened.enter_async_context(readers([api.url]))
        with patch.object(lua, "source", source):
            settings = Settings(_env_file=None, redis_url=url, key_prefix=PREFIX, lease_seconds=60)
            log = EventLog(redis, settings)
        await _story(log, crowd, two)
        return await crowd.violations(redis, lost_a_tail=True)


async def _story(log: EventLog, crowd: Readers, two: Pair) -> None:
    first = await _attempt(log, crowd.generation_id, 0, _said(1, 0, 6))
    await crowd.have_heard("p1.1.5 ")
    await two.replicated(log.keys.log(crowd.generation_id))
    two.line.freeze()
    await _lose_worker(log, crowd.generation_id, first)
    await _attempt(log, crowd.generation_id, first, _said(2, 0, 4))
    await crowd.have_heard("p1.2.3 ")
    await two.fail_over()
    await _lose_worker(log, crowd.generation_id, first)
    await _attempt(log, crowd.generation_id, first, [*_said(3, 0, TOKENS), COMPLETED], ends=True)


async def _lose_worker(log: EventLog, generation_id: str, epoch: int) -> None:
    async def look() -> bool:
        try:
            await log.reap(generation_id, expire_epoch=epoch)
            return True
        except AWAY:  # the door leads elsewhere now
            return False

    await wait_until(look, timeout=20)


async def _attempt(log: EventLog, generation_id: str, epoch: int, events: list[bytes], *, ends: bool = False) -> int:
    """Claim, write, and stop there; the epoch it had."""
    claim = await log.claim(Hint(generation_id, epoch, 1), random.randbytes(16).hex())
    assert claim is not None, "the claim was refused"
    answers = await log.append([Append(generation_id, claim.epoch, 1, events, "completed" if ends else None)])
    assert answers[0].code == "OK", answers
    return claim.epoch


async def counting_epochs() -> tuple[list[str], int]:
    return await lossy_failover(counted)


async def time_epochs() -> tuple[list[str], int]:
    return await lossy_failover(ORIGINAL)


CONTROLS = (
    ("naive writer: XADD *, no fence", naive_writer, True),
    ("counting epochs, failover that lost the tail", counting_epochs, True),
    ("Rejoin's epochs, the same failover", time_epochs, False),
)
