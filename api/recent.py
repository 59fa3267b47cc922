"""The list of a tenant's newest generations. A hint only: the orders and the logs say how they are doing."""

from __future__ import annotations

from shared.redis import Client, Keys

LENGTH = 1000


class Recent:
    """One sorted set for each tenant, newest last, bounded, gone when nothing new came for the order's retention.

    Deleted ones stay, so that the page after them is found: their orders say that they are not to be listed."""

    def __init__(self, redis: Client, keys: Keys, retention_seconds: int) -> None:
        self._redis = redis
        self._keys = keys
        self._retention_seconds = retention_seconds

    async def add(self, tenant: str, generation_id: str, created_at: int) -> None:
        key = self._keys.recent(tenant)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(key, {generation_id: created_at}, nx=True)
            pipe.zremrangebyrank(key, 0, -LENGTH - 1)
            pipe.expire(key, self._retention_seconds)
            await pipe.execute()

    async def page(self, tenant: str, after: str | None, count: int) -> list[str]:
        """At most `count` ids, newest first, those that follow `after` (the last of the page before)."""
        key = self._keys.recent(tenant)
        start = 0
        if after is not None:
            rank = await self._redis.zrevrank(key, after)
            if rank is None:
                return []
            start = rank + 1
        return [found.decode() for found in await self._redis.zrevrange(key, start, start + count - 1)]
