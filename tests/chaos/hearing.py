"""What one connection said, in any dialect: its bytes to frames, words and how it ended.

Written from the protocols' documents, not with the code under test. A frame that was not finished does not count, as
for any client. Knows nothing of what ought to have been said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

# How the words came to their end: `retry` and `superseded`, `draining` ask the client to come back.
Ending: TypeAlias = Literal[
    "", "complete", "failed", "cancelled", "superseded", "draining", "gone", "retry", "error", "unsaid"
]
TERMINALS: dict[str, Ending] = {
    "generation.completed": "complete",
    "generation.failed": "failed",
    "generation.cancelled": "cancelled",
}
CODES: dict[str, Ending] = {
    "attempt_superseded": "superseded",
    "draining": "draining",
    "gone": "gone",
    "cancelled": "cancelled",
}
STATUSES: dict[str, Ending] = {"completed": "complete", "failed": "failed", "cancelled": "cancelled"}


class Block(NamedTuple):
    """One server-sent event: its fields, and its bytes without comments."""

    fields: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.fields["data"])


@dataclass
class Heard:
    """`frames`: what can be compared byte for byte with another reading. `ending` is empty while there is none."""

    words: str = ""
    ending: Ending = ""
    frames: list[bytes] = None  # type: ignore[assignment]
    blocks: list[Block] = None  # type: ignore[assignment]
    code: str = ""  # what a failure was called
    follows: str = ""  # something that came after the end

    def __post_init__(self) -> None:
        self.frames = self.frames or []
        self.blocks = self.blocks or []

    def end(self, ending: Ending, code: str = "") -> None:
        self.ending, self.code = ending, code


def blocks_of(body: bytes) -> list[Block]:
    """The finished events of a body. Comments are left out, also those that share lines with an event."""
    blocks = []
    for part in body.split(b"\n\n")[:-1]:
        lines = [line for line in part.split(b"\n") if line and not line.startswith(b":")]
        if lines:
            fields = {
                name: value.removeprefix(" ") for name, _, value in (line.decode().partition(":") for line in lines)
            }
            blocks.append(Block(fields, b"\n".join(lines) + b"\n\n"))
    return blocks


def native(body: bytes) -> Heard:
    """`words` is what a client shows: a fresh attempt voids what was said before it."""
    heard = Heard()
    for block in blocks_of(body):
        if "data" not in block.fields:
            heard.ending = "retry" if not heard.ending or heard.ending == "retry" else heard.ending
            continue
        if heard.ending in TERMINALS.values():
            heard.follows = block.raw.decode()
        heard.ending = ""
        heard.blocks.append(block)
        heard.frames.append(block.raw)
        _add_event(heard, block.json)
    return heard


def _add_event(heard: Heard, event: Any) -> None:
    match event["type"]:
        case "snapshot":
            heard.words = event["text"]
            heard.ending = STATUSES.get(event["status"], "")
        case "generation.started" if event["mode"] == "fresh":
            heard.words = ""
        case "text.delta":
            heard.words += event["text"]
        case kind if kind in TERMINALS:
            heard.end(TERMINALS[kind], event.get("code", ""))


def text(body: bytes) -> Heard:
    return Heard(body.decode(errors="ignore"))  # half a character at the end is none yet


def chat_completions(body: bytes) -> Heard:
    """Complete is what had a finish reason, then `[DONE]`."""
    heard, finished = Heard(), False
    for block in blocks_of(body):
        if heard.ending:
            heard.follows = block.raw.decode()
        if block.fields["data"] == "[DONE]":
            heard.end("complete" if finished else "unsaid")
            heard.frames.append(block.raw)
            continue
        chunk = block.json
        if "error" in chunk:
            code = chunk["error"]["code"]
            heard.end(CODES.get(code, "failed"), code)
        if heard.ending not in ("superseded", "draining", "gone"):
            heard.frames.append(block.raw)
        for choice in chunk.get("choices", ()):
            heard.words += choice["delta"].get("content") or ""
            finished = finished or choice["finish_reason"] is not None
    return heard


def responses(body: bytes) -> Heard:
    """`blocks` has the numbered events; the error event, which repeats a number, is an ending only."""
    heard = Heard()
    for block in blocks_of(body):
        if heard.ending:
            heard.follows = block.raw.decode()
        event = block.json
        match event["type"]:
            case "error":
                heard.end(CODES.get(event["code"], "error"), event["code"])
                continue
            case "response.output_text.delta":
                heard.words += event["delta"]
            case "response.completed" | "response.failed" | "response.incomplete":
                error = event["response"]["error"] or {}
                heard.end(STATUSES.get(event["response"]["status"], "error"), error.get("type", ""))
        heard.blocks.append(block)
        heard.frames.append(block.raw)
    return heard


def ui_messages(body: bytes) -> Heard:
    """An `error` is a failure, or the word that the answer was begun anew: only the log can tell which."""
    heard, said = Heard(), ""
    for block in blocks_of(body):
        if heard.ending:
            heard.follows = block.raw.decode()
        heard.frames.append(block.raw)
        if block.fields["data"] == "[DONE]":
            ends: dict[str, Ending] = {"finish": "complete", "error": "error", "abort": "cancelled"}
            heard.ending = ends.get(said, "unsaid")
            continue
        chunk = block.json
        said = chunk["type"]
        if said == "text-delta":
            heard.words += chunk["delta"]
        elif said == "error":
            heard.code = chunk["errorText"]
    return heard


HEAR: dict[str, Callable[[bytes], Heard]] = {
    "native": native,
    "snapshot": native,
    "text": text,
    "chat_completions": chat_completions,
    "responses": responses,
    "ui_messages": ui_messages,
}
