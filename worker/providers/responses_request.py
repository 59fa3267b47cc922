"""A prompt as a request of OpenAI's Responses, in background mode. Pure.

One rule: what would change the answer and has no place there is refused by its name, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from shared.config import ModelRoute
from shared.prompt import Message, Prompt
from worker.providers.upstream_http import failure

Json: TypeAlias = dict[str, Any]


def body_of(prompt: Prompt, route: ModelRoute) -> Json:
    """The Responses request. Raises UpstreamError(`upstream_unsupported`) that names what has no place in it.

    `seed` and a message's `name` are hints, and left out; `metadata` is the caller's label on our log."""
    if prompt.stop:
        raise failure(prompt.model, "upstream_unsupported", "`stop`")
    asked = {
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "max_output_tokens": prompt.max_tokens,
        "tools": prompt.tools and [_tool(prompt.model, tool) for tool in prompt.tools],
        "tool_choice": _tool_choice(prompt.model, prompt.tool_choice),
        "text": prompt.response_format and {"format": _text_format(prompt.response_format)},
        "parallel_tool_calls": prompt.parallel_tool_calls,
        "reasoning": prompt.reasoning_effort and {"effort": prompt.reasoning_effort},
    }
    return {
        "model": prompt.model if route.upstream_model == "*" else route.upstream_model,
        "input": [item for message in prompt.messages for item in _items(prompt.model, message)],
        "stream": True,
        "background": True,
        "store": True,  # the upstream keeps it for as long as one may come back
        **{name: value for name, value in asked.items() if value is not None},
    }


def _items(model: str, message: Message) -> Iterator[Json]:
    if message.role == "tool":
        yield {"type": "function_call_output", "call_id": message.tool_call_id or "", "output": message.text()}
    elif message.role == "assistant":
        if text := message.text():
            yield {"role": "assistant", "content": text}
        for call in message.tool_calls or ():
            function = _object(call.get("function"))
            told = {"name": function.get("name"), "arguments": function.get("arguments")}
            yield {"type": "function_call", "call_id": call.get("id"), **told}
    elif isinstance(message.content, list):
        yield {"role": message.role, "content": [_part(model, part) for part in message.content]}
    else:
        yield {"role": message.role, "content": message.content or ""}


def _part(model: str, part: Json) -> Json:
    match part.get("type"):
        case "text":
            return {"type": "input_text", "text": part.get("text")}
        case "image_url":
            image = _object(part.get("image_url"))
            return {"type": "input_image", "image_url": image.get("url"), "detail": image.get("detail") or "auto"}
        case "file":
            return {"type": "input_file", **_object(part.get("file"))}
        case other:
            raise failure(model, "upstream_unsupported", f"content of the type {str(other)[:40]!r}")


def _tool(model: str, tool: Json) -> Json:
    """Said outright: without `strict` a Responses upstream takes it for true, and a Chat Completions one for false."""
    if tool.get("type") != "function":
        raise failure(model, "upstream_unsupported", f"tools of the type {str(tool.get('type'))[:40]!r}")
    function = _object(tool.get("function"))
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return {"type": "function", **function, "parameters": parameters, "strict": bool(function.get("strict"))}


def _tool_choice(model: str, choice: str | Json | None) -> str | Json | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise failure(model, "upstream_unsupported", f"`tool_choice` of the type {str(choice.get('type'))[:40]!r}")
    return {"type": "function", "name": _object(choice.get("function")).get("name")}


def _text_format(given: Json) -> Json:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", **_object(given.get("json_schema"))}


def _object(value: Any) -> Json:
    """An object of the caller's JSON; what should have been one and is not, the upstream will name."""
    return value if isinstance(value, dict) else {}
