"""The queue: enqueue an ARQ hint and ring the doorbell, in one step.

A hint may be lost, doubled or late: the claim decides.
Knows ARQ's key names and job format; knows nothing of prompts. Arguments are ids, the serializer is JSON, never pickle.
"""

from __future__ import annotations

from typing import Any, cast

import orjson
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.jobs import serialize_job
from arq.utils import timestamp_ms

from shared import lua
from shared.event_log import Hint
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


class Jobs:
    """The hints of one deployment, on the queue's Redis."""

    def __init__(self, redis: Client, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self._enqueue = redis.register_script(lua.source("enqueue"))

    async def send(self, hint: Hint) -> None:
        """Enqueue hint n, in the place of hint n-1, and ring."""
        generation_id, epoch, n = hint
        job_id = self.keys.hint(generation_id, n)
        previous = self.keys.hint(generation_id, n - 1) if n > 1 else ""
        job = serialize_job(FUNCTION, (generation_id, epoch, n), {}, None, timestamp_ms(), serializer=serialize)
        old_keys = [prefix + previous for prefix in (job_key_prefix, in_progress_key_prefix, retry_key_prefix)]
        await self._enqueue(
            keys=[self.keys.queue, self.keys.doorbell, job_key_prefix + job_id, *old_keys],
            args=[job_id, previous, job, HINT_LIVES_MS, CLOCK_SKEW_MS, DOORBELL_LENGTH],
        )

    async def taken(self, hint: Hint) -> None:
        """Off the queue: from here on the lease says that the generation is being worked on."""
        await self.redis.zrem(self.keys.queue, self.keys.hint(hint.generation_id, hint.n))

    async def depth(self) -> int:
        """How many hints wait for a worker."""
        return cast(int, await self.redis.zcard(self.keys.queue))

    async def position(self, hint: Hint) -> int | None:
        """How many hints stand before this one; None when it is not in the queue (any more)."""
        return cast("int | None", await self.redis.zrank(self.keys.queue, self.keys.hint(hint.generation_id, hint.n)))
