"""Drive the load generator and the feeder: targets in, what they counted out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

Counts: TypeAlias = dict[str, Any]
FAULTS = ("lost", "doubled", "reordered", "foreign", "refused", "broken", "turned_away")


@dataclass(frozen=True)
class Target:
    """One client: what it asks for, and the numbers of the events it is to get (`end` is behind the last one)."""

    port: int
    stream: int
    end: int
    path: str
    first: int = 0
    method: str = "GET"
    body: str = ""

    def line(self) -> str:
        parts = (self.port, self.stream, self.first, self.end, self.method, self.path, self.body)
        return "\t".join(map(str, parts))


class Program:
    """One run of a C program that prints JSON as its last line."""

    def __init__(self, *argv: str | Path) -> None:
        self._argv = [str(part) for part in argv]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Program:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=pipe, stdout=pipe, stderr=pipe, limit=2**22
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def says(self, word: str, timeout: float = 60) -> None:
        """Wait for a line that is this word."""
        assert self._process is not None and self._process.stdout is not None
        async with asyncio.timeout(timeout):
            while line := await self._process.stdout.readline():
                if line.decode().strip() == word:
                    return
        raise AssertionError(f"{self._argv[0]} ended before it said {word!r}: {await self._complaint()}")

    def let_go(self, word: str = "") -> None:
        """Tell it to go on: a line, or the end of its input."""
        assert self._process is not None and self._process.stdin is not None
        if word:
            self._process.stdin.write(f"{word}\n".encode())
        else:
            self._process.stdin.close()

    async def result(self, timeout: float = 120) -> Counts:
        """What it printed last. AssertionError, with its complaint, when that is no JSON."""
        assert self._process is not None and self._process.stdout is not None
        async with asyncio.timeout(timeout):
            lines = (await self._process.stdout.read()).decode().strip().splitlines()
            await self._process.wait()
        if not lines or not lines[-1].startswith("{"):
            raise AssertionError(f"{self._argv[0]} failed: {await self._complaint()}")
        counts: Counts = json.loads(lines[-1])
        counts["complaint"] = await self._complaint()
        return counts

    async def _complaint(self) -> str:
        assert self._process is not None and self._process.stderr is not None
        return (await self._process.stderr.read()).decode(errors="replace")[-500:]


def loading(program: Path, folder: Path, targets: Sequence[Target], *options: str) -> Program:
    """The load generator on these targets; `async with` it."""
    return Program(program, *options, written(folder / "targets.txt", (target.line() for target in targets)))


def written(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def faults(counts: Counts) -> int:
    """How many events were lost, doubled, reordered or foreign; how many clients refused, cut off or sent away."""
    return sum(int(counts[name]) for name in FAULTS)
