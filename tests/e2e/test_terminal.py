"""The commands in the terminal, as processes of their own: on a pseudo-terminal as a person has them, and in pipes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.__main__ import parser
from cli.addresses import Addresses
from cli.screens import blocks_of, visible
from shared.event_log import Append, EventLog, Hint, new_id
from shared.events import Completed, SourceAdded, TextDelta, encode
from shared.prompt import Prompt
from tests.conftest import RejoinUp
from tests.processes import ROOT, free_port
from tests.proxy import Proxy
from tests.reader import Reader
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

ID = re.compile(r"[0-9a-f]{32}")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and the cursor: all that we write ourselves
PACED = Script(count=60, pace_seconds=0.03)
COLUMNS = 110


class Run:
    """A `rejoin` command that runs: what it has said so far, and its keyboard."""

    def __init__(self, folder: Path, arguments: Sequence[str], env: dict[str, str], stdin: int, stdout: int) -> None:
        bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments],
            cwd=folder,
            env={**bare, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8", **env},
            stdin=stdin,
            stdout=stdout,
            stderr=stdout if stdin == stdout else subprocess.PIPE,
            preexec_fn=_take_terminal if stdin == stdout else None,
        )
        self.out, self.err = b"", b""
        self._open: dict[str, int] = {}

    def listen(self, fd: int, name: str) -> None:
        """Gather what comes out of `fd` in `self.out` or `self.err`."""
        self._open[name] = fd
        asyncio.get_running_loop().add_reader(fd, self._hear, fd, name)

    def _hear(self, fd: int, name: str) -> None:
        try:
            data = os.read(fd, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # how a terminal says that nobody has it any more
            data = b""
        setattr(self, name, getattr(self, name) + data)
        if not data:
            self.hang_up(name)

    def hang_up(self, name: str) -> None:
        """Close our end."""
        fd = self._open.pop(name)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    @property
    def text(self) -> str:
        """What it wrote to standard output; of a terminal without escape sequences, each state of it."""
        return ESCAPES.sub("", self.out.decode()).replace("\r\n", "\n")

    @property
    def errors(self) -> str:
        return self.err.decode()

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    async def shows(self, pattern: str, timeout: float = 20) -> str:
        """Wait until what it said matches."""

        def look() -> str | None:
            found = re.search(pattern, self.text + self.errors)
            assert found or self._open, f"it ended before it showed {pattern!r}:\n{self.text}\n{self.errors}"
            return found[0] if found else None

        return str(await wait_until(look, timeout))

    async def ends(self, timeout: float = 30) -> int:
        """Its exit code, once it has ended and all was heard."""
        await wait_until(lambda: self.popen.poll() is not None and not self._open, timeout)
        assert "Traceback" not in self.text + self.errors
        return self.popen.returncode

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for name in tuple(self._open):
            self.hang_up(name)


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Shell:
    """Runs commands against one Rejoin, each in a folder without a `.env`."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.env = {"REJOIN_URL": url}
        self.runs: list[Run] = []

    def piped(self, *arguments: str, stdin: bytes | None = None, **env: str) -> Run:
        """With its output in pipes; standard input is a pipe with `stdin`, or empty."""
        source, sink = os.pipe()
        os.write(sink, stdin or b"")
        os.close(sink)
        out, out_end = os.pipe()
        run = Run(self.folder, arguments, {**self.env, **env}, source, out_end)
        os.close(source)
        os.close(out_end)
        assert run.popen.stderr is not None
        run.listen(out, "out")
        run.listen(os.dup(run.popen.stderr.fileno()), "err")
        run.popen.stderr.close()
        self.runs.append(run)
        return run

    def typed(self, *arguments: str, columns: int = COLUMNS, **env: str) -> tuple[Run, int]:
        """On a terminal of its own; what is written to the given descriptor is typed."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        run = Run(self.folder, arguments, {**self.env, **env}, theirs, theirs)
        os.close(theirs)
        run.listen(ours, "out")
        self.runs.append(run)
        return run, ours


@pytest.fixture
async def shell_of(tmp_path: Path) -> AsyncIterator[Callable[[str], Shell]]:
    """A shell whose commands speak to the Rejoin at a URL; what still runs in it at the end is ended."""
    shells: list[Shell] = []

    def open_one(url: str) -> Shell:
        shells.append(Shell(tmp_path, url))
        return shells[-1]

    yield open_one
    for run in (run for shell in shells for run in shell.runs):
        run.end()


@pytest.fixture
def shell(house: Stack, shell_of: Callable[[str], Shell]) -> Shell:
    return shell_of(house.apis[0].url)


@pytest.fixture
def model(upstream: Upstream) -> str:
    """A model's name of this test's own."""
    return f"terminal-{uuid.uuid4().hex[:8]}"


async def newest(house: Stack, model: str) -> dict[str, Any]:
    """The generation of a model that was asked once."""

    async def look() -> dict[str, Any] | None:
        listing = (await house.http.get(house.apis[0].url + "/v1/generations?limit=100")).json()["data"]
        return next((one for one in listing if one["model"] == model), None)

    return await wait_until(look)


CTRL_C = b"\x03"


# ---- ask: the answer ----


async def test_a_pipe_gets_the_words_and_nothing_else(shell: Shell, upstream: Upstream, model: str) -> None:
    """Standard output is the answer byte for byte, control characters and all, without a line break of ours."""
    upstream.script(model, Script(count=60, reasoning=["hm"]))
    run = shell.piped("ask", "hello", "--model", model)
    assert await run.ends() == 0
    assert run.out.decode() == Script(count=60).text("hello")
    assert run.errors == ""


async def test_a_terminal_gets_markdown_and_how_it_went(shell: Shell, upstream: Upstream, model: str) -> None:
    """Markdown is drawn, reasoning is dim, and a line says model, time to the first token, tokens and their rate."""
    upstream.script(
        model,
        Script(
            chunks=["## Head\n\n", "some **bold** ", "and <b>html</b>\n\n- one\n", "- two"],
            reasoning=["let me ", "think"],
            pace_seconds=0.05,
        ),
    )
    run, _ = shell.typed("ask", "hello", "--model", model)
    assert await run.ends() == 0
    assert "**" not in run.text and "##" not in run.text
    assert "some bold and <b>html</b>" in run.text and " • two" in run.text
    assert re.search(r"\x1b\[2;3m *let me think", run.out.decode())
    figures = rf"{model} · first token \d\.\d\d s · [\d≈ ]+ tokens · [\d.]+ tokens/s *\n[0-9a-f]{{32}} *\n$"
    assert re.search(figures, run.text)


async def test_a_narrow_terminal_shows_the_id_whole(shell: Shell, house: Stack, upstream: Upstream) -> None:
    """At 80 columns too, while it runs and at the end: it is what `join` wants to be given."""
    model = f"terminal-{'long-name-' * 6}{uuid.uuid4().hex[:8]}"
    upstream.script(model, Script(chunks=["so ", "far"], stall_at=1))
    run, _ = shell.typed("ask", "hello", "--model", model, columns=80)
    await run.shows("so")
    generation_id = (await newest(house, model))["id"]
    await run.shows(rf"\n\W*{generation_id}")
    upstream.release(model)
    assert await run.ends() == 0
    assert re.search(rf"\n{generation_id}\n$", run.text)


async def test_tool_calls_are_shown(shell: Shell, upstream: Upstream, model: str) -> None:
    """A terminal shows a call below the answer; a pipe gets it on standard error."""
    call = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}
    ]
    upstream.script(model, Script(chunks=["so "], tool_calls=call, finish_reason="tool_calls"))
    typed, _ = shell.typed("ask", "hello", "--model", model)
    piped = shell.piped("ask", "hello", "--model", model)
    assert (await typed.ends(), await piped.ends()) == (0, 0)
    assert 'calls weather({"city":"Bern"})' in typed.text
    assert piped.out == b"so " and piped.errors == 'rejoin: calls weather({"city":"Bern"})\n'


async def test_sources_are_shown(stack: Stack, event_log: EventLog, shell_of: Callable[[str], Shell]) -> None:
    """Numbered, with title and address, below the answer; a pipe gets them on standard error."""
    await stack.api()
    generation_id, prompt = new_id(), Prompt(model="m", messages=[{"role": "user", "content": "hello"}])
    await event_log.create(generation_id, tenant="local", provider="demo", prompt=prompt)
    claim = await event_log.claim(Hint(generation_id, 0, 1), "nonce")
    assert claim is not None
    said = [SourceAdded("s1", "The \x1b[31mbook", "http://h/book"), TextDelta("so"), Completed("stop")]
    await event_log.append([Append(generation_id, claim.epoch, 1, [encode(one) for one in said], "completed")])
    shell = shell_of(stack.apis[0].url)
    typed, _ = shell.typed("join", generation_id)
    piped = shell.piped("join", generation_id)
    assert (await typed.ends(), await piped.ends()) == (0, 0)
    assert re.search(r"so *\n\n\[1\] The ␛\[31mbook http://h/book", typed.text)
    assert piped.out == b"so" and piped.errors == "rejoin: [1] The ␛[31mbook http://h/book\n"


async def test_json_gives_each_event_on_a_line(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """Each line has the event as it is in the log, its id, and its generation's."""
    upstream.script(model, Script(count=30))
    run = shell.piped("ask", "hello", "--model", model, "--json")
    assert await run.ends() == 0
    generation_id = (await newest(house, model))["id"]
    reader = await Reader(f"{house.apis[0].url}/v1/generations/{generation_id}/events").read_to_end()
    expected = [{"generation_id": generation_id, "event_id": b.id, "event": b.data} for b in reader.blocks]
    assert run.lines == expected


