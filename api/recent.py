"""The list of a tenant's newest generations. A hint only: the orders and the logs say how they are doing."""

from __future__ import annotations

from shared.jobs import Listing
from shared.redis import Client, Keys

LENGTH = 1000


class Recent:
    """One sorted set for each tenant, newest last, bounded, gone when nothing new came for the order's retention.

    Deleted ones stay, so that the page after them is found: their orders say that they are not to be listed."""

    def __init__(self, redis: Client, keys: Keys, retention_seconds: int) -> None:
        self._redis = redis
        self._keys = keys
        self._retention_seconds = retention_seconds

    def of(self, tenant: str) -> Listing:
        """Where a new one of this tenant's goes; it is put there together with its first hint."""
        return Listing(self._keys.recent(tenant), LENGTH, self._retention_seconds)

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
