"""LlamaIndex's OpenAILike; run by test_llama_index.py in an environment of its own."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

SENSE = "This is, all in all, a sensible answer."


def model(name: str = "sensible", **options: Any) -> OpenAILike:
    asked = {"api_base": os.environ["REJOIN_URL"], "api_key": "any", "max_retries": 0, "timeout": 30, **options}
    return OpenAILike(model=name, is_chat_model=True, is_function_calling_model=True, **asked)


def text() -> None:
    assert model().complete("hello").text == SENSE
    assert [part.text for part in model().stream_complete("hello")][-1] == SENSE
    hello = [ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="hello")]
    assert model().chat(hello).message.content == SENSE
    assert "".join(part.delta or "" for part in model().stream_chat(hello)) == SENSE


async def in_asyncio() -> None:
    assert (await model().acomplete("hello")).text == SENSE
    parts = [part async for part in await model().astream_complete("hello")]
    assert parts[-1].text == SENSE


def reasoning() -> None:
    parts = list(model("thinking").stream_chat([ChatMessage(role="user", content="hello")]))
    thought = "".join(part.additional_kwargs.get("thinking_delta") or "" for part in parts)
    assert thought == "Let me think." and parts[-1].message.content == "Yes.", (thought, parts[-1])


def tools() -> None:
    def multiply(a: int, b: int) -> int:
        """Multiply."""
        return a * b

    tool = FunctionTool.from_defaults(fn=multiply)
    answer = model().predict_and_call([tool], user_msg="multiply 4")
    assert answer.response == "16", answer
    *_, last = model().stream_chat_with_tools([tool], user_msg="multiply 4")
    (call,) = model().get_tool_calls_from_response(last)
    assert (call.tool_name, call.tool_kwargs) == ("multiply", {"a": 4, "b": 4})


class City(BaseModel):
    """A city."""

    name: str


def structure() -> None:
    answer = model().as_structured_llm(City).complete("the city 'Paris'")
    assert answer.raw == City(name="Paris"), answer


def failure() -> None:
    for ask in (lambda llm: list(llm.stream_complete("hello")), lambda llm: llm.complete("hello")):
        try:
            ask(model("broken"))
        except openai.APIError as error:
            assert error.code == "upstream_error"
        else:
            raise AssertionError("a broken answer passed for a whole one")


def key() -> None:
    keyed = model(default_headers={"Idempotency-Key": "llama-1"})
    first, second = keyed.complete("hello"), keyed.complete("hello")
    assert first.raw.id == second.raw.id and first.text == second.text == SENSE


if __name__ == "__main__":
    text()
    asyncio.run(in_asyncio())
    reasoning()
    tools()
    structure()
    failure()
    key()
    print("7 parts passed with openai", openai.__version__)
