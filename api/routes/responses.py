"""OpenAI's Responses over HTTP: create, retrieve, resume, cancel, delete, and go on from an earlier one.

What cannot be honoured and would change the answer is refused by its name; the rest is taken, and told again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from api.dependencies import Parts, PartsOf, Tenant, body_schema, own_order, parse_body
from api.dialects.responses import (
    ATTEMPT_NUMBERS,
    DEFAULTS,
    PREFIX,
    Asked,
    Responses,
    first_number,
    input_items,
    options_of,
    response,
)
from api.error_handlers import invalid
from api.frames import Ending
from api.generation import admit, fold, relay, start, wait
from api.relay import Relay, open_reader
from api.tail import Reader
from shared.errors import BadRequest, Conflict, NotFound, Unavailable
from shared.event_log import OnDisconnect, Order, gone
from shared.events import Cancelled, Entry, Snapshot
from shared.observability import logger
from shared.prompt import Message, Metadata, Prompt

Json = dict[str, Any]

router = APIRouter(prefix="/v1/responses", tags=["responses"])
log = logger("api")

# What would change the answer and is not done here: only `null` and these values are taken.
REFUSED: dict[str, tuple[JsonValue, ...]] = {
    "conversation": (),
    "prompt": (),
    "n": (1,),
    "context_management": ([],),
    "moderation": (),
    "top_logprobs": (0,),
}
# Asked for by SDKs of their own accord, and harmless to leave out.
INCLUDES_WITHOUT_EFFECT = ("reasoning.encrypted_content", "message.input_image.image_url")
OUTPUT_ITEM = re.compile(r"(?:msg|rs|fc)_([0-9a-f]{32})_[0-9]+")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class CreateResponse(BaseModel):
    """The body of `POST /v1/responses`. Fields that are not named here are accepted and change nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str | None = Field(None, max_length=256)
    input: str | list[dict[str, JsonValue]]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, JsonValue] | None = None
    reasoning: dict[str, JsonValue] | None = None
    include: list[str] | None = None
    metadata: Metadata | None = Field(None, max_length=16)
    max_tool_calls: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    conversation: JsonValue = None
    prompt: JsonValue = None
    n: JsonValue = None
    context_management: JsonValue = None
    moderation: JsonValue = None
    top_logprobs: JsonValue = None

    def to_prompt(self, default_model: str, history: Sequence[Message]) -> Prompt:
        """Raises BadRequest, or Unprocessable, that names the field to blame."""
        self._refuse()
        instructions = [Message(role="system", content=self.instructions)] if self.instructions else []
        reasoning = self.reasoning or {}
        try:
            return Prompt(
                model=self.model or default_model,
                messages=[*instructions, *history, *messages_of(self.input)],
                max_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                tools=[_tool(tool, n) for n, tool in enumerate(self.tools or ())] or None,
                tool_choice=_tool_choice(self.tool_choice),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=_response_format((self.text or {}).get("format")),
                reasoning_effort=_optional(reasoning, "effort", "reasoning"),
                metadata=self.metadata,
            )
        except ValidationError as error:
            raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None

    def options(self) -> Json:
        """What the Response says again: what was asked, each with the parts of it that have to be there."""
        said = {name: value for name in DEFAULTS if (value := getattr(self, name, None)) is not None}
        said.pop("top_logprobs", None)
        for name in ("text", "reasoning"):
            if name in said:
                said[name] = {**DEFAULTS[name], **said[name]}
        if "tools" in said:
            said["tools"] = [{"parameters": None, "strict": None, **tool} for tool in said["tools"]]
        return said

    def _refuse(self) -> None:
        for name, taken in REFUSED.items():
            value = getattr(self, name)
            if value is not None and value not in taken:
                raise BadRequest(f"{name}: this is not supported here; leave the field out", param=name)
        if any(name not in INCLUDES_WITHOUT_EFFECT for name in self.include or ()):
            raise BadRequest("include: of what can be included, nothing more is there to include", param="include")
        if self.background and self.store is False:
            raise BadRequest("a background response is retrieved later: it needs `store`", param="store")


