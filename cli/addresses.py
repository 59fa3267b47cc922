"""Where a `rejoin up` is to be found: a file in its data folder, written by it and read by `rejoin top`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "addresses.json"


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
        """None where no `rejoin up` has left word."""
        try:
            return cls(**json.loads((data / FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None