NASTY = ["\x1b]0;title\x07 ", "\x1b[31mred ", "\u009b32m ", "<http://h/%1b[33m> ", "a\rb \x7f", "[x](http://h/%07)"]


async def test_a_model_cannot_steer_the_terminal(shell: Shell, upstream: Upstream, model: str) -> None:
    """Escape sequences, C1 controls and what Markdown spells of them are shown as harmless characters."""
    upstream.script(model, Script(chunks=NASTY, reasoning=["\x1b[5m"]))
    run, _ = shell.typed("ask", "hello", "--model", model)
    assert await run.ends() == 0
    said = OURS.sub("", run.out.decode())
    assert "␛[31mred" in said and "␛]0;title␇" in said and "http://h/␛[33m" in said
    assert not set(said) & {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} - set("\r\n")
    assert not re.search("\x1b\\[[0-9;]*(?:31|32|5)m", re.sub(r"\x1b\[33m[^\x1b]*", "", run.out.decode()))
    piped = shell.piped("ask", "hello", "--model", model)
    assert await piped.ends() == 0
    assert piped.out.decode() == "".join(NASTY)


@pytest.mark.parametrize("how", ["dash", "nothing", "system"])
async def test_where_the_prompt_comes_from(shell: Shell, upstream: Upstream, model: str, how: str) -> None:
    """`-` and a pipe stand for standard input; `--system` comes before the prompt."""
    upstream.script(model, Script(count=1))
    arguments = {"dash": ["Sum up:", "-"], "nothing": [], "system": ["a b", "--system", "Be brief"]}[how]
    run = shell.piped("ask", *arguments, "--model", model, stdin="ein Töpfchen".encode())
    assert await run.ends() == 0
    expected = {
        "dash": [("user", "Sum up:\n\nein Töpfchen")],
        "nothing": [("user", "ein Töpfchen")],
        "system": [("system", "Be brief"), ("user", "a b")],
    }[how]
    asked = upstream.requests_of(model)[-1].body["messages"]
    assert [(one["role"], one["content"]) for one in asked] == expected


