"""What `useChat` of the AI SDK asks for: send a message, resume the answer, stop it. Errors are plain text.

A chat is a pointer to its newest generation: Rejoin keeps no conversation, each request brings it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import orjson
from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from starlette.responses import Response

from api.dependencies import Parts, PartsOf, Tenant, body_schema, parse_body
from api.dialects.text import Text
from api.dialects.ui_messages import HEADERS, UiMessages
from api.error_handlers import invalid
from api.generation import admit, follow, start
from shared.errors import BadRequest, Gone, Unprocessable
from shared.event_log import OnDisconnect, Order
from shared.events import Cancelled
from shared.observability import logger
from shared.prompt import Message, Prompt

router = APIRouter(prefix="/api/chat", tags=["AI SDK"])
log = logger("api")

CHAT_ID = r"^[^\x00-\x1f\x7f]{1,256}$"
# Parts that are for the reader, not for the model.
SHOWN_ONLY = ("reasoning", "reasoning-file", "source-url", "source-document", "step-start", "custom")
PICTURES = ("http://", "https://", "data:image/")
DENIED = "The user did not allow this call."

Stream: TypeAlias = Literal["ui", "text"]
StreamQuery = Annotated[Stream, Query()]
ResetStep = Annotated[bool, Query(alias="resetStep")]
ChatId = Annotated[str, Path(pattern=CHAT_ID)]


class UIMessage(BaseModel):
    """One message as the AI SDK's chat holds it."""

    model_config = ConfigDict(frozen=True)

    id: str = Field("", max_length=256)
    role: Literal["system", "user", "assistant"]
    parts: list[dict[str, JsonValue]] = Field(max_length=10_000)


class SendMessages(BaseModel):
    """The body of `POST /api/chat`. Sampling options have the names they have in a Prompt; what is not known here is
    the application's own, and passed over."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=CHAT_ID)
    messages: list[UIMessage] | None = Field(None, min_length=1, max_length=2048)
    message: UIMessage | None = None
    on_disconnect: OnDisconnect = Field("continue", alias="onDisconnect")
    reset_step: bool = Field(False, alias="resetStep")
    model: str = Field("", max_length=256)
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    response_format: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _messages_or_message(self) -> SendMessages:
        if (self.messages is None) == (self.message is None):
            raise ValueError("send either `messages` or `message`")
        return self

    def turns(self) -> list[UIMessage]:
        return self.messages or [turn for turn in (self.message,) if turn]

    def to_prompt(self, default_model: str) -> Prompt:
        ours = {"id", "messages", "message", "on_disconnect", "reset_step", "model"}
        asked = self.model_dump(exclude=ours, exclude_none=True)
        messages = [message for turn in self.turns() for message in _messages(turn)]
        try:
            return Prompt(model=self.model or default_model, messages=messages, **asked)
        except ValidationError as error:
            raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None

    def message_id(self) -> str | None:
        """An answer that goes on where an assistant's message stopped (for its tools) belongs to that message."""
        last = self.turns()[-1]
        return last.id or None if last.role == "assistant" else None


class Stop(BaseModel):
    """The body of a stop: only when the chat is still at this generation (or at the message it is shown as)."""

    model_config = ConfigDict(frozen=True)

    active_stream_id: str | None = Field(None, alias="activeStreamId", max_length=256)


