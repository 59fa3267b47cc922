"""A model's server that answers what is asked: it calls the tools it is given and fills in the schemas it is shown.

For suites that judge a client by the sense of the answers. By the same prompt the same answer; no model is at work.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.conftest import environment
from tests.processes import Processes
from tests.stack import Stack
from tests.upstream import Request, Script, Upstream

_QUOTED = re.compile(r"['\"‘“]([^'\"’”]+)['\"’”]")


class Sensible(Upstream):
    """An Upstream whose script for a request is made from the request."""

    def note(self, request: Request) -> int:
        self._asked = request.body
        return super().note(request)

    def script_of(self, model: str, hit: int) -> Script:
        return self._scripts[model][0] if model in self._scripts else answer(self._asked)


def answer(body: dict[str, Any]) -> Script:
    """The script that a sensible model would follow."""
    text = _words_of(body["messages"][-1])
    choice = body.get("tool_choice") or "auto"
    tools = [tool["function"] for tool in body.get("tools") or ()]
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
    if tools and (choice not in ("auto", "none") or (choice == "auto" and body["messages"][-1]["role"] == "user")):
        named = [tool for tool in tools if tool["name"] in text]
        return _call((named or tools)[0], text)
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    if schema is not None:
        return _pieces(json.dumps(value_for(schema, schema, text)))
    if (body.get("response_format") or {}).get("type") == "json_object":
        return _pieces(json.dumps({name: f"a {name}" for name in _QUOTED.findall(text)}))
    return _pieces("This is, all in all, a sensible answer.")


def value_for(schema: Any, root: Any, text: str) -> Any:
    """A value that a JSON schema allows, with the numbers and the quoted words of the prompt where it has some."""
    if "$ref" in schema:
        return value_for(root["$defs"][schema["$ref"].rpartition("/")[2]], root, text)
    if "enum" in schema or "const" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return value_for(schema["anyOf"][0], root, text)
    match schema.get("type"):
        case "object":
            return {name: value_for(part, root, text) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [value_for(schema.get("items", {}), root, text)]
        case "integer" | "number":
            return int((re.findall(r"-?\d+", text) or ["3"])[-1])
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return (_QUOTED.findall(text) or ["something"])[0]


def _call(function: dict[str, Any], text: str) -> Script:
    schema = function.get("parameters") or {"type": "object"}
    arguments = json.dumps(value_for(schema, schema, text), ensure_ascii=False)
    half = len(arguments) // 2
    first = {"index": 0, "id": "call_sensible", "type": "function", "function": {"name": function["name"]}}
    rest = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:half], arguments[half:])]
    return Script(chunks=(), tool_calls=(first, *rest), finish_reason="tool_calls")


def _pieces(text: str) -> Script:
    return Script(chunks=re.findall(r".{1,7}", text, re.DOTALL))


def _words_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(str(part.get("text", "")) for part in content)


@asynccontextmanager
async def sensible_house(processes: Processes, redis_url: str, key_prefix: str) -> AsyncIterator[Stack]:
    """An api and a worker in front of a sensible model; the model `broken` fails amid its answer."""
    async with Sensible() as upstream:
        upstream.script("broken", Script(count=5, error_at=3))
        upstream.script("thinking", Script(chunks=("Yes", "."), reasoning=("Let me ", "think.")))
        stack = Stack(processes, environment(redis_url, key_prefix, upstream))
        try:
            await stack.api()
            await stack.worker()
            yield stack
        finally:
            await stack.http.aclose()
            processes.end_all()
