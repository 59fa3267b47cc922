"""Connect to Redis, and the one list of every key there is: name, kind, time to live.

The only file that spells a key. A generation's own keys carry the hash tag `{p}` of its partition, the last hex
digit of its id, so that they share a slot in a Redis Cluster.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio import BlockingConnectionPool, Redis, Sentinel
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ReadOnlyError, RedisError, ResponseError, TimeoutError

from shared.config import Settings
from shared.errors import SettingsError, Unavailable
from shared.observability import logger

Client: TypeAlias = Redis

PARTITIONS = tuple("0123456789abcdef")
ALIVE_MS = 24 * 60 * 60 * 1000  # what a generation's keys live, refreshed while it runs
COMMAND_TIMEOUT_SECONDS = 2.0
log = logger("redis")
GENERATION_ID = re.compile(r"[0-9a-f]{32}")

# Redis is away, or not ready, or no longer the primary: the same call may work in a moment.
AWAY = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, OSError)
# Whatever else Redis refuses (full, cannot persist, a watched key moved): a background loop logs it and goes on.
TROUBLE = (RedisError, OSError, Unavailable)


@dataclass(frozen=True)
class KeyKind:
    """One kind of key. `lives`: its time to live in words; None for an index whose members are bounded."""

    pattern: str
    redis_type: str
    lives: str | None
    holds: str


@dataclass(frozen=True)
class Keys:
    """Every key and channel of one deployment, under its prefix."""

    prefix: str

    def order(self, generation_id: str) -> str:
        return f"{self.prefix}:{{{generation_id[-1]}}}:order:{generation_id}"

    def log(self, generation_id: str) -> str:
        return f"{self.prefix}:{{{generation_id[-1]}}}:log:{generation_id}"

    def leases(self, partition: str) -> str:
        return f"{self.prefix}:{{{partition}}}:leases"

    def reaper(self, partition: str) -> str:
        return f"{self.prefix}:{{{partition}}}:reaper"

    def push(self, generation_id: str) -> str:
        return f"{self.prefix}:push:{generation_id}"

    @property
    def nudge(self) -> str:
        return f"{self.prefix}:nudge"

    @property
    def queue(self) -> str:
        return f"{self.prefix}:queue"

    @property
    def doorbell(self) -> str:
        return f"{self.prefix}:doorbell"

    def recent(self, tenant: str) -> str:
        return f"{self.prefix}:recent:{tenant}"

    def chat(self, tenant: str, chat_id: str) -> str:
        return f"{self.prefix}:chat:{tenant}:{chat_id}"

    @property
    def workers(self) -> str:
        return f"{self.prefix}:workers"

    def hint(self, generation_id: str, n: int) -> str:
        """ARQ's job id of hint n; ARQ's keys hold it behind prefixes of their own."""
        return f"{self.prefix}:{generation_id}:{n}"

    def kinds(self) -> tuple[KeyKind, ...]:
        """The table of docs/protocol.md; the tests hold every key in Redis against it."""
        p = re.escape(self.prefix)
        hint = p + r":[0-9a-f]{32}:\d+"
        alive = "24 h, refreshed while it runs; at the end "
        return (
            KeyKind(p + r":\{.\}:order:.+", "hash", alive + "order_retention", "what was asked, how it is doing"),
            KeyKind(p + r":\{.\}:log:.+", "stream", alive + "log_retention", "the events"),
            KeyKind(p + r":\{.\}:leases", "zset", None, "id -> deadline; removed at the terminal"),
            KeyKind(p + r":\{.\}:reaper", "hash", None, "two fields: the grace guard"),
            KeyKind(p + r":queue", "zset", None, "ARQ's queue; a hint is removed when it is taken"),
            KeyKind(p + r":doorbell", "list", None, "at most 100 rings"),
            KeyKind(p + r":recent:.+", "zset", "order_retention", "a tenant's newest 1,000 generation ids"),
            KeyKind(
                p + r":chat:.+", "string", "log_retention and a generation's longest", "a chat's newest generation"
            ),
            KeyKind(p + r":workers", "zset", "one minute", "worker name -> last sign of life"),
            KeyKind(p + r":queue:health-check", "string", "set by ARQ", "ARQ's own health line"),
            KeyKind("arq:job:" + hint, "string", "set at enqueue: 24 h", "one hint, JSON"),
            KeyKind("arq:in-progress:" + hint, "string", "10 s", "ARQ's lock"),
            KeyKind("arq:retry:" + hint, "string", "about 24 h; removed at the end", "ARQ's count of tries"),
        )


def connect(
    url: str, *, connections: int, timeout_seconds: float | None = COMMAND_TIMEOUT_SECONDS, retries: int = 3
) -> Client:
    """A client over a pool of at most `connections`; a command waits for a free one instead of opening more.

    Every command of ours is idempotent, so a lost connection is retried. `retries=-1` retries until Redis is back.
    Raises SettingsError for a URL that cannot be understood; connecting itself happens at the first command.
    """
    options: dict[str, Any] = {
        "max_connections": connections,
        "timeout": 10 * COMMAND_TIMEOUT_SECONDS,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": COMMAND_TIMEOUT_SECONDS,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        "health_check_interval": 0,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
        "retry_on_error": [ConnectionError, TimeoutError, BusyLoadingError, OSError],
    }
    try:
        from_sentinel = "+sentinel:" in url
        pool = _pool_of_the_primary(url, options) if from_sentinel else BlockingConnectionPool.from_url(url, **options)
    except ValueError as error:
        raise SettingsError(f"REDIS_URL or REJOIN_QUEUE_URL: {error}") from None
    pool.connection_class = over_uvloop(pool.connection_class)
    return Redis.from_pool(pool)


def over_uvloop(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same kind of connection, for which a peer that has just broken it off is a ConnectionError; a command takes
    it a quarter less time.

    uvloop says RuntimeError where asyncio's own loop says nothing and lets the next read fail. redis-py does not know
    it, so it would be taken for a mistake of ours and end the process."""

    class Connection(kind):  # type: ignore[valid-type, misc]
        async def can_read_destructive(self) -> bool:
            """Is there something on a connection that was idle? What has come is in its buffers already: redis-py reads
            for no time at all, which takes two turns of the event loop."""
            if self._reader is None or self._reader.at_eof() or self._reader.exception():
                raise ConnectionError("the connection was closed while it was idle")
            return bool(self._reader._buffer) or self._parser._reader.has_data()

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            try:
                if not self._write_at_once(command):
                    await super().send_packed_command(command, check_health)
            except RuntimeError as error:
                raise ConnectionError("the connection was closed as it was written to") from error

        def _write_at_once(self, command: Any) -> bool:
            """A short command, where nothing is unsent, waits for nothing: redis-py makes a task of it, and a timer."""
            transport = self._writer.transport if self._writer else None
            if len(command) > 1 or transport is None or transport.is_closing() or transport.get_write_buffer_size():
                return False
            transport.writelines(command)
            return True

        async def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().read_response(*args, **kwargs)
            except RuntimeError as error:
                raise ConnectionError("the connection was closed as it was read") from error

    return Connection


