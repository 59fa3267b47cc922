"""LangChain's own standard tests for ChatOpenAI; run by test_langchain.py in an environment of its own."""

from __future__ import annotations

import os
from typing import Any

import openai
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

PARAMS = {"base_url": os.environ["REJOIN_URL"], "api_key": "any", "max_retries": 0, "timeout": 30}


class TestRejoin(ChatModelIntegrationTests):
    """Text, streams, usage, tools, structured output, JSON mode and agents, as LangChain checks every chat model."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**PARAMS, "model": "sensible", "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "sensible-too"


class TestRejoinResponses(TestRejoin):
    """The same through `/v1/responses`."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**PARAMS, "model": "sensible", "use_responses_api": True}


def test_a_failed_generation_is_raised() -> None:
    """A stream that breaks and an answer that does not come are errors, not short answers."""
    model = ChatOpenAI(model="broken", **PARAMS)
    with pytest.raises(openai.APIError):
        list(model.stream("hello"))
    with pytest.raises(openai.APIStatusError):
        model.invoke("hello")


def test_a_key_leads_to_the_same_answer() -> None:
    """Bound to an Idempotency-Key, a second invocation attaches to the first one's generation."""
    model = ChatOpenAI(model="sensible", **PARAMS).bind(extra_headers={"Idempotency-Key": "langchain-1"})
    first, second = model.invoke("hello"), model.invoke("hello")
    assert first.response_metadata["id"] == second.response_metadata["id"]
    assert "".join(chunk.text for chunk in model.stream("hello")) == first.text
