"""The scripts against the model: any order of steps, any lost tail, any time between them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import fakeredis._helpers
import fakeredis._socket._base
import fakeredis.commands_mixins.server_mixin
import hypothesis.strategies as st
import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared import lua
from shared.config import Settings
from shared.errors import Conflict, NotFound
from shared.event_log import Append, EventLog, Hint
from shared.events import Cancelled, Completed, Entry, Failed, TextDelta, encode, fold, outcome
from shared.prompt import Prompt
from shared.redis import Client, Keys
from tests.unit.log_model import Model, Order, check_log

T = TypeVar("T")

PARTITIONS = ("a", "b")
PROVIDER = "demo"
PROMPTS = {name: Prompt(model="demo", messages=[{"role": "user", "content": name}]) for name in ("this", "that")}
WORDS = ("a", "é", "\n\n", "\r\n", "\u2028", "\x00", "🦜", '"}', "\n0-1 {}")
SETTINGS = Settings(_env_file=None, log_retention_seconds=100_000, order_retention_seconds=300_000)
START_MS = 1_790_000_000_000
FAILOVER_MS = 100  # epochs may run ahead of the clock by one for each step within a millisecond; no failover is faster

RUN_ID = "redis.pcall('INFO', 'server')"

numbers = st.integers(0, 9)
TERMINALS = (
    Completed("stop"),
    Completed("length"),
    Failed("upstream_error", "the upstream said no", retryable=False),
    Cancelled("caller"),
)


@dataclass
class Attempt:
    """What a worker remembers of one attempt: its numbered events, the start among them, until their end is durable."""

    generation_id: str
    epoch: int
    memory: list[bytes]
    nonce: str
    final: str | None = None


@dataclass(frozen=True)
class Sending:
    """How one append is drawn: which attempt, what it says next, and from how far back it sends."""

    which: int
    words: list[str]
    ends: Any
    back: int
    at_most: int
    wrong_epoch: int = 0


sendings = st.builds(
    Sending,
    which=numbers,
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3) | st.just([]),
    ends=st.sampled_from([*[None] * 28, *TERMINALS]),
    back=st.integers(0, 4),
    at_most=st.sampled_from([6, 6, 3, 2, 1, 0]),
    wrong_epoch=st.sampled_from([0, 0, 0, 0, 0, 0, 10**12, -(10**12)]),
)


class LogMachine(RuleBasedStateMachine):
    """Runs each step through the scripts and through the model, and compares answers, pushes and all that is stored."""

    model_type: ClassVar[type[Model]] = Model
    prefix: ClassVar[str] = "machine"
    ttl_slack_ms: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.settings = SETTINGS.model_copy(update={"key_prefix": self.prefix})
        self.model = self.model_type(self.settings, START_MS)
        self.ids: list[str] = []
        self.attempts: list[Attempt] = []
        self.hints: list[Hint] = []
        self.saved: tuple[Any, dict[str, bytes]] | None = None
        self.said: dict[tuple[str, bytes], bytes] = {}  # what a reader was ever shown at a position
        self.checked: dict[str, tuple[str, str, list[Entry]]] = {}
        self.no_earlier_than = 0
        self.nonces = itertools.count(1)
        self.keys = Keys(self.prefix)
        self.runner = asyncio.Runner()
        self.run(self.open())

    # --- what a Redis to test on must bring

    async def connect(self) -> Client:
        raise NotImplementedError

    def event_log(self) -> EventLog:
        """The run id of the server is what a key says: a failover changes it."""
        source_of, telling = lua.source, f"'run_id:' .. redis.call('GET', '{self.server_key}')"
        with patch.object(lua, "source", lambda name: source_of(name).replace(RUN_ID, telling)):
            return EventLog(self.redis, self.settings)

    @property
    def server_key(self) -> str:
        return f"server-of-{self.prefix[1:]}"

    async def set_clock(self) -> None:
        """Make the time of Redis, the times to live included, what the model says it is."""
        raise NotImplementedError

    # --- the machinery

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.get_loop().run_until_complete(coroutine)

    async def open(self) -> None:
        self.redis = await self.connect()
        await self.set_clock()
        await self.redis.set(self.server_key, self.model.server)
        self.log = self.event_log()
        self.pubsub = self.redis.pubsub()
        await self.pubsub.psubscribe(f"{self.prefix}:push:*", self.keys.nudge)
        await self.published()

    async def close_all(self) -> None:
        await self.pubsub.aclose()
        await self.redis.aclose(close_connection_pool=True)

    def teardown(self) -> None:
        self.run(self.close_all())
        self.runner.close()

    async def published(self) -> tuple[list[bytes], list[bytes]]:
        """What was pushed, and who was nudged, since the last look: a PING on the same connection comes behind it."""
        pushed: list[bytes] = []
        nudged: list[bytes] = []
        await self.pubsub.ping()
        while True:
            message = await self.pubsub.get_message(timeout=5)
            assert message is not None, "the subscription answers"
            if message["type"] == "pong":
                return pushed, nudged
            if message["type"] == "pmessage":
                (nudged if message["channel"].decode() == self.keys.nudge else pushed).append(message["data"])

    def generation(self, which: int, wanted: Callable[[Order], bool]) -> str:
        """Mostly one that is wanted, the newest first; sometimes any."""
        fit = [name for name, order in self.model.orders.items() if wanted(order)] if which < 8 else self.ids
        fit = fit or self.ids
        return fit[-1 - which % len(fit)]

    def attempt(self, which: int) -> Attempt:
        """Mostly one that holds its generation, the newest first; sometimes any."""
        held = {(name, order.epoch) for name, order in self.model.orders.items() if order.held}
        running = [attempt for attempt in self.attempts if (attempt.generation_id, attempt.epoch) in held]
        fit = running if which < 7 and running else self.attempts
        return fit[-1 - which % min(len(fit), 5)]

    def hint(self, generation_id: str) -> Hint:
        order = self.model.orders.get(generation_id)
        return Hint(generation_id, order.epoch if order else 0, order.hints if order else 1)

    # --- the caller's side

    @initialize(cancel=st.booleans())
    def first(self, cancel: bool) -> None:
        self.ask(cancel, claimed=True)

    @rule(cancel=st.booleans(), claimed=st.booleans())
    def ask(self, cancel: bool, claimed: bool) -> None:
        """A new generation; a few at a time, so that much happens to each."""
        if sum(not order.ended for order in self.model.orders.values()) < 3:
            number = len(self.ids) + 1
            self.ids.append(f"{number}{PARTITIONS[number % 2]}".zfill(32))
            self._create(self.ids[-1], "this", cancel)
            self.check()
            if claimed:
                self.claim(0, continued=False)

    @rule(which=numbers, request=st.sampled_from(["this", "that"]), cancel=st.booleans())
    def ask_again(self, which: int, request: str, cancel: bool) -> None:
        self._create(self.generation(which, lambda order: True), request, cancel)

    def _create(self, generation_id: str, request: str, cancel: bool) -> None:
        expected = self.model.create(generation_id, request, model="demo", cancel_on_disconnect=cancel)
        creating = self.log.create(
            generation_id,
            tenant="t",
            provider=PROVIDER,
            prompt=PROMPTS[request],
            on_disconnect="cancel" if cancel else "continue",
        )
        try:
            answer = "CREATED" if self.run(creating).is_new else "SAME"
        except Conflict as conflict:
            answer = conflict.code
        assert answer == expected
        if answer == "CREATED":  # perhaps anew, after all of it expired or its creation was lost
            self.said.pop((generation_id, b"0-1"), None)

    @precondition(lambda self: self.attempts)
    @rule(which=numbers, event=st.sampled_from(TERMINALS), how=st.sampled_from(["close", "close if held", "delete"]))
    def end(self, which: int, event: Any, how: str) -> None:
        attempt = self.attempt(which)
        match how:
            case "close":
                self._close(self.generation(which, lambda order: not order.ended), event, None)
            case "close if held":
                self._close(attempt.generation_id, event, attempt.epoch)
            case "delete":
                self._delete(self.generation(which, lambda order: order.ended))

    def _close(self, generation_id: str, event: Any, held_at: int | None) -> None:
        expected = self.model.close(generation_id, event, held_at)
        answer: str | None = None
        with suppress(NotFound):
            answer = self.run(self.log.close(generation_id, event, held_at=held_at))
        assert answer == expected

    def _delete(self, generation_id: str) -> None:
        expected, found = self.model.delete(generation_id), False
        with suppress(NotFound):
            self.run(self.log.delete(generation_id))
            found = True
        assert found == expected

    @rule(which=numbers)
    def attend(self, which: int) -> None:
        generation_id = self.generation(which, lambda order: order.attended_until is not None)
        self.model.attend(generation_id)
        self.run(self.log.attend([generation_id]))

    # --- the worker's side

    @rule(which=numbers, continued=st.booleans())
    def claim(self, which: int, continued: bool) -> None:
        generation_id = self.generation(which, lambda order: not order.held and not order.ended)
        order = self.model.orders.get(generation_id)
        tail = order.tail.id.decode() if continued and order and order.tail else ""
        self._claim(self.hint(generation_id), f"nonce-{next(self.nonces)}", tail)

    @precondition(lambda self: self.attempts)
    @rule(
        which=numbers,
        by=st.sampled_from(["another epoch", "an old hint", "the same nonce"]),
        epoch=st.sampled_from([-1, 0, 1]),
        continues=st.sampled_from(["", "0-1", f"{START_MS}-0"]),
    )
    def claim_otherwise(self, which: int, by: str, epoch: int, continues: str) -> None:
        """Mostly in vain: too late, again, or to go on from an entry that is not the tail."""
        nonce = f"nonce-{next(self.nonces)}"
        hint = self.hint(self.generation(which, lambda order: not order.held and not order.ended))
        if by == "an old hint" and self.hints:
            hint = self.hints[-1 - which % len(self.hints)]
        if by == "the same nonce":
            attempt = self.attempt(which)
            hint, nonce = self.hint(attempt.generation_id), attempt.nonce
        self._claim(hint._replace(epoch=max(0, hint.epoch + epoch)), nonce, continues)

    def _claim(self, hint: Hint, nonce: str, continues: str) -> None:
        expected = self.model.claim(hint, nonce, PROVIDER, continues)
        claim = self.run(self.log.claim(hint, nonce, continues=continues))
        if expected is None or claim is None:
            assert claim is None and expected is None
            return
        assert (claim.epoch, claim.attempt) == (expected.epoch, expected.attempt)
        assert (claim.seconds_left, claim.continued) == (expected.seconds_left, expected.continued)
        order = self.model.orders[hint.generation_id]
        assert claim.prompt == PROMPTS[order.request].to_json()
        if self.model.pushed:
            assert order.tail is not None
            self.attempts.append(Attempt(hint.generation_id, claim.epoch, [order.tail.data], nonce))

    @precondition(lambda self: self.attempts)
    @rule(batches=st.lists(st.lists(sendings, min_size=1, max_size=3), min_size=1, max_size=4))
    def append(self, batches: list[list[Sending]]) -> None:
        """Several generations in one step, several steps in a row."""
        for batch in batches:
            self._append([self._numbered(sending) for sending in batch])

    @precondition(lambda self: self.attempts)
    @rule(which=numbers, words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), back=st.integers(0, 2))
    def stream(self, which: int, words: list[str], back: int) -> None:
        """Token after token, as a writer does where nothing goes wrong, or each of them more than once."""
        for word in words:
            self._append([self._numbered(Sending(which, [word], None, back, at_most=3))])

    def _append(self, appends: list[Append]) -> None:
        expected = [self.model.append(one) for one in appends]
        assert self.run(self.log.append(appends)) == expected
        self.check()

    def _numbered(self, sending: Sending) -> Append:
        """Number what an attempt says next, once and for ever, and send from some way back."""
        attempt = self.attempt(sending.which)
        memory = attempt.memory
        first = max(1, len(memory) - sending.back)
        if attempt.final is None:
            name = f"{attempt.generation_id[-2:]}/{attempt.epoch}/"
            memory += [encode(TextDelta(f"{name}{len(memory) + n} {word}")) for n, word in enumerate(sending.words)]
            if sending.ends is not None:
                memory.append(encode(sending.ends))
                attempt.final = outcome(sending.ends)
        events = memory[first : first + sending.at_most]
        final = attempt.final if events and first + len(events) == len(memory) else None
        return Append(attempt.generation_id, attempt.epoch + sending.wrong_epoch, first, events, final)

    @precondition(lambda self: self.attempts)
    @rule(which=numbers)
    def heal(self, which: int) -> None:
        """What a writer does about a gap: ask with an empty append, send everything after the last seq from memory."""
        attempt = self.attempt(which)
        probe = Append(attempt.generation_id, attempt.epoch, len(attempt.memory))
        expected = self.model.append(probe)
        (answer,) = self.run(self.log.append([probe]))
        assert answer == expected
        if answer.code == "GAP":
            self.check()
            rest = attempt.memory[answer.last + 1 :]
            again = Append(attempt.generation_id, attempt.epoch, answer.last + 1, rest, attempt.final)
            expected = self.model.append(again)
            assert self.run(self.log.append([again])) == [expected]

    @precondition(lambda self: self.attempts)
    @rule(which=numbers, deploys=st.sampled_from([0, 1, 1, 14]))
    def lose_the_worker(self, which: int, deploys: int) -> None:
        """Its supervisor saw it die; or it was stopped; or one after the other was, each after another claim."""
        attempt = self.attempt(which)
        if not deploys:
            expected = self.model.reap(attempt.generation_id, attempt.epoch)
            self._hinted(self.run(self.log.reap(attempt.generation_id, expire_epoch=attempt.epoch)), expected)
            return
        epoch = attempt.epoch
        while self._release(attempt.generation_id, epoch) and (deploys := deploys - 1):
            self.check()
            self._claim(self.hint(attempt.generation_id), f"nonce-{next(self.nonces)}", "")
            self.check()
            epoch = self.hint(attempt.generation_id).epoch

    def _release(self, generation_id: str, epoch: int) -> bool:
        expected = self.model.release(generation_id, epoch)
        self._hinted(self.run(self.log.release(generation_id, epoch)), expected)
        return expected is not None

    # --- the reaper's side

    @rule(partition=st.sampled_from(PARTITIONS))
    def reap_what_is_due(self, partition: str) -> None:
        expected = self.model.due(partition)
        assert self.run(self.log.due(partition)) == expected
        for generation_id in expected:
            self._reap(generation_id)

    @rule(which=numbers, late_ms=st.sampled_from([-1, 0, 1]))
    def reap(self, which: int, late_ms: int) -> None:
        """A worker died, or a hint was lost; or not yet."""
        generation_id = self.generation(which, lambda order: order.lease_until is not None)
        order = self.model.orders.get(generation_id)
        if order is not None and order.lease_until is not None and order.lease_until + late_ms > self.model.now:
            self._tick(order.lease_until - self.model.now + late_ms)
        self._reap(generation_id)

    def _reap(self, generation_id: str) -> None:
        expected = self.model.reap(generation_id)
        self._hinted(self.run(self.log.reap(generation_id)), expected)

    def _hinted(self, hint: Hint | None, expected: Hint | None) -> None:
        assert hint == expected
        if hint is not None:
            self.hints.append(hint)

    # --- what nobody asked for

    @rule(ms=st.sampled_from([1, 350, 900, 1_001, 3_001, 10_001]))
    def a_moment_passes(self, ms: int) -> None:
        self._tick(ms)

    @rule(ms=st.sampled_from([-1, -700, -5_000, 61_000, 61_000, 3_600_001, 86_400_007, 200_000_003]))
    def the_clock_jumps(self, ms: int) -> None:
        """Not back to where a failover lost epochs: that it takes longer than clocks differ is the one assumption."""
        self._tick(max(ms, min(0, self.no_earlier_than - self.model.now)))

    def _tick(self, ms: int) -> None:
        self.model.tick(ms)
        self.run(self.set_clock())

    @rule()
    def the_replica_catches_up(self) -> None:
        """What is stored at this moment survives the next failover."""
        self.saved = self.model.snapshot(), self.run(self._dump())

    @precondition(lambda self: self.saved is not None)
    @rule(ms=st.sampled_from([0, 3_000, 20_000]))
    def failover_loses_the_tail(self, ms: int) -> None:
        assert self.saved is not None
        snapshot, dumps = self.saved
        latest = max((max(epochs) for epochs in self.model.epochs.values()), default=START_MS)
        self.model.tick(max(0, latest - self.model.now) + FAILOVER_MS + ms)
        self.model.restore(snapshot)
        self.no_earlier_than = self.model.now
        self.run(self.set_clock())
        self.run(self._restore(dumps))

    def all_keys(self) -> list[str]:
        generations = [key for generation_id in self.ids for key in self._own_keys(generation_id)]
        return generations + [
            key(partition) for partition in PARTITIONS for key in (self.keys.leases, self.keys.reaper)
        ]

    def _own_keys(self, generation_id: str) -> tuple[str, str]:
        return self.keys.order(generation_id), self.keys.log(generation_id)

    async def _dump(self) -> dict[str, bytes]:
        dumps = {key: await self.redis.dump(key) for key in self.all_keys()}
        return {key: dump for key, dump in dumps.items() if dump is not None}

    async def _restore(self, dumps: dict[str, bytes]) -> None:
        await self.redis.delete(*self.all_keys())
        await self.redis.set(self.server_key, self.model.server)
        lives_until = self.lives_until()
        for key, dump in dumps.items():
            if key not in self.generation_keys():
                await self.redis.restore(key, 0, dump)
            elif key in lives_until:
                await self.redis.restore(key, max(1, lives_until[key] - self.model.now), dump)

    def generation_keys(self) -> list[str]:
        return [key for generation_id in self.ids for key in self._own_keys(generation_id)]

    def lives_until(self) -> dict[str, int]:
        """The keys that must be there, and for how long."""
        lives: dict[str, int] = {}
        for generation_id, order in self.model.orders.items():
            order_key, log_key = self._own_keys(generation_id)
            lives[order_key] = order.lives_until
            if order.entries is not None:
                lives[log_key] = order.log_lives_until
        return lives

    # --- what must hold after each step

    @invariant()
    def check(self) -> None:
        """Every entry was pushed once, behind its predecessor; what is stored is what the protocol says."""
        pushed, nudged = self.run(self.published())
        assert (pushed, nudged) == (self.model.pushed, self.model.nudged)
        for push in pushed:
            head, *lines = push.split(b"\n")
            for line in lines:
                entry_id, _, data = line.partition(b" ")
                at = head.split(b" ")[0].decode(), entry_id
                assert self.said.setdefault(at, data) == data, "no position ever says two things"
        self.model.pushed.clear()
        self.model.nudged.clear()
        self.run(self._check_stored())

    async def _check_stored(self) -> None:
        async with self.redis.pipeline(transaction=False) as pipe:
            for partition in PARTITIONS:
                pipe.zrange(self.keys.leases(partition), 0, -1, withscores=True)
            for generation_id in self.ids:
                order_key, log_key = self._own_keys(generation_id)
                pipe.hmget(order_key, "status", "epoch", "hints", "deleted", "prompt")
                pipe.xrange(log_key)
                pipe.pttl(order_key)
                pipe.pttl(log_key)
            replies = iter(await pipe.execute())
        for partition in PARTITIONS:
            leases = {name.decode(): int(score) for name, score in next(replies)}
            assert leases == self.model.leases(partition)
        lives_until = self.lives_until()
        for generation_id in self.ids:
            self._check_generation(generation_id, next(replies), next(replies))
            for key in self._own_keys(generation_id):
                self._check_life(next(replies), lives_until.get(key))

    def _check_generation(self, generation_id: str, stored: list[bytes | None], log: list[Any]) -> None:
        order = self.model.orders.get(generation_id)
        if order is None:
            assert (stored, log) == ([None] * 5, [])
            return
        status, epoch, hints, deleted, prompt = ((part or b"").decode() for part in stored)
        assert (status, int(epoch), int(hints)) == (order.status, order.epoch, order.hints)
        assert (deleted == "1", prompt == "") == (order.deleted, order.deleted), "a tombstone forgets the words"
        entries: list[Entry] = log
        assert entries == (order.entries or [])
        if entries and self.checked.get(generation_id) != (status, epoch, entries):
            self.checked[generation_id] = status, epoch, entries
            check_log(entries, status=status, epoch=int(epoch))
            assert fold(entries).text == order.text

    def _check_life(self, left: int, lives_until: int | None) -> None:
        assert (left == -2) == (lives_until is None), "nothing is there that should not be, nothing is missing"
        if lives_until is not None:
            assert left != -1, "every key of a generation has a time to live"
            assert abs(lives_until - self.model.now - left) <= self.ttl_slack_ms


class FakeTime(ModuleType):
    """Stands where fakeredis looks for the module `time`: its clock is set by hand."""

    def __init__(self) -> None:
        super().__init__("time")
        self.now_ms = START_MS

    def time(self) -> float:
        return self.now_ms / 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class FakeLogMachine(LogMachine):
    """On fakeredis, whose clock is ours."""

    def __init__(self) -> None:
        self.time = FakeTime()
        asking = (fakeredis._helpers, fakeredis._socket._base, fakeredis.commands_mixins.server_mixin)
        self.patches = [patch.object(module, "time", self.time) for module in asking]
        for each in self.patches:
            each.start()
        super().__init__()

    async def connect(self) -> Client:
        return FakeAsyncRedis(server=FakeServer())

    async def set_clock(self) -> None:
        self.time.now_ms = self.model.now

    def teardown(self) -> None:
        super().teardown()
        for each in self.patches:
            each.stop()


def options(examples: int, **more: Any) -> settings:
    """The same examples at every run, so that the fast suite stays fast and tells the same story twice."""
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )


def test_the_scripts_keep_the_protocol_whatever_happens_in_whatever_order() -> None:
    """Scripts and model agree after every step, and every log holds the invariants."""
    run_state_machine_as_test(FakeLogMachine, settings=options(80))


def test_epochs_that_only_count_are_found_out() -> None:
    """The negative control: without time in them, a failover that loses the tail hands an epoch out twice."""

    class CountingModel(Model):
        def epoch_after(self, epoch: int) -> int:
            return epoch + 1

    class CountingMachine(FakeLogMachine):
        model_type = CountingModel

        def event_log(self) -> EventLog:
            timed = "math.max(epoch + 1, now)"
            script_of = lua.source
            assert timed in script_of("claim")
            with patch.object(lua, "source", lambda name: script_of(name).replace(timed, "epoch + 1")):
                return super().event_log()

    with pytest.raises(AssertionError, match="was handed out twice"):
        run_state_machine_as_test(
            CountingMachine, settings=options(100, phases=[Phase.generate], report_multiple_bugs=False)
        )
