"""ARQ's own Worker, with a doorbell, and nothing that a Redis restart or a SIGTERM under load can break.

`python -m worker` runs `Worker`; `arq worker.settings.WorkerSettings` runs ARQ's with the same settings: it works,
only slower to start a job. What ARQ does that this file works around is listed in docs/protocol.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

import arq.worker
from arq.connections import ArqRedis

from shared import metrics
from shared.cluster import servers_of
from shared.config import Settings, load, model_table
from shared.event_log import EventLog, Hint
from shared.jobs import FUNCTION, Jobs, deserialize, serialize
from shared.observability import causes_of, logger
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
        log.error("worker.broke", **causes_of(error))
        os._exit(1)


async def generate(ctx: dict[Any, Any], generation_id: str, epoch: int, n: int) -> None:
    """The job ARQ runs: its arguments are a hint."""
    runtime: Runtime = ctx["runtime"]
    await runtime.generator.generate(Hint(generation_id, epoch, n))


async def on_startup(ctx: dict[Any, Any]) -> None:
    ctx["runtime"] = Runtime(ctx["settings"])
    await ctx["runtime"].start()
    log.info("worker.ready", pid=os.getpid())


async def on_job_start(ctx: dict[Any, Any]) -> None:
    """Only for ARQ's own worker: ours has taken the hint off the queue as it started the job."""
    with suppress(*TROUBLE):  # ARQ takes it off at the job's end
        await ctx["runtime"].jobs.taken(ctx["job_id"])


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
        "on_job_start": on_job_start,
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
        super().__init__(**{**worker_settings(settings), "on_job_start": None})
        self._bell: Client = connect(queue_url(settings), connections=1, timeout_seconds=settings.poll_seconds + 2)
        self._keys = Keys(settings.key_prefix)
        self._jobs = Jobs(self.pool, self._keys)
        self._drain_seconds = settings.drain_seconds
        self._slot_freed = asyncio.Event()
        self._drained: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._page = self._page_started = 0  # of the newest poll: hints read, jobs started
        self._waiting = 0  # hints still on the queue when jobs were last started

    async def main(self) -> None:
        self.ctx["redis"] = self.pool
        await on_startup(self.ctx)
        while True:
            try:
                async with self._polling:
                    self._page, self._page_started = 0, 0
                    await self._poll_iteration()
                if self._page == JOBS_PER_POLL and not self._page_started and not self._is_full:
                    self._queue_read_offset += self._page  # all locked by another worker: look behind them
                    continue
                self._queue_read_offset = 0
                if not self._page_started or self._is_full:
                    await self._answer_rings()
            except TROUBLE as error:
                log.warning("queue.redis_away", error=type(error).__name__)
                await asyncio.sleep(self.poll_delay_s)

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """ARQ takes four round trips for each job, one after the other; here one takes all of them off the queue."""
        self._page = len(job_ids)
        free = self.max_jobs - self.job_counter
        names = [job_id.decode(errors="replace") for job_id in job_ids[:free]]
        if not names:
            return
        scores, self._waiting = await self._jobs.take(names, self.in_progress_timeout_s)
        for name, score in zip(names, scores, strict=True):
            if score is not None:
                await self._start_job(name, score)

    async def _start_job(self, name: str, score: int) -> None:
        await self.sem.acquire()  # ARQ's own count of slots, which is given back with ours
        self.job_counter += 1
        self._page_started += 1
        self.tasks[name] = task = self.loop.create_task(self.run_job(name, score))
        task.add_done_callback(lambda _: self._release_sem_dec_counter_on_complete())

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

    async def _answer_rings(self) -> None:
        """Start what the bell is rung for, until it is time to poll: nobody rang, more waits, or all slots are full."""
        poll_at = self.loop.time() + self.poll_delay_s
        while (job_id := await self._next_ring()) and self.loop.time() < poll_at:
            async with self._polling:
                if self.allow_pick_jobs:
                    await self.start_jobs([job_id])
            if self._waiting or self._is_full:
                return

    async def _next_ring(self) -> bytes | None:
        """The hint that the bell is rung for. None after the poll's time, or (full, or stopping) when a slot frees."""
        if not self._is_full and self.allow_pick_jobs:
            ring = await self._bell.execute_command("BLPOP", self._keys.doorbell, self.poll_delay_s)  # type: ignore[no-untyped-call]
            return ring[1] if ring else None
        self._slot_freed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.poll_delay_s):
                await self._slot_freed.wait()
        return None

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
