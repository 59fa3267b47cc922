"""Native SSE, made for a browser's EventSource: every event as it stands in the log, under its own id.

The only dialect that may end cleanly without a terminal event, and only after `retry:`: its clients come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from api import sse
from api.frames import Ending, Frame
from shared.events import Entry, type_of


class Native:
    media_type = sse.MEDIA_TYPE

    def frames(self, entry: Entry) -> Iterable[Frame]:
        return (Frame(entry.data, type_of(entry.data), entry.id),)

    def render(self, entries: Sequence[Entry]) -> tuple[bytes, Ending | None]:
        """The same without a frame in between, which would cost more than the rest."""
        return b"".join([sse.BLOCK % (entry_id, type_of(data), data) for entry_id, data in entries]), None

    def ping(self) -> bytes:
        return sse.PING

    def ending(self, ending: Ending, retry_ms: int) -> bytes | None:
        return sse.comment(ending.value) + sse.retry(retry_ms)
