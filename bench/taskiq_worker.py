"""taskiq's list broker, with the same job; run by the Python of requirements.lock, which has none of Rejoin's packages.

`taskiq worker bench.taskiq_worker:broker` is the worker; `python -m bench.taskiq_worker N` sends N jobs and prints how
long each waited, in nanoseconds."""

import asyncio
import os
import sys
import time

from redis.asyncio import Redis
from taskiq_redis import ListQueueBroker  # type: ignore[import-not-found]

BEGAN = "bench:began"
URL = os.environ["REDIS_URL"]
broker = ListQueueBroker(URL, queue_name="bench-taskiq")
redis = Redis.from_url(URL)


@broker.task  # type: ignore[untyped-decorator]
async def began() -> None:
    now = time.monotonic_ns()
    await redis.rpush(BEGAN, now)


async def main(times: int) -> None:
    await broker.startup()
    for _ in range(times):
        sent = time.monotonic_ns()
        await began.kiq()
        _, when = await redis.blpop([BEGAN], 30)
        print(int(when) - sent, flush=True)
        await asyncio.sleep(0.005)
    await broker.shutdown()


if __name__ == "__main__":
    from bench import taskiq_worker  # under the name that the worker knows its task by

    asyncio.run(taskiq_worker.main(int(sys.argv[1])))
