"""The log protocol: create, claim, append, close, reap, release, read. The one rule: the log decides.

A thin typed face over the Lua scripts (shared/lua), each one atomic step and safe to send twice.
Knows nothing of the queue, of HTTP, or of what the events say. docs/protocol.md is the contract.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import orjson
from redis.asyncio.client import Pipeline
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError

from shared import lua, metrics
from shared.cluster import OneServer, Servers
from shared.config import Settings
from shared.errors import Conflict, Gone, NotFound, Unavailable
from shared.events import (
    Cancelled,
    Entry,
    Failed,
    Position,
    Queued,
    Status,
    Terminal,
    encode,
    is_terminal,
    outcome,
)
from shared.prompt import Prompt
from shared.redis import ALIVE_MS, AWAY, Client, Keys

OnDisconnect: TypeAlias = Literal["continue", "cancel"]
Run: TypeAlias = Callable[[Client, AsyncScript, list[str], list[Any]], Awaitable[Any]]
MAX_RELEASES = 10
ORDER_FIELDS = ["tenant", "model", "status", "created", "policy", "epoch", "fresh", "hints", "deleted", "metadata"]
ASK_AGAIN = 3  # times in all, where a Cluster says that it moved
PAGE = 500  # entries of a log read in one round trip


class Hint(NamedTuple):
    """What the queue carries: this generation, at this epoch, wants a worker. `n` counts the hints sent for it."""

    generation_id: str
    epoch: int
    n: int


@dataclass(frozen=True, slots=True)
class Order:
    """What the order's hash says: who asked, and the copy of status and epoch the scripts keep there."""

    id: str
    tenant: str
    model: str
    status: Status
    created_at: int  # Unix milliseconds
    on_disconnect: OnDisconnect
    epoch: int
    fresh: int | None  # the epoch of the newest `fresh` attempt
    hints: int
    deleted: bool
    metadata: dict[str, str]

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")


