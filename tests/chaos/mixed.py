"""The mixed run: clients of every dialect read while everything goes wrong, and a checker reads what they heard.

Two apis, three workers and a Valkey with an append-only file are killed, stopped, frozen and cut off by a seeded
schedule; what dies is started again. Two clients of different dialects read each generation. No figure depends on
speed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import redis as sync_redis
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.auth import idempotent_id
from shared.config import Settings
from shared.redis import Keys
from tests.chaos.checker import History, Truth, answer, check, count_events
from tests.chaos.faults import KINDS, Fault, Town, do, schedule, town
from tests.chaos.house import house
from tests.chaos.report import Row, Say
from tests.chaos.swarm import CLIENTS, Question, Swarm
from tests.conftest import key_leaks
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

APIS, WORKERS = 2, 3
PAIRS = list(itertools.combinations(CLIENTS, 2))
FAULTS_AT_ONCE = 3
READER_SECONDS = 300.0  # in which a client must have learned how its generation ended
SETTINGS = {
    "REJOIN_LEASE_SECONDS": "1",
    "REJOIN_CLAIM_GRACE_SECONDS": "2",
    "REJOIN_MAX_ATTEMPTS": "100",  # failing honestly is not what is looked for
    "REJOIN_DRAIN_SECONDS": "1",
    "REJOIN_PING_SECONDS": "1",
    "REJOIN_FIRST_TOKEN_SECONDS": "20",
}


@dataclass(frozen=True)
class Scale:
    """How much of it. `at_once`: generations running side by side. `pause`: seconds between two faults."""

    generations: int
    faults: int
    at_once: int
    pause: float


FULL = Scale(generations=1000, faults=500, at_once=40, pause=1.2)
QUICK = Scale(generations=60, faults=30, at_once=20, pause=0.9)


class Numbered(Upstream):
    """A model's server whose every token says whose it is. The model's name is its script: `any-<tokens>-<ms>`."""

    def script_of(self, model: str, hit: int) -> Script:
        _, tokens, milliseconds = model.split("-")
        return _Said(count=int(tokens), pace_seconds=int(milliseconds) / 1000, hit=hit)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said(Script):
    hit: int

    def outputs(self, seed: str) -> list[str | bytes]:
        return [f"{token} " for token in answer(seed, self.hit, self.count).split()]


@dataclass
class Findings:
    """What the run has seen so far."""

    violations: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    readers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken_faults: list[str] = field(default_factory=list)
    started: int = 0
    events: int = 0
    attempts: int = 0
    lost_tails: int = 0

    @property
    def ended(self) -> int:
        return self.statuses.total()


async def run(
    say: Say,
    quick: bool,
    seed: int | None = None,
    generations: int | None = None,
    faults: int | None = None,
    keep: Path | None = None,
) -> list[Row]:
    """The whole of it; `generations` and `faults` are both reached, whichever takes longer."""
    plan = QUICK if quick else FULL
    scale = Scale(generations or plan.generations, faults or plan.faults, plan.at_once, plan.pause)
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    say(f"seed {seed}: {scale.generations} generations, 2 readers each, {scale.faults} faults")
    return await mixed(say, scale, seed, keep)


async def mixed(say: Say, scale: Scale, seed: int, keep: Path | None = None) -> list[Row]:
    """The rows of one run. Violations are said as they are found."""
    async with (
        house(SETTINGS, apis=0, workers=0, upstream=Numbered(), folder=keep) as home,
        town(home, apis=APIS, workers=WORKERS) as here,
    ):
        swarm = Swarm(lambda: [place.url for place in here.apis], random.Random(f"readers {seed}"))
        findings = Findings()
        run = _Run(home.stack.env, Redis.from_url(home.store.url), swarm, here, findings, say)
        telling = asyncio.create_task(_tell(say, findings, here, scale))
        hurting = asyncio.create_task(_hurt(here, schedule_of(seed, scale), findings))
        try:
            await run.generate(random.Random(f"generations {seed}"), scale, hurting)
            await hurting
            sockets = await _open_sockets(home.upstream)
            leaks = await asyncio.to_thread(_leaks, home.store.url, home.stack.env["REJOIN_KEY_PREFIX"])
        finally:
            for task in (telling, hurting):
                task.cancel()
            await asyncio.gather(telling, hurting, return_exceptions=True)
            await run.redis.aclose()
        return _rows(scale, findings, swarm, here, sockets, leaks)


def schedule_of(seed: int, scale: Scale) -> list[Fault]:
    return schedule(seed, scale.faults, workers=WORKERS, apis=APIS, pause=scale.pause)


@dataclass
class _Run:
    """The generations of one run, and how each is checked."""

    env: dict[str, str]
    redis: Redis
    swarm: Swarm
    town: Town
    findings: Findings
    say: Say

    async def generate(self, chance: random.Random, scale: Scale, hurting: asyncio.Task[None]) -> None:
        """Keep so many generations going until there were enough, and all faults are done."""
        gate = asyncio.Semaphore(scale.at_once)

        async def one(number: int) -> None:
            async with gate:
                await self._one(number, random.Random(chance.random()))

        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                if number >= scale.generations and hurting.done():
                    return
                async with gate:  # nobody waits in line: the next one begins when there is room
                    pass
                self.findings.started += 1
                group.create_task(one(number))
                await asyncio.sleep(0.01)

    async def _one(self, number: int, chance: random.Random) -> None:
        tokens, milliseconds = chance.randrange(1, 160), chance.choice((1, 5, 20, 30))
        question = Question(f"mixed-{tokens}-{milliseconds}", f"p{number}", f"key-{number}")
        generation_id = idempotent_id(Settings(_env_file=None), "local", question.key)
        readers = [
            self._read(question, generation_id, History(f"r{n}", dialect), chance.choice((0, 0, chance.uniform(0, 4))))
            for n, dialect in enumerate(PAIRS[number % len(PAIRS)])
        ]
        began = time.monotonic()
        histories = await asyncio.gather(*readers)
        truth = await truth_of(self.redis, self.env["REJOIN_KEY_PREFIX"], question.prompt, generation_id, tokens)
        found = check(truth, histories)
        if found and any(moment > began for moment in self.town.store_deaths):
            found = check(replace(truth, lost_a_tail=True), histories)
            self.findings.lost_tails += not found
        for violation in found:
            self.say(f"VIOLATION {violation}")
        self.findings.violations += found
        self.findings.statuses[_status(truth)] += 1
        self.findings.readers.update(history.dialect for history in histories)
        self.findings.events += count_events(histories) + len(truth.entries)
        self.findings.attempts += len(truth.attempts)

    async def _read(self, question: Question, generation_id: str, history: History, late: float) -> History:
        await asyncio.sleep(late)
        return await self.swarm.read(question, generation_id, history, READER_SECONDS)


async def truth_of(
    redis: Redis, prefix: str, prompt: str, generation_id: str, tokens: int, lost_a_tail: bool = False
) -> Truth:
    """The log as it stands in Valkey, which may be away at this moment."""
    keys = Keys(prefix)

    async def look() -> Truth | None:
        try:
            found = await redis.xread({keys.log(generation_id): "0-0"})  # XRANGE may have been made to give entries
            status = await redis.hget(keys.order(generation_id), "status")  # type: ignore[misc]
        except (RedisError, OSError):
            return None
        entries = found[0][1] if found else []
        log = [(entry_id.decode(), fields[b"data"]) for entry_id, fields in entries]
        return Truth(prompt, tokens, log, (status or b"").decode(), lost_a_tail)

    return await wait_until(look, timeout=60, every=0.2)


def _status(truth: Truth) -> str:
    return f"failed ({truth.failure['code']})" if truth.failure else truth.status


async def _hurt(town: Town, faults: Sequence[Fault], findings: Findings) -> None:
    """The schedule, a few faults at a time."""
    gate = asyncio.Semaphore(FAULTS_AT_ONCE)

    async def one(fault: Fault) -> None:
        try:
            await do(fault, town)
            findings.faults[fault.kind] += 1
        except AssertionError as error:  # a process that would not end, a server that would not start
            findings.broken_faults.append(f"{fault}: {error}")
        finally:
            gate.release()

    async with asyncio.TaskGroup() as group:
        for fault in faults:
            await asyncio.sleep(fault.pause)
            await gate.acquire()
            group.create_task(one(fault))


async def _tell(say: Say, findings: Findings, town: Town, scale: Scale) -> None:
    while True:
        await asyncio.sleep(10)
        say(
            f"{findings.ended} of {findings.started} generations ended, {findings.faults.total()} of {scale.faults} "
            f"faults, {town.restarts} restarts, {findings.events} events checked, "
            f"{len(findings.violations)} violations"
        )


async def _open_sockets(upstream: Upstream) -> int:
    """Those of the model's server that are still open well after everything has ended."""
    with suppress(AssertionError):
        await wait_until(lambda: not upstream.open_sockets, timeout=30)
    return upstream.open_sockets