@router.post("", response_class=Response, openapi_extra=body_schema(SendMessages))
async def send(
    request: Request,
    parts: PartsOf,
    tenant: Tenant,
    stream: StreamQuery = "ui",
    reset_step: ResetStep = False,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Answer a chat. What the chat was still saying is cancelled: its reader has gone on."""
    admit(parts)  # before anything is started that a repeated request would start again
    try:
        body = await parse_body(request, SendMessages, parts.settings.max_body_bytes)
        order = await begin(parts, tenant, body, idempotency_key)
    except Unprocessable as error:
        raise BadRequest(error.message, code=error.code, param=error.param) from None
    return await _follow(parts, order, stream, body.message_id(), reset_step or body.reset_step)


@router.get("/{chat_id:path}/stream", response_class=Response)
async def resume(
    chat_id: ChatId,
    parts: PartsOf,
    tenant: Tenant,
    stream: StreamQuery = "ui",
    reset_step: ResetStep = False,
    ended: bool = False,
) -> Response:
    """What the chat is saying, from the start of the current attempt; 204 when it is not saying anything.

    `ended`: also what it has said, as long as the log is kept."""
    order = await newest(parts, tenant, chat_id)
    if order is None or (order.ended and not ended):
        return Response(status_code=204)
    try:
        return await _follow(parts, order, stream, await message_id_of(parts, order), reset_step, resumed=True)
    except Gone:
        return Response(status_code=204)


@router.post("/{chat_id:path}/stop", status_code=204)
async def stop(chat_id: ChatId, request: Request, parts: PartsOf, tenant: Tenant) -> Response:
    """End what the chat is saying; what was said stays. 204 also when there was nothing to stop."""
    only = None
    if request.headers.get("content-length") != "0" and "content-type" in request.headers:
        only = (await parse_body(request, Stop, parts.settings.max_body_bytes)).active_stream_id
    order = await newest(parts, tenant, chat_id)
    if order is not None and only in (None, order.id, f"msg_{order.id}"):
        await _cancel(parts, order.id)
    return Response(status_code=204)


async def begin(parts: Parts, tenant: str, body: SendMessages, idempotency_key: str | None) -> Order:
    """Start an answer and point the chat at it. The one before it is cancelled, if it still runs."""
    prompt, message_id = body.to_prompt(parts.models.default), body.message_id()
    options = {"message_id": message_id} if message_id else {}
    order = await start(parts, tenant, prompt, body.on_disconnect, idempotency_key, options=options)
    before = await parts.chats.point(tenant, body.id, order.id)
    if before is not None and await parts.event_log.order(before) is not None:
        await _cancel(parts, before)
    return order


async def newest(parts: Parts, tenant: str, chat_id: str) -> Order | None:
    """The order of the chat's newest generation, if it is there and the caller's own."""
    generation_id = await parts.chats.find(tenant, chat_id)
    order = await parts.event_log.order(generation_id) if generation_id else None
    return order if order and order.tenant == tenant and not order.deleted else None


async def message_id_of(parts: Parts, order: Order) -> str | None:
    """The message an answer goes on with, if it does."""
    asked = await parts.event_log.asked(order.id)
    return asked[1].get("message_id") if asked else None


async def _cancel(parts: Parts, generation_id: str) -> None:
    status = await parts.event_log.close(generation_id, Cancelled("caller"))
    log.info("generation.cancel", generation_id=generation_id, status=status)


async def _follow(
    parts: Parts, order: Order, stream: Stream, message_id: str | None, reset_step: bool, *, resumed: bool = False
) -> Response:
    if stream == "text":
        return await follow(parts, order, Text(), resumed=resumed)
    dialect = UiMessages(order.id, message_id=message_id, can_reset_step=reset_step)
    return await follow(parts, order, dialect, headers=HEADERS, resumed=resumed)


# --- UIMessage -> Message, as `convertToModelMessages` does it


def _messages(turn: UIMessage) -> Iterator[Message]:
    """Raises BadRequest for a part that is not known: words would be lost without a word."""
    match turn.role:
        case "system":
            yield Message(role="system", content="".join(_text(part) for part in turn.parts if _is(part, "text")))
        case "user":
            yield Message(role="user", content=_content(turn.parts))
        case "assistant":
            for step in _steps(turn.parts):
                yield from _spoken(step)


def _content(parts: list[dict[str, JsonValue]]) -> str | list[dict[str, JsonValue]]:
    content = [made for part in parts if (made := _content_part(part))]
    if not content:
        raise BadRequest("a user's message has neither text nor a picture", param="messages")
    if len(content) == 1 and content[0]["type"] == "text":
        return str(content[0]["text"])
    return content


def _content_part(part: dict[str, JsonValue]) -> dict[str, JsonValue] | None:
    if _is(part, "text"):
        return {"type": "text", "text": _text(part)}
    if not _is(part, "file"):
        _passed_over(part)
        return None
    url, media_type = part.get("url"), part.get("mediaType")
    if not (isinstance(url, str) and isinstance(media_type, str)):
        raise BadRequest("a file part has a `mediaType` and a `url`", param="messages")
    if not (media_type.startswith("image/") and url.startswith(PICTURES)):
        raise BadRequest("of files only pictures are taken, by http(s) or data URL", param="messages")
    return {"type": "image_url", "image_url": {"url": url}}


def _steps(parts: list[dict[str, JsonValue]]) -> Iterator[list[dict[str, JsonValue]]]:
    step: list[dict[str, JsonValue]] = []
    for part in parts:
        if _is(part, "step-start"):
            yield step
            step = []
        else:
            step.append(part)
    yield step


def _spoken(step: list[dict[str, JsonValue]]) -> Iterator[Message]:
    """One step of an assistant: what it said and called, then what the calls gave. Calls without an outcome are left
    out, since models refuse a conversation that has them."""
    said: list[str] = []
    calls: list[dict[str, JsonValue]] = []
    outcomes: list[Message] = []
    for part in step:
        if _is(part, "text"):
            said.append(_text(part))
        elif (name := _tool_name(part)) is not None:
            call_id, outcome = part.get("toolCallId"), _outcome(part)
            if not (isinstance(call_id, str) and name):
                raise BadRequest("a tool part has a `toolCallId` and a name", param="messages")
            if outcome is not None:
                function: dict[str, JsonValue] = {"name": name, "arguments": _arguments(part)}
                calls.append({"id": call_id, "type": "function", "function": function})
                outcomes.append(Message(role="tool", tool_call_id=call_id, content=outcome))
        elif not _is(part, "file"):
            _passed_over(part)
    text = "".join(said)
    if text or calls:
        yield Message(role="assistant", content=text or None, tool_calls=calls or None)
    yield from outcomes


def _tool_name(part: dict[str, JsonValue]) -> str | None:
    """The name of the tool a part is of; None when it is not of a tool."""
    if _is(part, "dynamic-tool"):
        return str(part.get("toolName") or "")
    kind = part.get("type")
    return kind.removeprefix("tool-") if isinstance(kind, str) and kind.startswith("tool-") else None


def _outcome(part: dict[str, JsonValue]) -> str | None:
    match part.get("state"):
        case "output-available" if not part.get("preliminary"):
            output = part.get("output")
            return output if isinstance(output, str) else orjson.dumps(output).decode()
        case "output-error":
            return str(part.get("errorText") or "The call failed.")
        case "output-denied":
            approval = part.get("approval")
            reason = approval.get("reason") if isinstance(approval, dict) else None
            return reason if isinstance(reason, str) and reason else DENIED
    return None


def _arguments(part: dict[str, JsonValue]) -> str:
    asked: Any = part.get("input")
    asked = part.get("rawInput") if asked is None else asked
    if isinstance(asked, str):  # arguments that were not JSON, as the model wrote them
        return asked
    return orjson.dumps({} if asked is None else asked).decode()


def _passed_over(part: dict[str, JsonValue]) -> None:
    kind = part.get("type")
    if not (isinstance(kind, str) and (kind in SHOWN_ONLY or kind.startswith("data-"))):
        raise BadRequest("a message has a part of a type that is not known here", param="messages")


def _text(part: dict[str, JsonValue]) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest("a text part has its `text`", param="messages")
    return text


def _is(part: dict[str, JsonValue], kind: str) -> bool:
    return part.get("type") == kind
