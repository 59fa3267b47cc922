"""What a caller asks, and when two requests are the same."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from shared.prompt import Message, Prompt

HELLO: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    content=st.none() | st.text() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()})),
)
prompts = st.builds(
    Prompt,
    model=st.text(min_size=1, max_size=20),
    messages=st.lists(messages, min_size=1, max_size=4),
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.none() | st.integers(1, 10_000),
    stop=st.none() | st.text() | st.lists(st.text(), max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    tool_choice=st.none() | st.just("auto"),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
)


@given(prompts)
def test_a_prompt_survives_its_json(prompt: Prompt) -> None:
    """The worker reads what the caller asked, and it counts as the same request."""
    again = Prompt.from_json(prompt.to_json())
    assert again == prompt
    assert again.hash() == prompt.hash()


def test_the_hash_is_the_same_in_every_version() -> None:
    """An Idempotency-Key lives for days, longer than a deployed version may."""
    assert Prompt(**HELLO).to_json() == b'{"messages":[{"content":"hello","role":"user"}],"model":"demo"}'
    assert Prompt(**HELLO).hash() == "0841789cf39a1286180a5e59c2052a7afe0aaa748a20b9427bd7cd839391d7e0"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HELLO["messages"], "model": "demo"},
        {**HELLO, "temperature": None, "tools": None},
        {**HELLO, "messages": [{"content": "hello", "role": "user", "name": None}]},
    ],
)
def test_the_hash_does_not_see_order_or_what_was_not_said(body: dict[str, Any]) -> None:
    """The same request, written otherwise."""
    assert Prompt(**body).hash() == Prompt(**HELLO).hash()


def test_the_hash_does_not_see_how_a_number_is_written() -> None:
    """`1` and `1.0` are the same temperature."""
    assert Prompt(**HELLO, temperature=1).hash() == Prompt(**HELLO, temperature=1.0).hash()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"messages": [{"role": "user", "content": "hello "}]},
        {"messages": [{"role": "system", "content": "hello"}]},
        {"temperature": 0},
        {"max_tokens": 5},
        {"stop": "x"},
        {"seed": 0},
        {"metadata": {}},
        {"tools": []},
    ],
)
def test_the_hash_sees_every_other_difference(change: dict[str, Any]) -> None:
    """Another request under the same Idempotency-Key must be noticed."""
    assert Prompt(**{**HELLO, **change}).hash() != Prompt(**HELLO).hash()


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "http://elsewhere"},
        {"api_key": "key"},
        {"stream": True},
        {"messages": [{"role": "user", "content": "hello", "colour": "red"}]},
        {"messages": [{"role": "robot", "content": "hello"}]},
        {"messages": []},
        {"model": ""},
        {"model": "m" * 257},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"max_tokens": 0},
        {"seed": 2**63},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": "v" * 513}},
        {"metadata": {str(n): "v" for n in range(17)}},
    ],
)
def test_what_we_do_not_know_or_cannot_do_is_refused(change: dict[str, Any]) -> None:
    """Nothing a caller says is silently dropped, least of all where it would send the prompt."""
    with pytest.raises(ValidationError):
        Prompt(**{**HELLO, **change})


def test_a_prompt_is_frozen() -> None:
    """What was hashed is what is sent."""
    with pytest.raises(ValidationError):
        Prompt(**HELLO).model = "other"  # type: ignore[misc]


def test_the_words_of_a_message_are_its_text_parts() -> None:
    """Pictures have no words."""
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    assert Message(role="user", content=parts).text() == "ab"
    assert Message(role="user", content="ab").text() == "ab"
    assert Message(role="assistant").text() == ""


def test_the_last_user_text_is_the_question() -> None:
    """What retrieval searches for; empty where no user spoke."""
    said = [("user", "first"), ("assistant", "answer"), ("user", "second"), ("assistant", "prefix")]
    prompt = Prompt(model="demo", messages=[Message(role=role, content=text) for role, text in said])
    assert prompt.last_user_text() == "second"
    assert Prompt(model="demo", messages=[Message(role="system", content="x")]).last_user_text() == ""
