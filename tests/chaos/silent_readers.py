"""A thousand clients that ask and never read: the api does not grow, closes them, and they may come back."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.chaos.sockets import clients_of, deaf_socket
from tests.chaos.streams import NEVER, need_descriptors, resident_bytes
from tests.reader import Reader, check_history
from tests.stack import Api
from tests.upstream import Script

READERS = 1_000
GENERATIONS = 5
SCRIPT = Script(chunks=["x" * 4000] * 1_200, pace_seconds=0.005)  # 5 MB in 6 s
MAX_GROWTH_MIB = 100
WITHIN_SECONDS = 30.0  # the api gives them 20
PATIENCE_SECONDS = 60.0
RESUMED = 10  # of them come back


@dataclass(frozen=True)
class Seen:
    """What became of the deaf ones."""

    growth_mib: float
    closed: int
    took: float
    whole: int


async def run(say: Say, quick: bool) -> list[Row]:
    count = READERS // 10 if quick else READERS
    need_descriptors(count + 500)
    async with house(apis=1, workers=1) as one:
        one.upstream.script("big", SCRIPT)
        seen = await _be_deaf(one, count, say)
    return [
        Row("silent readers", f"growth of the api with {count:,} that never read", f"{seen.growth_mib:.0f} MiB",
            f"< {MAX_GROWTH_MIB} MiB", seen.growth_mib < MAX_GROWTH_MIB),
        Row("silent readers", "closed by the api", f"{seen.closed:,} of {count:,}, the last after {seen.took:.1f} s",
            f"all within {WITHIN_SECONDS:g} s", seen.closed == count and seen.took < WITHIN_SECONDS),
        Row("silent readers", "have it all when they come back", f"{seen.whole} of {RESUMED}", "all",
            seen.whole == RESUMED),
    ]  # fmt: skip


async def _be_deaf(one: House, count: int, say: Say) -> Seen:
    """All ask while the answers are being given; nobody else reads them meanwhile."""
    generations = [await one.stack.create("big") for _ in range(GENERATIONS)]
    readers = [Reader(one.apis[0].url + generation["events_url"]) for generation in generations]
    await asyncio.gather(*(reader.connect(stop_after=5) for reader in readers))
    (api,) = one.apis
    before = resident_bytes(api.process.pid)
    began = time.monotonic()
    socks = [deaf_socket(readers[n % GENERATIONS].url) for n in range(count)]
    most, ends = await _watch(socks, api, began)
    say(f"{len(ends)} of {count} closed, the api grew from {before >> 20} to {most >> 20} MiB")
    for sock in socks:
        sock.close()
    for reader in readers:
        await reader.read_to_end()
    whole = [await _comes_back(readers[n % GENERATIONS], n) for n in range(RESUMED)]
    took = max(ends.values(), default=NEVER) if len(ends) == count else NEVER
    return Seen((most - before) / 2**20, len(ends), took, sum(whole))


async def _watch(socks: Sequence[socket.socket], api: Api, began: float) -> tuple[int, dict[int, float]]:
    """Until the api has closed all of them: the most memory it had, and when it let each one go.

    The api's own sockets are looked at: a client that takes nothing does not even hear that it was closed."""
    by_port = {sock.getsockname()[1]: sock for sock in socks}
    left, taken = set(by_port), set[int]()  # one that the api has not accepted yet is not one that it closed
    most, ends = 0, {}
    while left and time.monotonic() - began < PATIENCE_SECONDS:
        held = await asyncio.to_thread(clients_of, api.port, api.process.pid)
        taken |= left & held
        over = (left & taken) - held | {port for port in left if _was_turned_away(by_port[port])}
        ends |= dict.fromkeys(over, time.monotonic() - began)
        left -= over
        most = max(most, resident_bytes(api.process.pid))
        await asyncio.sleep(0.2)
    return most, ends


def _was_turned_away(sock: socket.socket) -> bool:
    """Does a whole answer lie there, which only says when to come back? Then nothing is kept for this client."""
    try:
        answer = sock.recv(1024, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False
    return b"content-length: " in answer and b"\nretry: " in answer


async def _comes_back(full: Reader, n: int) -> bool:
    """One that heard a little, or nothing, asks for the rest: with what it has, that is the very log."""
    late = Reader(full.url, blocks=full.blocks[: n * 3])
    await late.read_to_end()
    check_history(late.blocks)
    return late.raw == full.raw and late.text == SCRIPT.text()
