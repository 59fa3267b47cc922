"""The AI SDK's chat over one WebSocket (`WebSocketChatTransport` of `ai` 7): the same messages in, the same chunks out.

Many requests at once, each under the id the client gave it. A client that aborts one, or closes its socket, leaves: the
answer goes on. A resume is a full replay, as over HTTP.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import Any, Literal

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.websockets import WebSocket, WebSocketDisconnect

from api.admission import TENANT
from api.dependencies import Parts, parse
from api.dialects.ui_messages import UiMessages
from api.error_handlers import OUR_MISTAKE, STORE_AWAY
from api.frames import Ending, Frame
from api.generation import admit
from api.relay import open_reader
from api.routes.ui_messages import CHAT_ID, SendMessages, begin, message_id_of, newest
from api.tail import Gone, Reader
from shared import metrics
from shared.errors import RejoinError, TooLarge, TooMany
from shared.event_log import Order
from shared.events import is_terminal
from shared.observability import logger, place_of
from shared.redis import AWAY

router = APIRouter(tags=["AI SDK"])
log = logger("api")
WAIT_SECONDS = 60.0
MAX_REQUESTS = 16  # at once on one socket
MAX_ID_CHARS = 256
SERVICE_RESTART = 1012  # RFC 6455's registry: the server is restarting, connect again
LOST = "The answer's log is gone."


class ClientFrame(BaseModel):
    """What a client says. `body` is what the application adds; over HTTP it would stand beside the messages."""

    model_config = ConfigDict(frozen=True)

    type: Literal["send", "resume", "abort"]
    request_id: str = Field(alias="requestId", max_length=MAX_ID_CHARS)
    id: str = Field("", pattern=CHAT_ID)
    messages: Any = None
    body: dict[str, Any] = Field(default_factory=dict)

    def to_send(self) -> SendMessages:
        told = {"id": self.id, **({} if self.messages is None else {"messages": self.messages})}
        return parse(orjson.dumps({**self.body, **told}), SendMessages)


@router.websocket("/api/chat/ws")
async def connect(websocket: WebSocket) -> None:
    """Answer each request until the client closes."""
    parts: Parts = websocket.app.state.parts
    await websocket.accept()
    socket = Socket(websocket, parts, websocket.scope[TENANT], websocket.query_params.get("resetStep") == "true")
    parts.drain.relays.add(socket)
    try:
        if parts.drain.begun:
            socket.drain()
        await socket.run()
    finally:
        parts.drain.relays.discard(socket)


class Socket:
    """One client's socket and the answers on their way through it."""

    def __init__(self, websocket: WebSocket, parts: Parts, tenant: str, reset_step: bool) -> None:
        self._websocket = websocket
        self._parts = parts
        self._tenant = tenant
        self._reset_step = reset_step
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._drained = asyncio.Event()

    async def run(self) -> None:
        """Until the client has left or the server goes down: then the socket closes, and a client resumes elsewhere."""
        listening = asyncio.create_task(self._listen())
        draining = asyncio.create_task(self._drained.wait())
        try:
            await asyncio.wait((listening, draining), return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [listening, draining, *self._requests.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._drained.is_set():
            with suppress(RuntimeError, OSError):
                await self._websocket.close(SERVICE_RESTART)

    def drain(self) -> None:
        self._drained.set()

    async def _listen(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError, OSError):
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message.get("bytes") or (message.get("text") or "").encode())

    async def _take(self, raw: bytes) -> None:
        """Begin or leave an answer. What is wrong with one frame is no reason to close the socket."""
        request_id = _request_id(raw)
        try:
            if len(raw) > self._parts.settings.max_body_bytes:
                raise TooLarge(f"the frame is larger than {self._parts.settings.max_body_bytes} bytes")
            frame = parse(raw, ClientFrame)
            if frame.type == "abort":
                return self._leave(request_id)
            if request_id in self._requests or len(self._requests) >= MAX_REQUESTS:
                raise TooMany("this socket has all the requests it takes; wait for the end of one")
            found = await self._find(frame)
        except RejoinError as error:
            return await self._say("error", request_id, errorText=error.message)
        except AWAY:
            return await self._say("error", request_id, errorText=STORE_AWAY)
        except Exception as error:  # the edge, as error_handlers is over HTTP
            return await self._broke(error, request_id)
        if found is None:
            return await self._say("no-active", request_id)
        task = self._requests[request_id] = asyncio.create_task(
            self._follow(request_id, *found, resumed=frame.type == "resume")
        )
        task.add_done_callback(lambda _: self._requests.pop(request_id, None))

    def _leave(self, request_id: str) -> None:
        if running := self._requests.get(request_id):
            running.cancel()

    async def _find(self, frame: ClientFrame) -> tuple[Order, UiMessages] | None:
        """The answer that a frame begins, or takes up again, if there is one."""
        admit(self._parts)
        if frame.type == "send":
            body = frame.to_send()
            order: Order | None = await begin(self._parts, self._tenant, body, None)
            message_id, reset_step = body.message_id(), body.reset_step
        else:
            order = await newest(self._parts, self._tenant, frame.id)
            message_id = await message_id_of(self._parts, order) if order else None
            reset_step = frame.body.get("resetStep") is True
        if order is None or (order.ended and frame.type == "resume"):
            return None
        return order, UiMessages(order.id, message_id=message_id, can_reset_step=reset_step or self._reset_step)

    async def _follow(self, request_id: str, order: Order, dialect: UiMessages, *, resumed: bool) -> None:
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # the client has left: so does its reader
            try:
                opening = await open_reader(self._parts.tail, order, None, resumed=resumed)
                async with aclosing(opening.reader) as reader:
                    await self._say("start", request_id)
                    await self._chunks(request_id, reader, dialect)
                await self._say("end", request_id)
            except Gone:
                await self._say("error", request_id, errorText=LOST)
            except RejoinError as error:
                await self._say("error", request_id, errorText=error.message)
            except AWAY:
                await self._say("error", request_id, errorText=STORE_AWAY)
            except (WebSocketDisconnect, RuntimeError):
                raise
            except Exception as error:
                await self._broke(error, request_id)

    async def _broke(self, error: Exception, request_id: str) -> None:
        """Our mistake: its place goes to the log, and not its words, which may be somebody's."""
        log.error("api.broke", error=type(error).__name__, at=place_of(error))
        await self._say("error", request_id, errorText=OUR_MISTAKE)

    async def _chunks(self, request_id: str, reader: Reader, dialect: UiMessages) -> None:
        sequence = 0
        while True:
            entries = await reader.next(WAIT_SECONDS)
            for entry in entries:
                for chunk in dialect.frames(entry):
                    if isinstance(chunk, Ending):
                        return
                    if not _is_done(chunk):
                        await self._say("chunk", request_id, sequence=sequence, chunk=orjson.Fragment(chunk.data))
                        sequence += 1
            if entries and is_terminal(entries[-1].data):
                return

    async def _say(self, kind: str, request_id: str, **fields: Any) -> None:
        frame = orjson.dumps({"type": kind, "requestId": request_id, **fields})
        try:
            async with asyncio.timeout(self._parts.settings.send_timeout_seconds):
                await self._websocket.send_text(frame.decode())
        except TimeoutError:
            metrics.READERS_TIMED_OUT.inc()
            raise


def _is_done(frame: Frame) -> bool:
    return frame.data == b"[DONE]"  # the end has a frame of its own here


def _request_id(raw: bytes) -> str:
    """Whose request a frame is that is wrong otherwise, so that its client hears of it."""
    with suppress(orjson.JSONDecodeError):
        frame = orjson.loads(raw)
        if isinstance(frame, dict) and isinstance(frame.get("requestId"), str):
            return str(frame["requestId"])[:MAX_ID_CHARS]
    return ""
