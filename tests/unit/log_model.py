"""The log protocol once more, in plain Python: what every script must answer, store and push. Knows no Redis.

The state machines run the scripts and this model side by side. It is written to be read against docs/protocol.md,
not against the Lua: where the two differ, one of them is wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from shared.config import Settings
from shared.event_log import MAX_RELEASES, Answer, Append, Hint
from shared.events import (
    Cancelled,
    Entry,
    Failed,
    Queued,
    Started,
    Terminal,
    TextDelta,
    decode,
    encode,
    fold,
    is_terminal,
    outcome,
)
from shared.redis import ALIVE_MS

ENDED = frozenset({"completed", "failed", "cancelled", "incomplete"})
FAILURES = {
    "deadline_exceeded": "the generation ran longer than REJOIN_MAX_GENERATION_SECONDS",
    "queue_timeout": "no worker was free within REJOIN_MAX_QUEUE_SECONDS",
}
LOST = "every worker that tried was lost; see REJOIN_MAX_ATTEMPTS"
LOST_OR_STOPPED = "every worker that tried was lost or stopped; see REJOIN_MAX_ATTEMPTS"


@dataclass
class Order:
    """One order, its log and its lease. `entries` is None once the log is gone; times are milliseconds of Redis."""

    request: str
    entries: list[Entry] | None
    queue_until: int
    touched: int
    lives_until: int
    log_lives_until: int
    lease_until: int | None
    attended_until: int | None = None
    deadline: int | None = None
    epoch: int = 0
    nonce: str = ""
    status: str = "queued"
    attempts: int = 0
    charged: int = 0
    releases: int = 0
    misses: int = 0
    hints: int = 1
    deleted: bool = False
    continued: bool = False
    server: int = 0  # the one that took the newest claim, or the order
    text: str = ""

    @property
    def held(self) -> bool:
        return self.nonce != ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def tail(self) -> Entry | None:
        return self.entries[-1] if self.entries else None


@dataclass(frozen=True)
class Claimed:
    """What a successful claim answers."""

    epoch: int
    attempt: int
    seconds_left: float
    continued: bool


@dataclass
class Model:
    """All generations of one deployment. `pushed` and `nudged` collect what this step must publish."""

    settings: Settings
    now: int
    server: int = 1  # which one it is; a failover makes it another
    orders: dict[str, Order] = field(default_factory=dict)
    stray_leases: dict[str, int] = field(default_factory=dict)  # of orders that expired before anyone looked
    reaper: dict[str, tuple[int, int]] = field(default_factory=dict)
    pushed: list[bytes] = field(default_factory=list)
    nudged: list[bytes] = field(default_factory=list)
    epochs: dict[str, set[int]] = field(default_factory=dict)  # every epoch ever handed out, failovers or not

    def __post_init__(self) -> None:
        self.lease_ms = round(self.settings.lease_seconds * 1000)
        self.claim_grace_ms = round(self.settings.claim_grace_seconds * 1000)
        self.max_queue_ms = round(self.settings.max_queue_seconds * 1000)
        self.max_generation_ms = round(self.settings.max_generation_seconds * 1000)
        self.abandon_ms = round(self.settings.disconnect_grace_seconds * 1000)
        self.log_ms = self.settings.log_retention_seconds * 1000
        self.order_ms = self.settings.order_retention_seconds * 1000

    # --- time, and what a failover does

    def tick(self, ms: int) -> None:
        """Move the clock; keys whose time to live has passed are gone."""
        self.now += ms
        for generation_id, order in list(self.orders.items()):
            if order.entries is not None and order.log_lives_until < self.now:
                order.entries = None
            if order.lives_until < self.now:
                del self.orders[generation_id]
                if order.lease_until is not None:
                    self.stray_leases[generation_id] = order.lease_until

    def snapshot(self) -> Any:
        """Everything Redis holds at this moment, to be given back to `restore`."""
        return copy.deepcopy((self.orders, self.stray_leases, self.reaper))

    def restore(self, snapshot: Any) -> None:
        """A failover that lost all that was written since the snapshot."""
        self.orders, self.stray_leases, self.reaper = copy.deepcopy(snapshot)
        self.server += 1
        self.tick(0)

    def leases(self, partition: str) -> dict[str, int]:
        held = {g: o.lease_until for g, o in self.orders.items() if o.lease_until is not None}
        return {g: until for g, until in {**self.stray_leases, **held}.items() if g[-1] == partition}

    # --- the scripts

    def create(self, generation_id: str, request: str, *, model: str, cancel_on_disconnect: bool) -> str:
        """CREATED, SAME, or the code of the conflict."""
        if order := self.orders.get(generation_id):
            if order.deleted:
                return "deleted"
            return "SAME" if order.request == request else "idempotency_conflict"
        self.stray_leases.pop(generation_id, None)
        queue_until = self.now + self.max_queue_ms
        order = self.orders[generation_id] = Order(
            request,
            entries=[],
            queue_until=queue_until,
            touched=self.now,
            lives_until=self.now + ALIVE_MS,
            log_lives_until=self.now + ALIVE_MS,
            lease_until=min(self.now + self.claim_grace_ms, queue_until),
            attended_until=self.now + self.abandon_ms if cancel_on_disconnect else None,
            server=self.server,
        )
        self._write(generation_id, order, "0-1", encode(Queued(model, self.now)), previous="0-0")
        return "CREATED"

    def claim(self, hint: Hint, nonce: str, provider: str, continues: str) -> Claimed | None:
        order = self.orders.get(hint.generation_id)
        if order is None:
            return None
        if order.nonce == nonce:
            assert order.deadline is not None
            return Claimed(order.epoch, order.attempts, (order.deadline - self.now) / 1000, order.continued)
        if order.ended or order.held or order.epoch != hint.epoch or order.tail is None:
            return None
        if self._abandoned_by_now(order):
            self._cancel_abandoned(hint.generation_id, order)
            return None
        deadline = order.deadline if order.deadline is not None else self.now + self.max_generation_ms
        if self.now > deadline:
            self._fail(hint.generation_id, order, "deadline_exceeded")
            return None
        restored = None if order.server == self.server else True
        order.continued = not restored and order.attempts > 0 and continues == order.tail.id.decode()
        order.server = self.server
        order.epoch = self._next_epoch(hint.generation_id, order)
        order.attempts += 1
        order.nonce, order.status, order.misses, order.deadline = nonce, "in_progress", 0, deadline
        order.lease_until = self.now + self.lease_ms
        order.touched, order.lives_until, order.log_lives_until = self.now, self.now + ALIVE_MS, self.now + ALIVE_MS
        if order.continued:
            started = Started(order.attempts, provider, "continued", continues)
        else:
            order.text, started = "", Started(order.attempts, provider, restored=restored)
        self._write(hint.generation_id, order, f"{order.epoch}-0", encode(started))
        return Claimed(order.epoch, order.attempts, (deadline - self.now) / 1000, order.continued)

    def append(self, one: Append) -> Answer:
        order = self.orders.get(one.generation_id)
        if order is None or order.tail is None:
            return Answer("GONE")
        tail_epoch, tail_seq = order.tail.position
        after = one.first_seq + len(one.events)
        if one.events and tail_epoch == one.epoch and after <= tail_seq + 1:
            if order.held and order.epoch == one.epoch:
                order.lease_until = self.now + self.lease_ms
            return Answer("OK")  # a repeat
        if order.epoch != one.epoch or not order.held:
            return Answer("FENCED")
        if one.final is None and self._abandoned_by_now(order):
            self._cancel_abandoned(one.generation_id, order)
            return Answer("ABANDONED")
        order.lease_until = self.now + self.lease_ms
        if one.first_seq > tail_seq + 1:
            return Answer("GAP", tail_seq)
        previous = order.tail.id.decode()
        fresh = [
            Entry(b"%d-%d" % (one.epoch, seq), one.events[seq - one.first_seq]) for seq in range(tail_seq + 1, after)
        ]
        for entry in fresh:
            order.text += text_of(entry)
        order.entries = [*(order.entries or ()), *fresh]
        if one.final:
            self._retire(order, one.final)
        else:
            self._touch(order)
        if fresh:
            self._push(one.generation_id, previous, fresh)
        return Answer("OK")

    def close(self, generation_id: str, event: Terminal, held_at: int | None) -> str | None:
        """How it ended; `in_progress` when `held_at` does not hold it; None when there is no such order."""
        order = self.orders.get(generation_id)
        if order is None:
            return None
        if order.ended:
            return order.status
        if held_at is not None and (held_at != order.epoch or not order.held):
            return "in_progress"
        if order.held:
            self.nudged.append(generation_id.encode())
        self._terminate(generation_id, order, event)
        return order.status

    def delete(self, generation_id: str) -> bool:
        if self.close(generation_id, Cancelled("delete"), None) is None:
            return False
        order = self.orders[generation_id]
        order.entries, order.deleted, order.lives_until = None, True, self.now + self.order_ms
        return True

    def attend(self, generation_id: str) -> None:
        order = self.orders.get(generation_id)
        if order is not None and not order.ended and order.attended_until is not None:
            order.attended_until = self.now + self.abandon_ms

    def release(self, generation_id: str, epoch: int) -> Hint | None:
        order = self.orders.get(generation_id)
        if order is None or order.epoch != epoch or not order.held:
            return None
        order.releases += 1
        if order.releases > MAX_RELEASES:
            order.charged += 1
        if order.charged >= self.settings.max_attempts:
            self._fail(generation_id, order, "attempts_exhausted", LOST_OR_STOPPED)
            return None
        order.queue_until = self.now + self.max_queue_ms
        return self._make_claimable(generation_id, order, self.claim_grace_ms)

    def due(self, partition: str) -> list[str]:
        last_run, not_before = self.reaper.get(partition, (-math.inf, 0))
        if not last_run <= self.now <= last_run + 1000:
            not_before = self.now + self.lease_ms
        if self.now < last_run < math.inf:
            self._step_back(partition, int(last_run) - self.now)
        self.reaper[partition] = self.now, not_before
        ended = [(until, g) for g, until in self.leases(partition).items() if until <= self.now]
        return [] if self.now < not_before else [g for _, g in sorted(ended)]

    def reap(self, generation_id: str, expire_epoch: int | None = None) -> Hint | None:
        order = self.orders.get(generation_id)
        if order is None:
            self.stray_leases.pop(generation_id, None)
            return None
        if order.lease_until is None:
            return None
        if expire_epoch is None and order.lease_until > self.now:
            return None
        if expire_epoch is not None and not (order.held and order.epoch == expire_epoch):
            return None
        if self._abandoned(order):
            return self._cancel_abandoned(generation_id, order)
        if order.held:
            order.charged += 1
            if order.deadline is not None and self.now > order.deadline:
                return self._fail(generation_id, order, "deadline_exceeded")
            if order.charged >= self.settings.max_attempts:
                return self._fail(generation_id, order, "attempts_exhausted", LOST)
            order.queue_until, misses = self.now + self.max_queue_ms, 0
        else:
            if self.now >= order.queue_until:
                return self._fail(generation_id, order, "queue_timeout")
            misses = order.misses + 1
        patience = min(self.claim_grace_ms * 2**misses, max(60_000, self.claim_grace_ms))
        hint = self._make_claimable(generation_id, order, patience, misses)
        self._touch(order)
        return hint

    # --- what they share

    def _abandoned(self, order: Order) -> bool:
        return order.attended_until is not None and self.now > order.attended_until

    def _abandoned_by_now(self, order: Order) -> bool:
        """Asked by a writer: a lease that has ended tells of an outage, after which readers get one more grace time."""
        if not self._abandoned(order):
            return False
        if order.lease_until is not None and self.now <= order.lease_until:
            return True
        order.attended_until = self.now + self.abandon_ms
        return False

    def _cancel_abandoned(self, generation_id: str, order: Order) -> None:
        self._terminate(generation_id, order, Cancelled("disconnect"))

    def _fail(self, generation_id: str, order: Order, code: str, message: str | None = None) -> None:
        self._terminate(generation_id, order, Failed(code, message or FAILURES[code]))

    def _terminate(self, generation_id: str, order: Order, event: Terminal) -> None:
        data = encode(event).removesuffix(b"}") + b',"at":%d}' % self.now
        order.epoch = self._next_epoch(generation_id, order)
        self._write(generation_id, order, f"{order.epoch}-0", data)
        self._retire(order, outcome(event))

    def _retire(self, order: Order, status: str) -> None:
        order.status, order.nonce, order.lease_until = status, "", None
        order.log_lives_until, order.lives_until = self.now + self.log_ms, self.now + self.order_ms

    def _make_claimable(self, generation_id: str, order: Order, patience: int, misses: int = 0) -> Hint:
        order.nonce, order.misses, order.hints = "", misses, order.hints + 1
        order.lease_until = min(self.now + patience, order.queue_until)
        return Hint(generation_id, order.epoch, order.hints)

    def _touch(self, order: Order) -> None:
        if self.now - order.touched >= 60_000:
            order.touched, order.lives_until, order.log_lives_until = self.now, self.now + ALIVE_MS, self.now + ALIVE_MS

    def _step_back(self, partition: str, ms: int) -> None:
        for generation_id in self.leases(partition):
            if (order := self.orders.get(generation_id)) is not None and order.lease_until is not None:
                order.lease_until -= ms
            else:
                self.stray_leases[generation_id] -= ms

    def epoch_after(self, epoch: int) -> int:
        return max(epoch + 1, self.now)

    def _next_epoch(self, generation_id: str, order: Order) -> int:
        epoch = self.epoch_after(order.epoch)
        handed_out = self.epochs.setdefault(generation_id, set())
        assert epoch not in handed_out, f"epoch {epoch} was handed out twice"
        handed_out.add(epoch)
        return epoch

    def _write(self, generation_id: str, order: Order, entry_id: str, data: bytes, previous: str | None = None) -> None:
        if previous is None:
            assert order.tail is not None
            previous = order.tail.id.decode()
        entry = Entry(entry_id.encode(), data)
        order.entries = [*(order.entries or ()), entry]
        self._push(generation_id, previous, [entry])

    def _push(self, generation_id: str, previous: str, entries: Sequence[Entry]) -> None:
        lines = [f"{generation_id} {previous}".encode(), *(b"%s %s" % entry for entry in entries)]
        self.pushed.append(b"\n".join(lines))


def text_of(entry: Entry) -> str:
    event = decode(entry.data)
    return event.text if isinstance(event, TextDelta) else ""


def check_log(entries: Sequence[Entry], *, status: str, epoch: int) -> None:
    """What must hold for the log of any generation at any moment, whatever happened to it."""
    assert entries[0].id == b"0-1"
    assert isinstance(decode(entries[0].data), Queued)
    positions = [entry.position for entry in entries]
    assert positions == sorted(set(positions)), "ids increase"
    for (epoch_before, seq_before), (epoch_after, seq_after) in pairwise(positions):
        same = epoch_before == epoch_after
        assert seq_after == (seq_before + 1 if same else 0), "seqs are contiguous, and an epoch begins at 0"
    for entry in entries[1:]:
        begins = isinstance(decode(entry.data), Started) or (is_terminal(entry.data) and entry.position[1] == 0)
        assert begins == (entry.position[1] == 0), "an epoch begins with its start, or with an end from outside"
    assert [is_terminal(entry.data) for entry in entries[:-1]].count(True) == 0, "nothing follows the terminal event"
    assert is_terminal(entries[-1].data) == (status in ENDED), "closed means that the terminal event is there"
    assert fold(entries).status == status, "the order repeats what the log says"
    assert positions[-1][0] == epoch, "the order's epoch is the tail's"
