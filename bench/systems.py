"""The relays side by side. Each knows how to start itself, how to make streams, and how they are written to."""

from __future__ import annotations

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2

from bench import programs
from bench.drive import Program, Target, written
from bench.house import PREFIX, TENANT, House, answers
from shared import lua
from shared.event_log import Hint, new_id
from shared.prompt import Message, Prompt
from tests.processes import Process, free_port

T = TypeVar("T")
POST_LANES = 16


@dataclass(frozen=True)
class Stream:
    """One stream: the feeder's line for it, and the path at which a client follows it."""

    feed: str
    path: str


class Relay(ABC):
    """One system: one process of its own in a house. `feeds_itself`: its feeder has to be there before its clients."""

    name = ""
    feeds_itself = False
    replays = True

    def __init__(self) -> None:
        self.port = 0
        self.processes: list[Process] = []

    async def start(self, house: House) -> None:
        self.house = house
        self.processes = [await self.launch(house)]

    @abstractmethod
    async def launch(self, house: House) -> Process: ...

    @abstractmethod
    async def streams(self, n: int) -> list[Stream]:
        """Make so many."""

    @abstractmethod
    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        """What writes to them: `rate` events a second over all of them."""

    async def stop(self) -> None:
        await self.house.end(*self.processes)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def lines(self, streams: Iterable[Stream]) -> Path:
        return written(self.house.folder / f"streams-{self.name}.txt", (stream.feed for stream in streams))

    def feeder(
        self, mode: str, port: int, streams: Sequence[Stream], rate: float, seconds: float, *more: str
    ) -> Program:
        return Program(
            self.house.programs["feed"], mode, str(port), str(rate), str(seconds), self.lines(streams), *more
        )


class Rejoin(Relay):
    """Rejoin's api; the feeder calls the append script as a worker does."""

    name = "rejoin"

    async def launch(self, house: House) -> Process:
        process, self.port = await house.api()
        self._sha = await house.redis.script_load(lua.source("append"))
        return process

    async def streams(self, n: int) -> list[Stream]:
        return await bounded(32, [self._stream for _ in range(n)])

    async def _stream(self) -> Stream:
        log, generation_id = self.house.event_log, new_id()
        prompt = Prompt(model="bench", messages=[Message(role="user", content="bench")])
        await log.create(generation_id, tenant=TENANT, provider="openai_compatible", prompt=prompt)
        claim = await log.claim(Hint(generation_id, 0, 1), secrets.token_hex(16))
        assert claim is not None, "the claim was refused"
        keys = log.keys
        feed = [keys.order(generation_id), keys.log(generation_id), keys.leases(generation_id[-1]), generation_id]
        return Stream("\t".join([*feed, keys.push(generation_id), str(claim.epoch)]), self.path(generation_id))

    def path(self, generation_id: str) -> str:
        return f"/v1/generations/{generation_id}/events"

    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        return self.feeder("rejoin", self.house.store.port, streams, rate, seconds, self._sha)


class Floor(Rejoin):
    """The relay in C, on the same logs and pushes."""

    name = "floor"
    replays = False

    async def launch(self, house: House) -> Process:
        self._sha = await house.redis.script_load(lua.source("append"))
        self.port = free_port()
        argv = [str(house.programs["floor"]), str(self.port), str(house.store.port), f"{PREFIX}:push:"]
        process = house.start("floor", argv)
        await listens(process, self.port)
        return process

    def path(self, generation_id: str) -> str:
        return f"/{generation_id}"


class Naive(Relay):
    """A StreamingResponse over one XREAD for each client."""

    name = "naive"

    async def launch(self, house: House) -> Process:
        process, self.port = await house.uvicorn("bench.naive:naive")
        return process

    async def streams(self, n: int) -> list[Stream]:
        keys = [f"naive:{secrets.token_hex(8)}" for _ in range(n)]
        return [Stream(key, f"/streams/{key}") for key in keys]

    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        return self.feeder("xadd", self.house.store.port, streams, rate, seconds)


class Nchan(Relay):
    """nginx's module, one worker process, channels in its memory."""

    name = "nchan"

    async def launch(self, house: House) -> Process:
        nginx, module = programs.nchan()
        self.port = free_port()
        folder = house.folder / "nchan"
        folder.mkdir(exist_ok=True)
        text = (programs.HERE / "nchan.conf").read_text()
        for name, value in (("MODULE", str(module)), ("FOLDER", str(folder)), ("PORT", str(self.port))):
            text = text.replace(name, value)
        conf = folder / "nginx.conf"
        conf.write_text(text)
        process = house.start("nchan", [nginx, "-c", str(conf), "-p", str(folder), "-e", str(folder / "error.log")])
        await listens(process, self.port)
        return process

    async def streams(self, n: int) -> list[Stream]:
        ids = [secrets.token_hex(8) for _ in range(n)]
        return [Stream(f"/pub/{one}", f"/sub/{one}") for one in ids]

    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        return self.feeder("post", self.port, streams, rate, seconds, str(POST_LANES), "application/json")


class Durable(Relay):
    """The reference server of Durable Streams, in memory."""

    name = "durable"

    async def launch(self, house: House) -> Process:
        node, folder = await asyncio.to_thread(programs.node_with_peers)
        self.port = free_port()
        process = house.start("durable", [node, str(folder / "durable.mjs"), str(self.port)])
        await listens(process, self.port)
        return process

    async def streams(self, n: int) -> list[Stream]:
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:

            async def one() -> Stream:
                path = f"/bench/{secrets.token_hex(8)}"
                headers = {"Content-Type": "application/json"}
                answer = await http.put(f"http://127.0.0.1:{self.port}{path}", headers=headers)
                assert answer.status_code in (200, 201), answer.text
                return Stream(path, f"{path}?offset=-1&live=sse")

            return await bounded(16, [one for _ in range(n)])

    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        return self.feeder("post", self.port, streams, rate, seconds, str(POST_LANES), "application/json")


class Resumable(Relay):
    """Vercel's resumable-stream: the maker of the streams keeps them, and publishes to each client."""

    name = "resumable"
    feeds_itself = True

    async def launch(self, house: House) -> Process:
        self._node, self._folder = await asyncio.to_thread(programs.node_with_peers)
        self.port = free_port()
        argv = [self._node, str(self._folder / "resumable.mjs"), "relay", str(self.port), str(house.store.port)]
        process = house.start("resumable", argv)
        await answers(process, f"http://127.0.0.1:{self.port}/alive")
        return process

    async def streams(self, n: int) -> list[Stream]:
        ids = [secrets.token_hex(8) for _ in range(n)]
        return [Stream(one, f"/{one}") for one in ids]

    def feeding(self, streams: Sequence[Stream], rate: float, seconds: float) -> Program:
        script, port = self._folder / "resumable.mjs", str(self.house.store.port)
        return Program(self._node, script, "feed", port, str(rate), str(seconds), self.lines(streams))


RELAYS: tuple[type[Relay], ...] = (Rejoin, Floor, Naive, Nchan, Resumable, Durable)


def targets(system: Relay, streams: Sequence[Stream], end: int, first: int = 0) -> list[Target]:
    """One client for each stream."""
    return [Target(system.port, number, end, stream.path, first) for number, stream in enumerate(streams)]


async def listens(process: Process, port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.running, process.log()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


async def bounded(limit: int, makers: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all of these, so many at a time."""
    gate = asyncio.Semaphore(limit)

    async def one(make: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await make()

    return list(await asyncio.gather(*map(one, makers)))
