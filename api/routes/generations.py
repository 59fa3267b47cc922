"""The native API: create a generation, follow it, look at it, cancel it, erase it, list one's own."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from api import sse
from api.auth import stream_token
from api.dependencies import OwnOrder, Parts, PartsOf, Tenant, body_schema, own_order, parse_body
from api.dialects import DIALECTS
from api.dialects.native import Native
from api.dialects.text import Text
from api.frames import Frame
from api.generation import fold, follow, relay, start
from api.relay import AtEnd, jittered, open_reader
from shared.errors import NotFound
from shared.event_log import Hint, OnDisconnect, Order
from shared.events import Cancelled, Snapshot, Status
from shared.observability import logger
from shared.prompt import Message, Prompt
from shared.redis import GENERATION_ID, TROUBLE

router = APIRouter(prefix="/v1/generations", tags=["generations"])
log = logger("api")
SNAPSHOT_FIELDS = (
    *("text", "reasoning", "refusal", "tool_calls", "sources", "finish_reason", "error"),
    *("started_at", "first_token_at", "finished_at"),
)
OVERLOADED_RETRY_MS = 15_000


class CreateGeneration(Prompt):
    """The body of `POST /v1/generations`: a Prompt, or its short form with `prompt` in place of `messages`."""

    model: str = Field("", max_length=256)
    messages: list[Message] = Field(default_factory=list, max_length=2048)
    prompt: str | None = Field(None, min_length=1)
    on_disconnect: OnDisconnect = "continue"

    @model_validator(mode="after")
    def _messages_or_prompt(self) -> CreateGeneration:
        if self.messages and self.prompt is not None:
            raise ValueError("send `messages` or `prompt`, not both")
        if not self.messages and self.prompt is None:
            raise ValueError("send `messages` or `prompt`: there is neither")
        return self

    def to_prompt(self, default_model: str) -> Prompt:
        asked = self.model_dump(exclude={"prompt", "on_disconnect", "messages", "model"}, exclude_none=True)
        messages = self.messages or [Message(role="user", content=self.prompt)]
        return Prompt(model=self.model or default_model, messages=messages, **asked)


@router.post("", status_code=202, openapi_extra=body_schema(CreateGeneration))
async def create(
    request: Request, parts: PartsOf, tenant: Tenant, idempotency_key: Annotated[str | None, Header()] = None
) -> JSONResponse:
    """Start a generation; answers at once. The same Idempotency-Key and body again: the same generation."""
    body = await parse_body(request, CreateGeneration, parts.settings.max_body_bytes)
    prompt = body.to_prompt(parts.models.default)
    order = await start(parts, tenant, prompt, body.on_disconnect, idempotency_key)
    answer = {"id": order.id, "status": order.status, "model": order.model, "created_at": order.created_at / 1000}
    location = f"/v1/generations/{order.id}"
    return JSONResponse({**answer, **_urls(parts, order)}, 202, {"Location": location})


@router.get("")
async def list_own(
    parts: PartsOf,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=f"^{GENERATION_ID.pattern}$")] = None,
    status: Annotated[Status | None, Query()] = None,
) -> JSONResponse:
    """The caller's own generations, newest first. `after`: the last id of the page before."""
    found: list[Order] = []
    while len(found) <= limit:
        ids = await parts.recent.page(tenant, after, 100)
        orders = await parts.event_log.orders(ids)
        found += [order for order in orders if not order.deleted and status in (None, order.status)]
        if len(ids) < 100:
            break
        after = ids[-1]
    data = [
        {"id": order.id, "status": order.status, "model": order.model, "created_at": order.created_at / 1000}
        for order in found[:limit]
    ]
    return JSONResponse({"data": data, "has_more": len(found) > limit})


@router.get("/{generation_id}")
async def show(order: OwnOrder, parts: PartsOf) -> Response:
    """The snapshot: the state so far."""
    return await _snapshot_response(parts, order)


