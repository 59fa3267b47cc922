"""What Rejoin is held against in Python, as it is usually written: a route that streams, and a queue with XREAD.

`direct`: POST, and a StreamingResponse over the model's stream; nobody can leave and come back. `naive`: ARQ as it
comes, the SDK's objects, one awaited XADD for each, and one XREAD for each client. Written to be read, not to be slow:
the servers are the ones Rejoin runs on."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from fastapi import FastAPI, Request
from openai import AsyncOpenAI
from redis.asyncio import Redis
from starlette.responses import StreamingResponse

QUEUE = "bench-naive"


def _url() -> str:
    return os.environ["BENCH_REDIS_URL"]


def _openai() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="none", max_retries=0)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _alive() -> dict[str, bool]:
    return {"alive": True}


def direct() -> FastAPI:
    """POST /chat: asks the model and passes its chunks on, in one request."""
    app = FastAPI()
    app.get("/alive")(_alive)
    client = _openai()

    @app.post("/chat")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()

        async def chunks() -> AsyncIterator[str]:
            stream = await client.chat.completions.create(model="bench", messages=body["messages"], stream=True)
            async with stream:
                async for chunk in stream:
                    yield _event(chunk.model_dump_json())
            yield _event("[DONE]")

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


def naive() -> FastAPI:
    """POST /chat: enqueues, and follows the stream of the answer. GET /streams/KEY: follows one."""
    app = FastAPI()
    app.get("/alive")(_alive)
    redis = Redis.from_url(_url())
    pools: list[Any] = []

    async def follow(key: str) -> AsyncIterator[str]:
        last = "0"
        while True:
            for _, entries in await redis.xread({key: last}, block=15_000, count=100) or ():
                for entry_id, fields in entries:
                    last = entry_id.decode()
                    if b"end" in fields:
                        yield _event("[DONE]")
                        return
                    yield f"id: {last}\ndata: {fields[b'data'].decode()}\n\n"

    @app.get("/streams/{key}")
    async def streams(key: str) -> StreamingResponse:
        return StreamingResponse(follow(key), media_type="text/event-stream")

    @app.post("/chat")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        if not pools:
            pools.append(await create_pool(RedisSettings.from_dsn(_url()), default_queue_name=QUEUE))
        key = f"answer:{secrets.token_hex(16)}"
        await pools[0].enqueue_job("answer", key, body["messages"])
        return StreamingResponse(follow(key), media_type="text/event-stream")

    return app


async def answer(ctx: dict[str, Any], key: str, messages: list[dict[str, str]]) -> None:
    """The job: the SDK's objects, each written as it comes."""
    client, redis = ctx["client"], ctx["redis"]
    async with await client.chat.completions.create(model="bench", messages=messages, stream=True) as stream:
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                await redis.xadd(key, {"data": json.dumps({"text": text})})
    await redis.xadd(key, {"end": "1"})


async def _start(ctx: dict[str, Any]) -> None:
    ctx["client"] = _openai()
    print("worker.ready", flush=True)


class NaiveWorker:
    """For `python -m arq bench.naive.NaiveWorker`: as ARQ comes, but for `max_jobs`, without which it would do ten."""

    functions = (answer,)
    on_startup = _start
    max_jobs = 5000
    queue_name = QUEUE
    redis_settings = RedisSettings.from_dsn(os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379"))


async def iterate(streams: int, chunks: int) -> None:
    """Ask for so many streams at once and only look at the SDK's objects: what they alone cost."""
    client = _openai()

    async def one(number: int) -> int:
        seen = 0
        prompt: Any = [{"role": "user", "content": f"bench {number} {chunks} 12500 "}]
        async with await client.chat.completions.create(model="bench", messages=prompt, stream=True) as stream:
            async for chunk in stream:
                seen += bool(chunk.choices and chunk.choices[0].delta.content)
        return seen

    print("ready", flush=True)
    before = os.times()
    seen = sum(await asyncio.gather(*map(one, range(streams))))
    after = os.times()
    used = after.user + after.system - before.user - before.system
    print(json.dumps({"chunks": seen, "cpu": used}), flush=True)


if __name__ == "__main__":
    import sys

    import uvloop

    uvloop.run(iterate(int(sys.argv[1]), int(sys.argv[2])))