def _leaks(url: str, prefix: str) -> list[str]:
    client = sync_redis.Redis.from_url(url)
    try:
        return key_leaks(client, prefix)
    finally:
        client.close()


def _rows(scale: Scale, findings: Findings, swarm: Swarm, town: Town, open_sockets: int, leaks: list[str]) -> list[Row]:
    def row(what: str, figure: object, goal: str, met: bool = True) -> Row:
        return Row("mixed", what, str(figure), goal, met)

    readers, faults = findings.readers, findings.faults
    ended_by_themselves, statuses = town.ended_by_themselves, findings.statuses
    open_ends = [status for status in statuses if status not in ("completed", "cancelled") and "failed" not in status]
    return [
        row("generations", findings.ended, f"at least {scale.generations}", findings.ended >= scale.generations),
        *(row(f"readers: {dialect}", readers[dialect], "some", readers[dialect] > 0) for dialect in CLIENTS),
        *(row(f"fault: {kind}", faults[kind], "some", faults[kind] > 0) for kind in KINDS),
        row("faults", faults.total(), f"at least {scale.faults}", faults.total() >= scale.faults),
        row("faults that could not be done", _listed(findings.broken_faults), "none", not findings.broken_faults),
        row("connections of readers", swarm.connections, ""),
        row("attempts", findings.attempts, ""),
        *(row(f"ended as: {status or 'lost'}", count, "") for status, count in sorted(statuses.items())),
        row("logs that lost their newest words with the store", findings.lost_tails, ""),
        row("generations without an end", _listed(open_ends), "none", not open_ends),
        row("processes that ended by themselves", _listed(ended_by_themselves), "none", not ended_by_themselves),
        row("sockets open at the model's server", open_sockets, "0", open_sockets == 0),
        row("keys that do not expire", _listed(leaks), "none", not leaks),
        row("events checked", findings.events, ""),
        row("violations", len(findings.violations), "0", not findings.violations),
    ]


def _listed(things: Sequence[str]) -> str:
    return "; ".join(things)[:200] or "none"
