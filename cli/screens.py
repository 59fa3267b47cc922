"""How an answer is shown: Markdown in a terminal, its plain text in a pipe, its events as lines of JSON.

One rule: nothing that a model or a server says can steer the terminal; every control character is made visible.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.rule import Rule
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from shared.errors import RejoinError
from shared.events import (
    Entry,
    Event,
    ReasoningDelta,
    RefusalDelta,
    Snapshot,
    Started,
    TextDelta,
    ToolCallDelta,
)

FRAME_SECONDS = 0.1
PACE_SECONDS = 3.0  # the time over which the running rate is measured
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_RAW_CONTROL = re.compile(rb"\x7f|\xc2[\x80-\x9f]")
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def visible(text: str) -> str:
    """`text` with its control characters (C0, DEL, C1; not tab and line feed) as characters that do nothing."""
    return re.sub(r"\r\n?", "\n", text).translate(_VISIBLE)


def console(*, is_error: bool = False) -> Console:
    """A console that takes what it is given for text: no markup, no emoji codes, no highlighting."""
    return Console(stderr=is_error, markup=False, emoji=False, highlight=False)


def notice(text: str) -> None:
    """One line on standard error."""
    print(f"rejoin: {visible(text)}", file=sys.stderr, flush=True)


class Void(RejoinError):
    """The answer starts over, and what was written of it cannot be taken back."""


class Screen(Protocol):
    """Where an answer goes. `hear` is given each entry, and the fold up to it."""

    async def __aenter__(self) -> Screen: ...

    async def __aexit__(self, *error: object) -> None: ...

    def hear(self, entry: Entry, event: Event | None, state: Snapshot) -> None: ...

    def tell(self, text: str) -> None:
        """What is being done, which is no part of the answer."""

    def lost(self, why: str, pause_seconds: float) -> None: ...

    def back(self) -> None: ...

    def unknown(self, after: str) -> None:
        """The log has no event `after`, behind which the reader wanted to go on: all of it follows."""

    def end(self, state: Snapshot) -> None: ...


class Piped:
    """For pipes and files: words to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self._is_lost = False

    async def __aenter__(self) -> Screen:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    def tell(self, text: str) -> None:
        notice(text)

    def lost(self, why: str, pause_seconds: float) -> None:
        if not self._is_lost:
            notice(f"{why}; rejoining")
        self._is_lost = True

    def back(self) -> None:
        notice("rejoined")
        self._is_lost = False

    def unknown(self, after: str) -> None:
        notice(f"{not_in_log(after)}; it begins again from the start")

    def hear(self, entry: Entry, event: Event | None, state: Snapshot) -> None:
        raise NotImplementedError

    def end(self, state: Snapshot) -> None:
        if ending := ending_of(state):
            notice(ending)


class PlainText(Piped):
    """The words as they are, byte for byte, and nothing else. What was written cannot be taken back.

    `has_earlier`: the reader has the beginning from elsewhere."""

    def __init__(self, generation_id: str, *, has_earlier: bool) -> None:
        super().__init__()
        self._generation_id = generation_id
        self._has_written = has_earlier

    def unknown(self, after: str) -> None:
        """Raises Void: what comes cannot be put behind what the reader has."""
        raise Void(
            f"{not_in_log(after)}, so nothing can follow it: the id is wrong, or what you have is void. "
            f"It begins again from the start: rejoin join {self._generation_id}"
        )

    def hear(self, entry: Entry, event: Event | None, state: Snapshot) -> None:
        """Raises Void when the answer starts over."""
        if isinstance(event, Started) and event.mode == "fresh" and self._has_written:
            raise Void(
                f"the worker was lost and the answer starts over (attempt {event.attempt}): what was written so far is "
                f"void. The new answer, from its start: rejoin join {self._generation_id}"
            )
        if isinstance(event, TextDelta) and event.text:
            self._has_written = True
            write(event.text.encode())

    def end(self, state: Snapshot) -> None:
        if state.refusal:
            notice(f"the model refuses: {state.refusal}")
        for line in (*calls_of(state), *sources_of(state)):
            notice(line)
        super().end(state)


class JsonLines(Piped):
    """Each event on a line of its own, with its id and its generation's."""

    def __init__(self, generation_id: str) -> None:
        super().__init__()
        self._head = b'{"generation_id":"%b","event_id":"' % generation_id.encode()

    def hear(self, entry: Entry, event: Event | None, state: Snapshot) -> None:
        data = _RAW_CONTROL.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), entry.data)
        write(self._head + entry.id + b'","event":' + data + b"}\n")


