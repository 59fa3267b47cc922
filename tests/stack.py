"""The system under test: real api and worker processes on a real Valkey, and a client of their HTTP."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.processes import Process, Processes, free_port
from tests.reader import Reader
from tests.waiting import wait_until


@dataclass
class Api:
    """One api process."""

    process: Process
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Stack:
    """Starts apis and workers that share one Redis and one key prefix; talks to them as a client."""

    processes: Processes
    env: dict[str, str]
    apis: list[Api] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    http: httpx2.AsyncClient = field(default_factory=lambda: httpx2.AsyncClient(timeout=30, trust_env=False))

    async def api(self, **env: str) -> Api:
        port = free_port()
        argv = [sys.executable, "-m", "api"]
        process = await self.processes.start("api", argv, {**self.env, "REJOIN_PORT": str(port), **env})
        api = Api(process, port)
        await self.ready(api)
        self.apis.append(api)
        return api

    async def ready(self, api: Api) -> None:
        async def answers() -> bool:
            assert api.process.running, api.process.log()
            try:
                return (await self.http.get(api.url + "/readyz")).status_code == 200
            except httpx2.HTTPError:
                return False

        await wait_until(answers, timeout=30)

    async def worker(self, **env: str) -> Process:
        process = await self.processes.start("worker", [sys.executable, "-m", "worker"], {**self.env, **env})
        await process.says("worker.ready", timeout=30)
        self.workers.append(process)
        return process

    async def create(self, model: str = "words", prompt: str = "hello", api: Api | None = None, **body: Any) -> dict:
        """POST a generation and give its 202 answer."""
        headers = {"Idempotency-Key": body.pop("key")} if "key" in body else {}
        url = (api or self.apis[0]).url + "/v1/generations"
        answer = await self.http.post(url, json={"model": model, "prompt": prompt, **body}, headers=headers)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def reader(self, generation: dict, api: Api | None = None, query: str = "") -> Reader:
        return Reader((api or self.apis[0]).url + generation["events_url"] + query)

    async def snapshot(self, generation: dict | str, api: Api | None = None) -> dict:
        generation_id = generation if isinstance(generation, str) else generation["id"]
        answer = await self.http.get(f"{(api or self.apis[0]).url}/v1/generations/{generation_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def cancel(self, generation: dict, api: Api | None = None) -> dict:
        answer = await self.http.post((api or self.apis[0]).url + generation["cancel_url"])
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def finished(self, generation: dict, timeout: float = 30) -> dict:
        """The snapshot once the generation has ended."""

        async def look() -> dict | None:
            state = await self.snapshot(generation)
            return state if state["status"] not in ("queued", "in_progress") else None

        return await wait_until(look, timeout=timeout, every=0.05)

    async def attempt(self, generation: dict, n: int, timeout: float = 30) -> float:
        """Wait until attempt `n` has begun; how long that took, in seconds."""
        started = time.monotonic()

        async def look() -> bool:
            return (await self.snapshot(generation))["attempt"] >= n

        await wait_until(look, timeout=timeout, every=0.05)
        return time.monotonic() - started


async def gather_bounded(limit: int, *waiting: Any) -> list[Any]:
    """`asyncio.gather`, so many at a time."""
    gate = asyncio.Semaphore(limit)

    async def one(awaitable: Any) -> Any:
        async with gate:
            return await awaitable

    return await asyncio.gather(*map(one, waiting))
