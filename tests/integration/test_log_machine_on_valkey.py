"""The machine of tests/unit/test_log_machine.py on a real Valkey: fakeredis may be wrong about Redis."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis.stateful import run_state_machine_as_test

from shared import lua
from shared.event_log import EventLog
from shared.redis import Client, connect
from tests.unit.test_log_machine import LogMachine, options

TIME = "redis.call('TIME')"


def test_the_scripts_keep_the_protocol_on_a_real_server(redis_url: str, key_prefix: str) -> None:
    """Scripts and model agree after every step on Valkey too."""
    clock = f"clock-of-{key_prefix[1:]}"
    reading = f"redis.call('LRANGE', '{clock}', 0, 1)"
    script_of = lua.source

    def told_the_time(name: str) -> str:
        assert TIME in script_of(name)
        return script_of(name).replace(TIME, reading)

    class ValkeyLogMachine(LogMachine):
        """Nobody sets a server's clock, so the scripts read theirs from a list; and keys expire when we say so."""

        prefix = key_prefix
        ttl_slack_ms = 30_000

        async def connect(self) -> Client:
            client = connect(redis_url, connections=2)
            self.redis = client
            await self.forget()
            return client

        def event_log(self) -> EventLog:
            with patch.object(lua, "source", told_the_time):
                return super().event_log()

        async def set_clock(self) -> None:
            seconds, ms = divmod(self.model.now, 1000)
            lives_until = self.lives_until()
            async with self.redis.pipeline() as pipe:
                pipe.delete(clock)
                pipe.rpush(clock, seconds, ms * 1000)
                for key in self.generation_keys():
                    pipe.pexpire(key, max(0, lives_until.get(key, 0) - self.model.now))
                await pipe.execute()

        async def forget(self) -> None:
            await self.redis.delete(clock, self.server_key, *self.all_keys())

        async def close_all(self) -> None:
            await self.forget()
            await super().close_all()

    run_state_machine_as_test(ValkeyLogMachine, settings=options(40))
