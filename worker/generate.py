"""Run one generation: claim it, drive the provider, hand its events to the writer, close it exactly once.

The edge of a job: whatever goes wrong becomes the log's terminal event, or leaves the generation for the next attempt.
Knows neither HTTP nor the model's protocol.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, replace

from shared import metrics
from shared.config import ModelTable, Settings
from shared.errors import CallerError, OurError, UpstreamError
from shared.event_log import Claim, EventLog, Hint
from shared.events import (
    Completed,
    Failed,
    Output,
    SourceAdded,
    Terminal,
    UpstreamAccepted,
    decode,
    encode,
    format_id,
    outcome,
)
from shared.jobs import Jobs
from shared.observability import logger, place_of
from shared.prompt import Prompt
from shared.redis import TROUBLE
from worker import providers
from worker.providers import Said
from worker.writer import Attempt, Lost, Writer

DURABLE_SECONDS = 10.0  # how long what heals is kept for replicas that do not have the end yet
FLUSH_SECONDS = 1.0  # how long a stopping worker waits for its last events to be written
log = logger("generate")


class Generator:
    """What every job of this worker shares: the log, the writer, the providers."""

    def __init__(
        self, settings: Settings, models: ModelTable, event_log: EventLog, jobs: Jobs, writer: Writer, owner: str
    ) -> None:
        self._settings = settings
        self._owner = owner
        self._models = models
        self._event_log = event_log
        self._jobs = jobs
        self._writer = writer
        self._providers: dict[str, providers.Provider] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}

    async def generate(self, hint: Hint) -> None:
        """Run what the hint points to, if it still wants a worker. Cancelled: hand it over."""
        sent_at = time.monotonic()
        past = await self._past(hint)
        claim = await self._claim(hint, past.tail if past else "")
        if claim is None:
            log.debug("hint.stale", generation_id=hint.generation_id, epoch=hint.epoch)
            return
        said = past.said if past and claim.continued else None
        metrics.ATTEMPTS_STARTED.labels("continued" if said else "fresh").inc()
        with self._writer.open(claim, sent_at) as attempt:
            attempt.upstream_id = said.accepted_id if said else None
            try:
                if past and past.said.accepted_id and not said:  # nobody comes back to that one, and it goes on
                    await self._stop_upstream(claim, past.said.accepted_id)
                await self._run(claim, attempt, said)
            except asyncio.CancelledError:
                # The worker is stopping. This is the edge of the job: ARQ would only log a traceback of it.
                await asyncio.shield(self._hand_over(claim, attempt))

    def warm_up(self) -> None:
        """Build the providers before the first prompt: importing an SDK would hold up the event loop then."""
        for route in (*self._models.routes.values(), self._models.fallback):
            if route is not None:
                self._providers[route.name] = providers.build(self._settings, route)

    async def aclose(self) -> None:
        for provider in self._providers.values():
            await provider.aclose()

    async def _past(self, hint: Hint) -> Past | None:
        """What an earlier attempt left, where the provider can go on from it."""
        if hint.epoch == 0:  # nobody has had it yet
            return None
        try:
            past = await _read_past(self._event_log, hint.generation_id)
            if past is None or not self._provider(past.prompt.model).can_continue(past.prompt, past.said):
                return None
            return past
        except (*TROUBLE, CallerError) as error:  # a fresh start is always possible
            log.warning("past.not_read", generation_id=hint.generation_id, error=type(error).__name__)
            return None

    async def _claim(self, hint: Hint, tail: str) -> Claim | None:
        claiming = asyncio.ensure_future(
            self._event_log.claim(hint, secrets.token_hex(16), owner=self._owner, continues=tail)
        )
        try:
            return await asyncio.shield(claiming)
        except TROUBLE as error:  # the queued lease, or the claimed one, will end by itself
            log.warning("claim.redis_away", generation_id=hint.generation_id, error=type(error).__name__)
            return None
        except asyncio.CancelledError:  # stopping: what may have been claimed is handed over, not left to expire
            claim = await claiming
            if claim is not None:
                await self._release(claim.generation_id, claim.epoch)
            raise

    async def _run(self, claim: Claim, attempt: Attempt, said: Said | None) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                driving = group.create_task(self._drive(claim, attempt, said))
                attempt.on_lost = driving.cancel
                await asyncio.sleep(0)  # the upstream is asked before that is told
                log.info(
                    "generation.started",
                    generation_id=claim.generation_id,
                    attempt=claim.attempt,
                    model=claim.model,
                    mode="continued" if said else "fresh",
                )
        except* Lost:
            pass
        if attempt.lost == "UNREACHABLE":
            await self._release_when_back(claim)
        if attempt.lost:
            await self._abandon(claim, attempt)
            log.info("generation.lost", generation_id=claim.generation_id, attempt=claim.attempt, reason=attempt.lost)

    async def _drive(self, claim: Claim, attempt: Attempt, said: Said | None) -> None:
        terminal = await self._answer(claim, attempt, said)
        finished = replace(terminal, at=_redis_now(claim, attempt))
        attempt.put(encode(finished), outcome(finished))
        await attempt.settled()
        await self._until_durable(attempt)
        fields = {"code": finished.code} if isinstance(finished, Failed) else {}
        log.info(
            finished.type,
            generation_id=claim.generation_id,
            attempt=claim.attempt,
            events=attempt.last_seq,
            seconds=round(time.monotonic() - attempt.started_at, 3),
            **fields,
        )
        if isinstance(finished, Failed):
            await self._abandon(claim, attempt)

    async def _until_durable(self, attempt: Attempt) -> None:
        """Where replicas are to have it: keep what heals a failover until they have the end. No reader waits for it."""
        if not self._settings.wait_replicas:
            return
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + DURABLE_SECONDS
        while clock() < give_up_at:
            with suppress(*TROUBLE):
                if await self._event_log.is_durable(attempt.generation_id):
                    return
            await asyncio.sleep(0.2)
            self._writer.renew(attempt)  # a server that lost the end answers with a gap, and is given it again
            await attempt.settled()
        log.warning("generation.not_durable", generation_id=attempt.generation_id)

    async def _answer(self, claim: Claim, attempt: Attempt, said: Said | None) -> Terminal:
        """Every way an answer can end, as the terminal event that says so."""
        try:
            async with asyncio.timeout(max(claim.seconds_left, 0.001)) as deadline, self._slot(claim.model):
                return await self._stream(claim, attempt, said)
        except TimeoutError:
            if not deadline.expired():
                raise
            return Failed("deadline_exceeded", "the generation ran longer than REJOIN_MAX_GENERATION_SECONDS")
        except UpstreamError as error:
            return Failed(error.code, error.message, error.retryable)
        except (CallerError, OurError) as error:
            return Failed(error.code, error.message, retryable=False)
        except Lost:
            raise
        except Exception as error:
            log.error(
                "generation.broke", generation_id=claim.generation_id, error=type(error).__name__, at=place_of(error)
            )
            return Failed("internal_error", "the worker failed on this generation; its log has the place")

    async def _stream(self, claim: Claim, attempt: Attempt, said: Said | None) -> Completed:
        prompt = Prompt.from_json(claim.prompt)
        first = True
        async with aclosing(self._provider(claim.model).stream(prompt, said)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Completed):
                    attempt.upstream_id = None  # there is nothing left to stop
                    return event
                if isinstance(event, UpstreamAccepted):
                    attempt.upstream_id = event.id
                if first and not isinstance(event, SourceAdded | UpstreamAccepted):
                    event, first = replace(event, at=_redis_now(claim, attempt)), False
                attempt.put(encode(event))
                if attempt.must_wait:
                    await attempt.ready()
        raise UpstreamError("the model's answer ended without saying that it was complete", code="upstream_truncated")

    def _provider(self, model: str) -> providers.Provider:
        return self._providers[self._models.resolve(model).name]

    def _slot(self, model: str) -> AbstractAsyncContextManager[object]:
        route = self._models.resolve(model)
        if route.concurrency is None:
            return nullcontext()
        return self._slots.setdefault(route.name, asyncio.Semaphore(route.concurrency))

    async def _hand_over(self, claim: Claim, attempt: Attempt) -> None:
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await attempt.settled()
        except (TimeoutError, Lost):
            pass
        if attempt.lost is None and not (attempt.final and attempt.is_settled):
            await self._release(attempt.generation_id, attempt.epoch)
        await self._abandon(claim, attempt)

    async def _abandon(self, claim: Claim, attempt: Attempt) -> None:
        """Stop an upstream that goes on without us, if nobody will come back to it; to close its connection does not.

        Whoever was handed the generation, or has taken it, does come back, unless it began afresh."""
        if attempt.upstream_id is None:
            return
        try:
            order = await self._event_log.order(attempt.generation_id)
        except TROUBLE as error:  # then it goes on to its own end
            log.warning("upstream.not_stopped", generation_id=attempt.generation_id, error=type(error).__name__)
            return
        if order is None or order.ended or (order.fresh or 0) > attempt.epoch:
            await self._stop_upstream(claim, attempt.upstream_id)

    async def _stop_upstream(self, claim: Claim, upstream_id: str) -> None:
        try:
            await self._provider(claim.model).abandon(upstream_id)
            log.info("upstream.stopped", generation_id=claim.generation_id)
        except (UpstreamError, CallerError) as error:
            log.warning("upstream.not_stopped", generation_id=claim.generation_id, error=type(error).__name__)

    async def _release_when_back(self, claim: Claim) -> None:
        """This worker gave up because it did not reach Redis, not because it died: nothing is to be charged for it."""
        for _ in range(round(max(claim.seconds_left, 0)) + 1):
            if await self._release(claim.generation_id, claim.epoch):
                return
            await asyncio.sleep(1)

    async def _release(self, generation_id: str, epoch: int) -> bool:
        """Hand a generation over; False when Redis could not be told (its lease will end by itself)."""
        try:
            hint = await self._event_log.release(generation_id, epoch)
            if hint is not None:
                await self._jobs.send(hint)
                log.info("generation.released", generation_id=generation_id)
                metrics.GENERATIONS_RELEASED.inc()
            return True
        except TROUBLE as error:
            log.warning("generation.not_released", generation_id=generation_id, error=type(error).__name__)
            return False


def _redis_now(claim: Claim, attempt: Attempt) -> int:
    """Unix milliseconds by Redis' clock: the epoch is its TIME at the claim, our monotonic clock counts on."""
    return claim.epoch + round((time.monotonic() - attempt.started_at) * 1000)


@dataclass(frozen=True)
class Past:
    """What an earlier attempt left behind: the prompt, the outputs that stand, and the id of the log's last entry."""

    prompt: Prompt
    said: Said
    tail: str


async def _read_past(event_log: EventLog, generation_id: str) -> Past | None:
    order, asked = await event_log.order(generation_id), await event_log.asked(generation_id)
    if order is None or asked is None or order.fresh is None:
        return None
    outputs: list[Output] = []
    tail = after = format_id((order.fresh, 0)).decode()
    while page := await event_log.read(generation_id, after):
        tail = after = page[-1].id.decode()
        for entry in page:
            event = decode(entry.data)
            if event is None or isinstance(event, Terminal):
                return None
            if isinstance(event, Output):
                outputs.append(event)
    return Past(asked[0], Said(outputs), tail)
