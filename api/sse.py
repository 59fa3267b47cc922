"""Server-Sent Events: Frame -> bytes, Last-Event-ID -> cursor. The one place that knows the wire format.

Source: the HTML Standard, "Server-sent events" (parsing an event stream).
"""

from __future__ import annotations

import re

from api.frames import Frame
from shared.errors import BadRequest
from shared.events import Position, parse_id

MEDIA_TYPE = "text/event-stream"
PING = b":\n\n"
HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx: do not hold the stream back
}
BLOCK = b"id: %b\nevent: %b\ndata: %b\n\n"  # an event with all it can have
_CURSOR = re.compile(r"(?:0|[1-9][0-9]{0,14})-(?:0|[1-9][0-9]{0,14})")


def encode(frame: Frame) -> bytes:
    """One event block. An `id` only counts for a client when the block has data, so it always has."""
    block = b"data: %b\n\n" % frame.data
    if frame.event:
        block = b"event: %b\n%b" % (frame.event, block)
    return b"id: %b\n%b" % (frame.id, block) if frame.id else block


def retry(milliseconds: int) -> bytes:
    """How long the client is to wait before it connects again."""
    return b"retry: %d\n\n" % milliseconds


def comment(text: str) -> bytes:
    return b": " + text.encode() + b"\n\n"


def cursor(last_event_id: str | None, after: str | None) -> Position | None:
    """The last position the client has: the header counts, else the query; None for a reader that has nothing.

    Raises BadRequest(`bad_cursor`) for anything that is not an id of ours."""
    given = last_event_id or after
    if not given:
        return None
    if not _CURSOR.fullmatch(given):
        raise BadRequest(
            "the cursor is not an event id: send the last `id:` you saw (like 1790000000000-7), or none",
            code="bad_cursor",
        )
    return parse_id(given)
