"""The connections to Redis: however one breaks, it is a Redis that is away, and not a mistake of ours."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from redis.exceptions import ConnectionError

from shared.redis import connect


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_breaks_before_a_write_is_a_redis_that_is_away(redis_url: str, new_loop) -> None:
    """The peer resets, and then a command is sent: uvloop's RuntimeError would end a worker, or an api."""

    async def write_to_a_broken_connection() -> None:
        client = connect(redis_url, connections=1)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        connection._writer.transport.abort()
        await asyncio.sleep(0.01)  # for the loop to close it
        with pytest.raises(ConnectionError):
            await connection.send_command("PING")
            await connection.read_response()
        assert await client.ping()
        await client.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(write_to_a_broken_connection())