class Terminal:
    """Markdown as it grows. A block that is finished stays where it is; the last one is drawn again and again, with a
    line below it that says how it goes."""

    def __init__(self, generation_id: str, out: Console | None = None) -> None:
        self._generation_id = generation_id
        self._console = out or console()
        self._spinner = Spinner("dots")
        self._drawing: asyncio.Task[None] | None = None
        self._state = Snapshot()
        self._kind: type[Event] = TextDelta
        self._pending = ""  # what is drawn again and again
        self._has_printed = False
        self._begins_again = False  # which has been said
        self._pace = Pace()
        self._tokens = 0  # of this attempt: an event of output is mostly one
        self._trouble = ""
        self._notice = ""
        self._live = Live(
            console=self._console,
            get_renderable=self._frame,
            auto_refresh=False,
            transient=True,
            redirect_stderr=False,
        )

    async def __aenter__(self) -> Screen:
        self._live.start()
        self._drawing = asyncio.create_task(self._draw())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
            with suppress(asyncio.CancelledError):
                await self._drawing
        self._live.stop()
        self._settle(everything=True)

    def tell(self, text: str) -> None:
        self._notice = text

    def lost(self, why: str, pause_seconds: float) -> None:
        self._trouble = f"{why}; rejoining in {pause_seconds:.1f} s"
        self._pace = Pace()

    def back(self) -> None:
        self._trouble = ""
        self._pace = Pace()

    def unknown(self, after: str) -> None:
        self._rule(f"{not_in_log(after)}: the answer from its start")
        self._begins_again = True

    def hear(self, entry: Entry, event: Event | None, state: Snapshot) -> None:
        self._state, self._trouble = state, ""
        match event:
            case TextDelta() | ReasoningDelta() | RefusalDelta():
                self._say(type(event), event.text)
                self._tokens += 1
            case ToolCallDelta():
                self._tokens += 1
            case Started():
                self._start(event)

    def end(self, state: Snapshot) -> None:
        """What belongs below the answer: calls, sources, how it ended, what it took."""
        self._state = state
        self._live.stop()
        self._settle(everything=True)
        for line in (*calls_of(state), *sources_of(state)):
            self._print(Text(line, style="cyan"))
        if ending := ending_of(state):
            self._print(Text(visible(ending), style="red" if state.status == "failed" else "yellow"))
        figures = " · ".join(figures_of(state, self._tokens))
        self._print(Text("\n".join(filter(None, [figures, self._generation_id])), style="dim"))

    def _start(self, event: Started) -> None:
        if event.mode == "fresh":
            if (self._has_printed or self._pending) and not self._begins_again:
                self._rule(
                    f"attempt {event.attempt}: the worker was lost and the answer starts over; void is what is above"
                )
            self._pending, self._tokens, self._begins_again = "", 0, False
        self._pace = Pace()

    def _rule(self, title: str) -> None:
        self._settle(everything=True)
        self._print(Rule(Text(title, style="yellow"), style="yellow"))

    def _say(self, kind: type[Event], text: str) -> None:
        if kind is not self._kind:
            self._settle(everything=True)
            self._kind = kind
        self._pending += text

    async def _draw(self) -> None:
        """Ten times a second, less often where drawing takes long."""
        while True:
            began = time.monotonic()
            self._pace.add(self._tokens)
            self._settle()
            self._live.refresh()
            await asyncio.sleep(max(FRAME_SECONDS, 5 * (time.monotonic() - began)))

    def _settle(self, *, everything: bool = False) -> None:
        """Print for good what will not change any more: all blocks but the last one; of reasoning, paragraphs."""
        if self._kind is TextDelta:
            blocks = blocks_of(self._pending)
        else:
            end = self._pending.rfind("\n\n") + 1
            blocks = [self._pending[:end], self._pending[end:]]
        self._pending = "" if everything else blocks.pop()
        for block in blocks:
            if block.strip():
                self._print(self._drawn(block))

    def _print(self, drawn: RenderableType) -> None:
        if self._has_printed:
            self._console.print()
        self._console.print(Harmless(drawn))
        self._has_printed = True

    def _drawn(self, text: str) -> RenderableType:
        text = visible(text).strip("\n")
        if self._kind is ReasoningDelta:
            return Text(text, style="dim italic")
        return Text(text, style="yellow") if self._kind is RefusalDelta else Answer(text)

    def _frame(self) -> RenderableType:
        height = max(1, self._console.height - 5)
        parts: list[RenderableType] = [Text()] if self._has_printed else []
        if self._pending.strip():
            parts += [Harmless(self._drawn(self._pending), height), Text()]
        parts += [
            Text(line, style="dim cyan", no_wrap=True, overflow="ellipsis") for line in calls_of(self._state)[-3:]
        ]
        return Group(*parts, self._status())

    def _status(self) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        if said := self._trouble or self._notice:
            row.add_row(self._spinner, Text(visible(said), style="yellow", no_wrap=True, overflow="ellipsis"))
            return row
        words = figures_of(self._state, self._tokens)
        if self._state.status == "queued":
            words.append("waiting for a worker")
        elif self._state.first_token_at is None and not self._tokens:
            words.append("waiting for the first token")
        elif self._state.finished_at is None and (rate := self._pace.tokens_per_second):
            words.append(f"{rate:.1f} tokens/s")
        row.add_row(self._spinner, Text(" · ".join(words), style="dim", no_wrap=True, overflow="ellipsis"))
        row.add_row("", Text(self._generation_id, style="dim", no_wrap=True))
        return row


