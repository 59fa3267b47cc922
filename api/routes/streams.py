"""The routes that every tutorial begins with, a prompt in and a stream out in one call: as text, as Server-Sent Events,
and a question to the documents.

What they stream is a generation like any other: `Location` says where to find it again. Who leaves ends it, unless the
request says otherwise or has an Idempotency-Key to come back with.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from api.dependencies import Parts, PartsOf, Tenant, body_schema, parse_body
from api.dialects.native import Native
from api.dialects.text import Text
from api.frames import Dialect
from api.generation import admit, follow, start
from api.routes.generations import CreateGeneration
from shared.config import DOCUMENTS
from shared.errors import Forbidden
from shared.event_log import OnDisconnect
from shared.prompt import Message, Prompt

router = APIRouter(tags=["streams"])
MAX_QUERY_CHARS = 8_000
Key = Annotated[str | None, Header(alias="Idempotency-Key")]


@router.post("/v1/chat/stream", response_class=Response, openapi_extra=body_schema(CreateGeneration))
async def chat_stream(request: Request, parts: PartsOf, tenant: Tenant, key: Key = None) -> Response:
    """The answer's words, as they come; broken off when they are not going to be complete."""
    return await _stream(request, parts, tenant, key, Text())


@router.post("/v1/chat/stream-sse", response_class=Response, openapi_extra=body_schema(CreateGeneration))
async def chat_stream_sse(request: Request, parts: PartsOf, tenant: Tenant, key: Key = None) -> Response:
    """The events of the answer, as `/v1/generations/{generation_id}/events` has them: go on there from the last id."""
    return await _stream(request, parts, tenant, key, Native())


@router.get("/stream-question/", response_class=Response)
async def stream_question(
    request: Request,
    parts: PartsOf,
    tenant: Tenant,
    query_text: Annotated[str, Query(min_length=1, max_length=MAX_QUERY_CHARS)],
    on_disconnect: OnDisconnect | None = None,
    key: Key = None,
) -> Response:
    """A question to the documents: the answer's words, as they come."""
    _refuse_other_sites(request, parts)
    prompt = Prompt(model=DOCUMENTS, messages=[Message(role="user", content=query_text)])
    return await _started(parts, tenant, prompt, on_disconnect, key, Text())


async def _stream(request: Request, parts: Parts, tenant: str, key: str | None, dialect: Dialect) -> Response:
    body = await parse_body(request, CreateGeneration, parts.settings.max_body_bytes)
    said = body.on_disconnect if "on_disconnect" in body.model_fields_set else None
    return await _started(parts, tenant, body.to_prompt(parts.models.default), said, key, dialect)


async def _started(
    parts: Parts, tenant: str, prompt: Prompt, on_disconnect: OnDisconnect | None, key: str | None, dialect: Dialect
) -> Response:
    admit(parts)
    order = await start(parts, tenant, prompt, on_disconnect or ("continue" if key else "cancel"), key)
    return await follow(parts, order, dialect, headers={"Location": f"/v1/generations/{order.id}"})


def _refuse_other_sites(request: Request, parts: Parts) -> None:
    """A GET that costs something: where no key is asked for, a page of another site could have it sent by an image.

    Browsers tell (Fetch Metadata, https://www.w3.org/TR/fetch-metadata/); an Origin was judged at the gate."""
    headers = request.headers
    is_foreign = headers.get("sec-fetch-site") == "cross-site" and "origin" not in headers
    if is_foreign and not parts.settings.tenants_by_key_hash:
        raise Forbidden(
            "without REJOIN_API_KEYS only this machine is served, and this request comes from a page of another site",
            code="loopback_only",
        )