# ---- ask: connections ----


async def test_a_lost_connection_is_rejoined(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """Cut twice, the answer is whole, each word once; standard error says what went on."""
    upstream.script(model, PACED)
    async with Proxy(house.apis[0].port) as proxy:
        run = shell.piped("ask", "hello", "--model", model, "--url", f"http://127.0.0.1:{proxy.port}")
        for _ in range(2):
            heard = len(run.out)
            await wait_until(lambda heard=heard: len(run.out) > heard + 20)
            assert proxy.cut()
        assert await run.ends() == 0
    assert run.out.decode() == PACED.text("hello")
    assert re.fullmatch(r"(rejoin: [^\n]+; rejoining\nrejoin: rejoined\n){2}", run.errors), run.errors


async def test_a_terminal_shows_that_it_rejoins(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """While the connection is away the last line says so; then the answer goes on where it was."""
    upstream.script(model, Script(chunks=[f"w{n} " for n in range(60)], pace_seconds=0.03))
    async with Proxy(house.apis[0].port) as proxy:
        run, _ = shell.typed("ask", "hello", "--model", model, "--url", f"http://127.0.0.1:{proxy.port}")
        await run.shows("w9 ")
        assert proxy.cut()
        await run.shows(r"rejoining in \d\.\d s")
        assert await run.ends() == 0
    shown = re.findall(r"w\d+", run.text[run.text.rindex("w0 ") :])
    assert shown == [f"w{n}" for n in range(60)]
    assert "starts over" not in run.text


async def test_a_connection_that_holds_is_one_though_it_says_nothing(
    shell: Shell, house: Stack, upstream: Upstream, model: str
) -> None:
    """Rejoined while the model is silent, it does not go on saying that it rejoins."""
    upstream.script(model, Script(chunks=["so ", "far"], stall_at=1))
    async with Proxy(house.apis[0].port) as proxy:
        run = shell.piped("ask", "hello", "--model", model, "--url", f"http://127.0.0.1:{proxy.port}")
        await run.shows("so ")
        proxy.cut()
        await run.shows("rejoin: rejoined")
        assert run.out == b"so "
        upstream.release(model)
        assert await run.ends() == 0
    assert run.out == b"so far"


async def test_a_server_that_says_come_back_is_no_connection(shell: Shell) -> None:
    """Answers of `retry:` alone, as an overloaded server gives them, are waited for and then given up."""
    generation_id, asked = "0" * 32, 0

    async def come_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\nretry: 200\n\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(come_back, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        run = shell.piped("join", generation_id, "--url", url, "--patience", "2")
        assert await run.ends() == 3
    assert 3 <= asked <= 20
    assert run.errors.count("rejoining") == 1 and "rejoined" not in run.errors
    assert run.errors.endswith(f"rejoin join {generation_id}\n")


async def test_it_gives_up_and_says_how_to_go_on(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """After its patience: exit code 3 and a command; what that prints is exactly the rest."""
    upstream.script(model, PACED)
    async with Proxy(house.apis[0].port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        run = shell.piped("ask", "hello", "--model", model, "--url", url, "--patience", "1")
        await wait_until(lambda: len(run.out) > 20)
        proxy.freeze("up")
        proxy.cut()
        assert await run.ends() == 3
    command = re.search(r"may go on at the server: rejoin (join [0-9a-f]{32} --after \d+-\d+)\n$", run.errors)
    assert command is not None, run.errors
    rest = shell.piped(*command[1].split())
    assert await rest.ends() == 0
    assert (run.out + rest.out).decode() == PACED.text("hello")


async def test_an_answer_that_starts_over_ends_a_pipe_and_begins_again_on_a_screen(
    stack: Stack, upstream: Upstream, model: str, shell_of: Callable[[str], Shell]
) -> None:
    """Bytes in a pipe cannot be taken back: exit code 1 and the command for the new answer. A screen says so, and
    shows the new one below; `join` gives only that."""
    upstream.script(model, Script(chunks=["old ", "words "], stall_at=2), Script(chunks=["new ", "words"]))
    await stack.api()
    victim = await stack.worker(REJOIN_LEASE_SECONDS="0.5")
    shell = shell_of(stack.apis[0].url)
    piped = shell.piped("ask", "hello", "--model", model)
    await piped.shows("old words ")
    generation_id = (await newest(stack, model))["id"]
    typed, _ = shell.typed("join", generation_id)
    await typed.shows("old words")
    lines = shell.piped("join", generation_id, "--json")
    await wait_until(lambda: b"words" in lines.out)
    await victim.kill()
    await stack.worker(REJOIN_LEASE_SECONDS="0.5")
    assert (await piped.ends(), await typed.ends(), await lines.ends()) == (1, 0, 0)
    assert piped.out == b"old words " and f"rejoin join {generation_id}\n" in piped.errors
    assert re.search(r"old words(?s:.)*attempt 2: the worker was lost(?s:.)*new words\s", typed.text)
    assert [one["event"]["type"] for one in lines.lines].count("generation.started") == 2
    again = shell.piped("join", generation_id)
    assert await again.ends() == 0 and again.out == b"new words"


# ---- Leaving ----


@pytest.mark.parametrize("way", ["terminal", "pipe"])
async def test_ctrl_c_cancels(shell: Shell, house: Stack, upstream: Upstream, model: str, way: str) -> None:
    """The generation ends, the model's server is left, what was said stays; exit code 130."""
    upstream.script(model, Script(chunks=["so ", "far "], stall_at=2))
    if way == "terminal":
        run, keys = shell.typed("ask", "hello", "--model", model)
        await run.shows("so far")
        os.write(keys, CTRL_C)
    else:
        run = shell.piped("ask", "hello", "--model", model)
        await run.shows("so far")
        run.popen.send_signal(signal.SIGINT)
    assert await run.ends() == 130
    state = await house.snapshot((await newest(house, model))["id"])
    assert (state["status"], state["text"]) == ("cancelled", "so far ")
    await upstream.wait_closed(model)
    if way == "terminal":
        assert re.search(r"so far\s+cancelled\n", run.text)
    else:
        assert run.out == b"so far " and run.errors.endswith("rejoin: cancelled\n")


async def test_a_second_ctrl_c_leaves_at_once(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """When the cancel cannot arrive, nobody has to wait for it; what to do is said."""
    upstream.script(model, Script(chunks=["so ", "far "], stall_at=2))
    async with Proxy(house.apis[0].port) as proxy:
        run, keys = shell.typed("ask", "hello", "--model", model, "--url", f"http://127.0.0.1:{proxy.port}")
        await run.shows("so far")
        proxy.freeze("up")
        os.write(keys, CTRL_C)
        await run.shows("cancelling; Ctrl-C again leaves at once")
        os.write(keys, CTRL_C)
        assert await run.ends(timeout=10) == 130
        generation = await newest(house, model)
        assert f"rejoin cancel {generation['id']}" in run.text
        assert (
            run.out.rstrip().endswith(b"still runs") and run.out.count(b"\x1b[?25h") == run.out.count(b"\x1b[?25l") > 0
        )
    await house.cancel({"cancel_url": f"/v1/generations/{generation['id']}/cancel"})


async def test_leaving_a_join_cancels_nothing(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """`ask --detach` prints the id; Ctrl-C in `join` leaves, and the answer goes on to its end."""
    upstream.script(model, Script(chunks=["so ", "far ", "and on"], stall_at=2))
    started = shell.piped("ask", "hello", "--model", model, "--detach")
    assert await started.ends() == 0
    generation_id = started.text.removesuffix("\n")
    assert ID.fullmatch(generation_id)
    run, keys = shell.typed("join", generation_id)
    await run.shows("so far")
    os.write(keys, CTRL_C)
    assert await run.ends() == 130
    command = re.search(rf"rejoin (join {generation_id} --after \d+-\d+)\n$", run.text)
    assert command is not None, run.text
    rest = shell.piped(*command[1].split())
    upstream.release(model)
    assert (await house.finished(generation_id))["text"] == "so far and on"
    assert await rest.ends() == 0 and rest.out == b"and on"


@pytest.mark.parametrize("policy", ["continue", "cancel"])
async def test_a_closed_pipe_ends_quietly(
    stack: Stack, upstream: Upstream, model: str, shell_of: Callable[[str], Shell], policy: str
) -> None:
    """`| head -1` has what it wanted: exit code 0, not a word, and the answer goes on unless it was told not to."""
    upstream.script(model, Script(chunks=["one\n", *["more\n"] * 100], pace_seconds=0.03, stall_at=100))
    await stack.api(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    await stack.worker(REJOIN_DISCONNECT_GRACE_SECONDS="0.5")
    shell = shell_of(stack.apis[0].url)
    run = shell.piped("ask", "hello", "--model", model, "--on-disconnect", policy)
    await run.shows("one\n")
    run.hang_up("out")
    assert await run.ends() == 0
    assert run.errors == ""
    generation_id = (await newest(stack, model))["id"]
    if policy == "continue":
        await upstream.wait_sent(model, 100)
        assert (await stack.snapshot(generation_id))["status"] == "in_progress"
        upstream.release(model)
    ended = await stack.finished(generation_id)
    assert ended["status"] == {"continue": "completed", "cancel": "cancelled"}[policy]


# ---- How it ended ----


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (Script(chunks=["a"], finish_reason="length"), "incomplete: length"),
        (Script(status=400, body=b"no"), "failed: upstream_rejected: "),
    ],
    ids=["incomplete", "failed"],
)
async def test_what_is_no_whole_answer_is_exit_code_1(
    shell: Shell, upstream: Upstream, model: str, script: Script, says: str
) -> None:
    """In a pipe and on a terminal, with the reason."""
    upstream.script(model, script)
    piped = shell.piped("ask", "hello", "--model", model)
    typed, _ = shell.typed("ask", "hello", "--model", model)
    assert (await piped.ends(), await typed.ends()) == (1, 1)
    assert f"rejoin: {says}" in piped.errors and says in typed.text


WRONG = [
    (["ask", "x", "--url", "ftp://127.0.0.1"], 2, "'ftp://127.0.0.1' is no address of a server"),
    (
        ["ask", "x", "--url", "localhost:8000"],
        2,
        "'localhost:8000' is no address of a server; write one like http://localhost:8000",
    ),
    (["ask", "x", "--url", "a b"], 2, "write one like http://127.0.0.1:8000"),
    (["ask", "x", "--url", "http://127.0.0.1:99999"], 2, "write one like http://127.0.0.1:8000"),
    (["list", "--url", "http://127.0.0.1:8000/v1/"], 2, "leave out /v1"),
    (["list", "--limit", "x"], 2, "'x': write a whole number, at least 1"),
    (["ask", "x", "--bogus"], 2, "rejoin ask: error: unrecognized arguments: --bogus"),
    (["ask", "x", "--url", "http://user:pass-word@127.0.0.1"], 2, "a key goes to REJOIN_API_KEY"),
    (["ask", "x", "--model", "m" * 300], 2, "model: "),
    (["ask", "x", "--patience", "soon"], 2, "--patience"),
    (["ask"], 2, "the prompt is empty"),
    (["ask", "-"], 2, "the prompt is empty"),
    (["join", "../healthz"], 2, "32 hexadecimal digits"),
    (["join", "0" * 32], 2, "no generation"),
    (["join", "0" * 32, "--after", "x"], 2, "--after"),
    (["cancel", "0" * 32], 2, "no generation"),
    (["list", "--status", "lost"], 2, "--status"),
    (["list", "--limit", "0"], 2, "--limit"),
]


async def test_a_prompt_that_is_no_text_is_refused(shell: Shell) -> None:
    """Standard input has to be UTF-8."""
    run = shell.piped("ask", stdin=b"\xff\xfe")
    assert await run.ends() == 2 and run.errors == "rejoin: the prompt is not UTF-8\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
async def test_what_is_wrong_is_said_in_one_line(shell: Shell, arguments: list[str], code: int, says: str) -> None:
    """Exit code 2, nothing on standard output, the last line says what to do."""
    run = shell.piped(*arguments)
    assert await run.ends() == code
    assert run.out == b"" and says in run.errors.splitlines()[-1] and "pass-word" not in run.errors


async def test_a_server_that_is_not_there_is_exit_code_3(shell: Shell) -> None:
    """At once, and with the settings to look at; a server that is no Rejoin is a wrong address."""
    for command in (["ask", "x"], ["join", "0" * 32], ["list"]):
        run = shell.piped(*command, "--url", f"http://127.0.0.1:{free_port()}")
        assert await run.ends(timeout=15) == 3
        assert "cannot reach" in run.errors and "REJOIN_URL" in run.errors and run.errors.count("\n") == 1


STRANGERS = {
    "another API": b'HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n{"detail":"Not Found"}',
    "another answer": b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"hello":"you"}',
    "a page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p>\n",
    "no HTTP": b"-ERR unknown command\r\n\r\n",
}


@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS)
async def test_a_server_that_is_no_rejoin_is_a_wrong_address(shell: Shell, answer: bytes) -> None:
    """Whatever it answers: exit code 2, its address, and the settings to look at."""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()  # closed before the whole request was read, the answer could be lost
        writer.close()

    async with await asyncio.start_server(stranger, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for command in (["ask", "x"], ["join", "0" * 32], ["list"]):
            run = shell.piped(*command, "--url", url)
            assert await run.ends(timeout=15) == 2, run.errors
            assert f"{url} answered" in run.errors and "is that a Rejoin?" in run.errors and "--url" in run.errors


async def test_the_rejoin_of_this_folder_is_found(rejoin_up: RejoinUp, shell_of: Callable[[str], Shell]) -> None:
    """Without an address the `rejoin up` of the folder is asked, as long as it runs; what a killed one left is not."""
    shell = shell_of("")  # an empty REJOIN_URL is none
    found = shell.folder / ".rejoin"
    found.symlink_to(rejoin_up.data)
    started = shell.piped("ask", "hello", "--detach")
    assert await started.ends() == 0 and ID.fullmatch(started.text.strip())
    elsewhere = shell.piped("list", REJOIN_URL=f"http://127.0.0.1:{free_port()}")
    assert await elsewhere.ends() == 3 and "cannot reach" in elsewhere.errors
    found.unlink()
    found.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):  # one that has ended; one that is something else by now
        (found / "lock").write_text(f"{pid}\n")
        (found / "addresses.json").write_text((rejoin_up.data / "addresses.json").read_text())
        stale = Addresses.read(found)
        assert stale is None, f"believed, though {pid} is no `rejoin up`"
    assert Addresses.read(rejoin_up.data) == Addresses(rejoin_up.url, f"unix://{rejoin_up.data}/valkey.sock")


async def test_a_key_is_read_from_the_environment_and_shown_to_nobody(
    stack: Stack, upstream: Upstream, model: str, shell_of: Callable[[str], Shell]
) -> None:
    """A wrong one is exit code 2 and names the variable."""
    upstream.script(model, Script(count=3))
    key = "the-key-of-this-test"
    digest = hashlib.sha256(key.encode()).hexdigest()
    await stack.api(REJOIN_API_KEYS=f"me:{digest}", REJOIN_SECRET="s" * 32)
    await stack.worker()
    shell = shell_of(stack.apis[0].url)
    right = shell.piped("ask", "hello", "--model", model, REJOIN_API_KEY=key)
    wrong = shell.piped("ask", "hello", "--model", model, REJOIN_API_KEY="another-key")
    missing = shell.piped("list")
    assert await right.ends() == 0 and right.out.decode() == Script(count=3).text("hello")
    assert (await wrong.ends(), await missing.ends()) == (2, 2)
    for run, says in ((wrong, "does not know the key that was sent"), (missing, "none was sent")):
        assert says in run.errors and "set REJOIN_API_KEY to a key of that server" in run.errors
        assert "another-key" not in run.errors
    spaced = shell.piped("list", REJOIN_API_KEY="a key")
    assert await spaced.ends() == 2 and "a key has" in spaced.errors


# ---- join, cancel, list ----


async def test_join_reads_from_the_start_or_after_an_event(
    shell: Shell, house: Stack, upstream: Upstream, model: str
) -> None:
    """Whole without `--after`; with it exactly the rest; at the end nothing, and how it ended."""
    upstream.script(model, Script(count=40))
    generation = await house.create(model)
    reader = await house.reader(generation).read_to_end()
    whole = shell.piped("join", generation["id"])
    middle = reader.blocks[20]
    assert middle.event == "text.delta"
    rest = shell.piped("join", generation["id"], "--after", middle.id)
    nothing = shell.piped("join", generation["id"], "--after", reader.last_event_id)
    assert (await whole.ends(), await rest.ends(), await nothing.ends()) == (0, 0, 0)
    assert whole.out.decode() == reader.text
    following = "".join(block.data["text"] for block in reader.blocks[21:] if block.event == "text.delta")
    assert following and rest.out.decode() == following
    assert nothing.out == b"" and "completed" in nothing.errors


async def test_join_after_an_event_that_is_none_says_so(
    shell: Shell, house: Stack, upstream: Upstream, model: str
) -> None:
    """A wrong id is not taken for a lost worker. Behind what a pipe has the whole answer cannot be put: exit code 1."""
    upstream.script(model, Script(count=5))
    generation = await house.create(model)
    await house.finished(generation)
    wrong = ["join", generation["id"], "--after", "1-1"]
    piped, as_json, (typed, _) = shell.piped(*wrong), shell.piped(*wrong, "--json"), shell.typed(*wrong)
    assert (await piped.ends(), await as_json.ends(), await typed.ends()) == (1, 0, 0)
    assert piped.out == b"" and piped.errors.endswith(f"rejoin join {generation['id']}\n")
    assert as_json.errors == "rejoin: event 1-1 is not in the log (any more); it begins again from the start\n"
    text = "".join(one["event"].get("text", "") for one in as_json.lines if one["event"]["type"] == "text.delta")
    assert text == Script(count=5).text("hello")
    for run in (piped, typed):
        said = run.text + run.errors
        assert "event 1-1 is not in the log (any more)" in said and "worker was lost" not in said


async def test_detach_with_json_prints_what_the_api_answered(shell: Shell, upstream: Upstream, model: str) -> None:
    """All of it: the addresses to read and to cancel it are in it."""
    upstream.script(model, Script(count=1))
    run = shell.piped("ask", "hello", "--model", model, "--detach", "--json")
    assert await run.ends() == 0
    (answer,) = run.lines
    assert {"id", "status", "model", "created_at", "events_url", "cancel_url"} <= answer.keys()
    assert answer["id"] in answer["events_url"] and answer["id"] in answer["cancel_url"]


async def test_cancel_ends_a_generation_and_is_harmless_after_it(
    shell: Shell, house: Stack, upstream: Upstream, model: str
) -> None:
    """Twice the same; of one that has ended it says how. `--json` is the snapshot, without the token of its URLs."""
    upstream.script(model, Script(stall_at=1))
    running, done = await house.create(model), await house.create("words-of-cancel")
    await house.finished(done)
    for _ in range(2):
        run = shell.piped("cancel", running["id"])
        assert await run.ends() == 0 and run.text == f"{running['id']} cancelled\n"
    run = shell.piped("cancel", done["id"])
    assert await run.ends() == 0 and run.text == f"{done['id']} had ended before: completed\n"
    run = shell.piped("cancel", running["id"], "--json")
    assert await run.ends() == 0
    expected = {name: value for name, value in (await house.snapshot(running)).items() if not name.endswith("_url")}
    assert run.lines == [expected] and b"token=" not in run.out


async def test_list_shows_ones_own(shell: Shell, house: Stack, upstream: Upstream, model: str) -> None:
    """Newest first: tab-separated in a pipe, a table on a terminal, JSON when asked for; by status, and so many."""
    upstream.script(model, Script(finish_reason="length"))
    made = [await house.create(model) for _ in range(3)]
    for one in made:
        await house.finished(one)
    piped = shell.piped("list", "--status", "incomplete", "--limit", "2")
    typed, _ = shell.typed("list", "--limit", "2")
    as_json = shell.piped("list", "--json", "--limit", "101")
    assert (await piped.ends(), await typed.ends(), await as_json.ends()) == (0, 0, 0)
    rows = [line.split("\t") for line in piped.text.splitlines()]
    assert [row[:3] for row in rows] == [[one["id"], "incomplete", model] for one in (made[2], made[1])]
    assert re.search(rf"id +status +model +created *\n *{made[2]['id']} +incomplete +{model}", typed.text)
    (listing,) = as_json.lines
    assert [one["id"] for one in listing["data"][:3]] == [one["id"] for one in reversed(made)]


# ---- top ----


async def test_top_tells_what_runs_and_not_what_is_said(
    stack: Stack, upstream: Upstream, model: str, shell_of: Callable[[str], Shell]
) -> None:
    """Queue, workers, generations with their pace, the store and the api; no prompt, no answer. It writes nothing."""
    upstream.script(model, Script(chunks=["answerword "] * 500, pace_seconds=0.02))
    api = await stack.api()
    await stack.worker()
    generation = await stack.create(model, "promptword", metadata={"name": "metaword"})
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end())
    await wait_until(lambda: len(reader.blocks) > 5)
    shell = shell_of(api.url)
    env = {name: value for name, value in stack.env.items() if name in ("REDIS_URL", "REJOIN_KEY_PREFIX")}
    run = shell.piped("top", "--once", "--json", **env)
    assert await run.ends() == 0
    (look,) = run.lines
    (one,) = look["generations"]
    assert (one["id"], one["status"], one["model"], one["attempt"]) == (generation["id"], "in_progress", model, 1)
    assert one["tokens"] > 5 and one["apis_reading"] == 1 and 0 < one["age_seconds"] < 60
    assert 10 < one["tokens_per_second"] < 100 and look["tokens_per_second"] == one["tokens_per_second"]
    assert (look["open"], look["running"], look["queue_depth"]) == (1, 1, 0)
    (worker,) = look["workers"]
    assert worker["name"] == one["worker"] and worker["running"] == 1 and worker["seconds_since_sign"] < 10
    (store,) = look["stores"]
    assert store["version"].startswith("Valkey ") and store["maxmemory_policy"] == "noeviction"
    assert store["used_memory_bytes"] > 0 and store["connected_clients"] > 0
    assert (look["api"], look["api_state"]) == (api.url, "ok")
    shown = shell.piped("top", "--once", "--interval", "0.2", **env)
    assert await shown.ends() == 0
    assert generation["id"] in shown.text and "noeviction" in shown.text and worker["name"] in shown.text
    assert all(line == line.rstrip() for line in shown.text.splitlines()), "blanks up to a screen that is none"
    narrow, _ = shell.typed("top", "--once", "--interval", "0.2", columns=90, **env)
    assert await narrow.ends() == 0
    assert (
        generation["id"] in narrow.text and "left out below 120 columns: attempt, apis reading, worker" in narrow.text
    )
    for word in ("answerword", "promptword", "metaword"):
        assert word not in run.text + shown.text
    await stack.cancel(generation)
    await reading


async def test_top_draws_a_screen_until_ctrl_c(rejoin_up: RejoinUp, shell_of: Callable[[str], Shell]) -> None:
    """It finds the embedded store of a `rejoin up` by its folder, draws again and again, and leaves the screen as it
    was."""
    shell = shell_of("http://127.0.0.1:1")
    run, keys = shell.typed("top", "--data", str(rejoin_up.data), "--interval", "0.2")
    await run.shows(r"rejoin top(?s:.)*rejoin top(?s:.)*rejoin top")
    assert f"api {rejoin_up.url} ok" in run.text and "workers 2" in run.text and "valkey.sock" in run.text
    os.write(keys, CTRL_C)
    assert await run.ends() == 130
    assert run.out.startswith(b"\x1b[?1049h") and run.out.endswith(b"\x1b[?1049l")


async def test_top_says_that_redis_is_away(shell: Shell, rejoin_up: RejoinUp) -> None:
    """Exit code 3, and no password of the URL; a folder that no `rejoin up` has used is said as well."""
    away = f"redis://:pass-word@127.0.0.1:{free_port()}/0"
    run = shell.piped("top", "--once", REDIS_URL=away)
    assert await run.ends() == 3
    assert "cannot reach Redis" in run.errors and "REDIS_URL" in run.errors and "pass-word" not in run.errors
    run = shell.piped("top", "--once", "--data", str(shell.folder))
    assert await run.ends() == 3 and "no `rejoin up`" in run.errors


async def test_top_without_a_rejoin_up_says_what_to_do(shell: Shell) -> None:
    """In a folder in which none runs, and without REDIS_URL: start one, or say where it is."""
    with socket.socket() as usual:
        if usual.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("a Redis runs where one usually is, and is looked at")
    run = shell.piped("top", "--once")
    assert await run.ends() == 3 and run.errors.count("\n") == 1
    for advice in ("no `rejoin up` runs on .rejoin", "start one", "--data", "REDIS_URL"):
        assert advice in run.errors


# ---- The page ----


def test_the_page_names_every_command_and_option() -> None:
    """docs/terminal.md has each command, and each of its options in the command's section."""
    page = (ROOT / "docs/terminal.md").read_text()
    sections = dict(re.findall(r"(?ms)^## `rejoin (\w+)[^\n]*\n(.*?)(?=^## |\Z)", page))
    (commands,) = [action for action in parser()._actions if isinstance(action.choices, dict)]
    assert set(sections) == set(commands.choices)
    for name, section in sections.items():
        options = {option for action in commands.choices[name]._actions for option in action.option_strings}
        assert options - {"-h", "--help"} == set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE)), name


async def test_the_examples_of_the_page_run(rejoin_up: RejoinUp, tmp_path: Path) -> None:
    """The `sh` blocks of docs/terminal.md, as they stand, in the order in which they stand."""
    command = tmp_path / "bin/rejoin"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "notes.txt").write_text("Some notes.")
    (tmp_path / ".rejoin").symlink_to(rejoin_up.data)
    env = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "REJOIN_URL": rejoin_up.url}
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", (ROOT / "docs/terminal.md").read_text())
    assert len(blocks) >= 3
    done = await asyncio.create_subprocess_exec(
        "sh", "-eu", cwd=tmp_path, env=env, stdin=asyncio.subprocess.PIPE, stdout=-1, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(done.communicate("\n".join(blocks).encode()), 90)
    assert done.returncode == 0, out.decode()


# ---- The parts ----


@given(st.text(alphabet="ab #-`*|\n\r\t>_=\u2028\x0c\x00[]:1.", max_size=80))
def test_cutting_markdown_loses_nothing(text: str) -> None:
    """The blocks together are the text, however its lines end."""
    assert "".join(blocks_of(text)) == text


@given(st.text())
def test_what_is_visible_has_no_control_character(text: str) -> None:
    """Neither C0 (but tab and line feed), nor DEL, nor C1."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", visible(text))
