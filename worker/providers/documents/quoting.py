"""The offline voice over the documents: no model, only the sentences that share most with the question, word for word.

The same question over the same passages is answered with the same words, at the pace of the demo model.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence

from shared.events import Completed, FinishReason, TextDelta, Usage
from shared.prompt import Prompt
from worker.providers.documents import sentences
from worker.providers.documents.passages import Passage

QUOTED = 3  # passages
WORTH = 0.4  # of the best one's score: with less a passage is not quoted
_WORD = re.compile(r"\S+\s*")
_HONESTY = (
    "No language model is at work here: these are the passages of your documents that share most with the question."
)
_NOTHING = (
    "No language model is at work here, and no passage of your documents shares a word with the question. "
    "Try the words that the documents themselves would use."
)
_NO_DOCUMENTS = "No language model is at work here, and there are no documents in the folder yet."


class Quoting:
    """Speaks `words_per_second` out of `passages`, the best first. `has_documents`: whether there are any at all."""

    def __init__(self, passages: Sequence[Passage], words_per_second: float, has_documents: bool = True) -> None:
        self._passages = passages
        self._has_documents = has_documents
        self._words_per_second = words_per_second

    async def stream(self, prompt: Prompt, question: str) -> AsyncGenerator[TextDelta | Completed, None]:
        words = _WORD.findall(_until_stop(answer(question, self._passages, self._has_documents), prompt.stop))
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


def answer(question: str, passages: Sequence[Passage], has_documents: bool = True) -> str:
    """The whole answer: which sentences, of which document, under which number."""
    if not passages:
        return _NOTHING if has_documents else _NO_DOCUMENTS
    best = zip(passages, sentences.best(question, [passage.words for passage in passages]), strict=True)
    worth = [(passage, one) for passage, one in best if passage.score >= WORTH * passages[0].score][:QUOTED]
    sharing = [(passage, one) for passage, one in worth if one.shares] or worth  # by vectors, perhaps none does
    quotes = [f"[{passage.number}] {passage.title}: “{one.without(passage.title)}”" for passage, one in sharing]
    return "\n\n".join([_HONESTY, *quotes])


def _until_stop(text: str, stop: str | list[str] | None) -> str:
    stops = [stop] if isinstance(stop, str) else stop or []
    ends = [text.index(word) for word in stops if word and word in text]
    return text[: min(ends, default=len(text))]
