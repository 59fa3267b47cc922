"""Start, watch and end the real processes a test needs. Ends only what it started, by pid."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cli.valkey import server_argv
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Process:
    """One process a test started; its output goes to `log_path`."""

    name: str
    argv: list[str]
    env: Mapping[str, str]
    log_path: Path
    popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self.popen.send_signal(number)

    async def wait(self, timeout: float = 30) -> int:
        await wait_until(lambda: not self.running, timeout=timeout)
        return self.popen.returncode

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.wait()

    async def terminate(self, timeout: float = 45) -> int:
        self.signal(signal.SIGTERM)
        return await self.wait(timeout)

    async def says(self, pattern: str, timeout: float = 20) -> str:
        """Wait until a line of its output matches; the match's first group, or the whole of it."""

        def look() -> str | None:
            found = re.search(pattern, self.log())
            if found is None and not self.running:
                raise AssertionError(f"{self.name} ended before it said {pattern!r}:\n{self.log()}")
            return (found[1] if found.groups() else found[0]) if found else None

        return str(await wait_until(look, timeout=timeout))


@dataclass
class Processes:
    """All processes of one test."""

    folder: Path
    started: list[Process] = field(default_factory=list)

    async def start(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> Process:
        """Start `argv` in the project's folder with `env` over a bare environment."""
        return self.launch(name, argv, env)

    def launch(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> Process:
        log_path = self.folder / f"{name}-{len(self.started)}.log"
        bare = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        full = {**bare, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        with log_path.open("wb") as log:
            popen = subprocess.Popen(
                argv, cwd=ROOT, env=full, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        process = Process(name, argv, full, log_path, popen)
        self.started.append(process)
        return process

    def end_all(self) -> None:
        """Terminate what still runs, kill what does not listen."""
        running = [process for process in self.started if process.running]
        for process in running:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM if process.name != "worker" else signal.SIGKILL)
        deadline = time.monotonic() + 10
        for process in running:
            try:
                process.popen.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()


@dataclass
class Valkey:
    """A real Valkey server on a loopback port, which a test may kill and start again on the same data."""

    processes: Processes
    folder: Path
    port: int
    argv: list[str]
    process: Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = self.processes.launch("valkey", self.argv)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as sock:
                sock.settimeout(1)
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    sock.sendall(b"PING\r\n")
                    if sock.recv(64).startswith(b"+PONG"):
                        return
            time.sleep(0.02)
        raise AssertionError(f"valkey did not start:\n{self.process.log()}")

    async def kill(self) -> None:
        assert self.process is not None
        await self.process.kill()


def valkey(processes: Processes, folder: Path, *, append_only: bool = False, binary: str | None = None) -> Valkey:
    """A server ready to be started; `binary` takes the place of the embedded one."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    argv = server_argv(folder, port=port, append_only=append_only)
    return Valkey(processes, folder, port, [binary or argv[0], *argv[1:]])


PYTHON = sys.executable
