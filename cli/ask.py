"""`rejoin ask`, `join`, `cancel`, `list`: one command each, from what was typed to an exit code.

The first Ctrl-C of `ask` cancels what it started and reads on to the end of that; the second leaves at once. A reader
that goes in any other way (its pipe closed, its terminal gone, Ctrl-C in `join`) cancels nothing.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from rich.table import Table
from rich.text import Text

from cli.client import EVENT_ID, Rejoin, Server
from cli.screens import JsonLines, PlainText, Screen, Terminal, Void, console, notice, visible, write
from shared.errors import BadRequest, CallerError, Gone, RejoinError, SettingsError
from shared.events import Snapshot, decode

COMPLETED, NO_ANSWER, WRONG, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
STYLES = {"completed": "green", "failed": "red", "incomplete": "yellow", "cancelled": "yellow", "in_progress": "cyan"}


def exit_code(error: RejoinError) -> int:
    """What a script is told of an error."""
    if isinstance(error, Gone | Void):
        return NO_ANSWER
    return WRONG if isinstance(error, CallerError | SettingsError) else UNREACHABLE


@dataclass(frozen=True)
class Question:
    """What `ask` was given; what is None is left to the server."""

    prompt: str
    model: str | None = None
    system: str | None = None
    on_disconnect: str | None = None

    def body(self) -> dict[str, Any]:
        """The body of `POST /v1/generations`."""
        said = {"model": self.model, "on_disconnect": self.on_disconnect}
        body: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        if self.system is None:
            return body | {"prompt": self.prompt}
        turns = [("system", self.system), ("user", self.prompt)]
        return body | {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompt_of(words: Sequence[str]) -> str:
    """The prompt as it was typed; `-`, or nothing at all in a pipe, stands for standard input. Raises BadRequest."""
    if not words and sys.stdin.isatty():
        raise BadRequest('say what to ask: rejoin ask "…", or cat FILE | rejoin ask')
    try:
        parts = [sys.stdin.buffer.read().decode() if word == "-" else word for word in words or ["-"]]
        prompt = ("\n\n" if "-" in words else " ").join(parts)
        prompt.encode()
    except UnicodeError:
        raise BadRequest("the prompt is not UTF-8") from None
    if not prompt.strip():
        raise BadRequest("the prompt is empty")
    return prompt


async def ask(question: Question, server: Server, *, detach: bool, as_json: bool) -> int:
    """Start a generation, and read it to its end unless told to leave at once."""
    async with Rejoin(server, _try_again) as rejoin:
        if detach:
            _print_started(await rejoin.start(question.body()), as_json)
            return COMPLETED
        with CtrlC() as ctrl_c:
            started = await rejoin.start(question.body())
            return await _read(rejoin, started["id"], None, as_json, ctrl_c)


async def join(generation_id: str, after: str | None, server: Server, *, as_json: bool) -> int:
    """Read a generation, from its start or behind an event, to its end. Raises BadRequest for what is no event id."""
    if after is not None and not EVENT_ID.fullmatch(after):
        raise BadRequest("--after: write the id of an event, like 1790000000000-7")
    async with Rejoin(server, _try_again) as rejoin:
        return await _read(rejoin, _checked(generation_id), after, as_json, None)


async def cancel(generation_id: str, server: Server, *, as_json: bool) -> int:
    """End a generation; one that has ended stays as it is."""
    async with Rejoin(server, _try_again) as rejoin:
        state = await rejoin.cancel(_checked(generation_id))
    if as_json:
        _print_json({name: value for name, value in state.items() if not name.endswith("_url")})  # one holds a token
    else:
        done = "cancelled" if state["status"] == "cancelled" else f"had ended before: {state['status']}"
        console().print(visible(f"{generation_id} {done}"), soft_wrap=True)
    return COMPLETED


async def list_own(limit: int, status: str | None, server: Server, *, as_json: bool) -> int:
    """One's own generations, newest first: a table, in a pipe lines of tab-separated fields."""
    async with Rejoin(server, _try_again) as rejoin:
        listing = await rejoin.listing(limit, status)
    if as_json:
        _print_json(listing)
    elif sys.stdout.isatty():
        console().print(_table(listing))
    else:
        rows = [[str(one[name]) for name in ("id", "status", "model")] + [_when(one)] for one in listing["data"]]
        write("".join("\t".join(row) + "\n" for row in rows).encode())
    return COMPLETED


