"""The queue: enqueue an ARQ hint and ring the doorbell, in one step; take hints off it, in one step.

A hint may be lost, doubled or late: the claim decides.
Knows ARQ's key names and job format; knows nothing of prompts. Arguments are ids, the serializer is JSON, never pickle.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import orjson
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.jobs import serialize_job
from arq.utils import timestamp_ms

from shared import lua
from shared.event_log import Hint, Order
from shared.redis import Client, Keys

FUNCTION = "generate"
HINT_LIVES_MS = 24 * 60 * 60 * 1000
CLOCK_SKEW_MS = 60 * 60 * 1000  # how far a worker's clock may be behind Redis and still see a hint at once
DOORBELL_LENGTH = 100


def serialize(job: dict[str, Any]) -> bytes:
    return orjson.dumps(job)


def deserialize(data: bytes) -> dict[str, Any]:
    """Raises ValueError on anything but a JSON object: ARQ logs it and drops the job."""
    job = orjson.loads(data)
    if not isinstance(job, dict):
        raise ValueError("a job is a JSON object")
    return job


class Listing(NamedTuple):
    """A list in which a new generation is found again: its key, how many it holds, how long it lives without news."""

    key: str
    length: int
    lives_seconds: int


class Taken(NamedTuple):
    """What came off the queue: the score of each hint, None where it was not to be had; and how many wait on."""

    scores: list[int | None]
    waiting: int


class Jobs:
    """The hints of one deployment, on the queue's Redis."""

    def __init__(self, redis: Client, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self.was_full = False  # when a generation was last announced
        self._announce, self._enqueue, self._take = (
            redis.register_script(lua.source(name)) for name in lua.QUEUE_SCRIPTS
        )

    async def announce(self, order: Order, listing: Listing, most: int | None) -> bool:
        """Hint 1 of a new order, a ring, and its place in the list; False, and none of it, where `most` hints wait."""
        hint = Hint(order.id, order.epoch, 1)
        listed: list[Any] = [order.id, order.created_at, listing.length, listing.lives_seconds * 1000]
        reply = await self._announce(
            keys=[self.keys.queue, self.keys.doorbell, self._job_key(hint), listing.key],
            args=[*self._job(hint), "" if most is None else most, *listed],
        )
        self.was_full = reply == b"FULL"
        return not self.was_full

    async def send(self, hint: Hint) -> None:
        """Enqueue hint n, in the place of hint n-1, and ring."""
        previous = self.keys.hint(hint.generation_id, hint.n - 1) if hint.n > 1 else ""
        old_keys = [prefix + previous for prefix in (job_key_prefix, in_progress_key_prefix, retry_key_prefix)]
        await self._enqueue(
            keys=[self.keys.queue, self.keys.doorbell, self._job_key(hint), *old_keys],
            args=[*self._job(hint), previous],
        )

    async def take(self, job_ids: Sequence[str], lock_seconds: float) -> Taken:
        """Take hints off the queue, each under ARQ's lock: from here on the lease says that they are worked on."""
        locks = [in_progress_key_prefix + job_id for job_id in job_ids]
        args: list[Any] = [secrets.token_hex(8), round(lock_seconds * 1000), *job_ids]  # a token makes a retry safe
        waiting, *scores = await self._take(keys=[self.keys.queue, *locks], args=args)
        return Taken([int(score) if score else None for score in scores], waiting)

    async def taken(self, job_id: str) -> None:
        """Off the queue, where ARQ's own worker has locked it: running jobs would hide what waits behind them."""
        await self.redis.zrem(self.keys.queue, job_id)

    def _job_key(self, hint: Hint) -> str:
        return job_key_prefix + self.keys.hint(hint.generation_id, hint.n)

    def _job(self, hint: Hint) -> list[Any]:
        """What both scripts that enqueue are told of a hint, in the order of `hint` in prelude.lua."""
        job = serialize_job(FUNCTION, tuple(hint), {}, None, timestamp_ms(), serializer=serialize)
        job_id = self.keys.hint(hint.generation_id, hint.n)
        return [job_id, job, HINT_LIVES_MS, CLOCK_SKEW_MS, DOORBELL_LENGTH]

    async def depth(self) -> int:
        """How many hints wait for a worker."""
        return cast(int, await self.redis.zcard(self.keys.queue))

    async def position(self, hint: Hint) -> int | None:
        """How many hints stand before this one; None when it is not in the queue (any more)."""
        return cast("int | None", await self.redis.zrank(self.keys.queue, self.keys.hint(hint.generation_id, hint.n)))
