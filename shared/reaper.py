"""Find generations whose lease ended, and hint them again. Run by every worker and every api process, jittered.

It decides nothing: the scripts do. When it is not run, nothing is lost, only later.
"""

from __future__ import annotations

import asyncio
import random

from shared import metrics
from shared.event_log import EventLog
from shared.jobs import Jobs
from shared.observability import logger
from shared.redis import PARTITIONS, TROUBLE

INTERVAL_SECONDS = 0.3  # well under the second after which the grace guard thinks that nobody looks
log = logger("reaper")


async def reap_forever(event_log: EventLog, jobs: Jobs) -> None:
    """Look at all partitions, again and again, until cancelled. Redis being away only delays it; of a Cluster, a node
    that is away delays no other."""
    async with asyncio.TaskGroup() as group:
        for lane in event_log.servers.lanes:
            group.create_task(_reap_lane(event_log, jobs, lane))


async def _reap_lane(event_log: EventLog, jobs: Jobs, lane: str) -> None:
    while True:
        await asyncio.sleep(INTERVAL_SECONDS * random.uniform(0.75, 1.25))
        try:
            await asyncio.gather(*(reap_partition(event_log, jobs, partition) for partition in lane))
        except TROUBLE as error:
            log.warning("reaper.delayed", error=type(error).__name__)


async def reap_owner(event_log: EventLog, jobs: Jobs, owner: str) -> int:
    """End the leases of a process that is known to be dead, now, and charge them; how many hints were sent."""
    sent = 0
    for partition in PARTITIONS:
        for generation_id, epoch in await event_log.held_by(owner, partition):
            hint = await event_log.reap(generation_id, expire_epoch=epoch)
            if hint is not None:
                await jobs.send(hint)
                sent += 1
    return sent


async def reap_partition(event_log: EventLog, jobs: Jobs, partition: str) -> int:
    """Reap what is due in one partition; how many hints were sent."""
    sent = 0
    for generation_id in await event_log.due(partition):
        try:
            hint = await event_log.reap(generation_id)
            if hint is not None:
                await jobs.send(hint)
        except TROUBLE as error:  # one that cannot be reaped must not keep the others
            log.warning("reaper.delayed", generation_id=generation_id, error=type(error).__name__)
            continue
        if hint is not None:
            log.info("generation.hinted_again", generation_id=generation_id, hint=hint.n)
            metrics.HINTED_AGAIN.inc()
            sent += 1
    return sent
