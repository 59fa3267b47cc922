"""The figures that say how a process is doing, for Prometheus; each is in the table of docs/metrics.md.

The rule: labels have a handful of values that are known beforehand, all there from the start. Never an id, a tenant or
anybody's words. A process of either role shows all of them; those of the other role stay 0.
"""

from __future__ import annotations

import asyncio
import time

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from shared.errors import SettingsError

LAG_SECONDS = 0.1  # between two looks at the event loop
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)  # CPU, memory and open files, as the operating system tells them


def _counter(name: str, says: str, **labels: tuple[str, ...]) -> Counter:
    """A counter with its one label, if any, each of whose values begins at 0: a first event is an increase then."""
    counter = Counter(f"rejoin_{name}", says, tuple(labels), registry=REGISTRY)
    for values in labels.values():
        for value in values:
            counter.labels(value)
    return counter


def _gauge(name: str, says: str) -> Gauge:
    return Gauge(f"rejoin_{name}", says, registry=REGISTRY)


def _histogram(name: str, says: str) -> Histogram:
    buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
    return Histogram(f"rejoin_{name}", says, buckets=buckets, registry=REGISTRY)


# The worker
ATTEMPTS_STARTED = _counter("attempts_started", "Attempts begun.", mode=("fresh", "continued"))
ATTEMPTS_LOST = _counter(
    "attempts_lost",
    "Attempts that may not go on writing, by what their worker was told.",
    reason=("FENCED", "ABANDONED", "GONE", "UNREACHABLE", "LOG_LOST"),
)
ATTEMPTS_RUNNING = _gauge("attempts_running", "Attempts that run now.")
GENERATIONS_RELEASED = _counter("generations_released", "Generations handed over to another worker, uncharged.")
EVENTS_APPENDED = _counter("events_appended", "Events that Redis has taken.")
APPEND_SECONDS = _histogram("append_seconds", "Time of one append, which holds what all attempts had gathered.")
APPENDS_FAILED = _counter("appends_failed", "Appends that Redis did not answer or refused; they are sent again.")
GAPS_HEALED = _counter("gaps_healed", "Times that Redis had lost the last events of a log and was given them again.")
PENDING_BYTES = _gauge("pending_bytes", "Bytes of events that Redis has not taken yet.")

# The api
GENERATIONS_CREATED = _counter("generations_created", "Generations that callers began.")
OPEN_READERS = _gauge("open_readers", "Open streams, waiting requests and WebSockets.")
READERS_STARTED = _counter("readers_started", "Readers set on their way.", resumed=("no", "yes"))
READERS_TIMED_OUT = _counter("readers_timed_out", "Readers cut off because they did not take what they were sent.")
HOLES_FILLED = _counter("holes_filled", "Reads of a log that found what no push had brought.")
TAIL_CONNECTIONS = _counter("tail_connections", "Times that the subscription was connected: 1, and more after trouble.")
QUEUE_DEPTH = _gauge("queue_depth", "Hints that wait for a worker; the same from every api, NaN while Redis is away.")

# Both
GENERATIONS_ENDED = _counter(
    "generations_ended",
    "Generations whose end this process wrote.",
    status=("completed", "incomplete", "failed", "cancelled"),
)
HINTED_AGAIN = _counter("generations_hinted_again", "Generations whose lease had ended, given to the queue again.")
LOOP_LAG_SECONDS = _histogram("loop_lag_seconds", "How late the event loop wakes a task, measured ten times a second.")


async def watch_loop() -> None:
    """Measure the event loop, until cancelled: everything this process does is late by about as much."""
    while True:
        due = time.monotonic() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        LOOP_LAG_SECONDS.observe(max(time.monotonic() - due, 0.0))


def serve(host: str, port: int) -> None:
    """Answer Prometheus on a port of its own, in a thread of its own; port 0: do not.

    Raises SettingsError where the port cannot be had."""
    if port == 0:
        return
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a third more lines, of which nobody asks
    try:
        prometheus_client.start_http_server(port, host, REGISTRY)
    except OSError as error:
        raise SettingsError(
            f"REJOIN_METRICS_PORT: {host}:{port}: {error.strerror}; each process on a machine needs a port of its own"
        ) from None
