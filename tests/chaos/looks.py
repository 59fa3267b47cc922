"""What a fault test looks at from outside: the memory of a process, an upstream that nobody reads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.processes import Process
from tests.upstream import Request


def resident_bytes(process: Process) -> int:
    """How much memory a process has at this moment."""
    (line,) = (one for one in Path(f"/proc/{process.pid}/status").read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def stands_still(request: Request) -> float:
    """When (by the monotonic clock) the upstream last got rid of a chunk, once it has not for over a second."""
    sent, at = -1, time.monotonic()
    while time.monotonic() - at < 1.5:
        if request.chunks_sent != sent:
            sent, at = request.chunks_sent, time.monotonic()
        await asyncio.sleep(0.02)
    return at
