"""Workers whose job only says when it began, to measure how long a job waits: `python -m bench.job_workers KIND`.

`rejoin` is Rejoin's own worker (ARQ's Worker with the doorbell), `arq` is ARQ as it comes. taskiq's, which must not
know this project's packages, is in taskiq_worker.py. All write the monotonic clock to the same list."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import uvloop
from arq.connections import RedisSettings
from arq.worker import run_worker
from redis.asyncio import Redis

import worker.settings
from shared.config import load

BEGAN = "bench:began"
ARQ_QUEUE = "bench-arq"


def _url() -> str:
    return os.environ["REDIS_URL"]


async def _began(ctx: dict[Any, Any], generation_id: str = "", epoch: int = 0, n: int = 0) -> None:
    began = time.monotonic_ns()
    if "began" not in ctx:
        ctx["began"] = Redis.from_url(_url())
    await ctx["began"].rpush(BEGAN, began)


async def _ready(ctx: dict[Any, Any]) -> None:
    print("worker.ready", flush=True)


def main(kind: str) -> None:
    if kind == "arq":
        options = {"functions": [_began], "on_startup": _ready, "queue_name": ARQ_QUEUE}
        run_worker({**options, "redis_settings": RedisSettings.from_dsn(_url())})
        return
    asyncio.set_event_loop(uvloop.new_event_loop())
    worker.settings.generate = _began  # the job alone is another one; how it is found and started is Rejoin's
    print("worker.ready", flush=True)
    worker.settings.Worker(load()).run()


if __name__ == "__main__":
    main(sys.argv[1])
