"""ARQ's own Worker, with a doorbell, and nothing that a Redis restart or a SIGTERM under load can break.

`python -m worker` runs `Worker`; `arq worker.settings.WorkerSettings` runs ARQ's with the same settings: it works,
only slower to start a job. What ARQ does that this file works around is listed in docs/protocol.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import arq.worker
from arq.connections import ArqRedis

from shared import metrics
from shared.cluster import servers_of
from shared.config import Settings, load, model_table
from shared.event_log import EventLog, Hint
from shared.jobs import FUNCTION, Jobs, deserialize, serialize
from shared.observability import logger, place_of
from shared.reaper import reap_forever
from shared.redis import TROUBLE, Client, Keys, connect, queue_url, when_reachable
from worker.generate import Generator
from worker.heartbeat import hear_nudges, renew_leases, show_life, worker_name
from worker.writer import Writer

JOBS_PER_POLL = 16  # a worker takes a few hints at a time, so that a burst spreads over all workers
HAND_OVER_SECONDS = 5.0  # for the last events and the release, when the time to drain is over
log = logger("worker")


class Runtime:
    """Everything one worker process holds open. `run` owns its tasks until `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keys(settings.key_prefix)
        self.servers = servers_of(settings.redis_url, connections=8)
        self.queue = connect(queue_url(settings), connections=4)
        self.listening = servers_of(settings.redis_url, connections=1, timeout_seconds=None)
        event_log = EventLog(self.servers, settings)
        self.jobs = Jobs(self.queue, self.keys)
        writer = Writer(EventLog(servers_of(settings.redis_url, connections=1), settings), settings.lease_seconds)
        self.event_log, self.writer = event_log, writer
        self.generator = Generator(settings, model_table(settings), event_log, self.jobs, writer, worker_name())
        self._stopping = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait for Redis, then begin. Raises SettingsError when the Redis there is would lose generations."""
        await when_reachable(self.servers.all)
        self.generator.warm_up()
        metrics.ATTEMPTS_RUNNING.set_function(lambda: len(self.writer.attempts))
        metrics.PENDING_BYTES.set_function(lambda: self.writer.pending_bytes)
        self._owner = asyncio.create_task(self._own())
        self._owner.add_done_callback(_end_process_if_broken)

    async def stop(self) -> None:
        self._stopping.set()
        if self._owner is not None:
            await asyncio.wait([self._owner])
        await self.generator.aclose()
        for part in (self.servers, self.queue, self.listening, self.writer):
            await part.aclose()

    async def _own(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.writer.run()),
                group.create_task(renew_leases(self.writer, self.settings.lease_seconds)),
                group.create_task(hear_nudges(self.listening, self.keys, self.writer)),
                group.create_task(show_life(self.queue, self.keys)),
                group.create_task(reap_forever(self.event_log, self.jobs)),
                group.create_task(metrics.watch_loop()),
            ]
            await self._stopping.wait()
            for task in tasks:
                task.cancel()


def _end_process_if_broken(owner: asyncio.Task[None]) -> None:
    """A worker without its writer must not go on, nor drain: its leases end, and the supervisor starts another."""
    error = None if owner.cancelled() else owner.exception()
    if error is not None:
        errors = getattr(error, "exceptions", (error,))
        log.error("worker.broke", error=[type(one).__name__ for one in errors], at=[place_of(one) for one in errors])
        os._exit(1)


async def generate(ctx: dict[Any, Any], generation_id: str, epoch: int, n: int) -> None:
    """The job ARQ runs: its arguments are a hint."""
    runtime: Runtime = ctx["runtime"]
    await runtime.generator.generate(Hint(generation_id, epoch, n))


async def on_startup(ctx: dict[Any, Any]) -> None:
    ctx["runtime"] = Runtime(ctx["settings"])
    await ctx["runtime"].start()
    log.info("worker.ready", pid=os.getpid())


async def on_shutdown(ctx: dict[Any, Any]) -> None:
    await ctx["runtime"].stop()
    log.info("worker.stopped", pid=os.getpid())


def worker_settings(settings: Settings) -> dict[str, Any]:
    """What ARQ's Worker is built with; the reasons are in docs/protocol.md, "ARQ"."""
    keys = Keys(settings.key_prefix)
    patient = connect(queue_url(settings), connections=16, retries=-1)  # a Redis restart must not end the process
    pool = ArqRedis(
        pool_or_conn=patient.connection_pool,
        default_queue_name=keys.queue,
        job_serializer=serialize,
        job_deserializer=deserialize,
    )
    return {
        "functions": [arq.worker.func(generate, name=FUNCTION)],
        "redis_pool": pool,
        "queue_name": keys.queue,
        "job_serializer": serialize,
        "job_deserializer": deserialize,
        "on_startup": on_startup,
        "on_shutdown": on_shutdown,
        "ctx": {"settings": settings},
        "max_jobs": settings.worker_concurrency,
        "queue_read_limit": JOBS_PER_POLL,
        "poll_delay": settings.poll_seconds,
        "job_timeout": None,
        "job_completion_wait": settings.drain_seconds,
        "max_tries": 1,
        "retry_jobs": False,
        "keep_result": 0,
        "allow_abort_jobs": False,
        "log_results": False,
    }


def __getattr__(name: str) -> Any:
    """`WorkerSettings` reads the environment when ARQ asks for it, not when this module is imported."""
    if name == "WorkerSettings":
        return worker_settings(load())
    raise AttributeError(name)


class Worker(arq.worker.Worker):
    """ARQ's Worker that listens for the doorbell, survives a Redis restart and drains before it stops."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(**worker_settings(settings))
        self._bell: Client = connect(queue_url(settings), connections=1, timeout_seconds=settings.poll_seconds + 2)
        self._keys = Keys(settings.key_prefix)
        self._drain_seconds = settings.drain_seconds
        self._slot_freed = asyncio.Event()
        self._drained: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._page = self._page_started = 0  # of the newest poll: hints read, jobs started

    async def main(self) -> None:
        self.ctx["redis"] = self.pool
        await on_startup(self.ctx)
        while True:
            try:
                async with self._polling:
                    self._page, self._page_started = 0, 0
                    await self._poll_iteration()
                if self._page == JOBS_PER_POLL and not self._page_started and not self._is_full:
                    self._queue_read_offset += self._page  # all locked by a worker that died: look behind them
                    continue
                self._queue_read_offset = 0
                if not self._page_started or self._is_full:
                    await self._next_ring()
            except TROUBLE as error:
                log.warning("queue.redis_away", error=type(error).__name__)
                await asyncio.sleep(self.poll_delay_s)

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """ARQ takes four round trips for each job, one job after the other; side by side a burst starts at once."""
        self._page = len(job_ids)
        await asyncio.gather(*map(self._start_job, job_ids))

    async def _start_job(self, job_id: bytes) -> None:
        name = job_id.decode()
        had = self.tasks.get(name)
        try:
            await super().start_jobs([job_id])
        except TROUBLE as error:  # ARQ had taken a slot for it
            log.warning("job.not_started", error=type(error).__name__)
            if self.tasks.get(name) is had:
                self.job_counter -= 1
                self.sem.release()
        self._page_started += self.tasks.get(name) is not had

    async def run_job(self, job_id: str, score: int) -> None:
        try:
            await super().run_job(job_id, score)
        except TROUBLE as error:  # ARQ would end the process; its lock expires, and the lease sends the hint again
            log.warning("job.redis_away", error=type(error).__name__)

    def handle_sig(self, signum: signal.Signals) -> None:
        """Stop taking hints, drain, hand over the rest. A second signal hands over at once."""
        log.info("worker.stopping", signal=signal.Signals(signum).name, running=len(self.job_tasks))
        self.allow_pick_jobs = False
        if self._drained is None:
            self._drained = self.loop.create_task(self._drain())
        else:
            self._cancel_jobs()

    handle_sig_wait_for_completion = handle_sig

    async def close(self) -> None:
        await self._end_jobs()
        if "runtime" in self.ctx:
            await on_shutdown(self.ctx)
        await self._bell.aclose()
        await self.pool.aclose(close_connection_pool=True)

    @property
    def _is_full(self) -> bool:
        return self.job_counter >= self.max_jobs

    async def _next_ring(self) -> None:
        """Until there may be work: the bell, or (full, or stopping) a slot that frees, or the poll's time."""
        if self._is_full or not self.allow_pick_jobs:
            self._slot_freed.clear()
            try:
                async with asyncio.timeout(self.poll_delay_s):
                    await self._slot_freed.wait()
            except TimeoutError:
                pass
        else:
            await self._bell.execute_command("BLPOP", self._keys.doorbell, self.poll_delay_s)  # type: ignore[no-untyped-call]

    def _release_sem_dec_counter_on_complete(self) -> None:
        super()._release_sem_dec_counter_on_complete()
        self._slot_freed.set()

    async def _drain(self) -> None:
        async with self._polling:  # what is being started is to be drained too
            running = [task for task in self.tasks.values() if not task.done()]
        if running:
            await asyncio.wait(running, timeout=self._drain_seconds)
        self._cancel_jobs()
        await self._end_jobs()
        if self.main_task is not None:
            self.main_task.cancel()

    async def _end_jobs(self) -> None:
        """Wait for the hand-overs; what then still waits is ARQ's own tidying, which Redis may hold up for ever."""
        running = [task for task in self.tasks.values() if not task.done()]
        if running:
            _, stuck = await asyncio.wait(running, timeout=HAND_OVER_SECONDS)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _cancel_jobs(self) -> None:
        for task in self.job_tasks.values():
            task.cancel()