class Created(NamedTuple):
    """The order a create stands for. `is_new`: this call wrote it; else the same request had before."""

    order: Order
    is_new: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write one attempt: `epoch` numbers its entries. `seconds_left` until the deadline.
    `continued`: it goes on from the tail that was named, and voids nothing."""

    generation_id: str
    epoch: int
    attempt: int
    model: str
    provider: str
    prompt: bytes
    seconds_left: float
    continued: bool = False


@dataclass(frozen=True, slots=True)
class Append:
    """Events `first_seq…` of one attempt; `final` is the status that the last of them, a terminal, ends it with.
    With no events it only renews the lease (and shows a gap before `first_seq`)."""

    generation_id: str
    epoch: int
    first_seq: int
    events: Sequence[bytes] = ()
    final: Status | None = None


class Answer(NamedTuple):
    """OK; GAP (`last` is the last seq the log has); FENCED, ABANDONED, GONE: not the writer any more."""

    code: Literal["OK", "GAP", "FENCED", "ABANDONED", "GONE"]
    last: int = -1


def process_name(pid: int) -> str:
    """How a process of this machine (or container) is called in Redis: as the owner of leases, among the workers."""
    return f"{socket.gethostname()}:{pid}"


def new_id() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


class Look(NamedTuple):
    """An order, the last entry of its log, and the entries of the log from a cursor on, itself among them."""

    order: Order | None
    tail: Entry | None
    page: list[Entry]


class EventLog:
    """The logs and orders of one deployment. All methods raise redis' own errors when Redis is away."""

    def __init__(self, redis: Client | Servers, settings: Settings) -> None:
        self.servers: Servers = OneServer(redis) if isinstance(redis, Client) else redis
        self.keys = Keys(settings.key_prefix)
        self._settings = settings
        sources = {name: lua.source(name).encode() for name in lua.LOG_SCRIPTS}
        self._scripts = {name: AsyncScript(cast(Client, None), source) for name, source in sources.items()}
        self._lease_ms = _ms(settings.lease_seconds)
        self._log_ms = settings.log_retention_seconds * 1000
        self._order_ms = settings.order_retention_seconds * 1000
        self._claim_grace_ms = _ms(settings.claim_grace_seconds)
        self._max_queue_ms = _ms(settings.max_queue_seconds)
        self._abandon_ms = _ms(settings.disconnect_grace_seconds)

    # --- the caller's side

    async def create(
        self,
        generation_id: str,
        *,
        tenant: str,
        provider: str,
        prompt: Prompt,
        on_disconnect: OnDisconnect = "continue",
        options: dict[str, Any] | None = None,
    ) -> Created:
        """Write the order and entry `0-1`, or find the order of the same request.
        `options` is kept for the dialect that asked; it is no part of what makes two requests the same.

        Raises Conflict when the id stands for another request (an Idempotency-Key used twice) or was deleted;
        Unavailable when Redis has no room left, too few replicas, or has lost it since."""
        fields = {
            "tenant": tenant,
            "model": prompt.model,
            "provider": provider,
            "prompt": prompt.to_json(),
            "policy": on_disconnect,
            "metadata": orjson.dumps(prompt.metadata or {}),
            "options": orjson.dumps(options or {}),
        }
        request_hash = prompt.hash()
        head = encode(Queued(prompt.model, 0)).removesuffix(b',"created_at":0}')
        args: list[Any] = [generation_id, self.keys.push(generation_id), request_hash, head]
        args += [self._claim_grace_ms, self._max_queue_ms, ALIVE_MS]
        args += [self._abandon_ms if on_disconnect == "cancel" else ""]  # what an outage adds to it, too
        args += [part for pair in fields.items() for part in pair]
        reply, has_replicas = await self._create(generation_id, args)
        if reply[0] == b"CREATED":
            if not has_replicas:
                await self.retract(generation_id)
                raise Unavailable("too few replicas of Redis are up to keep this safe; try again", code="not_durable")
            order = _new_order(generation_id, tenant, prompt, int(reply[1]), on_disconnect)
            return Created(order, is_new=True)
        if reply[2]:
            raise Conflict(
                "this Idempotency-Key belongs to a generation that was deleted; use a new key", code="deleted"
            )
        if reply[1].decode() != request_hash:
            raise Conflict(
                "this Idempotency-Key was used with another request body; use a new key for a new request",
                code="idempotency_conflict",
            )
        found = await self.order(generation_id)
        if found is None:
            raise Unavailable("the generation was written and is gone; Redis was flushed", code="store_lost")
        return Created(found, is_new=False)

    async def retract(self, generation_id: str) -> bool:
        """Take back an order that nobody knows of yet; False where a worker has claimed it meanwhile."""
        reply: bytes = await self._run("retract", generation_id, [generation_id])
        return reply == b"RETRACTED"

    async def _create(self, generation_id: str, args: list[Any]) -> tuple[Any, bool]:
        """What `create` answers, and whether enough replicas have what it wrote."""
        if not self._settings.wait_replicas:
            return await self._run("create", generation_id, args), True

        async def create_and_wait(client: Client) -> Any:
            async with client.pipeline(transaction=False) as pipe:  # WAIT speaks of its own connection's writes
                await self._scripts["create"](keys=self._keys_of(generation_id), args=args, client=pipe)
                pipe.wait(self._settings.wait_replicas, self._settings.wait_milliseconds)
                return await pipe.execute()

        reply, replicas = await self._ask(generation_id, create_and_wait)
        return reply, replicas >= self._settings.wait_replicas

    async def is_durable(self, generation_id: str) -> bool:
        """Have enough replicas the end of this log? Only WAIT behind a write of the same connection can tell."""

        async def write_and_wait(client: Client) -> Any:
            async with client.pipeline(transaction=False) as pipe:
                pipe.pexpire(self.keys.order(generation_id), self._order_ms)
                pipe.xrevrange(self.keys.log(generation_id), "+", "-", 1)
                pipe.wait(self._settings.wait_replicas, self._settings.wait_milliseconds)
                return await pipe.execute()

        _, reply, replicas = await self._ask(generation_id, write_and_wait)
        last: list[Entry] = reply
        return bool(last) and is_terminal(last[0].data) and replicas >= self._settings.wait_replicas

    async def close(self, generation_id: str, event: Terminal, *, held_at: int | None = None) -> Status:
        """End a generation from outside its attempt; answers how it ended, also if it had before.

        `held_at`: only if that epoch still holds it. Raises NotFound when there is no such order."""
        head = encode(event).removesuffix(b"}")
        args: list[Any] = [generation_id, self.keys.push(generation_id), outcome(event), head]
        args += [self._log_ms, self._order_ms, self.keys.nudge, "" if held_at is None else held_at]
        reply = await self._run("close", generation_id, args)
        if reply[0] == b"GONE":
            raise NotFound(f"no generation {generation_id}")
        if reply[0] == b"CLOSED":
            metrics.GENERATIONS_ENDED.labels(outcome(event)).inc()
        return cast(Status, reply[1].decode()) if len(reply) > 1 else "in_progress"

    async def delete(self, generation_id: str) -> None:
        """Close if it runs, then erase log and prompt; a tombstone stays for the order's retention."""
        await self.close(generation_id, Cancelled("delete"))
        await self._run("erase", generation_id, [self._order_ms])

    async def attend(self, generation_ids: Iterable[str]) -> None:
        """Say that somebody reads these; matters to orders with `on_disconnect: cancel`."""

        async def ask(pipe: Pipeline, generation_id: str) -> None:
            await self._scripts["attend"]([self.keys.order(generation_id)], [self._abandon_ms], client=pipe)

        ids = list(generation_ids)
        if len(ids) == 1:  # a reader that has come: before a pipeline redis-py asks whether its scripts are known
            await self._run("attend", ids[0], [self._abandon_ms], [self.keys.order(ids[0])])
            return
        for start in range(0, len(ids), PAGE):
            await self._ask_each(ids[start : start + PAGE], ask)

    # --- the worker's side

    async def claim(self, hint: Hint, nonce: str, *, owner: str = "", continues: str = "") -> Claim | None:
        """Take the generation for one attempt, or None: the hint is stale, drop it. `nonce` makes a retry safe.

        `owner` names the process, for a supervisor that sees it die. `continues` is the tail this worker could go on
        from; whether the attempt does so is in the claim: the tail may have moved, or the server may be another."""
        args: list[Any] = [hint.generation_id, self.keys.push(hint.generation_id), hint.epoch, nonce, self._lease_ms]
        args += [_ms(self._settings.max_generation_seconds), ALIVE_MS, self._log_ms, self._order_ms, owner, continues]
        reply = await self._run("claim", hint.generation_id, args)
        if reply[0] != b"OK":
            _count_abandoned(reply)
            return None
        epoch, attempt = int(reply[1]), int(reply[2])
        model, provider, prompt, left, mode = reply[3:]
        return Claim(
            generation_id=hint.generation_id,
            epoch=epoch,
            attempt=attempt,
            model=model.decode(),
            provider=provider.decode(),
            prompt=prompt,
            seconds_left=int(left) / 1000,
            continued=mode == b"continued",
        )

    async def append(self, appends: Sequence[Append], run: Run | None = None) -> list[Answer]:
        """Append to many generations of one lane in one step, in the order given. Sending the same events again is
        harmless. `run`: how the script is run, for who has a connection of its own."""
        keys = [key for one in appends for key in self._keys_of(one.generation_id)]
        args: list[Any] = [self._lease_ms, ALIVE_MS, self._log_ms, self._order_ms]
        for one in appends:
            args += [one.generation_id, self.keys.push(one.generation_id), one.epoch, one.first_seq]
            args += [one.final or "", len(one.events), *one.events]
        script = self._scripts["append"]
        run = run or (lambda client, script, keys, args: script(keys, args, client))
        replies = await self._ask(appends[0].generation_id, lambda client: run(client, script, keys, args))
        for one, reply in zip(appends, replies, strict=True):
            if one.final and reply[0] == b"OK":
                metrics.GENERATIONS_ENDED.labels(one.final).inc()
            _count_abandoned(reply)
        return [Answer(reply[0].decode(), *reply[1:]) for reply in replies]

    async def release(self, generation_id: str, epoch: int) -> Hint | None:
        """Hand over what this worker cannot finish. Answers the hint to send, if it is still ours to give."""
        args: list[Any] = [
            generation_id,
            self.keys.push(generation_id),
            epoch,
            self._claim_grace_ms,
            self._max_queue_ms,
        ]
        args += [self._settings.max_attempts, MAX_RELEASES, self._log_ms, self._order_ms]
        return _hint(generation_id, await self._run("release", generation_id, args))

    # --- the reaper's side

    async def due(self, partition: str, limit: int = 100) -> list[str]:
        """The ids of a partition whose lease has ended (none while the grace guard holds)."""
        keys = [self.keys.leases(partition), self.keys.reaper(partition)]
        return [found.decode() for found in await self._run("due", partition, [self._lease_ms, limit], keys)]

    async def reap(self, generation_id: str, *, expire_epoch: int | None = None) -> Hint | None:
        """Make an expired generation claimable, or end it. Answers the hint to send, if there is one.

        `expire_epoch`: end the lease of that epoch now, as a supervisor may that saw the worker die."""
        args: list[Any] = [generation_id, self.keys.push(generation_id), self._claim_grace_ms, self._max_queue_ms]
        args += [self._settings.max_attempts, ALIVE_MS, self._log_ms, self._order_ms]
        args += ["" if expire_epoch is None else expire_epoch]
        return _hint(generation_id, await self._run("reap", generation_id, args))

    async def held_by(self, owner: str, partition: str) -> list[tuple[str, int]]:
        """The generations of a partition that a process holds, each with its epoch."""
        leases = self.keys.leases(partition)
        ids = [found.decode() for found in await self._ask(partition, lambda client: client.zrange(leases, 0, -1))]

        async def ask(pipe: Pipeline, generation_id: str) -> None:
            pipe.hmget(self.keys.order(generation_id), ["owner", "epoch", "nonce"])

        replies = await self._ask_each(ids, ask)
        held = zip(ids, replies, strict=True)
        return [(one, int(epoch)) for one, (by, epoch, nonce) in held if nonce and by == owner.encode()]

    # --- reading

    async def order(self, generation_id: str) -> Order | None:
        """The order, or None."""
        return _order(generation_id, await self._fields(generation_id, ORDER_FIELDS))

    async def orders(self, generation_ids: Sequence[str]) -> list[Order]:
        """Those of these orders that still stand, in the order given, in one round trip."""

        async def ask(pipe: Pipeline, generation_id: str) -> None:
            pipe.hmget(self.keys.order(generation_id), ORDER_FIELDS)

        replies = await self._ask_each(generation_ids, ask)
        found = (_order(*pair) for pair in zip(generation_ids, replies, strict=True))
        return [order for order in found if order is not None]

    async def asked(self, generation_id: str) -> tuple[Prompt, dict[str, Any]] | None:
        """The prompt and the dialect's options of an order; None when it is gone or was deleted."""
        prompt, options = await self._fields(generation_id, ["prompt", "options"])
        return (Prompt.from_json(prompt), orjson.loads(options or b"{}")) if prompt else None

    async def read(self, generation_id: str, after: str = "-", count: int = PAGE) -> list[Entry]:
        """At most `count` entries that follow the id `after` (`-`: from the beginning)."""
        log, start = self.keys.log(generation_id), "-" if after == "-" else f"({after}"
        return cast("list[Entry]", await self._ask(generation_id, lambda client: client.xrange(log, start, "+", count)))

    async def entry(self, generation_id: str, entry_id: str) -> Entry | None:
        log = self.keys.log(generation_id)
        found: list[Entry] = await self._ask(generation_id, lambda client: client.xrange(log, entry_id, entry_id, 1))
        return found[0] if found else None

    async def tail(self, generation_id: str) -> Entry | None:
        """The last entry of a log, or None where there is no log."""
        log = self.keys.log(generation_id)
        found: list[Entry] = await self._ask(generation_id, lambda client: client.xrevrange(log, "+", "-", 1))
        return found[0] if found else None

    async def look(self, generation_id: str, cursor: str = "-", count: int = PAGE) -> Look:
        """What a reader finds that comes with the id `cursor` (`-`: with nothing), in one round trip."""
        order_key, log = self.keys.order(generation_id), self.keys.log(generation_id)

        async def ask(client: Client) -> Any:
            async with client.pipeline(transaction=False) as pipe:
                pipe.hmget(order_key, ORDER_FIELDS)
                pipe.xrevrange(log, "+", "-", 1)
                pipe.xrange(log, cursor, "+", count)
                return await pipe.execute()

        fields, last, page = await self._ask(generation_id, ask)
        return Look(_order(generation_id, fields), last[0] if last else None, page)

    async def tails(self, generation_ids: Sequence[str]) -> list[Position | None]:
        """Where each of these logs ends, in one round trip; None where there is no log."""

        async def ask(pipe: Pipeline, generation_id: str) -> None:
            pipe.xrevrange(self.keys.log(generation_id), "+", "-", 1)

        replies = await self._ask_each(generation_ids, ask)
        return [reply[0].position if reply else None for reply in replies]

    def _keys_of(self, generation_id: str) -> list[str]:
        keys = self.keys
        return [keys.order(generation_id), keys.log(generation_id), keys.leases(generation_id[-1])]

    async def _fields(self, generation_id: str, names: list[str]) -> Any:
        order = self.keys.order(generation_id)
        return await self._ask(generation_id, lambda client: client.hmget(order, names))

    # --- asking the servers

    def lane_of(self, generation_id: str) -> str:
        """The lane this generation is in: one append can hold those of one lane only."""
        return next(lane for lane in self.servers.lanes if generation_id[-1] in lane)

    async def is_reachable(self) -> bool:
        """Does any of the servers answer? Raises redis' errors when none does."""
        asked = [cast("asyncio.Future[bool]", client.ping()) for client in await self.servers.all()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failed) == len(answers):
            raise failed[0]
        return True

    async def _run(self, name: str, generation_id: str, args: list[Any], keys: list[str] | None = None) -> Any:
        script, keys = self._scripts[name], keys or self._keys_of(generation_id)
        return await self._ask(generation_id, lambda client: script(keys=keys, args=args, client=client))

    async def _ask_each(self, ids: Sequence[str], ask: Callable[[Pipeline, str], Awaitable[None]]) -> list[Any]:
        """One question about each generation, in one round trip to each server; the answers in the order of `ids`."""

        async def ask_lane(lane: list[str]) -> dict[str, Any]:
            async def ask_all(client: Client) -> list[Any]:
                async with client.pipeline(transaction=False) as pipe:
                    for generation_id in lane:
                        await ask(pipe, generation_id)
                    return await pipe.execute()

            return dict(zip(lane, await self._ask(lane[0], ask_all), strict=True))

        lanes: dict[str, list[str]] = {}
        for generation_id in ids:
            lanes.setdefault(self.lane_of(generation_id), []).append(generation_id)
        answers: dict[str, Any] = {}
        for found in await asyncio.gather(*map(ask_lane, lanes.values())):
            answers |= found
        return [answers[generation_id] for generation_id in ids]

    async def _ask(self, generation_id: str, ask: Callable[[Client], Any]) -> Any:
        """The answer of the server in charge (of a generation's partition, its last digit); in a Cluster that moved, of
        the next one. Raises Unavailable where it has no room to write."""
        for _ in range(ASK_AGAIN):
            try:
                return await ask(await self.servers.at(generation_id[-1]))
            except (ResponseError, *AWAY) as error:
                if isinstance(error, OutOfMemoryError) or str(error).startswith("MISCONF"):
                    raise Unavailable(
                        "Redis has no room to write; nothing was lost, try again", code="store_full"
                    ) from error
                if not self.servers.doubt(error):
                    raise
        raise ConnectionError("the Redis Cluster is being rearranged")


