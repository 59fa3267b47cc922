"""Keep a few processes running: start, watch, restart, end in order. Knows nothing of what they do.

One rule: no child outlives its supervisor, however that ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

STEADY_SECONDS = 10.0  # a process that ran this long is restarted at once
MAX_PATIENCE_SECONDS = 5.0

# Becomes the program it is given, which the kernel asks to stop when the supervisor dies (prctl(2), PR_SET_PDEATHSIG;
# it outlasts exec). A program and no `preexec_fn`: between fork and exec a process with threads can run no Python.
LEASH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # else it died before we asked
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Child:
    """One process to keep running. `stop_seconds`: how long it may take to end when asked to."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    stop_seconds: float
    pass_fds: tuple[int, ...] = ()
    on_death: Callable[[int], Awaitable[None]] | None = None  # told the pid of one that ended by itself
    process: asyncio.subprocess.Process | None = None
    starts: int = 0


@dataclass
class Supervisor:
    """The children of one `rejoin up`, and whether they are to go on."""

    children: list[Child] = field(default_factory=list)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep(self, child: Child) -> None:
        """Run a child until the end is asked for; restart it whenever it ends by itself."""
        self.children.append(child)
        patience = 0.1
        while not self.ending.is_set():
            started = time.monotonic()
            code = await self._run(child)
            if self.ending.is_set():
                return
            if child.on_death is not None and child.process is not None:
                await child.on_death(child.process.pid)
            steady = time.monotonic() - started > STEADY_SECONDS
            patience = 0.1 if steady else min(patience * 2, MAX_PATIENCE_SECONDS)
            self.tell(f"{child.name} ended ({_describe(code)}); starting it again")
            try:
                async with asyncio.timeout(patience):
                    await self.ending.wait()
            except TimeoutError:
                pass

    async def end(self, names: Sequence[str]) -> None:
        """Ask these children to stop, wait for each its time, then insist."""
        running = [child for child in self.children if child.name in names and _runs(child)]
        for child in running:
            _signal(child, signal.SIGTERM)
        for child in running:
            assert child.process is not None
            try:
                async with asyncio.timeout(child.stop_seconds):
                    await child.process.wait()
            except TimeoutError:
                self.tell(f"{child.name} did not stop within {child.stop_seconds:g} s; killing it")
                _signal(child, signal.SIGKILL)
                await child.process.wait()

    def tell(self, line: str, out: TextIO | None = None) -> None:
        """A line on `out`, standard error if None. When nobody can read it any more (`| head`, a terminal that was
        closed), the end is asked for: a house that cannot be heard is one that was left."""
        out = out or sys.stderr
        try:
            print(line, file=out, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            self.ending.set()

    async def _run(self, child: Child) -> int:
        child.starts += 1
        child.process = await asyncio.create_subprocess_exec(
            *_leashed(child.argv),
            env=dict(child.env),
            pass_fds=child.pass_fds,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor, which ends the others in order
        )
        if self.ending.is_set():  # the end came while it was being started
            _signal(child, signal.SIGTERM)
        assert child.process.stdout is not None
        while line := await child.process.stdout.readline():
            self.tell(f"{child.name:<9}| {line.decode(errors='replace').rstrip()}")
        return await child.process.wait()


def _leashed(argv: Sequence[str]) -> Sequence[str]:
    """Elsewhere than on Linux a child can outlive a supervisor that is killed: nothing there covers every program."""
    if sys.platform != "linux":
        return argv
    return [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), *argv]


def _runs(child: Child) -> bool:
    return child.process is not None and child.process.returncode is None


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None and _runs(child):
        with suppress(ProcessLookupError):
            os.kill(child.process.pid, number)


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
