"""The offline demo model: the same words for the same prompt, at the pace that was asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import ModelRoute, Settings
from shared.events import Completed, TextDelta
from shared.prompt import Prompt
from worker.providers import Said, build
from worker.providers.demo import answer

ROUTE = ModelRoute(name="demo", provider="demo", upstream_model="demo")


def prompt(text: str = "What is a log?", **fields: Any) -> Prompt:
    return Prompt.model_validate({"model": "demo", "messages": [{"role": "user", "content": text}], **fields})


async def ask(asked: Prompt, words_per_second: float = 100_000) -> list[TextDelta | Completed]:
    settings = Settings(_env_file=None, demo_words_per_second=words_per_second)
    one = build(settings, ROUTE)
    got = [event async for event in one.stream(asked)]
    await one.aclose()
    return got  # type: ignore[return-value]


def text_of(got: list[TextDelta | Completed]) -> str:
    return "".join(event.text for event in got if isinstance(event, TextDelta))


async def test_the_same_prompt_gives_the_same_words() -> None:
    """Two answers to one prompt are the same event for event, and complete."""
    first, second = await ask(prompt()), await ask(prompt())
    assert first == second
    assert text_of(first) == answer("What is a log?")
    assert isinstance(first[-1], Completed) and first[-1].finish_reason == "stop"


@given(st.text(), st.text())
def test_different_prompts_give_different_answers(one: str, other: str) -> None:
    """An answer can be told from the answer to any other question."""
    assert (answer(one) == answer(other)) == (one == other)


@given(st.text())
def test_an_answer_is_long_enough_to_watch_and_has_more_than_ascii(question: str) -> None:
    """There is time to leave and rejoin, an emoji and an accent to lose, and no doubt about who speaks."""
    text = answer(question)
    assert 140 <= len(text.split()) <= 240
    assert "🌊" in text and any(letter in text for letter in "çéï")
    assert "demo model" in text


async def test_max_tokens_cuts_the_answer_short() -> None:
    """A word counts as a token, and an answer that was cut says so."""
    got = await ask(prompt(max_tokens=7))
    assert len(got) == 8
    assert isinstance(got[-1], Completed) and got[-1].finish_reason == "length"
    assert got[-1].usage is not None and got[-1].usage.output_tokens == 7


@pytest.mark.parametrize("stop", ["stream", ["never said", "stream"]])
async def test_a_stop_word_ends_the_answer_before_it(stop: Any) -> None:
    """Nothing of the stop word is said, and the end is an ordinary one."""
    got = await ask(prompt(stop=stop))
    assert text_of(got) == answer("What is a log?").partition("stream")[0]
    assert isinstance(got[-1], Completed) and got[-1].finish_reason == "stop"


async def test_the_words_come_at_the_pace_and_the_first_at_once() -> None:
    """Eleven words at a hundred a second take a tenth of a second, counted from the first."""
    clock = asyncio.get_running_loop().time
    start = clock()
    settings = Settings(_env_file=None, demo_words_per_second=100)
    times = []
    one = build(settings, ROUTE)
    async for _ in one.stream(prompt(max_tokens=11)):
        times.append(clock() - start)
    assert times[0] < 0.05
    assert 0.1 <= times[10] < 0.3


async def test_it_goes_on_from_any_of_its_own_words() -> None:
    """What was said and what follows are the whole answer, whatever the place; from other words it does not go on."""
    whole = await ask(prompt())
    one = build(Settings(_env_file=None, demo_words_per_second=100_000), ROUTE)
    for place in (1, 7, len(whole) - 1):
        said = Said(whole[:place])  # type: ignore[arg-type]
        assert one.can_continue(prompt(), said)
        assert whole[:place] + [event async for event in one.stream(prompt(), said)] == whole
    assert not one.can_continue(prompt("Another question"), Said(whole[:30]))  # type: ignore[arg-type]
    assert not one.can_continue(prompt(), Said([]))
