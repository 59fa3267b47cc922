"""Which generation a chat is at. A pointer only: the order and the log say how it is doing, and whose it is."""

from __future__ import annotations

from shared.redis import Client, Keys


class Chats:
    """One string for each chat of a tenant, the id of its newest generation; gone when that must have ended."""

    def __init__(self, redis: Client, keys: Keys, lives_seconds: int) -> None:
        self._redis = redis
        self._keys = keys
        self._lives_seconds = lives_seconds

    async def point(self, tenant: str, chat_id: str, generation_id: str) -> str | None:
        """Make this generation the chat's own; the id of the one before it, if that was another."""
        key = self._keys.chat(tenant, chat_id)
        before = await self._redis.set(key, generation_id, ex=self._lives_seconds, get=True)
        return before.decode() if before and before.decode() != generation_id else None

    async def find(self, tenant: str, chat_id: str) -> str | None:
        """The id of the chat's newest generation, or None."""
        found = await self._redis.get(self._keys.chat(tenant, chat_id))
        return found.decode() if found else None
