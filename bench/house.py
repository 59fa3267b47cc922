"""Where a run lives: a folder, one Valkey, and the processes it started. Everything on loopback, everything ended."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from redis.asyncio import Redis

from shared.config import Settings
from shared.event_log import EventLog
from shared.redis import connect
from tests.processes import Process, Processes, Valkey, free_port, valkey
from tests.waiting import wait_until

PREFIX = "bench"
TENANT = "local"  # whom an api without keys serves
LEASE_SECONDS = 300.0  # longer than any run: the feeder writes in the place of a worker, and renews nothing
LOG_LEVEL = {"REJOIN_LOG_LEVEL": "warning"}


@dataclass
class House:
    """What a section of the bench is given."""

    folder: Path
    programs: dict[str, Path]
    processes: Processes
    store: Valkey
    redis: Redis
    event_log: EventLog

    @property
    def store_pid(self) -> int:
        assert self.store.process is not None
        return self.store.process.pid

    @property
    def env(self) -> dict[str, str]:
        """The settings of Rejoin's processes in this house."""
        lease = {"REJOIN_LEASE_SECONDS": str(LEASE_SECONDS)}
        return {"REDIS_URL": self.store.url, "REJOIN_KEY_PREFIX": PREFIX, **lease, **LOG_LEVEL}

    def start(self, name: str, argv: list[str], **env: str) -> Process:
        return self.processes.launch(name, argv, env)

    async def api(self, **env: str) -> tuple[Process, int]:
        """An api of Rejoin's, ready, and its port."""
        port = free_port()
        argv = [sys.executable, "-m", "api"]
        process = self.start(
            "api", argv, **{**self.env, "REJOIN_PORT": str(port), "REJOIN_MAX_STREAMS": "100000", **env}
        )
        await answers(process, f"http://127.0.0.1:{port}/readyz")
        return process, port

    async def worker(self, **env: str) -> Process:
        """A worker of Rejoin's, ready."""
        more = {"REJOIN_LOG_LEVEL": "info", "REJOIN_WORKER_CONCURRENCY": "5000", **env}
        process = self.start("worker", [sys.executable, "-m", "worker"], **{**self.env, **more})
        await process.says("worker.ready", timeout=30)
        return process

    async def uvicorn(self, app: str, **env: str) -> tuple[Process, int]:
        """An application of the peers', under the server that Rejoin runs on, with the same options."""
        port = free_port()
        options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
        argv = [sys.executable, "-m", "uvicorn", app, "--factory", "--port", str(port), *options]
        process = self.start(app.rpartition(":")[2], argv, BENCH_REDIS_URL=self.store.url, **env)
        await answers(process, f"http://127.0.0.1:{port}/alive")
        return process, port

    async def end(self, *processes: Process) -> None:
        for process in processes:
            if process.running:
                process.popen.terminate()
                try:
                    await process.wait(15)
                except AssertionError:
                    await process.kill()


async def answers(process: Process, url: str, timeout: float = 30) -> None:
    """Wait until something, whatever its status, answers at this address."""
    async with httpx2.AsyncClient(trust_env=False, timeout=2) as http:

        async def look() -> bool:
            assert process.running, process.log()
            try:
                return (await http.get(url)).status_code != 503
            except httpx2.HTTPError:
                return False

        _: bool = await wait_until(look, timeout=timeout, every=0.05)


@asynccontextmanager
async def house(programs: dict[str, Path]) -> AsyncIterator[House]:
    """A fresh house with a running Valkey; everything in it ends with the block."""
    async with AsyncExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="rejoin-bench-")))
        processes = Processes(folder)
        opened.callback(processes.end_all)
        store = valkey(processes, folder / "valkey")
        store.argv += ["--maxclients", "15000"]
        store.start()
        redis = connect(store.url, connections=32, timeout_seconds=30)
        opened.push_async_callback(redis.aclose)
        settings = Settings(_env_file=None, redis_url=store.url, key_prefix=PREFIX, lease_seconds=LEASE_SECONDS)
        logs = connect(store.url, connections=32, timeout_seconds=30)  # EventLog has XRANGE give it entries
        opened.push_async_callback(logs.aclose)
        yield House(folder, programs, processes, store, redis, EventLog(logs, settings))
