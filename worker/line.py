"""A connection to Redis that one task has for itself: packed in C, one timer for a question and its answer, no pool.

For the appends, of which a busy worker sends thousands a second: redis-py's way through a pool costs twice the CPU.
What redis-py does about a lost connection, a failover, a script that is not loaded is done here as well. Knows nothing
of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeout

from shared.redis import Client


class Line:
    """Open from the first question on, again after each failure, and anew where another server is in charge."""

    def __init__(self) -> None:
        self._pool: ConnectionPool | None = None
        self._connection: AbstractConnection
        self._seconds: float | None = None

    async def run(self, client: Client, script: AsyncScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """What the script answers. Raises redis' errors."""
        await self._lead_to(client)
        command = hiredis.pack_command(("EVALSHA", script.sha, len(keys), *keys, *args))
        try:
            return await self._ask_again(command)
        except NoScriptError:
            await client.script_load(script.script)
            return await self._ask_again(command)

    async def aclose(self) -> None:
        if self._pool is not None:
            await self._connection.disconnect()
            self._pool = None

    async def _lead_to(self, client: Client) -> None:
        if self._pool is not client.connection_pool:
            await self.aclose()
            self._pool = client.connection_pool
            self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            # One timer of ours in place of redis-py's two, one of which would be a task for each command.
            self._seconds, self._connection.socket_timeout = self._connection.socket_timeout, None

    async def _ask_again(self, command: bytes) -> Any:
        connection = self._connection
        return await connection.retry.call_with_retry(lambda: self._ask(command), lambda _: connection.disconnect())

    async def _ask(self, command: bytes) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                await self._connection.send_packed_command(command)
                return await self._connection.read_response()
        except TimeoutError:
            raise RedisTimeout("no answer in time") from None