class CtrlC:
    """While open, the first Ctrl-C sets `pressed`; the second is a KeyboardInterrupt, even in a blocked write."""

    def __init__(self) -> None:
        self.pressed = asyncio.Event()

    def __enter__(self) -> CtrlC:
        self._loop = asyncio.get_running_loop()
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # a shell's background job is to stay deaf
            signal.signal(signal.SIGINT, lambda number, frame: self._press())
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._loop.call_soon_threadsafe(self.pressed.set)


async def _read(rejoin: Rejoin, generation_id: str, after: str | None, as_json: bool, ctrl_c: CtrlC | None) -> int:
    """Show a generation to its end; the exit code of how that was."""
    is_pressed, state = False, Snapshot()
    try:
        async with _screen(generation_id, after, as_json) as screen:
            rejoin.on_lost, rejoin.on_back, rejoin.on_unknown = screen.lost, screen.back, screen.unknown
            cancelling = asyncio.create_task(_cancel_when_pressed(ctrl_c, rejoin, generation_id, screen))
            try:
                await _hear(rejoin, generation_id, after, screen, state)
            finally:
                cancelling.cancel()
                is_pressed = ctrl_c is not None and ctrl_c.pressed.is_set()
            screen.end(state)
    except (asyncio.CancelledError, KeyboardInterrupt):
        last = state.last_event_id or after
        go_on = f"join {generation_id}" + (f" --after {last}" if last else "")
        cancel = f"cancel {generation_id}, if it still runs"
        left = f"whether it was cancelled is not known: rejoin {cancel}" if is_pressed else f"to go on: rejoin {go_on}"
        notice(f"left; {left}")
        raise
    if state.status == "cancelled" and is_pressed:
        return INTERRUPTED
    return COMPLETED if state.status == "completed" else NO_ANSWER


async def _hear(rejoin: Rejoin, generation_id: str, after: str | None, screen: Screen, state: Snapshot) -> None:
    """Fold what comes into `state`, and show it."""
    async with aclosing(rejoin.follow(generation_id, after)) as entries:
        async for entry in entries:
            state.add(entry)
            screen.hear(entry, decode(entry.data), state)
    if state.last_event_id is None:  # what we came with was its last event
        state.status = (await rejoin.snapshot(generation_id))["status"]
        screen.tell(f"nothing follows that event; the generation is {state.status}")


async def _cancel_when_pressed(ctrl_c: CtrlC | None, rejoin: Rejoin, generation_id: str, screen: Screen) -> None:
    if ctrl_c is None:
        return
    await ctrl_c.pressed.wait()
    screen.tell("cancelling; Ctrl-C again leaves at once")
    try:
        await rejoin.cancel(generation_id)
    except RejoinError as error:
        screen.tell(f"not cancelled: {error.message}")


def _try_again(why: str, pause_seconds: float) -> None:
    notice(f"{why}; trying again")


def _screen(generation_id: str, after: str | None, as_json: bool) -> Screen:
    if as_json:
        return JsonLines(generation_id)
    if sys.stdout.isatty():
        return Terminal(generation_id)
    return PlainText(generation_id, has_earlier=after is not None and not after.startswith("0-"))


def _checked(generation_id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", generation_id):
        raise BadRequest("a generation's id has 32 hexadecimal digits; `rejoin list` shows yours")
    return generation_id


def _print_started(started: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(started)
    else:
        write(visible(started["id"]).encode() + b"\n")


def _print_json(body: dict[str, Any]) -> None:
    write(orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE))


def _table(listing: dict[str, Any]) -> Table:
    more = "there are more: --limit" if listing["has_more"] else None
    table = Table("id", "status", "model", "created", box=None, header_style="bold", caption=more)
    for one in listing["data"]:
        cells = [Text(visible(str(one[name]))) for name in ("id", "status", "model")]
        cells[1].stylize(STYLES.get(one["status"], ""))
        table.add_row(*cells, Text(_when(one)))
    return table


def _when(one: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["created_at"]))
