"""What a route is given: the open parts of this process, the caller's tenant, a parsed body, an order of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from api.admission import TENANT
from api.chats import Chats
from api.error_handlers import invalid
from api.recent import Recent
from api.relay import Drain
from api.tail import Tail
from shared.config import ModelTable, Settings
from shared.errors import BadRequest, NotFound, TooLarge, Unprocessable
from shared.event_log import EventLog, Order
from shared.jobs import Jobs
from shared.redis import GENERATION_ID

Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Parts:
    """Everything one api process holds open; made by app.py, found on the app's state."""

    settings: Settings
    models: ModelTable
    event_log: EventLog
    jobs: Jobs
    tail: Tail
    recent: Recent
    chats: Chats
    drain: Drain = field(default_factory=Drain)


# Coroutines, though nothing is waited for: FastAPI would run plain functions in a thread each.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _tenant(request: Request) -> str:
    tenant: str = request.scope[TENANT]
    return tenant


async def own_order(parts: Parts, tenant: str, generation_id: str) -> Order:
    """The order, if it is there and the caller's own. Raises NotFound for both: ids of others are not confirmed."""
    order = await parts.event_log.order(generation_id) if GENERATION_ID.fullmatch(generation_id) else None
    if order is None or order.tenant != tenant:
        raise NotFound("there is no generation with this id; ids are 32 hexadecimal digits")
    return order


async def _own_order(generation_id: str, request: Request) -> Order:
    return await own_order(await _parts(request), await _tenant(request), generation_id)


PartsOf = Annotated[Parts, Depends(_parts)]
Tenant = Annotated[str, Depends(_tenant)]
OwnOrder = Annotated[Order, Depends(_own_order)]


async def parse_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The request's JSON as a value of `model`.

    Raises TooLarge while reading, BadRequest for what is not JSON (NaN, 1e400 and lone surrogates are not), and
    Unprocessable that names the field."""
    return parse(await _read(request, max_bytes), model)


def parse(raw: bytes, model: type[Model]) -> Model:
    """JSON as a value of `model`. Raises BadRequest and Unprocessable, as `parse_body` does."""
    try:
        return model.model_validate(_checked(orjson.loads(raw)))
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not valid JSON: {error.msg} at byte {error.pos}" if raw else "the body is empty; send JSON",
            code="invalid_json",
        ) from None
    except ValidationError as error:
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None


def _checked(value: Any) -> Any:
    """The body, if it is an object that orjson can write again: it reads 1,024 levels and writes 254."""
    if not isinstance(value, dict):
        raise Unprocessable("the body is not a JSON object: send {…}")
    try:
        orjson.dumps([[[[value]]]])  # a dialect may wrap what it was given
    except TypeError:
        raise Unprocessable("the body is nested deeper than 250 levels; send it flatter", code="too_deep") from None
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = TooLarge(f"the body is larger than {max_bytes} bytes (REJOIN_MAX_BODY_BYTES)")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise BadRequest("the client left before its body was complete", code="incomplete_body") from None
    return bytes(body)


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI is told of a body that the route parses itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, definitions)}}}
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name == "JsonValue":
        return {}
    if name in definitions:
        return _inlined(definitions[name], definitions)
    return {key: _inlined(part, definitions) for key, part in schema.items()}
