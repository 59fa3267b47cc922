"""The upstream that speaks OpenAI's Chat Completions: OpenAI itself, vLLM, Ollama, a gateway.

One rule: an answer is complete when a finish reason was seen, and every other end is an UpstreamError with a
stable code. The bytes that come back are read here and not by the openai SDK, whose stream takes a cut, an HTML page
and an error for a normal end. Knows nothing of logs, jobs or clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from shared.config import ModelRoute, Settings
from shared.errors import UpstreamError
from shared.events import Completed, FinishReason, Output, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta, Usage
from shared.prompt import Prompt
from worker.providers import Said
from worker.providers.upstream_events import (
    UNREADABLE,
    Characters,
    ServerSentEvents,
    TextEvent,
    count,
    encodable,
    parse,
    pieces,
)
from worker.providers.upstream_http import LINGER_SECONDS, Chunks, UpstreamHTTP, failure

SETTLE_SECONDS = 2.0  # after the finish reason: for usage, [DONE] and the end
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def build(settings: Settings, route: ModelRoute) -> OpenAICompatible:
    """Raises SettingsError where the base URL is none. A missing key shows when it is needed."""
    return OpenAICompatible(UpstreamHTTP(settings, route), route)


class OpenAICompatible:
    """One upstream, asked for chat completions."""

    def __init__(self, http: UpstreamHTTP, route: ModelRoute) -> None:
        self._http = http
        self._route = route
        self._create = http.client.chat.completions.with_streaming_response.create  # imports much: not at a request

    async def aclose(self) -> None:
        await self._http.aclose()

    async def abandon(self, upstream_id: str) -> None:
        """Closing the connection was enough: such an upstream tells no id."""

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """Where the route says how, and as far as it was all text: thoughts, calls and a schema cannot be taken up."""
        return self._route.continuation != "none" and said.is_text_only and prompt.response_format is None

    async def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncGenerator[Output | Completed, None]:
        """The events of one answer. Raises UpstreamError with a code of FAILURES.

        Cancelling the task closes the connection wherever it waits; a consumer that stops early on its own
        closes this generator (`contextlib.aclosing`)."""
        self._http.require_key(prompt)
        clock = asyncio.get_running_loop().time
        body = _body(prompt, self._route, self._http.is_openai)
        if said is not None:
            if prompt.max_tokens is not None and prompt.max_tokens <= len(said.outputs):
                yield Completed("length")
                return
            _go_on(body, self._route, said)
        answer = Answer("".join(said.texts()) if said and self._route.repeats_prefix else "")
        async with AsyncExitStack() as connection:
            chunks, deadline = await self._http.open(prompt.model, partial(self._create, **body), connection)
            while data := await self._next(prompt.model, chunks, answer, deadline):
                outputs = answer.read(data)
                for output in outputs:
                    yield output
                if answer.problem:
                    break
                # The wait is counted from here, not from the read: a slow consumer is not the upstream's silence.
                if answer.is_whole:
                    deadline = min(deadline, clock() + LINGER_SECONDS)
                elif answer.finished_now:
                    deadline = clock() + SETTLE_SECONDS
                elif outputs and not answer.finish_reason:
                    deadline = clock() + self._route.inter_token_seconds
        if answer.finish_reason is None:
            raise failure(prompt.model, *(answer.problem or answer.cut_off()))
        for output in answer.leftovers():
            yield output
        yield Completed(answer.finish_reason, answer.usage)

    async def _next(self, model: str, chunks: Chunks, answer: Answer, deadline: float) -> bytes:
        """The next bytes, or none at the end. Once all is said, a cut and a silence are an end like any other."""
        try:
            return await self._http.read(model, chunks, deadline, started=answer.started)
        except UpstreamError:
            if answer.finish_reason is None and not answer.is_whole:
                raise
            return b""


class Answer:
    """What was read of one answer so far. `problem`, once set, is a failure's code and detail; after a finish
    reason it does not matter any more. `repeated`: a beginning that was said before and comes again; it is left out."""

    def __init__(self, repeated: str = "") -> None:
        self._repeated = repeated
        self.started = False
        self.finish_reason: FinishReason | None = None
        self.finished_now = False
        self.usage: Usage | None = None
        self.problem: tuple[str, str] | None = None
        self._done = False
        self._sse = ServerSentEvents()
        self._characters = Characters()
        self._named: set[tuple[int, str]] = set()

    @property
    def is_whole(self) -> bool:
        return self._done or (self.finish_reason is not None and self.usage is not None)

    def read(self, data: bytes) -> list[Output]:
        """The outputs in the next bytes, up to the first problem with them."""
        outputs: list[Output] = []
        had_finished = self.finish_reason is not None
        try:
            for payload in self._sse.feed(data):
                if payload == b"[DONE]":
                    self._done = True
                elif not self._done:
                    self._chunk(parse(payload), outputs)
        except UNREADABLE as error:
            self.problem = ("upstream_invalid", type(error).__name__)
        self.finished_now = not had_finished and self.finish_reason is not None
        self.started = self.started or bool(outputs)
        return outputs

    def cut_off(self) -> tuple[str, str]:
        """The problem with a stream that has ended here."""
        return self._sse.cut_off()

    def leftovers(self) -> Sequence[Output]:
        """Halves of characters that never found their mates."""
        return self._characters.leftovers()

    def _chunk(self, chunk: dict[str, Any], outputs: list[Output]) -> None:
        if chunk.get("error"):
            self.problem = ("upstream_error", "")
            self._done = True
            return
        if usage := chunk.get("usage"):
            self.usage = _usage(usage)
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0):
                continue
            if delta := choice.get("delta"):
                self._delta(delta, outputs)
            if reason := choice.get("finish_reason"):
                self.finish_reason = self.finish_reason or FINISH_REASONS.get(reason, "stop")

    def _delta(self, delta: dict[str, Any], outputs: list[Output]) -> None:
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            self._text(ReasoningDelta, reasoning, outputs)
        if content := delta.get("content"):
            self._text(TextDelta, content, outputs)
        if refusal := delta.get("refusal"):
            self._text(RefusalDelta, refusal, outputs)
        for position, call in enumerate(delta.get("tool_calls") or ()):
            outputs += self._tool_call(call, position)

    def _text(self, event: TextEvent, text: str, outputs: list[Output]) -> None:
        whole = self._characters.whole(event, text)
        if self._repeated and event is TextDelta:
            whole = self._new(whole)
        outputs += map(event, pieces(whole))

    def _new(self, text: str) -> str:
        """`text` without what is left of the repeated beginning. Raises ValueError where it is another beginning."""
        known = min(len(text), len(self._repeated))
        if text[:known] != self._repeated[:known]:
            raise ValueError("another beginning than the one to go on from")
        self._repeated = self._repeated[known:]
        return text[known:]

    def _tool_call(self, call: dict[str, Any], position: int) -> Iterator[Output]:
        index = call.get("index", position)
        if type(index) is not int or not 0 <= index < 1024:
            raise ValueError("tool call index")
        function = call.get("function") or {}
        call_id, name = self._once(index, "id", call.get("id")), self._once(index, "name", function.get("name"))
        first, *rest = pieces(self._characters.whole(index, function.get("arguments") or "")) or [""]
        if call_id or name or first:
            yield ToolCallDelta(index, call_id, name, first)
        for piece in rest:
            yield ToolCallDelta(index, arguments=piece)

    def _once(self, index: int, field: str, value: str | None) -> str | None:
        """Some upstreams repeat a call's id and name in every fragment; the vocabulary says them once."""
        if not value or (index, field) in self._named:
            return None
        self._named.add((index, field))
        return encodable(value)