class Pace:
    """How many tokens come in a second, measured here over the last few. The burst that a rejoined stream begins with
    is no part of it."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._begins = time.monotonic() + 0.5

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if now >= self._begins:
            self._seen.append((now, tokens))
        while self._seen and self._seen[0][0] < now - PACE_SECONDS:
            self._seen.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """None before there is something to tell from."""
        if not self._seen or self._seen[-1][0] - self._seen[0][0] < 0.5:
            return None
        (began, before), (now, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (now - began)


class Answer(Markdown):
    """Markdown in which HTML is text: rich would leave it out. Links show where they lead."""

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup, self.parsed = text, MARKDOWN.parse(text)


@dataclass
class Harmless:
    """What is drawn, without a control character in its text: Markdown can spell them (`%1b` in a link). Without blank
    lines around it; with `most`, only its last lines: a block may be longer than the screen."""

    drawn: RenderableType
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.drawn, options.update(height=None), pad=False)
        filled = [n for n, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        shown = lines[filled[0] : filled[-1] + 1] if filled else []
        for line in shown[-self.most :] if self.most else shown:
            for segment in line:
                yield Segment(segment.text.translate(_VISIBLE), segment.style)
            yield Segment.line()


def blocks_of(text: str) -> list[str]:
    """Markdown cut into its top-level blocks; together they are the text."""
    tokens = [
        token for token in MARKDOWN.parse(text) if token.level == 0 and token.nesting >= 0 and token.map is not None
    ]
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)  # where Markdown sees lines end
    starts = [0, *(token.map[0] for token in tokens[1:] if token.map is not None), len(lines)]
    return ["".join(lines[start:end]) for start, end in pairwise(starts)]


def write(data: bytes) -> None:
    """To standard output, at once. Raises BrokenPipeError when nobody reads it any more."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def not_in_log(after: str) -> str:
    return f"event {visible(after)} is not in the log (any more)"


def calls_of(state: Snapshot) -> list[str]:
    return [visible(f"calls {call['name'] or '?'}({call['arguments']})") for call in state.tool_calls]


def sources_of(state: Snapshot) -> list[str]:
    found = enumerate(state.sources, 1)
    return [visible(f"[{n}] {source['title']}" + (f" {source['url']}" if source["url"] else "")) for n, source in found]


def ending_of(state: Snapshot) -> str:
    """How it ended, where that was not the end of the answer."""
    match state.status:
        case "failed" if state.error is not None:
            again = "; asking again may help" if state.error["retryable"] else ""
            return f"failed: {state.error['code']}: {state.error['message']}{again}"
        case "incomplete":
            return f"incomplete: {state.finish_reason}"
        case "cancelled":
            return "cancelled"
    return ""


def figures_of(state: Snapshot, tokens: int) -> list[str]:
    """Model, time to the first token, tokens, and, once it has ended, tokens per second; by the log's own times."""
    words = [visible(state.model)] if state.model else []
    if state.attempt > 1:
        words.append(f"attempt {state.attempt}")
    if state.first_token_at is not None and state.created_at is not None:
        words.append(f"first token {_seconds(state.first_token_at - state.created_at)}")
    counted = state.usage.output_tokens if state.usage else 0
    if counted or tokens:
        words.append(f"{counted} tokens" if counted else f"≈ {tokens} tokens")
    if state.finished_at is not None and state.first_token_at is not None and state.finished_at > state.first_token_at:
        took_ms = state.finished_at - state.first_token_at
        words += [f"{(counted or tokens) * 1000 / took_ms:.1f} tokens/s"] if counted or tokens else []
    return words


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.2f} s"
