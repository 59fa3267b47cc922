"""OpenAI's Responses over one WebSocket (`client.responses.connect()`): the same bodies in, the same events out.

One answer after the other on each lane, a lane being a `stream_id` the client made up, or none. A client that closes
its socket leaves all of them; a server that goes closes it. Nothing is resumed here: that is what HTTP is for.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import Literal

import orjson
from fastapi import APIRouter
from pydantic import Field
from starlette.websockets import WebSocket, WebSocketDisconnect

from api.admission import TENANT
from api.dependencies import Parts, parse
from api.dialects.responses import Responses, error_event
from api.error_handlers import OUR_MISTAKE, STORE_AWAY, status_of
from api.frames import Ending
from api.generation import admit
from api.relay import open_reader
from api.routes.responses import CreateResponse, order_of
from api.tail import Gone, Reader
from shared import metrics
from shared.errors import BadRequest, CallerError, Conflict, OurError, RejoinError, TooLarge, Unavailable
from shared.events import is_terminal
from shared.observability import logger
from shared.redis import AWAY

router = APIRouter(tags=["responses"])
log = logger("api")
WAIT_SECONDS = 60.0
MAX_LANES = 16  # answers at once on one socket
SERVICE_RESTART = 1012  # RFC 6455's registry: the server is restarting, connect again


class CreateFrame(CreateResponse):
    """A body of `POST /v1/responses` with the fields that only a frame has."""

    type: Literal["response.create"]
    stream_id: str | None = Field(None, max_length=256)  # every event of the answer repeats it
    generate: bool | None = None

    def refuse(self) -> None:
        if self.background:
            raise BadRequest("background: a WebSocket has none; send the request over HTTP", param="background")
        if self.generate is False:
            raise BadRequest("generate: nothing is prepared ahead here; leave the field out", param="generate")


@router.websocket("/v1/responses")
async def connect(websocket: WebSocket) -> None:
    """Answer each `response.create` until the client closes."""
    parts: Parts = websocket.app.state.parts
    await websocket.accept()
    socket = Socket(websocket, parts, websocket.scope[TENANT])
    parts.drain.relays.add(socket)
    try:
        if parts.drain.begun:
            socket.drain()
        await socket.run()
    finally:
        parts.drain.relays.discard(socket)


class Socket:
    """One client's socket and the answers on their way through it."""

    def __init__(self, websocket: WebSocket, parts: Parts, tenant: str) -> None:
        self._websocket = websocket
        self._parts = parts
        self._tenant = tenant
        self._busy: set[str | None] = set()  # the lanes that have not said their last event
        self._answers: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        listening = asyncio.create_task(self._listen())
        draining = asyncio.create_task(self._drained.wait())
        try:
            await asyncio.wait((listening, draining), return_when=asyncio.FIRST_COMPLETED)
            if self._drained.is_set():
                with suppress(RuntimeError, OSError):  # the server has closed it already
                    await self._websocket.close(SERVICE_RESTART)
        finally:
            tasks = [listening, draining, *self._answers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        self._drained.set()

    async def _listen(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message.get("bytes") or (message.get("text") or "").encode())

    async def _take(self, raw: bytes) -> None:
        """Begin an answer, or say why not. What is wrong with one frame is no reason to close the socket."""
        lane: str | None = None
        try:
            if len(raw) > self._parts.settings.max_body_bytes:
                raise TooLarge(f"the frame is larger than {self._parts.settings.max_body_bytes} bytes")
            frame = parse(raw, CreateFrame)
            lane = frame.stream_id
            frame.refuse()
            if lane in self._busy or len(self._answers) >= MAX_LANES:
                raise Conflict("this lane is still answering: wait for its end, or use a `stream_id`", code="lane_busy")
        except RejoinError as error:
            return await self._send(_refusal(error), lane)
        self._busy.add(lane)
        task = asyncio.create_task(self._answer(frame, lane))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, frame: CreateFrame, lane: str | None) -> None:
        with suppress(WebSocketDisconnect, RuntimeError, OSError):  # the client has left: so does its reader
            try:
                admit(self._parts)
                order, asked = await order_of(self._parts, self._tenant, frame)
                opening = await open_reader(self._parts.tail, order, None)
                async with aclosing(opening.reader) as reader:
                    await self._follow(reader, Responses(asked), lane)
            except RejoinError as error:
                await self._refuse(error, lane)
            except AWAY:
                await self._refuse(Unavailable(STORE_AWAY, code="store_unavailable"), lane)
            except (WebSocketDisconnect, RuntimeError, OSError):
                raise
            except Exception as error:  # the edge, as error_handlers is over HTTP
                log.error("api.broke", error=type(error).__name__, at="socket")
                await self._refuse(OurError(OUR_MISTAKE), lane)

    async def _refuse(self, error: RejoinError, lane: str | None) -> None:
        self._busy.discard(lane)
        await self._send(_refusal(error), lane)

    async def _follow(self, reader: Reader, dialect: Responses, lane: str | None) -> None:
        try:
            while True:
                entries = await reader.next(WAIT_SECONDS)
                for entry in entries:
                    frames = list(dialect.frames(entry))
                    is_last = is_terminal(entry.data) or Ending.STOP in frames
                    if is_last:  # who has heard the last event may ask again at once
                        self._busy.discard(lane)
                    for frame in frames:
                        if not isinstance(frame, Ending):
                            await self._send(frame.data, lane)
                    if is_last:
                        return
        except Gone:
            self._busy.discard(lane)
            await self._send(dialect.last_words(Ending.GONE).data, lane)

    async def _send(self, event: bytes, lane: str | None) -> None:
        if lane is not None:
            event = event[:-1] + b',"stream_id":' + orjson.dumps(lane) + b"}"
        try:
            async with asyncio.timeout(self._parts.settings.send_timeout_seconds):
                await self._websocket.send_text(event.decode())
        except TimeoutError:
            metrics.READERS_TIMED_OUT.inc()
            raise


def _refusal(error: RejoinError) -> bytes:
    """An error before the first event of an answer, with the status it would have over HTTP."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param = error.param if isinstance(error, CallerError) else None
    event = error_event(error.code, error.message, 0, kind=kind, param=param)
    return orjson.dumps({**event, "sequence_number": None, "status": 400 if status == 422 else status})
