"""Where a `rejoin up` is to be found: files in its data folder, written by it and read by the other commands.

One rule: what a `rejoin up` left that runs no more leads nobody astray.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "addresses.json"
LOCK = "lock"  # held as long as a `rejoin up` (or its store) runs; in it the pid


@dataclass(frozen=True)
class Addresses:
    """The api's URL, and the store's where it is the embedded one: no password is ever written here."""

    api: str
    store: str | None

    def write(self, data: Path) -> None:
        new = data / f"{FILE}.new"
        new.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(new, data / FILE)

    @classmethod
    def read(cls, data: Path) -> Addresses | None:
        """None where no `rejoin up` runs."""
        if holder(data) is None:
            return None
        try:
            return cls(**json.loads((data / FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @staticmethod
    def remove(data: Path) -> None:
        (data / FILE).unlink(missing_ok=True)


def holder(data: Path) -> int | None:
    """The pid of the `rejoin up` that runs on this folder; None where none does."""
    try:
        with (data / LOCK).open() as file:
            pid = int(file.read(20))
            os.kill(pid, 0)  # before the lock is tried: one that just starts is not to find it taken
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return pid
    except (OSError, ValueError, OverflowError):
        return None
    return None  # nobody holds it: another process has that pid by now