class Replies(asyncio.Protocol):
    """What a connection of redis-py's hears from now on, all whole replies of one read at once: for a subscription.

    redis-py gives one reply for each await, of a task that each wakes: several times the cost of parsing it, and a busy
    subscription has hundreds at hand. `ended` is done when the connection is, or raises what `take` raised."""

    def __init__(self, connection: AbstractConnection, take: Callable[[list[Any]], None]) -> None:
        redis: Any = connection
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._take = take
        self._parser = redis._parser._reader
        self._before = redis._writer.transport.get_protocol()  # redis-py waits on it when it writes
        redis._writer.transport.set_protocol(self)
        self.data_received(bytes(redis._reader._buffer))

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        replies: list[Any] = []
        while (reply := self._parser.gets(False)) is not NOT_ENOUGH_DATA:
            replies.append(reply)
        try:
            self._take(replies)
        except Exception as error:
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._before.connection_lost(error)
        self._end(ConnectionError("the subscription's connection is closed"))

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def _end(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class Primary:
    """Where the primary of a Sentinel service is at the moment. Each new connection of a pool asks."""

    is_master, check_connection = True, False  # what redis-py's connection wants to know of its pool

    def __init__(self, sentinels: Sentinel, service: str) -> None:
        self._sentinels = sentinels
        self._service = service

    async def get_master_address(self) -> tuple[str, int]:
        """Raises redis' ConnectionError while no sentinel knows of a primary that lives."""
        address: tuple[str, int] = await self._sentinels.discover_master(self._service)
        return address


def _pool_of_the_primary(url: str, options: dict[str, Any]) -> BlockingConnectionPool:
    """`redis+sentinel://[user:password@]host:port,host:port/service[/db]`; `rediss+sentinel` for TLS to the primary.

    redis-py's own pool for Sentinel opens connections without a bound. Raises ValueError."""
    parts = urlsplit(url)
    user, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    username, _, password = user.partition(":")
    addresses = [address_of(host, 26379) for host in hosts.split(",")]
    if not service or not hosts:
        raise ValueError("write redis+sentinel://host:port,host:port/service: the sentinels, and the name they watch")
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        addresses, socket_timeout=COMMAND_TIMEOUT_SECONDS, socket_connect_timeout=COMMAND_TIMEOUT_SECONDS / 4
    )
    is_tls = parts.scheme.startswith("rediss")
    return BlockingConnectionPool(
        connection_class=SentinelManagedSSLConnection if is_tls else SentinelManagedConnection,
        connection_pool=Primary(sentinels, service),
        username=unquote(username) or None,
        password=unquote(password) or None,
        db=int(db or 0),
        **options,
    )


def address_of(host_port: str, default_port: int) -> tuple[str, int]:
    """`host:port`, `[v6]:port` or a host alone. Raises ValueError."""
    parts = urlsplit(f"//{host_port}")
    if not parts.hostname:
        raise ValueError(f"{host_port!r} is no host:port")
    return parts.hostname, parts.port or default_port


async def when_reachable(servers: Callable[[], Awaitable[list[Client]]]) -> None:
    """Wait until each server answers. Raises SettingsError for one that would lose generations without a word."""
    while True:
        try:
            policies = {await _eviction_policy(client) for client in await servers()}
            break
        except AWAY as error:
            log.warning("redis.not_yet_reachable", error=type(error).__name__)
            await asyncio.sleep(0.5)
    for policy in policies - {"noeviction"}:
        raise SettingsError(
            f"REDIS_URL: this Redis evicts keys when its memory is full (maxmemory-policy {policy}), and would lose "
            "generations without a word: set maxmemory-policy noeviction"
        )


async def _eviction_policy(client: Client) -> str:
    try:
        return str((await client.config_get("maxmemory-policy")).get("maxmemory-policy", "noeviction"))
    except ResponseError as error:
        if str(error).startswith("LOADING"):
            raise ConnectionError(str(error)) from error
        log.warning(
            "redis.policy_unknown", advice="CONFIG is not allowed here: make sure of maxmemory-policy noeviction"
        )
        return "noeviction"


def queue_url(settings: Settings, redis_url: str | None = None) -> str:
    """Where the queue, the doorbell and the lists live; the same Redis unless a Cluster holds the logs."""
    return settings.queue_url or redis_url or settings.redis_url
