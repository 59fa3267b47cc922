"""`python -m worker`: one worker process. `--health` asks instead whether one on this machine is alive."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from shared import metrics, observability
from shared.config import Settings, load
from shared.errors import SettingsError
from shared.redis import AWAY, Keys, connect, queue_url
from worker.heartbeat import is_alive
from worker.settings import Worker


def main(argv: list[str]) -> int:
    """Exit code 0 after an orderly stop, 1 for unhealthy, 2 for a wrong setting (named in one line)."""
    try:
        settings = load()
        if "--health" in argv:
            return asyncio.run(_health(settings))
        observability.configure(settings.log_format, settings.log_level)
        metrics.serve(settings.metrics_host, settings.metrics_port)
        asyncio.set_event_loop(uvloop.new_event_loop())
        Worker(settings).run()
    except SettingsError as error:
        print(f"rejoin worker: {error.message}", file=sys.stderr)
        return 2
    return 0


async def _health(settings: Settings) -> int:
    redis = connect(queue_url(settings), connections=1)
    try:
        return 0 if await is_alive(redis, Keys(settings.key_prefix)) else 1
    except AWAY as error:
        print(f"rejoin worker: Redis does not answer ({type(error).__name__})", file=sys.stderr)
        return 1
    finally:
        await redis.aclose()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