def messages_of(given: str | list[dict[str, JsonValue]]) -> list[Message]:
    """The items of a conversation as turns. What the model thought is not told to it again."""
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    messages: list[Message] = []
    for n, item in enumerate(given):
        where = f"input[{n}]"
        match item.get("type") or "message":
            case "message":
                messages.append(_message(item, where))
            case "function_call":
                _add_call(messages, item, where)
            case "function_call_output":
                call_id, output = _string(item, "call_id", where), _content(item.get("output"), f"{where}.output")
                messages.append(Message(role="tool", tool_call_id=call_id, content=output))
            case "reasoning":
                pass
            case _:
                raise BadRequest(f"{where}: items of this type are not supported here", param=f"{where}.type")
    if not messages:
        raise BadRequest("input: there is nothing in it to answer", param="input")
    return messages


def _message(item: Json, where: str) -> Message:
    role, content = item.get("role"), _content(item.get("content"), f"{where}.content")
    match role:
        case "user" | "system" | "developer":
            return Message(role=role, content=content)
        case "assistant":
            if isinstance(content, list):
                raise BadRequest(f"{where}: an assistant's turn is text", param=f"{where}.content")
            return Message(role=role, content=content)
        case _:
            known = "user, assistant, system or developer"
            raise BadRequest(f"{where}.role: a message is of {known}", param=f"{where}.role")


def _add_call(messages: list[Message], item: Json, where: str) -> None:
    """Calls belong to the assistant's turn before them."""
    function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
    call: Json = {"id": _string(item, "call_id", where), "type": "function", "function": function}
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant":
        messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
    else:
        messages.append(Message(role="assistant", tool_calls=[call]))


