"""OpenAI's Chat Completions over HTTP: create one, streamed or whole; find it again by its id; erase it.

Without an Idempotency-Key a client that leaves ends the generation, as its SDK expects. With one it goes on, and the
same request again attaches to it and hears it from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from starlette.responses import JSONResponse, Response

from api.dependencies import Parts, PartsOf, Tenant, body_schema, own_order, parse_body
from api.dialects.chat_completions import CANCELLED, ENDINGS, ID_PREFIX, ChatCompletions, completion, error
from api.error_handlers import problem
from api.frames import Ending
from api.generation import admit, follow, start, wait
from shared.errors import Unavailable, Unprocessable
from shared.event_log import OnDisconnect, Order, gone
from shared.events import Snapshot
from shared.observability import logger
from shared.prompt import Message, Prompt

router = APIRouter(prefix="/v1/chat/completions", tags=["chat completions"])
log = logger("api")

# What a failed generation answers that is not 502.
STATUS_OF_FAILURE = {
    "upstream_rate_limited": 429,
    "upstream_timeout_first_token": 504,
    "upstream_timeout_inter_token": 504,
    "deadline_exceeded": 504,
    "queue_timeout": 503,
    "attempts_exhausted": 503,
    "internal_error": 500,
    "log_lost": 500,
}

# What would change the answer and is not carried: only these values are taken, besides null.
TAKEN: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "web_search_options": (),
}


def _known_only(message: Any) -> Any:
    """An answer comes back as a message with all that SDKs put in it; what a model is told is less."""
    if not isinstance(message, dict):
        return message
    known = {name: value for name, value in message.items() if name in Message.model_fields}
    if known.get("content") is None and isinstance(message.get("refusal"), str):
        known["content"] = message["refusal"]
    if known.get("tool_calls") == []:
        del known["tool_calls"]
    return known


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class CreateChatCompletion(Prompt):
    """The body of `POST /v1/chat/completions`. Fields that are not named here are accepted and change nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str | None = Field(None, max_length=256)  # type: ignore[assignment]
    messages: list[Annotated[Message, BeforeValidator(_known_only)]] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: JsonValue = None
    logprobs: JsonValue = None
    top_logprobs: JsonValue = None
    modalities: JsonValue = None
    audio: JsonValue = None
    functions: JsonValue = None
    function_call: JsonValue = None
    presence_penalty: JsonValue = None
    frequency_penalty: JsonValue = None
    logit_bias: JsonValue = None
    web_search_options: JsonValue = None

    def to_prompt(self, default_model: str) -> Prompt:
        """Raises Unprocessable for what would be asked in vain."""
        for name, values in TAKEN.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise Unprocessable(f"{name}: this value is not supported here; leave the field out", param=name)
        for n, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                raise Unprocessable("only tools of the type 'function' are supported", param=f"tools.{n}.type")
        asked = {name: getattr(self, name) for name in Prompt.model_fields}
        asked |= {"model": self.model or default_model, "stop": self.stop or None, "tools": self.tools or None}
        return Prompt(**{**asked, "max_tokens": self.max_completion_tokens or self.max_tokens})


async def _stored(completion_id: str, parts: PartsOf, tenant: Tenant) -> Order:
    return await own_order(parts, tenant, completion_id.removeprefix(ID_PREFIX))


Stored = Annotated[Order, Depends(_stored)]


@router.post("", response_class=Response, openapi_extra=body_schema(CreateChatCompletion))
async def create(
    request: Request, parts: PartsOf, tenant: Tenant, idempotency_key: Annotated[str | None, Header()] = None
) -> Response:
    """Ask a model and stream its answer, or wait for the whole of it."""
    body = await parse_body(request, CreateChatCompletion, parts.settings.max_body_bytes)
    prompt = body.to_prompt(parts.models.default)
    on_disconnect: OnDisconnect = "cancel" if idempotency_key is None else "continue"
    if body.stream:
        admit(parts)
    order = await start(parts, tenant, prompt, on_disconnect, idempotency_key)
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return await follow(parts, order, ChatCompletions(order.id, include_usage))
    return await _whole(parts, order, request, again_is_new=idempotency_key is None)


@router.get("/{completion_id}", response_class=Response)
async def retrieve(order: Stored, parts: PartsOf, request: Request) -> Response:
    """The whole completion, once there is one: waits for the end of one that runs."""
    return await _whole(parts, order, request, again_is_new=False)


@router.delete("/{completion_id}")
async def delete(order: Stored, parts: PartsOf) -> JSONResponse:
    """End a generation and erase its words."""
    await parts.event_log.delete(order.id)
    log.info("generation.deleted", generation_id=order.id)
    return JSONResponse({"id": ID_PREFIX + order.id, "object": "chat.completion.deleted", "deleted": True})


async def _whole(parts: Parts, order: Order, request: Request, *, again_is_new: bool) -> Response:
    return await wait(parts, order, _build(order, request.scope["path"], again_is_new))


def _build(order: Order, path: str, again_is_new: bool) -> Callable[[Snapshot | Ending], Response]:
    """`again_is_new`: the same request, sent again, is another generation and not this one's failure once more."""

    def build(state: Snapshot | Ending) -> Response:
        if state is Ending.GONE:
            return problem(gone(order), path)
        if isinstance(state, Ending):  # or ABORT: the client has left, and nobody reads this
            code, message = ENDINGS[Ending.DRAINING]
            return problem(Unavailable(message, code=code), path)
        if state.status in ("completed", "incomplete"):
            return _json(completion(order.id, state), 200, order)
        if state.error is None:
            return _json(error("cancelled", CANCELLED), 409, order, retry=False)
        code, message = state.error["code"], state.error["message"]
        status = STATUS_OF_FAILURE.get(code, 502)
        return _json(error(code, message), status, order, retry=again_is_new and state.error["retryable"])

    return build


def _json(body: dict[str, Any], status: int, order: Order, *, retry: bool | None = None) -> Response:
    """`retry`: what the SDKs are told to do, who would send again after any of 409, 429 and 5xx."""
    headers = {"X-Generation-Id": order.id}
    if retry is not None:
        headers["x-should-retry"] = "true" if retry else "false"
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
