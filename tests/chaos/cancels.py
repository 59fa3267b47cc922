"""A cancel stops the bill: from the caller's request to the upstream's socket being closed."""

from __future__ import annotations

import asyncio
import time

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.streams import NEVER, in_time, p99_under, spread
from tests.stack import gather_bounded
from tests.upstream import Script
from tests.waiting import wait_until

CANCELS = 200  # of each kind
AT_ONCE = 8
PATIENCE_SECONDS = 5.0
# what the upstream is doing -> its script, how many words it has sent by then, the goal in seconds
KINDS = {
    "while tokens flow": (Script(count=5_000, pace_seconds=0.01), 5, 0.25),
    "before the headers": (Script(stall_headers=True), 0, 0.5),
    "before the first token": (Script(stall_at=0), 0, 0.5),
    "in silence between tokens": (Script(count=20, stall_at=5), 5, 0.5),
}


async def run(say: Say, quick: bool) -> list[Row]:
    rows = []
    count = CANCELS // 10 if quick else CANCELS
    async with house(apis=2, workers=2) as one:
        for kind, (script, words, goal) in KINDS.items():
            names = [f"{kind} {n}".replace(" ", "-") for n in range(count)]
            cancels = (_cancel(one, n, name, script, words) for n, name in enumerate(names))
            took = await gather_bounded(AT_ONCE, *cancels)
            say(f"{kind}: {spread(took)}")
            rows.append(Row("cancel", f"to the closed upstream, {kind}", spread(took), f"p99 < {goal * 1000:g} ms",
                            p99_under(took, goal)))  # fmt: skip
    return rows


async def _cancel(one: House, n: int, model: str, script: Script, words: int) -> float:
    """Begin, wait until the upstream is where it is to be, cancel; the seconds until its socket was closed by us."""
    one.upstream.script(model, script)
    api = one.apis[n % len(one.apis)]
    generation = await one.stack.create(model, api=api)
    await one.upstream.wait_hits(model)
    (request,) = one.upstream.requests_of(model)
    await asyncio.sleep(0.1 + n % 7 * 0.05)  # cancels come at any time, not only right after a beginning
    await wait_until(lambda: request.chunks_sent >= words)
    assert request.closed_at is None
    started = time.monotonic()
    state = await one.stack.cancel(generation, api)
    assert state["status"] == "cancelled"
    closed = await in_time(lambda: request.closed_at is not None, PATIENCE_SECONDS)
    if not closed or not request.left_early or len(one.upstream.requests_of(model)) != 1:
        return NEVER
    assert request.closed_at is not None
    return request.closed_at - started