def _content(content: Any, where: str) -> str | list[dict[str, JsonValue]]:
    """Text where it is only text, else chat content parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: send a text, or a list of content parts", param=where)
    parts = [_part(part, f"{where}[{n}]") for n, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        return {"type": "text", "text": _string(part, TEXT_PARTS[kind], where)}
    if kind == "input_image":
        image = {"url": _string(part, "image_url", where), "detail": _optional(part, "detail", where) or "auto"}
        return {"type": "image_url", "image_url": image}
    raise BadRequest(f"{where}: content parts are `input_text` and `input_image` here", param=f"{where}.type")


def _tool(tool: Json, n: int) -> Json:
    where = f"tools[{n}]"
    if tool.get("type") != "function":
        raise BadRequest(f"{where}: only tools of the type `function` are supported here", param=f"{where}.type")
    told = ("description", "parameters", "strict")
    function = {name: tool[name] for name in told if tool.get(name) is not None}
    return {"type": "function", "function": {"name": _string(tool, "name", where), **function}}


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise BadRequest("tool_choice: only a `function` can be chosen here", param="tool_choice")
        return {"type": "function", "function": {"name": _string(choice, "name", "tool_choice")}}
    if choice not in (None, "auto", "none", "required"):
        raise BadRequest("tool_choice: send `auto`, `none`, `required` or a function", param="tool_choice")
    return choice


def _response_format(given: Any) -> Json | None:
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case {"type": "json_schema", **schema}:
            return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}
        case _:
            raise BadRequest("text.format: send `text`, `json_object` or `json_schema`", param="text.format")


def _string(of: Json, name: str, where: str) -> str:
    value = _optional(of, name, where)
    if value is None:
        raise BadRequest(f"{where}.{name} is missing", param=f"{where}.{name}")
    return value


def _optional(of: Json, name: str, where: str) -> str | None:
    value = of.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{where}.{name} is not a string", param=f"{where}.{name}")
    return value


async def _own(parts: Parts, tenant: str, response_id: str, param: str = "response_id") -> Order:
    """Raises NotFound, that names the parameter, also for what was deleted."""
    missing = NotFound("there is no response with this id", code="response_not_found", param=param)
    if not response_id.startswith(PREFIX):
        raise missing
    try:
        order = await own_order(parts, tenant, response_id.removeprefix(PREFIX))
    except NotFound:
        raise missing from None
    if order.deleted:
        raise missing
    return order


async def _stored(parts: Parts, order: Order, param: str = "response_id") -> tuple[Prompt, Json]:
    """What was asked. Raises NotFound where that was not to be stored."""
    found = await parts.event_log.asked(order.id)
    if found is None:
        raise gone(order)
    if found[1].get("store") is False:
        raise NotFound("this response was created with `store: false`", code="response_not_found", param=param)
    return found


async def _own_response(response_id: str, parts: PartsOf, tenant: Tenant) -> Order:
    return await _own(parts, tenant, response_id)


OwnResponse = Annotated[Order, Depends(_own_response)]


@router.post("", response_class=Response, openapi_extra=body_schema(CreateResponse))
async def create(
    request: Request, parts: PartsOf, tenant: Tenant, idempotency_key: Annotated[str | None, Header()] = None
) -> Response:
    """Ask a model and stream its answer, wait for the whole of it, or (`background`) for nothing."""
    body = await parse_body(request, CreateResponse, parts.settings.max_body_bytes)
    if body.stream:
        admit(parts)  # before anything is started that a repeated request would start again
    order, asked = await order_of(parts, tenant, body, idempotency_key)
    if body.stream:
        return await _stream(parts, order, asked)
    if body.background:
        return await _present(parts, order, asked)
    return await wait(parts, order, _at_the_end(parts, order, asked))


@router.get("/{response_id}", response_class=Response)
async def retrieve(
    order: OwnResponse,
    parts: PartsOf,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
) -> Response:
    """The Response so far; or its events, all of them or those that follow a `sequence_number`."""
    asked = _asked(order, *await _stored(parts, order))
    if not stream:
        return await _present(parts, order, asked)
    return await _stream(parts, order, asked, -1 if starting_after is None else starting_after)


@router.post("/{response_id}/cancel", response_class=Response)
async def cancel(order: OwnResponse, parts: PartsOf) -> Response:
    """End a response; what was said so far stays. Answers what it ended as, also the second time."""
    await parts.event_log.close(order.id, Cancelled("caller"))
    found = await parts.event_log.asked(order.id)
    if found is None:
        raise gone(order)
    log.info("generation.cancel", generation_id=order.id)
    return await _present(parts, order, _asked(order, *found))


@router.delete("/{response_id}")
async def delete(order: OwnResponse, parts: PartsOf) -> JSONResponse:
    """End a response and erase its words."""
    await parts.event_log.delete(order.id)
    log.info("generation.deleted", generation_id=order.id)
    return JSONResponse({"id": PREFIX + order.id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items")
async def list_input_items(
    order: OwnResponse,
    parts: PartsOf,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ordering: Annotated[Literal["asc", "desc"], Query(alias="order")] = "desc",
    after: str | None = None,
) -> JSONResponse:
    """What the model was given, instructions apart, newest first unless told otherwise."""
    items = input_items(order.id, _turns(*await _stored(parts, order)))
    if ordering == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise BadRequest("after: this response has no input item with this id", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


async def order_of(parts: Parts, tenant: str, body: CreateResponse, key: str | None = None) -> tuple[Order, Asked]:
    """Write the order a body asks for. A client that leaves ends it, unless it said how it would come back."""
    history = await _history(parts, tenant, body.previous_response_id) if body.previous_response_id else []
    if isinstance(body.input, list):
        body = body.model_copy(update={"input": await _resolved(parts, tenant, body.input)})
    prompt = body.to_prompt(parts.models.default, history)
    on_disconnect: OnDisconnect = "continue" if body.background or key is not None else "cancel"
    order = await start(parts, tenant, prompt, on_disconnect, key, options=body.options())
    found = await parts.event_log.asked(order.id)
    if found is None:
        raise gone(order)
    return order, _asked(order, *found)


async def _resolved(parts: Parts, tenant: str, items: list[Json]) -> list[Json]:
    """The items with each `item_reference` (the AI SDK sends them) replaced by the output item it stands for."""
    outputs: dict[str, dict[str, Json]] = {}
    resolved = []
    for n, item in enumerate(items):
        if item.get("type") == "item_reference":
            param = f"input[{n}].id"
            found = OUTPUT_ITEM.fullmatch(_string(item, "id", f"input[{n}]"))
            response_id = PREFIX + (found[1] if found else "")
            if response_id not in outputs:
                outputs[response_id] = await _output(parts, tenant, response_id, param)
            if item["id"] not in outputs[response_id]:
                raise NotFound("there is no item with this id", code="response_not_found", param=param)
            item = outputs[response_id][item["id"]]
        resolved.append(item)
    return resolved


async def _output(parts: Parts, tenant: str, response_id: str, param: str) -> dict[str, Json]:
    order = await _own(parts, tenant, response_id, param)
    asked = _asked(order, *await _stored(parts, order, param))
    return {item["id"]: item for item in response(asked, await _entries(parts, order))["output"]}


async def _history(parts: Parts, tenant: str, previous_id: str) -> list[Message]:
    """All that was said up to an earlier response and in it. Its instructions are not carried over."""
    param = "previous_response_id"
    order = await _own(parts, tenant, previous_id, param)
    prompt, options = await _stored(parts, order, param)
    if not order.ended:
        raise Conflict(
            "the previous response is still being generated: wait for its end, or cancel it",
            code="previous_response_in_progress",
            param=param,
        )
    if order.status == "failed":
        raise BadRequest("the previous response failed: go on from the one before it", param=param)
    return [*_turns(prompt, options), *_answer(await fold(parts, order))]


def _turns(prompt: Prompt, options: Json) -> list[Message]:
    return prompt.messages[1:] if options.get("instructions") else prompt.messages


def _answer(state: Snapshot) -> list[Message]:
    calls: list[dict[str, JsonValue]] = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"] or "", "arguments": call["arguments"]},
        }
        for call in state.tool_calls
        if call["id"]
    ]
    words = state.text + state.refusal
    return [Message(role="assistant", content=words or None, tool_calls=calls or None)] if words or calls else []


def _asked(order: Order, prompt: Prompt, options: Json) -> Asked:
    return Asked(order.id, {**options_of(prompt, options), "metadata": order.metadata})


async def _stream(parts: Parts, order: Order, asked: Asked, after: int = -1) -> Relay:
    """Raises Conflict when what the client has is of an attempt that was voided: there is no rest of it."""
    admit(parts)
    opening = await open_reader(parts.tail, order, None, resumed=after >= 0)
    try:
        first = await _first_number(parts, opening.reader)
        _check_number(after, first)
    except BaseException:
        await opening.reader.aclose()
        raise
    return relay(parts, Responses(asked, after=after, first=first), opening)


def _check_number(after: int, first: int) -> None:
    if first == 0 and after >= ATTEMPT_NUMBERS:
        raise BadRequest("starting_after: there is no event with this number yet", param="starting_after")
    if after >= 0 and not first <= after < first + ATTEMPT_NUMBERS:
        raise Conflict(
            "the attempt this number belongs to was lost and its words are void: retrieve without starting_after",
            code="attempt_superseded",
            param="starting_after",
        )


async def _first_number(parts: Parts, reader: Reader) -> int:
    """The number of the first event the reader gets: of the newest fresh attempt."""
    entries = list(reader.prefix)
    after = "0-1"
    while reader.prefix:  # it begins at a fresh start and skips what was before
        page = await parts.event_log.read(reader.generation_id, after)
        for entry in page:
            entries.append(entry)
            if entry.position > reader.cursor:
                return first_number(entries)
        if not page:
            break
        after = page[-1].id.decode()
    return first_number(entries)


async def _present(parts: Parts, order: Order, asked: Asked) -> Response:
    """The Response as the log has it now."""
    now = response(asked, await _entries(parts, order))
    return Response(orjson.dumps(now), media_type="application/json")


async def _entries(parts: Parts, order: Order) -> list[Entry]:
    entries: list[Entry] = []
    after = "-"
    while page := await parts.event_log.read(order.id, after):
        entries += page
        after = page[-1].id.decode()
    if not entries:
        raise gone(order)
    return entries


def _at_the_end(parts: Parts, order: Order, asked: Asked) -> Callable[[Snapshot | Ending], Response]:
    def build(end: Snapshot | Ending) -> Response:
        if end is Ending.GONE:
            raise gone(order)
        if end is Ending.DRAINING:
            raise Unavailable("this server is going down; send the request again", code="draining")
        return _AtTheEnd(parts, order, asked)

    return build


class _AtTheEnd(Response):
    """The Response of a generation that has ended, read from its log: a snapshot does not know the order of items."""

    def __init__(self, parts: Parts, order: Order, asked: Asked) -> None:
        super().__init__()
        self._what = parts, order, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await _present(*self._what))(scope, receive, send)