@router.get("/{generation_id}/events", response_class=Response)
async def events(
    generation_id: str,
    parts: PartsOf,
    tenant: Tenant,
    last_event_id: Annotated[str | None, Header()] = None,
    after: Annotated[str | None, Query()] = None,
    snapshot: bool = False,
) -> Response:
    """The log as Server-Sent Events, from the start or from where the reader left off."""
    cursor = cursor_of_client = sse.cursor(last_event_id, after)
    retry_ms = jittered(parts.settings.retry_milliseconds)
    if parts.drain.begun:
        return _come_back(retry_ms)
    if len(parts.drain.relays) >= parts.settings.max_streams:
        return _come_back(jittered(OVERLOADED_RETRY_MS))
    greeting = sse.retry(retry_ms)
    try:
        order = await own_order(parts, tenant, generation_id)
        if snapshot and cursor is None:
            state = await fold(parts, order)
            greeting += sse.encode(_snapshot_frame(order, state))
            cursor = sse.cursor(state.last_event_id, None)
        opening = await open_reader(parts.tail, order, cursor, resumed=cursor_of_client is not None)
    except AtEnd:
        if cursor_of_client is None:  # it asked for the snapshot, and that is all there is
            return Response(greeting, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        return Response(status_code=204)
    except TROUBLE:  # an EventSource takes any other status than 200 for final
        return _come_back(retry_ms)
    return relay(parts, Native(), opening, greeting=greeting)


@router.get("/{generation_id}/text", response_class=Response)
async def text(order: OwnOrder, parts: PartsOf) -> Response:
    """The words alone, from the start, as they come; broken off when they are not going to be complete."""
    return await follow(parts, order, Text())


@router.get("/{generation_id}/dialects/{dialect}", response_class=Response)
async def in_dialect(order: OwnOrder, parts: PartsOf, dialect: str) -> Response:
    """The log as any client protocol puts it on the wire, from the start: to look at, and to compare."""
    if dialect not in DIALECTS:
        raise NotFound(f"there is no dialect {dialect[:40]!r}; there are {', '.join(DIALECTS)}")
    return await follow(parts, order, DIALECTS[dialect](order.id))


@router.post("/{generation_id}/cancel")
async def cancel(order: OwnOrder, parts: PartsOf) -> Response:
    """End a generation; what was said so far stays. Answers the final snapshot, also the second time."""
    await parts.event_log.close(order.id, Cancelled("caller"))
    order = await parts.event_log.order(order.id) or order
    log.info("generation.cancel", generation_id=order.id, status=order.status)
    return await _snapshot_response(parts, order)


@router.delete("/{generation_id}", status_code=204)
async def delete(order: OwnOrder, parts: PartsOf) -> Response:
    """End a generation and erase its words."""
    await parts.event_log.delete(order.id)
    log.info("generation.deleted", generation_id=order.id)
    return Response(status_code=204)


def _come_back(retry_ms: int) -> Response:
    return Response(sse.retry(retry_ms), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)


async def _snapshot_response(parts: Parts, order: Order) -> Response:
    state = await fold(parts, order)
    return Response(orjson.dumps(await _snapshot(parts, order, state)), media_type="application/json")


async def _snapshot(parts: Parts, order: Order, state: Snapshot) -> dict[str, Any]:
    waits = state.status == "queued"
    return {
        "id": order.id,
        "status": state.status,
        "model": order.model,
        "attempt": state.attempt,
        **_words(state),
        "queue_position": await parts.jobs.position(Hint(order.id, 0, order.hints)) if waits else None,
        "created_at": order.created_at / 1000,
        "last_event_id": state.last_event_id,
        "metadata": order.metadata,
        **_urls(parts, order),
    }


def _snapshot_frame(order: Order, state: Snapshot) -> Frame:
    body = {"type": "snapshot", "id": order.id, "status": state.status, "model": order.model, "attempt": state.attempt}
    body |= {**_words(state), "created_at": order.created_at / 1000, "last_event_id": state.last_event_id}
    return Frame(orjson.dumps(body), b"snapshot", (state.last_event_id or "").encode())


def _words(state: Snapshot) -> dict[str, Any]:
    words = {name: getattr(state, name) for name in SNAPSHOT_FIELDS}
    for name in ("started_at", "first_token_at", "finished_at"):
        words[name] = words[name] / 1000 if words[name] is not None else None
    words["usage"] = asdict(state.usage) if state.usage else None
    return words


def _urls(parts: Parts, order: Order) -> dict[str, str]:
    """Where to follow and where to stop. The token lives as long as the log can."""
    settings = parts.settings
    lives = settings.log_retention_seconds + settings.max_queue_seconds + settings.max_generation_seconds
    token = stream_token(settings, order.tenant, order.id, int(time.time() + lives))
    base = f"/v1/generations/{order.id}"
    return {"events_url": f"{base}/events?token={token}", "cancel_url": f"{base}/cancel"}
