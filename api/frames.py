"""Frame, and what a Dialect is. Knows no protocol, no web framework, no Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from shared.events import Entry


class Frame(NamedTuple):
    """One message of a client protocol. `data` must hold no line break."""

    data: bytes
    event: bytes = b""
    id: bytes = b""


class Ending(Enum):
    """Why a relay ends that is not in the log."""

    STOP = "the frame before says why; nothing follows"
    DRAINING = "this server is going down; connect again"
    GONE = "the log is gone"
    ABORT = "the words so far are all there is, and they are not complete"


class Dialect(Protocol):
    """A pure, deterministic function from a log to the frames of one client protocol.

    No clock, no randomness: ids and times come from the generation and its events, so that resuming is rendering
    again and skipping. One instance serves one connection and sees the entries in order."""

    media_type: str

    def frames(self, entry: Entry) -> Iterable[Frame | Ending]:
        """What this entry says in this protocol. `Ending.STOP` after a frame that says why the stream ends here,
        `Ending.ABORT` when there is no such frame and the connection is broken off."""

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        """The bytes of what these entries say, up to an ending among their frames, which is answered too."""

    def ping(self) -> bytes:
        """Bytes that mean nothing, to keep a silent connection open; empty where the protocol has none."""

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        """The last bytes of a relay that has to stop early, after which it ends cleanly; None: abort the connection."""


def render(
    frames: Callable[[Entry], Iterable[Frame | Ending]], encode: Callable[[Frame], bytes], entries: Sequence[Entry]
) -> tuple[bytes, Ending | None]:
    """What most dialects' `render` is: `frames` of each entry, `encode` of each frame."""
    blocks: list[bytes] = []
    for entry in entries:
        for frame in frames(entry):
            if isinstance(frame, Ending):
                return b"".join(blocks), frame
            blocks.append(encode(frame))
    return b"".join(blocks), None
