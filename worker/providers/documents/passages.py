"""A passage that was found: its number in the answer, what the client is told of it, what the model is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from shared.events import SourceAdded

SNIPPET_CHARS = 300
_TAG = re.compile(r"<(?=/?passage)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Passage:
    """`id`: the file's path inside the folder, and the place in it. `score` is of the way it was found."""

    number: int
    id: str
    path: str
    title: str
    words: str
    score: float


def source_of(passage: Passage, best: str, base_url: str | None) -> SourceAdded:
    """What is told of it, its `best` sentences among that; nothing of where the folder is on this machine."""
    url = f"{base_url.rstrip('/')}/{quote(passage.path)}" if base_url else None
    words = " ".join(best.split())
    snippet = words if len(words) <= SNIPPET_CHARS else words[: SNIPPET_CHARS - 1].rstrip() + "…"
    return SourceAdded(passage.id, passage.title, url, round(passage.score, 4), snippet)


def context_of(passages: Sequence[Passage]) -> list[str]:
    """What the model is given: each between tags of its own, which the words themselves cannot close."""
    return [
        f"<passage number={passage.number} of={quote(passage.path)}>\n{_harmless(passage.title)}\n"
        f"{_harmless(passage.words)}\n</passage>"
        for passage in passages
    ] or ["(No passage fits the question.)"]


def _harmless(words: str) -> str:
    return _TAG.sub("&lt;", words)
