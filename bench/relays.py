"""The relays, side by side: how late an event is, what it costs, what a connection costs, replay, a storm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.drive import FAULTS, Counts, Program, Target, faults, loading
from bench.figures import OWN, Figures
from bench.house import House, house
from bench.programs import Missing
from bench.systems import Relay, Stream, targets

LOADS = ((100, 100), (1000, 30))  # streams, and events a second on each
GROWTH = ((10, 500), (100, 50), (500, 10), (2000, 2.5))  # streams at 5,000 events/s
RATES = ((100, 10), (100, 50), (100, 100), (100, 200), (100, 300))  # 1,000 to 30,000 events/s
REPLAYED = 5000
FLIGHT = 100  # connections that are opened at once where memory is asked for: what a request needs for a moment stays
TOO_SLOW = {"durable": 100 * 100}  # events/s beyond which a system is not asked for more


@dataclass(frozen=True)
class Run:
    """What one load gave: the clients' counts, the feeder's, CPU seconds of the relay and of the store."""

    counts: Counts
    fed: Counts
    cpu: float
    store_cpu: float
    memory: int


@asynccontextmanager
async def started(home: House, kinds: Sequence[type[Relay]], figures: Figures) -> AsyncIterator[list[Relay]]:
    """Those of the systems that can be had here, running; the others are named."""
    async with AsyncExitStack() as opened:
        systems = []
        for kind in kinds:
            system = kind()
            try:
                await system.start(home)
            except Missing as why:
                figures.note(f"{kind.name} is NOT MEASURED: {why}")
            else:
                opened.push_async_callback(system.stop)
                systems.append(system)
        yield systems


async def load_once(
    home: House, system: Relay, streams: Sequence[Stream], rate: float, seconds: float, skip: int = 0
) -> Run:
    """Open a client for each stream, then write, until all have everything."""
    events = int(rate * seconds) // len(streams)
    clients = targets(system, streams, events)
    feed = system.feeding(streams, rate, seconds)
    limit = str(seconds * 3 + 25)
    async with AsyncExitStack() as opened:
        if system.feeds_itself:
            await opened.enter_async_context(feed)
            await feed.says("ready")
        load = loading(home.programs["load"], home.folder, clients, "--seconds", limit, "--skip", str(skip))
        await opened.enter_async_context(load)
        await load.says("ready")
        await asyncio.sleep(0.2)
        cpu, store_cpu = machine.cpu_seconds(system.pids), machine.cpu_seconds([home.store_pid])
        if system.feeds_itself:
            feed.let_go("go")
        else:
            await opened.enter_async_context(feed)
        await asyncio.sleep(seconds * 0.7)
        memory = machine.memory_bytes(system.pids)
        counts = await load.result()
        cpu, store_cpu = machine.cpu_seconds(system.pids) - cpu, machine.cpu_seconds([home.store_pid]) - store_cpu
        feed.let_go()
        return Run(counts, await feed.result(), cpu, store_cpu, memory)


async def latency(
    figures: Figures, programs: dict[str, Path], rounds: int, seconds: float, kinds: Sequence[type[Relay]]
) -> None:
    """How late an event is at its client, and what the relay spends on it."""
    async with house(programs) as home, started(home, kinds, figures) as systems:
        for n in range(rounds):
            for streams, each in LOADS:
                for system in systems:
                    if streams * each > TOO_SLOW.get(system.name, 10**9):
                        continue
                    busy = await machine.wait_for_quiet()
                    run = await load_once(
                        home, system, await system.streams(streams), streams * each, seconds, skip=int(each / 4)
                    )
                    _keep(figures, f"relay {streams * each // 1000}k/s", system.name, run)
                    _say(n, f"{streams} x {each}/s", system.name, run, busy)


def _keep(figures: Figures, figure: str, system: str, run: Run) -> None:
    counts = run.counts
    figures.add(f"{figure}: p50", system, counts["latency"]["p50"], "ms")
    figures.add(f"{figure}: p99", system, counts["latency"]["p99"], "ms")
    figures.add(f"{figure}: cpu per event", system, run.cpu / max(1, counts["events"]) * 1e6, "µs")
    figures.add(f"{figure}: store's cpu per event", system, run.store_cpu / max(1, counts["events"]) * 1e6, "µs")
    figures.curve(figure, system, counts["latency"]["curve"])
    check(figures, system, run)


def check(figures: Figures, system: str, run: Run) -> None:
    found = faults(run.counts)
    figures.checked(system, run.counts["expected"], found)
    if found:
        what = {name: run.counts[name] for name in FAULTS}
        figures.note(f"{system}: not all events came once and in order: {what} {run.counts['complaint'][:200]}")
    if run.fed["worst_lag_ms"] > 250:
        figures.note(f"{system}: the feeder was held up by as much as {run.fed['worst_lag_ms']:.0f} ms: saturated")


def _say(n: int, load: str, system: str, run: Run, busy: float) -> None:
    times, events = run.counts["latency"], max(1, run.counts["events"])
    print(
        f"  round {n + 1}, {load}, {system}: p50 {times['p50']:.3f} ms, p99 {times['p99']:.2f} ms, "
        f"{run.cpu / events * 1e6:.1f} µs/event, store {run.store_cpu / events * 1e6:.1f} µs/event"
        f"{f', {busy:.0%} busy before' if busy > machine.QUIET_SHARE else ''}",
        flush=True,
    )


async def growth(
    figures: Figures, programs: dict[str, Path], rounds: int, seconds: float, kinds: Sequence[type[Relay]]
) -> None:
    """What an event costs as there are more streams, or more events; memory of connections that are busy."""
    async with house(programs) as home, started(home, kinds, figures) as systems:
        for _ in range(rounds):
            for streams, each in dict.fromkeys((*GROWTH, *RATES)):
                for system in systems:
                    await machine.wait_for_quiet()
                    made = await system.streams(streams)
                    run = await load_once(home, system, made, streams * each, seconds)
                    cost = run.cpu / max(1, run.counts["events"]) * 1e6
                    if (streams, each) in GROWTH:
                        figures.add(f"cpu per event, {streams} streams at 5,000/s", system.name, cost, "µs")
                    if (streams, each) in RATES:
                        figures.add(f"cpu per event, 100 streams at {streams * each:,.0f}/s", system.name, cost, "µs")
                    print(f"  {streams} x {each:g}/s, {system.name}: {cost:.1f} µs/event", flush=True)
                    check(figures, system.name, run)


async def memory(
    figures: Figures,
    programs: dict[str, Path],
    sizes: Sequence[int],
    kinds: Sequence[type[Relay]],
    active_seconds: float,
) -> None:
    """What a connection costs that waits, each on a stream of its own; and what it costs while it is written to."""
    for kind in kinds:
        async with house(programs) as home, started(home, [kind], figures) as systems:
            for system in systems:
                await _memory_of(figures, home, system, sizes, active_seconds)


async def _memory_of(figures: Figures, home: House, system: Relay, sizes: Sequence[int], active_seconds: float) -> None:
    async with AsyncExitStack() as opened:
        streams = await system.streams(max(sizes))
        if system.feeds_itself:
            feed = await opened.enter_async_context(system.feeding(streams, 1, 0))
            await feed.says("ready")
        await _hold(home, system, streams[:100])  # what is only made once is made now
        before, held = machine.memory_bytes(system.pids), 0
        store_before = machine.memory_bytes([home.store_pid])
        for size in sizes:
            await opened.enter_async_context(loader := _holding(home, system, streams[held:size]))
            await loader.says("ready", timeout=120)
            held = size
            await asyncio.sleep(0.5)
            each = (machine.memory_bytes(system.pids) - before) / size / 1024
            figures.add(f"memory per idle connection, {size}", system.name, each, "KiB")
        store = (machine.memory_bytes([home.store_pid]) - store_before) / held / 1024
        figures.add(f"memory per idle connection, {max(sizes)}: the store's", system.name, store, "KiB")
        print(f"  memory, {system.name}: {each:.1f} KiB a connection", flush=True)
    if active_seconds and not system.feeds_itself:
        made = await system.streams(max(sizes))
        run = await load_once(home, system, made, 5000, max(active_seconds, max(sizes) / 1000))
        figures.add(
            f"memory per active connection, {max(sizes)}",
            system.name,
            (run.memory - before) / max(sizes) / 1024,
            "KiB",
        )
        check(figures, system.name, run)


def _holding(home: House, system: Relay, streams: Sequence[Stream]) -> Program:
    options = ("--hold", "--seconds", "600", "--flight", str(FLIGHT))
    return loading(home.programs["load"], home.folder, targets(system, streams, 1), *options)


async def _hold(home: House, system: Relay, streams: Sequence[Stream]) -> None:
    async with _holding(home, system, streams) as load:
        await load.says("ready")
        load.let_go()
        await load.result()


async def replay(
    figures: Figures, programs: dict[str, Path], rounds: int, times: int, kinds: Sequence[type[Relay]]
) -> None:
    """From the request to the last of 5,000 events that had happened; and to the one that a client has missed."""
    async with house(programs) as home, started(home, [kind for kind in kinds if kind.replays], figures) as systems:
        for _ in range(rounds):
            for system in systems:
                async with AsyncExitStack() as opened:
                    streams = await system.streams(1)
                    feed = await opened.enter_async_context(system.feeding(streams, REPLAYED * 2, 0.5))
                    if system.feeds_itself:
                        await feed.says("ready")
                        feed.let_go("go")
                        await asyncio.sleep(1.5)
                    else:
                        await feed.result()
                    await machine.wait_for_quiet()
                    whole = targets(system, streams, REPLAYED) * times
                    counts = await _sequentially(home, whole)
                    _keep_times(figures, f"replay of {REPLAYED:,} events", system.name, counts, "whole")
                    if system.name == OWN:
                        epoch = streams[0].feed.rpartition("\t")[2]
                        path = f"{streams[0].path}?after={epoch}-{REPLAYED - 1}"
                        last = [Target(system.port, 0, REPLAYED, path, first=REPLAYED - 1)] * times
                        _keep_times(
                            figures, "resume: request to missed event", OWN, await _sequentially(home, last), "first"
                        )


async def _sequentially(home: House, clients: Sequence[Target]) -> Counts:
    async with loading(home.programs["load"], home.folder, clients, "--flight", "1", "--seconds", "60") as load:
        return await load.result()


def _keep_times(figures: Figures, figure: str, system: str, counts: Counts, which: str) -> None:
    figures.add(f"{figure}: p50", system, counts[which]["p50"], "ms")
    figures.checked(system, counts["expected"], faults(counts))
    print(f"  {figure}, {system}: {counts[which]['p50']:.2f} ms", flush=True)
    if faults(counts):
        figures.note(f"{system}: {figure}: not all events came: {counts['lost']} lost {counts['complaint'][:200]}")


async def storm(figures: Figures, programs: dict[str, Path], clients: int, kinds: Sequence[type[Relay]]) -> None:
    """So many clients at once, after a restart say: until each has the 20 events that are there."""
    for kind in [kind for kind in kinds if kind.replays and not kind.feeds_itself]:
        async with house(programs) as home, started(home, [kind], figures) as systems:
            for system in systems:
                streams = await system.streams(100)
                async with system.feeding(streams, 20_000, 0.1) as feed:
                    await feed.result()
                everyone = [client for _ in range(clients // 100) for client in targets(system, streams, 20)]
                cpu = machine.cpu_seconds(system.pids)
                options = ("--seconds", "60", "--flight", "2000", "--hold", "--whole")
                async with loading(home.programs["load"], home.folder, everyone, *options) as load:
                    try:
                        await load.says("ready", timeout=60)
                    except (TimeoutError, AssertionError):
                        figures.note(f"{system.name}: a storm of {clients:,} clients was not served within 60 s")
                    load.let_go()
                    counts = await load.result()
                used = machine.cpu_seconds(system.pids) - cpu
                got = int(counts["answered"])
                figures.add(f"storm of {clients:,}: all have begun", system.name, counts["first"]["max"] / 1000, "s")
                figures.add(f"storm of {clients:,}: clients served", system.name, got, "")
                figures.add(f"storm of {clients:,}: cpu per client", system.name, used / max(1, got) * 1e6, "µs")
                away = int(counts["turned_away"])  # told to come back, as an EventSource does: no loss
                figures.add(f"storm of {clients:,}: told to come back", system.name, away, "")
                figures.checked(system.name, counts["events"], faults(counts) - away)
                if faults(counts) > away:
                    figures.note(f"{system.name}: the storm: { ({name: counts[name] for name in FAULTS}) }")
                print(f"  storm, {system.name}: {got:,} of {clients:,} within {counts['first']['max'] / 1000:.1f} s")
