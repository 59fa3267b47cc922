"""What a caller asks: model, messages, sampling options. Edges parse into it, the middle trusts it.

Knows no client protocol and no provider: it is the words both sides translate to.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue

Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class Message(BaseModel):
    """One turn, in the field's usual shape (OpenAI Chat Completions). Text or a list of content parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, JsonValue]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """The words of this turn, content parts that are not text left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part["text"]) for part in self.content or () if isinstance(part.get("text"), str))


class Prompt(BaseModel):
    """A request for one generation. `None` means: not said, the upstream's default applies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=2048)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    response_format: dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, max_length=64)
    metadata: Metadata | None = Field(None, max_length=16)

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(exclude_none=True), option=orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, data: bytes) -> Prompt:
        return cls.model_validate(orjson.loads(data))

    def hash(self) -> str:
        """SHA-256 of the canonical JSON: two requests are the same when this is the same."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def last_user_text(self) -> str:
        return next((message.text() for message in reversed(self.messages) if message.role == "user"), "")
