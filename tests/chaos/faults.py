"""The faults of the mixed run: what can go wrong, when and to whom, all drawn from one seed, and how each is done.

A fault knows the place it hurts (`worker 1`), not the process that stands there: whoever died was replaced.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.chaos.house import House
from tests.processes import Process, Valkey, free_port
from tests.proxy import Proxy
from tests.stack import Api

READY_SECONDS = 60.0


@dataclass(frozen=True)
class Fault:
    """`place`: the worker, api or proxy it happens to. `seconds`: how long it lasts. `pause`: before the next one."""

    kind: str
    place: int
    seconds: float
    pause: float


@dataclass(frozen=True)
class Kind:
    """How often a fault is drawn (`weight`), whom it hits, and how long it lasts."""

    weight: int
    places: str
    shortest: float = 0.0
    longest: float = 0.0


KINDS: dict[str, Kind] = {
    "worker killed": Kind(6, "workers"),
    "worker stopped": Kind(5, "workers", 1.2, 3.0),  # longer than a lease
    "worker terminated": Kind(5, "workers"),
    "store killed": Kind(3, "store", 0.1, 5.0),
    "proxy frozen": Kind(6, "proxies", 0.1, 4.0),
    "proxy frozen one way": Kind(4, "proxies", 0.1, 4.0),
    "connections cut": Kind(5, "proxies"),
    "replies dropped": Kind(8, "proxies"),
    "black hole": Kind(3, "proxies", 0.5, 3.0),
    "slow network": Kind(3, "proxies", 0.5, 3.0),
    "api killed": Kind(4, "apis"),
    "api terminated": Kind(4, "apis"),
}


def schedule(seed: int, count: int, *, workers: int, apis: int, pause: float) -> list[Fault]:
    """`count` faults, the same for the same seed; every kind is among the first of them."""
    chance = random.Random(seed)
    places = {"workers": workers, "apis": apis, "proxies": workers + apis, "store": 1}
    weights = [kind.weight for kind in KINDS.values()]
    names = [*chance.sample(list(KINDS), min(count, len(KINDS)))]
    names += chance.choices(list(KINDS), weights, k=count - len(names))
    return [
        Fault(
            name,
            chance.randrange(places[KINDS[name].places]),
            chance.uniform(KINDS[name].shortest, KINDS[name].longest),
            chance.uniform(0, 2 * pause),
        )
        for name in names
    ]


@dataclass
class Place:
    """Where a process stands: its proxy stays when the process is replaced. `hurt`: one fault at a time."""

    name: str
    proxy: Proxy
    env: dict[str, str]
    process: Process | None = None
    hurt: asyncio.Lock = field(default_factory=asyncio.Lock)
    expected_to_end: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.env['REJOIN_PORT']}"


@dataclass
class Town:
    """The processes of a mixed run, each behind a proxy of its own, and replaced when it ends."""

    house: House
    apis: list[Place] = field(default_factory=list)
    workers: list[Place] = field(default_factory=list)
    restarts: int = 0
    store_hurt: asyncio.Lock = field(default_factory=asyncio.Lock)
    store_deaths: list[float] = field(default_factory=list)  # monotonic
    ended_by_themselves: list[str] = field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        return [*self.workers, *self.apis]

    def start(self, place: Place) -> None:
        argv = [sys.executable, "-m", place.name.split()[0]]
        place.expected_to_end = False
        place.process = self.house.processes.launch(place.name.split()[0], argv, place.env)

    async def replace_the_dead(self) -> None:
        """Start again what has ended, for ever; what ended without having been told to is written down."""
        while True:
            for place in self.places:
                if place.process is not None and not place.process.running:
                    if not place.expected_to_end:
                        last = place.process.log().strip().splitlines()[-3:]
                        self.ended_by_themselves.append(f"{place.name}: {place.process.popen.returncode} {last}")
                    self.restarts += 1
                    self.start(place)
            await asyncio.sleep(0.05)

    async def ready(self, place: Place) -> None:
        """Until the process that stands there has said that it works."""
        assert place.process is not None
        if place in self.workers:
            await place.process.says("worker.ready", timeout=READY_SECONDS)
        else:
            await self.house.stack.ready(Api(place.process, int(place.env["REJOIN_PORT"])))


@asynccontextmanager
async def town(house: House, *, apis: int, workers: int) -> AsyncIterator[Town]:
    """So many places, all started. House and proxies end what is started here."""
    one = Town(house)
    for name, count, places in (("api", apis, one.apis), ("worker", workers, one.workers)):
        for number in range(count):
            proxy = await house.proxy()
            env = {**house.stack.env, "REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"}
            places.append(Place(f"{name} {number}", proxy, {**env, "REJOIN_PORT": str(free_port())}))
    for place in one.places:
        one.start(place)
    for place in one.places:
        await one.ready(place)
    keeper = asyncio.create_task(one.replace_the_dead())
    try:
        yield one
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def do(fault: Fault, town: Town) -> None:
    """Hurt, wait, and put right what does not come right by itself."""
    kind = KINDS[fault.kind]
    if kind.places == "store":
        async with town.store_hurt:
            town.store_deaths.append(time.monotonic())
            await _kill_store(town.house.store, fault.seconds)
        return
    places = {"workers": town.workers, "apis": town.apis, "proxies": town.places}[kind.places]
    place = places[fault.place]
    async with place.hurt:
        await DOING[fault.kind](place, fault.seconds)


async def _kill_store(store: Valkey, seconds: float) -> None:
    await store.kill()
    await asyncio.sleep(seconds)
    await asyncio.to_thread(store.start)


async def _kill(place: Place, seconds: float) -> None:
    assert place.process is not None
    place.expected_to_end = True
    place.process.signal(signal.SIGKILL)
    await place.process.wait()


async def _terminate(place: Place, seconds: float) -> None:
    assert place.process is not None
    place.expected_to_end = True
    await place.process.terminate(timeout=READY_SECONDS)


async def _stop_and_go_on(place: Place, seconds: float) -> None:
    assert place.process is not None
    process = place.process
    process.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    process.signal(signal.SIGCONT)


async def _freeze(place: Place, seconds: float) -> None:
    place.proxy.freeze()
    await asyncio.sleep(seconds)
    place.proxy.thaw()


async def _freeze_one_way(place: Place, seconds: float) -> None:
    place.proxy.freeze("up" if seconds > 2 else "down")
    await asyncio.sleep(seconds)
    place.proxy.thaw()


async def _cut(place: Place, seconds: float) -> None:
    place.proxy.cut()


async def _drop_replies(place: Place, seconds: float) -> None:
    """To scripts only: what is lost then is the answer to something that was written."""
    place.proxy.drop_replies(3, to=b"EVALSHA")


async def _black_hole(place: Place, seconds: float) -> None:
    place.proxy.black_hole = True
    place.proxy.cut()
    await asyncio.sleep(seconds)
    place.proxy.black_hole = False
    place.proxy.cut()


async def _slow(place: Place, seconds: float) -> None:
    place.proxy.delay_seconds = 0.1
    await asyncio.sleep(seconds)
    place.proxy.delay_seconds = 0.0


DOING: dict[str, Callable[[Place, float], Awaitable[None]]] = {
    "worker killed": _kill,
    "worker stopped": _stop_and_go_on,
    "worker terminated": _terminate,
    "proxy frozen": _freeze,
    "proxy frozen one way": _freeze_one_way,
    "connections cut": _cut,
    "replies dropped": _drop_replies,
    "black hole": _black_hole,
    "slow network": _slow,
    "api killed": _kill,
    "api terminated": _terminate,
}
