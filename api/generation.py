"""What every family of routes does with a generation: start it, follow it, wait for its end, look at it.

Knows no client protocol: a route says who asks, for what, and in which dialect.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from api import sse
from api.auth import idempotent_id
from api.dependencies import Parts
from api.frames import Dialect, Ending
from api.relay import Opening, Relay, Whole, open_reader
from shared import metrics
from shared.errors import BadRequest, TooMany, Unavailable
from shared.event_log import OnDisconnect, Order, gone, new_id
from shared.events import Snapshot
from shared.observability import logger
from shared.prompt import Prompt
from shared.redis import TROUBLE

log = logger("api")
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


async def start(
    parts: Parts,
    tenant: str,
    prompt: Prompt,
    on_disconnect: OnDisconnect,
    idempotency_key: str | None,
    *,
    options: dict[str, Any] | None = None,
) -> Order:
    """Write the order and its log, then hint the workers: the order first, so that a lost hint loses nothing.

    The same Idempotency-Key and prompt again: the same order. `options`: what the dialect wants to find again."""
    if idempotency_key is not None and not IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise BadRequest("an Idempotency-Key is 1 to 255 printable ASCII characters", param="Idempotency-Key")
    if parts.drain.begun:
        raise Unavailable("this server is going down; send the request again", code="draining")
    route = parts.models.resolve(prompt.model)
    generation_id = idempotent_id(parts.settings, tenant, idempotency_key) if idempotency_key else new_id()
    is_new = idempotency_key is None or await parts.event_log.order(generation_id) is None
    if is_new and (idempotency_key or parts.jobs.was_full) and await parts.jobs.depth() >= parts.settings.max_queued:
        raise _full()
    order, created = await parts.event_log.create(
        generation_id,
        tenant=tenant,
        provider=route.provider,
        prompt=prompt,
        on_disconnect=on_disconnect,
        options=options or {},
    )
    if created or (is_new and order.status == "queued"):  # ours too, perhaps: the create was sent twice, its reply lost
        # Another request with the same key may have been told of the order: it is not taken back.
        await _announce(parts, order, most=None if idempotency_key else parts.settings.max_queued)
    if created:
        log.info("generation.queued", generation_id=generation_id, model=prompt.model)
        metrics.GENERATIONS_CREATED.inc()
    return order


async def _announce(parts: Parts, order: Order, most: int | None) -> None:
    """Hint the workers, and list it. Raises TooMany, and takes the order back, where `most` hints wait already."""
    try:
        if await parts.jobs.announce(order, parts.recent.of(order.tenant), most):
            return
        if not await parts.event_log.retract(order.id):  # a worker has it: the announcement was sent twice
            return
    except TROUBLE as error:  # the queued lease will send the hint again
        log.warning("generation.not_hinted", generation_id=order.id, error=type(error).__name__)
        return
    raise _full()


def _full() -> TooMany:
    return TooMany("too many generations wait for a worker; try again later", code="queue_full")


def admit(parts: Parts) -> None:
    """Raises Unavailable when this server takes no more streams."""
    if parts.drain.begun:
        raise Unavailable("this server is going down; send the request again", code="draining")
    if len(parts.drain.relays) >= parts.settings.max_streams:
        raise Unavailable(
            "this server has all the streams it takes; try again later", code="overloaded", retry_after=15
        )


async def follow(
    parts: Parts, order: Order, dialect: Dialect, *, headers: dict[str, str] | None = None, resumed: bool = False
) -> Relay:
    """The answer that streams a log from its start in one dialect.

    Raises Gone when the log is no more, Unavailable when this server takes no more streams."""
    admit(parts)
    opening = await open_reader(parts.tail, order, None, resumed=resumed)
    return relay(parts, dialect, opening, headers=headers)


async def wait(parts: Parts, order: Order, build: Callable[[Snapshot | Ending], Response]) -> Whole:
    """The answer that waits for the end of a log and says all of it at once, as `build` puts it.

    Raises Gone when the log is no more. A client that leaves is a reader that leaves."""
    opening = await open_reader(parts.tail, order, None)
    return Whole(opening.reader, parts.drain, build)


def relay(
    parts: Parts,
    dialect: Dialect,
    opening: Opening,
    *,
    headers: dict[str, str] | None = None,
    greeting: bytes = b"",
) -> Relay:
    """The response that relays an opened log; it owns the reader."""
    headers = {
        **sse.HEADERS,
        "X-Content-Type-Options": "nosniff",
        "X-Generation-Id": opening.reader.generation_id,
        "Rejoin-Resumed-From": opening.resumed_from,
        **(headers or {}),
    }
    return Relay(opening, dialect, parts.drain, parts.settings, headers=headers, greeting=greeting)


async def fold(parts: Parts, order: Order) -> Snapshot:
    """Fold the log up to its present tail. Raises Gone when it is no more."""
    state = Snapshot()
    after = "-"
    while page := await parts.event_log.read(order.id, after):
        for entry in page:
            state.add(entry)
        after = page[-1].id.decode()
    if state.last_event_id is None or order.deleted:
        raise gone(order)
    return state
