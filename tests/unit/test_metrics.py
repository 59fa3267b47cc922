"""The figures of one process: a late event loop is seen, every label is there from the start, port 0 opens nothing."""

from __future__ import annotations

import asyncio
import threading
import time

from shared import metrics
from tests.waiting import wait_until


def lag(suffix: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"rejoin_loop_lag_seconds_{suffix}", labels) or 0.0


async def test_a_loop_that_is_held_up_is_seen() -> None:
    """Half a second in which nothing else runs is in the sum and beyond the buckets below it."""
    count, total, quick = lag("count"), lag("sum"), lag("bucket", le="0.25")
    watching = asyncio.create_task(metrics.watch_loop())
    try:
        await wait_until(lambda: lag("count") > count)
        time.sleep(0.5)
        await wait_until(lambda: lag("count") - count > lag("bucket", le="0.25") - quick)
        assert lag("sum") - total > 0.25
    finally:
        watching.cancel()


def test_every_counter_begins_at_zero() -> None:
    """Each counter with a label has its values before anything happened: the first event is an increase."""
    for family in metrics.REGISTRY.collect():
        if family.type == "counter" and family.name.startswith("rejoin_"):
            assert family.samples, family.name


def test_no_port_opens_none() -> None:
    """Port 0 starts neither a server nor a thread."""
    before = threading.active_count()
    metrics.serve("127.0.0.1", 0)
    assert threading.active_count() == before
