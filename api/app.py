"""Put the api together: settings in, an ASGI application out. `uvicorn api.app:create_app --factory` runs it."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from api import error_handlers
from api.admission import Gate
from api.chats import Chats
from api.dependencies import Parts
from api.recent import Recent
from api.relay import RELAYING, TRANSPORT, Drain, Relay
from api.routes import (
    chat_completions,
    generations,
    health,
    models,
    playground,
    responses,
    responses_socket,
    streams,
    ui_messages,
    ui_messages_socket,
)
from api.tail import Tail
from shared import metrics
from shared.cluster import servers_of
from shared.config import Settings, load, model_table
from shared.event_log import EventLog
from shared.jobs import Jobs
from shared.observability import causes_of, cut_query_strings, logger, place_of
from shared.reaper import reap_forever
from shared.redis import TROUBLE, connect, queue_url, when_reachable

# With the subscription at most 8 connections to Redis, however many readers there are.
LOG_CONNECTIONS = 4
QUEUE_CONNECTIONS = 2
STILL_ASKED_FOR = ("type", "method", "headers")  # of a request's scope, by a server while it sends
DEPTH_SECONDS = 1.0  # how long the metrics wait for the depth of the queue
log = logger("api")


class Application(FastAPI):
    """A FastAPI that keeps the server's transport in reach, so that a relay can break a connection off, and that runs
    the relays itself, once the routes have returned."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope[TRANSPORT] = getattr(getattr(send, "__self__", None), "transport", None)
        try:
            relay = await self._route(scope, receive, send)
            if relay is not None:
                await _run_relay(relay, receive, send)
        except Exception as error:
            # Starlette raises again what error_handlers has answered and logged by its place. The server would log
            # the words of it as well, and they may be a caller's. It closes a connection whose answer is not complete.
            if scope["type"] == "lifespan":
                raise
            if transport is None:
                raise ConnectionAbortedError(f"broken off: {type(error).__name__}") from None

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> Relay | None:
        """Answer, but for the relay that the answer may have begun."""
        relaying: list[Relay] = []
        given = dict(scope)
        scope[RELAYING] = relaying
        try:
            await super().__call__(scope, receive, send)
        except BaseException:
            for relay in relaying:
                await relay.aclose()
            raise
        if not relaying:
            return None
        scope.clear()  # of the request and of what the routing left there, its exit stacks above all
        scope.update({name: given[name] for name in STILL_ASKED_FOR})
        given["headers"].clear()  # a browser sends two kilobytes of them, and the server's connection holds them too
        return relaying[0]


async def _run_relay(relay: Relay, receive: Receive, send: Send) -> None:
    try:
        await relay.run(receive, send)
    except ConnectionAbortedError:  # how a stream is broken off where the transport is not in reach
        raise
    except Exception as error:
        log.error("relay.broke", error=type(error).__name__, at=place_of(error))
        raise


def create_app(settings: Settings | None = None) -> Application:
    """The application of one api process. Raises SettingsError for a wrong setting."""
    settings = settings or load()
    models_served = model_table(settings)  # a wrong table stops the start; so do a missing secret, a URL that is none
    _ = settings.secret_bytes
    servers_of(settings.redis_url, connections=1)
    connect(queue_url(settings), connections=1)
    app = Application(title="Rejoin", description="LLM streams that you can leave and rejoin", lifespan=_lifespan)
    app.state.settings, app.state.models = settings, models_served
    for routes in (
        generations,
        streams,
        chat_completions,
        ui_messages,
        ui_messages_socket,
        responses,
        responses_socket,
        models,
        health,
        playground,
    ):
        app.include_router(routes.router)
    error_handlers.install(app)
    app.add_middleware(Gate, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["Location", "X-Generation-Id", "Rejoin-Resumed-From", "Retry-After"],
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    cut_query_strings()
    _collect_less()
    servers = servers_of(settings.redis_url, connections=LOG_CONNECTIONS)
    queue = connect(queue_url(settings), connections=QUEUE_CONNECTIONS)
    subscriber = servers_of(settings.redis_url, connections=1, timeout_seconds=None)
    event_log = EventLog(servers, settings)
    jobs = Jobs(queue, event_log.keys)
    tail = Tail(subscriber, event_log, settings.disconnect_grace_seconds)
    recent = Recent(queue, event_log.keys, settings.order_retention_seconds)
    longest = settings.log_retention_seconds + settings.max_queue_seconds + settings.max_generation_seconds
    chats = Chats(queue, event_log.keys, int(longest))
    app.state.parts = Parts(settings, app.state.models, event_log, jobs, tail, recent, chats)
    await when_reachable(servers.all)
    running = asyncio.gather(tail.run(), reap_forever(event_log, jobs), metrics.watch_loop())
    running.add_done_callback(_end_process_if_broken)
    try:
        with _drain_on_signal(app.state.parts.drain), _gauges(app.state.parts):
            yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        for part in (servers, queue, subscriber):
            await part.aclose()


@contextmanager
def _gauges(parts: Parts) -> Iterator[None]:
    """What Prometheus is told as it stands at the moment. It is asked for in a thread of its own."""
    loop = asyncio.get_running_loop()

    def depth() -> float:
        try:
            return asyncio.run_coroutine_threadsafe(_depth(parts.jobs), loop).result(2 * DEPTH_SECONDS)
        except TimeoutError:  # the event loop is held up
            return math.nan

    metrics.OPEN_READERS.set_function(lambda: len(parts.drain.relays))
    metrics.QUEUE_DEPTH.set_function(depth)
    try:
        yield
    finally:
        metrics.QUEUE_DEPTH.set_function(lambda: math.nan)


async def _depth(jobs: Jobs) -> float:
    try:
        async with asyncio.timeout(DEPTH_SECONDS):
            return await jobs.depth()
    except (*TROUBLE, TimeoutError):
        return math.nan


def _collect_less() -> None:
    """Ten thousand open streams are millions of objects that stay: looking through all of them for cycles, time and
    again, took two thirds of a storm of reconnects. And what the start has made is not looked at any more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _end_process_if_broken(running: asyncio.Future[tuple[None, None, None]]) -> None:
    """An api without its tail would look healthy and be deaf: better that its supervisor starts another."""
    error = None if running.cancelled() else running.exception()
    if error is not None and not isinstance(error, asyncio.CancelledError):  # what a gather makes of our own cancel
        log.error("api.broke", **causes_of(error))
        os.kill(os.getpid(), signal.SIGTERM)


class _drain_on_signal:
    """Hear SIGTERM and SIGINT before the server does: it would only wait for the open streams, not tell them."""

    def __init__(self, drain: Drain) -> None:
        self._drain = drain
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = self._before[number] = signal.getsignal(number)

            def hear(received: int, frame: object, before: object = before) -> None:
                loop.call_soon_threadsafe(self._drain.begin)
                if callable(before):
                    before(received, frame)

            signal.signal(number, hear)

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
