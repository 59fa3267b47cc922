"""The offline voice over the documents: no model, only the sentences that share most with the question, word for word.

The same question over the same passages is answered with the same words, at the pace of the demo model.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence

from shared.events import Completed, FinishReason, TextDelta, Usage
from shared.prompt import Prompt
from worker.providers.documents.passages import Passage

SENTENCES = 3  # in a row, of each passage
QUOTED = 3  # passages
WORTH = 0.4  # of the best one's score: with less a passage is not quoted
STEM_CHARS = 5  # a word is known by its beginning
_WORD = re.compile(r"\S+\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b\d\.)\s+|(?<=[。！？])")  # and not after the number of a list
_HONESTY = (
    "No language model is at work here: these are the passages of your documents that share most with the question."
)
_NOTHING = (
    "No language model is at work here, and no passage of your documents shares a word with the question. "
    "Try the words that the documents themselves would use."
)
_EMPTY_WORDS = frozenset(  # that say nothing of what is asked for
    re.findall(
        r"\w+",
        "about after also and are can could did does for from has have her his how its may must not our she should "
        "than that the their them then there they this was were what when where which while who whom why will with "
        "would you your",
    )
)


class Quoting:
    """Speaks `words_per_second` out of `passages`, the best first."""

    def __init__(self, passages: Sequence[Passage], words_per_second: float) -> None:
        self._passages = passages
        self._words_per_second = words_per_second

    async def stream(self, prompt: Prompt, question: str) -> AsyncGenerator[TextDelta | Completed, None]:
        words = _WORD.findall(_until_stop(answer(question, self._passages), prompt.stop))
        spoken = words[: prompt.max_tokens]
        clock = asyncio.get_running_loop().time
        start = clock()
        for number, word in enumerate(spoken):
            if number:
                await asyncio.sleep(max(0.0, start + number / self._words_per_second - clock()))
            yield TextDelta(word)
        finish_reason: FinishReason = "stop" if len(spoken) == len(words) else "length"
        read = len(question.split()) + sum(len(passage.words.split()) for passage in self._passages)
        yield Completed(finish_reason, Usage(read, len(spoken), read + len(spoken)))


def answer(question: str, passages: Sequence[Passage]) -> str:
    """The whole answer: which sentences, of which document, under which number."""
    if not passages:
        return _NOTHING
    quotes = [
        f"[{passage.number}] {passage.title}: “{_best_sentences(question, passage.words)}”"
        for passage in passages[:QUOTED]
        if passage.score >= WORTH * passages[0].score
    ]
    return "\n\n".join([_HONESTY, *quotes])


def _best_sentences(question: str, words: str) -> str:
    """So many sentences in a row that share most with the question, the first of those that share as much."""
    paragraphs = (re.sub(r"(?m)^#+\s", "", paragraph) for paragraph in words.split("\n\n"))
    found = (" ".join(one.split()) for paragraph in paragraphs for one in _SENTENCE_END.split(paragraph))
    sentences = [sentence for sentence in found if sentence]
    asked = set(_stems(question))
    windows = [sentences[n : n + SENTENCES] for n in range(max(1, len(sentences) - SENTENCES + 1))]
    best = max(windows, key=lambda window: _shared(asked, window))
    return " ".join(best)


def _shared(asked: set[str], window: Sequence[str]) -> tuple[int, int, bool]:
    """How many of the question's words, how often, and whether from the first sentence on."""
    found = [stem for stem in _stems(" ".join(window)) if stem in asked]
    return len(set(found)), len(found), not asked.isdisjoint(_stems(window[0] if window else ""))


def _stems(text: str) -> list[str]:
    words = re.findall(r"\w{3,}", text.lower())
    return [word[:STEM_CHARS] for word in words if word not in _EMPTY_WORDS]


def _until_stop(text: str, stop: str | list[str] | None) -> str:
    stops = [stop] if isinstance(stop, str) else stop or []
    ends = [text.index(word) for word in stops if word and word in text]
    return text[: min(ends, default=len(text))]
