"""What the machine says of processes and of itself: CPU, memory, whether it is quiet. Reads /proc and nothing else."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUIET_SHARE = 0.08  # of all cores: more is somebody else's work
PATIENCE_SECONDS = 5.0  # how long a quiet moment is waited for, before a round begins all the same


def cpu_seconds(pids: Iterable[int]) -> float:
    """What these processes have run so far, all threads together: from schedstat, since `stat` counts in ticks."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes, shared pages shared out."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


async def wait_for_quiet(patience: float | None = None) -> float:
    """Wait until the machine is quiet, or patience ends. Answers the share of it that was busy at the last look."""
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
    while True:
        busy = await _busy_share(0.5)
        if busy <= QUIET_SHARE or time.monotonic() > deadline:
            return busy


async def _busy_share(seconds: float) -> float:
    before = _cpu_times()
    await asyncio.sleep(seconds)
    spent = [after - earlier for earlier, after in zip(before, _cpu_times(), strict=True)]
    idle = spent[3] + spent[4]
    return 1 - idle / max(1, sum(spent))


def _cpu_times() -> list[int]:
    return [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def facts() -> dict[str, Any]:
    """What was measured on, for whoever reads the figures later."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }
