"""`rejoin top`: the queue, the workers, what runs and the store, looked at again and again, straight from Redis.

It reads what the protocol keeps anyway (docs/protocol.md) and writes nothing; of a log only how long it is, never what
it says. Tokens per second are the growth of logs between two looks.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from redis.asyncio.client import Pipeline
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cli.addresses import Addresses
from cli.client import Rejoin, Server
from cli.screens import Harmless, console, visible, write
from shared import observability
from shared.cluster import Servers, servers_of
from shared.config import Settings
from shared.errors import Unavailable
from shared.events import Position, parse_id
from shared.redis import PARTITIONS, TROUBLE, Client, Keys, connect, queue_url

MOST = 500  # generations that are looked at one by one: a look stays cheap, whatever runs
RATE_LOOKS = 4  # tokens per second are measured over so many looks
ORDER_FIELDS = ["model", "status", "created", "attempts", "owner"]
ENDED = ("completed", "failed", "cancelled", "incomplete")
STYLES = {"in_progress": "cyan", "queued": "yellow", "ok": "green", "noeviction": "green"}
WIDE = 120
MORE = (">attempt", ">apis reading", "worker")  # columns for which a narrow screen has no room
ID_WIDTH = 32  # an id that is cut is of no use


@dataclass(frozen=True)
class Generation:
    """One that has not ended. `tokens`: events of output of its current attempt, about one for each token;
    `apis_reading`: how many apis have a reader of it."""

    id: str
    status: str
    model: str
    attempt: int
    worker: str
    age_seconds: float
    tokens: int
    tokens_per_second: float | None
    apis_reading: int


@dataclass(frozen=True)
class Worker:
    name: str
    seconds_since_sign: float
    running: int


@dataclass(frozen=True)
class Store:
    """One server, by its own INFO."""

    address: str
    version: str
    used_memory_bytes: int
    maxmemory_bytes: int
    maxmemory_policy: str
    ops_per_second: int
    connected_clients: int


@dataclass(frozen=True)
class Look:
    """What was seen at one moment, Unix seconds of Redis. `open`: all that have not ended, of which at most MOST are
    among the generations. The rate is None at the first look."""

    at: float
    queue_depth: int
    open: int
    tokens_per_second: float | None
    api: str
    api_state: str
    workers: list[Worker]
    generations: list[Generation]
    stores: list[Store]

    @property
    def running(self) -> int:
        return sum(one.status == "in_progress" for one in self.generations)


async def top(
    data: Path | None,
    default_data: Path,
    url: str | None,
    settings: Settings,
    interval_seconds: float,
    *,
    once: bool,
    as_json: bool,
) -> int:
    """Look until Ctrl-C; with `once`, or in a pipe, print one look and leave. Raises Unavailable when Redis is away."""
    observability.configure("console", "error")  # a warning would be written over the screen
    is_named = "redis_url" in settings.model_fields_set and data is None
    found = None if is_named else Addresses.read(data or default_data)
    if data is not None and (found is None or found.store is None):
        raise Unavailable(
            f"no `rejoin up` with a store of its own runs on {data}; start one, or is another folder its --data?"
        )
    redis_url = found.store if found and found.store else settings.redis_url
    api = url or (found.api if found else settings.url or Settings.model_fields["url"].default)
    where = "; is it up? See REDIS_URL"
    if not is_named and found is None:
        where = f", and no `rejoin up` runs on {default_data}: start one, or name its folder (--data) or REDIS_URL"
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(aclosing(servers_of(redis_url, connections=2)))
        queue = await stack.enter_async_context(connect(queue_url(settings, redis_url), connections=2, retries=0))
        rejoin = await stack.enter_async_context(Rejoin(Server(api, None, 0)))
        watch = Watch(servers, queue, Keys(settings.key_prefix), rejoin, api, where)
        out = console()
        if out.is_terminal and not once and not as_json:
            await _show(watch, out, interval_seconds)
        if not out.is_terminal:
            out.width = 2 * WIDE  # nobody's screen: there is room for every column
        await _print(watch, out, interval_seconds, once=once or not as_json, as_json=as_json)
    return 0


async def _print(watch: Watch, out: Console, interval_seconds: float, *, once: bool, as_json: bool) -> None:
    """Each look as a line of JSON, or one look as it would be on the screen. A rate needs two."""
    await watch.look()
    while True:
        await asyncio.sleep(interval_seconds)
        look = await watch.look()
        if as_json:
            write(orjson.dumps(asdict(look) | {"running": look.running}, option=orjson.OPT_APPEND_NEWLINE))
        else:
            _print_look(drawn(look, rows=MOST, is_wide=out.width >= WIDE), out)
        if once:
            return


def _print_look(look: RenderableType, out: Console) -> None:
    if out.is_terminal:
        out.print(Harmless(look))
        return
    with out.capture() as captured:  # tables fill their last column, which in a file is but blanks
        out.print(Harmless(look))
    write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()).encode())


async def _show(watch: Watch, out: Console, interval_seconds: float) -> None:
    """The live screen. While Redis is away it keeps what was seen last, and says so."""
    look: Look | None = None
    with Live(console=out, screen=True, auto_refresh=False, redirect_stderr=False) as live:
        while True:
            try:
                look, trouble = await watch.look(), ""
            except Unavailable as error:
                trouble = error.message
            live.update(Harmless(Group(*_screen(look, trouble, out))), refresh=True)
            await asyncio.sleep(interval_seconds)


def _screen(look: Look | None, trouble: str, out: Console) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(visible(trouble), style="bold red"), Text()] if trouble else []
    if look is not None:
        used = 10 + len(look.stores) + len(look.workers) + len(parts)
        parts.append(drawn(look, rows=max(1, out.height - used), is_wide=out.width >= WIDE))
    return parts


class Watch:
    """The connections of one `rejoin top`, and the looks it has had."""

    def __init__(self, servers: Servers, queue: Client, keys: Keys, rejoin: Rejoin, api: str, where: str) -> None:
        """`where`: the end of the sentence that Redis cannot be reached."""
        self._where = where
        self._servers, self._queue, self._keys, self._rejoin, self._api = servers, queue, keys, rejoin, api
        self._seen: deque[tuple[float, int, dict[str, Position]]] = deque(maxlen=RATE_LOOKS)
        self._tokens = 0  # that were seen to come, of all generations together

    async def look(self) -> Look:
        """Raises Unavailable when Redis does not answer."""
        try:
            return await self._look()
        except TROUBLE as error:
            self._servers.doubt(error)
            raise Unavailable(f"cannot reach Redis ({type(error).__name__}: {error}){self._where}") from None

    async def _look(self) -> Look:
        async with self._queue.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zcard(self._keys.queue)
            pipe.zrange(self._keys.workers, 0, -1, withscores=True)
            (seconds, micros), depth, signs = await pipe.execute()
        now = seconds + micros / 1e6
        ids, total = await self._open_ids()
        before = self._seen[-1][2] if self._seen else {}
        ended = [one for one in before if one not in set(ids)]  # they may have grown before they ended
        orders = await self._ask_each(ids + ended, self._ask_order)
        tails = await self._ask_each(ids + ended, self._ask_tail)
        positions = {one: parse_id(tail[0][0]) for one, tail in tails.items() if tail}
        self._tokens += sum(
            _growth(before[one], positions[one], has_ended=_text(orders[one][1]) in ENDED)
            for one in before
            if one in positions
        )
        self._seen.append((now, self._tokens, {one: positions[one] for one in ids if one in positions}))
        readers = await self._readers(ids)
        generations = [self._generation(one, orders[one], now, readers[one]) for one in ids if one in positions]
        generations = [one for one in generations if one.status not in ENDED]
        held = Counter(one.worker for one in generations)
        began, tokens_before, _ = self._seen[0]
        return Look(
            at=now,
            queue_depth=depth,
            open=total,
            tokens_per_second=(self._tokens - tokens_before) / (now - began) if now > began else None,
            api=self._api,
            api_state=await self._rejoin.is_ready(),
            workers=[Worker(_text(name), max(0.0, now - sign), held[_text(name)]) for name, sign in signs],
            generations=sorted(generations, key=lambda one: (one.status, -one.age_seconds)),
            stores=[await _store(client) for client in await self._servers.all()],
        )

    def _generation(self, generation_id: str, order: Sequence[bytes | None], now: float, readers: int) -> Generation:
        model, status, created, attempts, owner = map(_text, order)
        position = self._seen[-1][2][generation_id]
        return Generation(
            id=generation_id,
            status=status,
            model=model,
            attempt=int(attempts or 0),
            worker=owner if status == "in_progress" else "",
            age_seconds=max(0.0, now - int(created or 0) / 1000),
            tokens=_tokens(position),
            tokens_per_second=self._rate(generation_id, position, now),
            apis_reading=readers,
        )

    def _rate(self, generation_id: str, position: Position, now: float) -> float | None:
        """Since the oldest look in which it was at the same attempt."""
        for at, _, positions in self._seen:
            then = positions.get(generation_id)
            if then is not None and then[0] == position[0] and now > at:
                return (position[1] - then[1]) / (now - at)
        return None

    async def _open_ids(self) -> tuple[list[str], int]:
        """Generations that have not ended, at most MOST of them, always the same ones; and how many there are."""
        replies = await self._ask_each(list(PARTITIONS), self._ask_leases)
        counts = await self._ask_each(list(PARTITIONS), lambda pipe, one: pipe.zcard(self._keys.leases(one)))
        return sorted(_text(one) for found in replies.values() for one in found)[:MOST], sum(counts.values())

    def _ask_leases(self, pipe: Pipeline, partition: str) -> None:
        pipe.zrange(self._keys.leases(partition), 0, MOST - 1)

    def _ask_order(self, pipe: Pipeline, generation_id: str) -> None:
        pipe.hmget(self._keys.order(generation_id), ORDER_FIELDS)

    def _ask_tail(self, pipe: Pipeline, generation_id: str) -> None:
        pipe.xrevrange(self._keys.log(generation_id), count=1)

    async def _ask_each(self, names: list[str], ask: Callable[[Pipeline, str], object]) -> dict[str, Any]:
        """One question about each partition or generation, in one round trip to each server."""
        homes: dict[Client, list[str]] = {}
        for name in names:
            homes.setdefault(await self._servers.at(name[-1]), []).append(name)
        answers: dict[str, Any] = {}
        for client, here in homes.items():
            async with client.pipeline(transaction=False) as pipe:
                for name in here:
                    ask(pipe, name)
                answers |= zip(here, await pipe.execute(), strict=True)
        return answers

    async def _readers(self, generation_ids: list[str]) -> Counter[str]:
        """How many apis are subscribed to each; an api is subscribed at one server of a Cluster."""
        found: Counter[str] = Counter()
        channels = {self._keys.push(one): one for one in generation_ids}
        for client in await self._servers.all() if channels else ():
            for channel, count in await client.pubsub_numsub(*channels):
                found[channels[_text(channel)]] += count
        return found


async def _store(client: Client) -> Store:
    info = await client.info()
    is_valkey = "valkey_version" in info
    return Store(
        address=_address(client),
        version=f"Valkey {info['valkey_version']}" if is_valkey else f"Redis {info['redis_version']}",
        used_memory_bytes=info["used_memory"],
        maxmemory_bytes=info["maxmemory"],
        maxmemory_policy=info.get("maxmemory_policy", "unknown"),
        ops_per_second=info["instantaneous_ops_per_sec"],
        connected_clients=info["connected_clients"],
    )


def _address(client: Client) -> str:
    """Where it is, without user and password."""
    known = client.connection_pool.connection_kwargs
    return str(known.get("path") or f"{known.get('host', 'Sentinel')}:{known.get('port', '?')}")


def _text(value: bytes | str | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _tokens(position: Position) -> int:
    """An attempt's first entry is its start, and what follows its output; `0-1` is before any."""
    epoch, seq = position
    return seq if epoch else 0


def _growth(then: Position, now: Position, *, has_ended: bool) -> int:
    """By how much the output grew. The terminal event of an attempt is one entry more."""
    grown = now[1] - then[1] if now[0] == then[0] else _tokens(now)
    return max(0, grown - has_ended)


def drawn(look: Look, *, rows: int, is_wide: bool = True) -> RenderableType:
    """A look as tables, with at most so many generations; a narrow screen has no room for all columns."""
    parts: list[RenderableType] = [_overview(look), _stores(look), _workers(look)]
    if look.generations:
        parts.append(_generations(look.generations[:rows], is_wide=is_wide))
        if not is_wide:
            parts.append(Text(f"left out below {WIDE} columns: {', '.join(MORE).replace('>', '')}", style="dim"))
    if hidden := max(look.open, len(look.generations)) - min(rows, len(look.generations)):
        parts.append(Text(f"and {hidden} more", style="dim"))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _overview(look: Look) -> RenderableType:
    figures = {
        "queue": str(look.queue_depth),
        "open": str(look.open),
        "running": str(look.running),
        "tokens/s": _rate_text(look.tokens_per_second),
        "workers": str(len(look.workers)),
    }
    at = datetime.fromtimestamp(look.at).strftime("%H:%M:%S")
    state = (visible(look.api_state), STYLES.get(look.api_state, "bold red"))
    title = Text.assemble(("rejoin top", "bold"), f"   {at}   ", ("api ", "dim"), f"{visible(look.api)} ", state)
    words = [Text.assemble((f"{name} ", "dim"), (word, "bold")) for name, word in figures.items()]
    return Group(title, Text("   ").join(words))


def _stores(look: Look) -> RenderableType:
    table = _table("store", "version", ">memory", ">ops/s", ">clients", "when full")
    for one in look.stores:
        most = f" of {_bytes(one.maxmemory_bytes)}" if one.maxmemory_bytes else ""
        policy = one.maxmemory_policy
        advice = "" if policy == "noeviction" else ": would lose generations; set noeviction"
        table.add_row(
            _cell(one.address),
            _cell(one.version),
            _bytes(one.used_memory_bytes) + most,
            f"{one.ops_per_second:,}",
            str(one.connected_clients),
            Text(visible(policy + advice), style=STYLES.get(policy, "bold red")),
        )
    return table


def _workers(look: Look) -> RenderableType:
    if not look.workers:
        return Text("no worker shows life: nothing in the queue will be answered", style="bold red")
    table = _table("worker", ">running", ">last sign")
    for one in look.workers:
        table.add_row(_cell(one.name), str(one.running), f"{one.seconds_since_sign:.0f} s ago")
    return table


def _generations(generations: list[Generation], *, is_wide: bool) -> RenderableType:
    table = _table("generation", "status", "model", ">age", ">tokens", ">tokens/s", *(MORE if is_wide else ()))
    table.columns[0].min_width = ID_WIDTH
    for one in generations:
        cells: list[Text | str] = [
            Text(one.id),
            Text(visible(one.status), style=STYLES.get(one.status, "")),
            _cell(one.model),
            _age(one.age_seconds),
            str(one.tokens),
            _rate_text(one.tokens_per_second),
        ]
        if is_wide:
            cells += [str(one.attempt), str(one.apis_reading), _cell(one.worker)]
        table.add_row(*cells)
    return table


def _table(*columns: str) -> Table:
    """A table without lines; a heading with `>` is of figures."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for heading in columns:
        is_figure = heading.startswith(">")
        table.add_column(
            heading.lstrip(">"), justify="right" if is_figure else "left", no_wrap=True, overflow="ellipsis"
        )
    return table


def _cell(text: str) -> Text:
    return Text(visible(text).replace("\n", "␊"), no_wrap=True, overflow="ellipsis")


def _rate_text(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.1f}"


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
