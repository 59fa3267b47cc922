"""Which sentences of a passage answer a question best: those that share with it the words that are rare.

Words are what BM25 takes them for: stemmed, so that "dog" is found in "dogs". Pure functions; no index is asked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import fsum, log
from typing import Any, NamedTuple

SENTENCES = 3  # in a row
RUNS = 2  # of them, from one passage
WORTH = 0.3  # of all that a passage shares: with less a second run is left out
YEAR_DIGITS = 4  # so long a number says something by itself
MAX_HEADING_CHARS = 60
_LINE_START = re.compile(r"\n(?=[ \t]*(?:#+\s|[-*+•|]|\d{1,3}[.)]\s))")  # of what is a line by itself, and not wrapped
_MARK = re.compile(r"(?:#+|[-*+•])\s+")
_ITEM = re.compile(r"[-*+•]\s|.*\S \| |\|")  # of a list without numbers, or a row of a table
_RULE = re.compile(r"[-|:=_* ]*")  # or nothing at all
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b\d\.)\s+|(?<=[。！？])")  # and not after the number of a list
_TOKEN = re.compile(r"\b\w\w+\b")  # as BM25Retriever has it; one digit is no word either
_EMPTY_WORDS = frozenset(  # that say nothing of what is asked for
    re.findall(
        r"\w+",
        "about after also an and any are as at be but by can could did do does for from had has have he her here his "
        "how if in into is it its many may me much must my no not of on one or our she should so some such than that "
        "the their them then there these they this those to us was we were what when where which while who whom whose "
        "why will with would you your",
    )
)


class Sentence(NamedTuple):
    """`section`: counts the headings so far. `heading`: the last of them; `is_item`: of a list or a table."""

    text: str
    section: int
    heading: str
    is_item: bool


class Best(NamedTuple):
    """The best sentences of a passage, word for word and in their order. Where it shares no word with the question,
    they are its first ones."""

    words: str
    shares: bool

    def without(self, title: str) -> str:
        """The words, where the document's title is told anyway."""
        return self.words.removeprefix(f"{title}: ")


def best(question: str, passages: Sequence[str]) -> list[Best]:
    """Of each passage the sentences that answer the question best."""
    found = [sentences(words) for words in passages]
    asked = frozenset(stems(question))
    weights = _weights(asked, [f"{one.heading}\n{one.text}" for passage in found for one in passage])
    return [_best(passage, weights) for passage in found]


def sentences(words: str) -> list[Sentence]:
    """The sentences of a passage, table rows and list items among them; without its headings."""
    found: list[Sentence] = []
    section, heading = 0, ""
    bare = ""  # a short line that is a heading only if something stands below it
    for paragraph in re.split(r"\n\s*\n", words):
        for line in _LINE_START.split(paragraph):
            text = " ".join(_MARK.sub("", line.strip()).split())
            if _RULE.fullmatch(text):
                continue
            if _is_heading(line.strip(), text):
                found += [Sentence(bare, section, "", False)] if bare else []
                section, heading = section + 1, text.rstrip(":")
                bare = "" if line.strip().startswith("#") else text
            else:
                bare = ""
                is_item = _ITEM.match(line.strip()) is not None
                parts = [text] if is_item else _SENTENCE_END.split(text)
                found += [Sentence(part, section, heading, is_item) for part in parts if part]
    if bare or not found:
        found.append(Sentence(bare or heading, section, "", False))
    return found


def stems(text: str) -> list[str]:
    """The words of a text that count, as BM25 knows them. A short number counts with its neighbours alone: "15 metres"
    is not found in "15 years"."""
    words: list[str] = _stemmer().stemWords([word for word in _TOKEN.findall(text.lower()) if word not in _EMPTY_WORDS])
    numbers = {word for word in words if word.isdigit() and len(word) < YEAR_DIGITS}
    pairs = [f"{one} {other}" for one, other in pairwise(words) if one in numbers or other in numbers]
    return [word for word in words if word not in numbers] + pairs


def _is_heading(line: str, text: str) -> bool:
    if line.startswith("#"):
        return True
    if _ITEM.match(line):
        return False
    return len(text) <= MAX_HEADING_CHARS and text[-1] not in ".!?:;,。！？”\"'" and not re.match(r"\W|\d|.*\|", text)


def _weights(asked: Collection[str], texts: Sequence[str]) -> dict[str, float]:
    """How much each word of the question says: the more, the fewer sentences have it. What none has is left out."""
    in_texts = Counter(stem for text in texts for stem in set(stems(text)) if stem in asked)
    return {stem: log(1 + len(texts) / count) for stem, count in in_texts.items()}


def _best(passage: Sequence[Sentence], weights: Mapping[str, float]) -> Best:
    """The run of sentences that shares most, and one with what that has not, if it is worth it. Runs do not go beyond
    a heading, and a word of the heading counts half."""
    runs = [
        [n for n in range(start, min(start + SENTENCES, len(passage))) if passage[n].section == passage[start].section]
        for start in range(len(passage))
    ]
    known = [[stem for stem in stems(sentence.text) if stem in weights] for sentence in passage]
    headings = [{stem for stem in stems(sentence.heading) if stem in weights} for sentence in passage]
    everything = fsum(weights[stem] for stem in set().union(*known, *headings))
    chosen: set[int] = set()
    covered: set[str] = set()
    for _ in range(RUNS):

        def share(run: Sequence[int]) -> tuple[float, int, bool]:
            """What is new in it, how often, and whether from its first sentence on."""
            new = [stem for n in run for stem in known[n] if stem not in covered]
            above = headings[run[0]] - covered - set(new)
            share = [weights[stem] for stem in set(new)] + [weights[stem] / 2 for stem in above]
            return fsum(share), len(new), not covered.issuperset(known[run[0]])

        run = max(runs, key=share)
        if chosen and share(run)[0] < max(WORTH * everything, 1e-9):
            break
        chosen.update(run)
        covered.update(headings[run[0]], *(known[n] for n in run))
    under = {n for n, one in enumerate(passage) if one.is_item or headings[n].difference(known[n])}
    return Best(_quoted(passage, sorted(chosen), under), bool(covered))


def _quoted(passage: Sequence[Sentence], chosen: Sequence[int], under: Collection[int]) -> str:
    """The chosen sentences; an ellipsis is what was left out between two. Those that are understood only under their
    heading have it before them, where the quotation or the section begins."""
    said = ""
    for place, n in enumerate(chosen):
        one = passage[n]
        before = passage[chosen[place - 1]] if place else None
        if before is not None:
            said += " … " if n != chosen[place - 1] + 1 else "; " if before.is_item and one.is_item else " "
        begins = before is None or before.section != one.section or (one.is_item and not before.is_item)
        said += f"{one.heading}: {one.text}" if one.heading and begins and n in under else one.text
    return said


@cache
def _stemmer() -> Any:
    import Stemmer  # type: ignore[import-not-found]  # BM25's; part of the extra

    return Stemmer.Stemmer("english")