def gone(order: Order) -> Gone:
    """What a reader is told when the order stands and its log does not."""
    if order.deleted:
        return Gone(f"generation {order.id} was deleted", outcome=order.status, code="deleted")
    return Gone(
        f"the log of generation {order.id} has expired; it ended as {order.status}",
        outcome=order.status,
        code="expired",
    )


LOG_LOST = Failed("log_lost", "Redis came back without the generation's last events, and they could not be healed")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _count_abandoned(reply: list[Any]) -> None:
    if reply[0] == b"ABANDONED":  # the script that says so has cancelled it
        metrics.GENERATIONS_ENDED.labels("cancelled").inc()


def _hint(generation_id: str, reply: list[Any]) -> Hint | None:
    if reply[0] == b"ENDED":
        metrics.GENERATIONS_ENDED.labels(reply[1].decode()).inc()
    return Hint(generation_id, int(reply[1]), int(reply[2])) if reply[0] == b"HINT" else None


def _new_order(generation_id: str, tenant: str, prompt: Prompt, created_at: int, on_disconnect: OnDisconnect) -> Order:
    """An order as `create` has just written it."""
    return Order(
        generation_id,
        tenant,
        prompt.model,
        "queued",
        created_at,
        on_disconnect,
        epoch=0,
        fresh=None,
        hints=1,
        deleted=False,
        metadata=prompt.metadata or {},
    )


def _order(generation_id: str, reply: Sequence[bytes | None]) -> Order | None:
    if reply[0] is None:
        return None
    tenant, model, status, created, policy, epoch, fresh, hints, deleted, metadata = (
        (part or b"").decode() for part in reply
    )
    return Order(
        generation_id,
        tenant,
        model,
        cast(Status, status),
        int(created),
        cast(OnDisconnect, policy),
        int(epoch),
        int(fresh) if fresh else None,
        int(hints),
        bool(deleted),
        orjson.loads(metadata or "{}"),
    )