def _body(prompt: Prompt, route: ModelRoute, is_openai: bool) -> dict[str, Any]:
    """The Chat Completions request. `metadata` is the caller's label on our log: it stays here, and OpenAI
    takes it only together with `store`, which would keep the prompt there."""
    asked = {
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "max_completion_tokens" if is_openai else "max_tokens": prompt.max_tokens,  # few others know the new name
        "stop": prompt.stop,
        "seed": prompt.seed,
        "tools": prompt.tools,
        "tool_choice": prompt.tool_choice,
        "response_format": prompt.response_format,
        "parallel_tool_calls": prompt.parallel_tool_calls,
        "reasoning_effort": prompt.reasoning_effort,
    }
    return {
        "model": prompt.model if route.upstream_model == "*" else route.upstream_model,
        "messages": [message.model_dump(exclude_none=True) for message in prompt.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in asked.items() if value is not None},
    }


def _go_on(body: dict[str, Any], route: ModelRoute, said: Said) -> None:
    """Have the upstream go on with what was said, as vLLM and SGLang, or Mistral and DeepSeek, want to be asked.

    A delta is at least one token, so of `max_tokens` at most what was left is asked for, and perhaps a little more."""
    begun: dict[str, Any] = {"role": "assistant", "content": "".join(said.texts())}
    if route.continuation == "prefix":
        begun["prefix"] = True
    else:
        body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
    body["messages"] = [*body["messages"], begun]
    for limit in ("max_tokens", "max_completion_tokens"):
        if limit in body:
            body[limit] -= len(said.outputs)


def _usage(usage: dict[str, Any]) -> Usage:
    read, written = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    return Usage(
        read,
        written,
        count(usage, "total_tokens") or read + written,
        cached_tokens=count(usage.get("prompt_tokens_details") or {}, "cached_tokens"),
        reasoning_tokens=count(usage.get("completion_tokens_details") or {}, "reasoning_tokens"),
    )
