"""Plain text: the words alone. It has no cursor and no way to say that something went wrong, so it starts at the
beginning, and a stream that is not complete is broken off, never ended cleanly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from api.frames import Ending, Frame, render
from shared.events import Cancelled, Completed, Entry, Failed, Started, TextDelta, decode


class Text:
    media_type = "text/plain; charset=utf-8"

    def __init__(self) -> None:
        self._has_spoken = False

    def frames(self, entry: Entry) -> Iterable[Frame | Ending]:
        match decode(entry.data):
            case TextDelta(text=text) if text:
                self._has_spoken = True
                return (Frame(text.encode()),)
            case Started(mode="fresh") if self._has_spoken:
                return (Ending.ABORT,)  # what was sent is void, and cannot be unsaid
            case Failed() | Cancelled():
                return (Ending.ABORT,)
            case Completed():
                return ()
            case _:
                return ()

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        return render(self.frames, lambda frame: frame.data, entries)

    def ping(self) -> bytes:
        return b""

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        return None
