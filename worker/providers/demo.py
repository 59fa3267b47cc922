"""The offline model: words at a steady pace, no key and no network needed.

The same prompt gives the same answer, byte for byte, and it says openly that no model wrote it.
Knows nothing of upstreams.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator

from shared.config import ModelRoute, Settings
from shared.events import Completed, FinishReason, TextDelta, Usage
from shared.prompt import Prompt
from worker.providers import Said

_QUOTED_CHARS = 60
_WORD = re.compile(r"\S+\s*")

# One of each row is taken, by the prompt's hash.
_OPENINGS = (
    "Hello from the demo model 👋",
    "Bonjour, this is the demo model, très patient as ever 👋",
    "Good day from the demo model, which lives entirely on this computer 👋",
    "Here is the demo model, speaking at a calm and even pace 👋",
)
_HONESTY = (
    "Honesty first: no language model is at work here. These words were written in advance, and a hash of your "
    "question only chose among them. It is a small façade, put up so that you can see the machinery behind it move.",
    "To be plain about it, I cannot answer that. I am a few prepared paragraphs, picked by a hash of your question, "
    "a naïve stand-in which needs no key, no network and no money, and which always says the same to the same words.",
    "Please do not take this for an answer. Nothing here was thought up by a model: the sentences lay ready like "
    "dishes in a café, and a hash of your question decided which of them to serve, the same ones every time.",
)
_LEAVING = (
    "What is real is the stream. Reload this page while I am still talking, close the tab, or let the train go into "
    "a tunnel. The worker goes on writing, and every word is kept in a log with a number of its own.",
    "Watch the stream instead, for that part is real. Leave whenever you like: shut the laptop, lose the network, "
    "reload in the middle of a word. I am written into a log by a worker that does not mind whether anyone is reading.",
    "The stream itself is worth a look. Walk away in the middle of this sentence if you wish, and come back from "
    "another window. Nobody has to hold the line, since each word goes to a numbered log before it comes to you.",
)
_REJOINING = (
    "When you come back, your client names the last number it saw, and receives exactly what it missed: nothing "
    "twice and nothing left out, even a 🌊 or an accent cut in half on the way.",
    "On your return you tell the number of the last event that reached you, and the rest follows from there, first "
    "what you missed and then what is new, without a seam, every é and every 🌊 whole.",
    "To rejoin, you only say how far you had read. The missing part is replayed at once, the live part follows on "
    "its heels, and the two together are the same bytes that a reader who never left would have seen 🌊.",
)
_SHARING = (
    "Several readers may follow one answer at the same time, each at a place of its own.",
    "You may open this answer in two windows, and both will end with the same text.",
    "A slow reader holds up nobody, and a late one still hears the story from the start.",
)
_CLOSING = (
    "Set an API key, or the address of a server of your own, and a real model will speak here in my place. "
    "Until then I am glad to be interrupted.",
    "With an API key, or a base URL that points at a model of yours, this voice gives way to a real one. "
    "Try leaving once before you go.",
)
_ROWS = (_HONESTY, _LEAVING, _REJOINING, _SHARING, _CLOSING)


def build(settings: Settings, route: ModelRoute) -> Demo:
    return Demo(settings.demo_words_per_second)


class Demo:
    """Speaks `words_per_second`, the first word at once."""

    def __init__(self, words_per_second: float) -> None:
        self._words_per_second = words_per_second

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """The answer is known by heart: it can go on from any word of it."""
        return bool(said.outputs) and list(said.texts()) == _words(prompt)[: len(said.outputs)]

    async def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncGenerator[TextDelta | Completed, None]:
        words = _words(prompt)
        spoken = words[: prompt.max_tokens]
        clock = asyncio.get_running_loop().time
        start = clock()
        for number, word in enumerate(spoken[len(said.outputs) if said else 0 :]):
            if number:  # by the clock, not by the interval: a late word does not delay those after it
                await asyncio.sleep(max(0.0, start + number / self._words_per_second - clock()))
            yield TextDelta(word)
        finish_reason: FinishReason = "stop" if len(spoken) == len(words) else "length"
        yield Completed(finish_reason, _usage(prompt, len(spoken)))

    async def abandon(self, upstream_id: str) -> None:
        """Nobody else speaks."""

    async def aclose(self) -> None:
        """Nothing is held open."""


def _words(prompt: Prompt) -> list[str]:
    return _WORD.findall(_until_stop(answer(prompt.last_user_text()), prompt.stop))


def answer(question: str) -> str:
    """About 180 words, chosen by the question and the same every time; no two questions get the same seal."""
    digest = hashlib.sha256(question.encode("utf-8", "replace")).digest()
    opening = f"{_OPENINGS[digest[0] % len(_OPENINGS)]} {_echo(question)}"
    paragraphs = [row[byte % len(row)] for row, byte in zip(_ROWS, digest[1:], strict=False)]
    return "\n\n".join([opening, *paragraphs, f"The seal of this answer is {digest[-6:].hex()}."])


def _echo(question: str) -> str:
    line = " ".join(question.split())
    if not line:
        return "You asked nothing at all, which is fine with me."
    return f"You asked: “{line}”" if len(line) <= _QUOTED_CHARS else f"You asked: “{line[:_QUOTED_CHARS].rstrip()}…”"


def _until_stop(text: str, stop: str | list[str] | None) -> str:
    stops = [stop] if isinstance(stop, str) else stop or []
    ends = [text.index(word) for word in stops if word and word in text]
    return text[: min(ends, default=len(text))]


def _usage(prompt: Prompt, output_tokens: int) -> Usage:
    input_tokens = sum(len(message.text().split()) for message in prompt.messages)
    return Usage(input_tokens, output_tokens, input_tokens + output_tokens)
