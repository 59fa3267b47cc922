"""The servers that hold the logs: one (perhaps behind Sentinel), or the primaries of a Redis Cluster.

A generation's keys share a hash tag, so that its partition is all one has to know to find its server. redis-py's own
Cluster client opens connections without waiting for a free one, and has no subscriptions in asyncio.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

from redis.crc import key_slot
from redis.exceptions import ConnectionError, ResponseError

from shared.errors import SettingsError
from shared.events import Entry
from shared.observability import logger
from shared.redis import AWAY, COMMAND_TIMEOUT_SECONDS, PARTITIONS, Client, address_of, connect

Address: TypeAlias = tuple[str, int]
ELSEWHERE = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")  # what a node says that is not in charge
LEARN_AGAIN_SECONDS = 0.1
log = logger("cluster")


class Servers(Protocol):
    """Where each partition is."""

    @property
    def lanes(self) -> tuple[str, ...]:
        """The partitions in groups; what is in one group can be written in one step."""

    async def at(self, partition: str) -> Client:
        """The client of the server in charge of a partition. Raises redis' ConnectionError while none is known."""

    async def all(self) -> list[Client]:
        """The clients of all servers in charge, each once."""

    def doubt(self, error: Exception) -> bool:
        """A server failed, or says that it is not in charge (then True: ask again, elsewhere)."""

    async def aclose(self) -> None:
        """Close all connections."""


class OneServer:
    """One server has all partitions."""

    lanes = ("".join(PARTITIONS),)

    def __init__(self, client: Client) -> None:
        self.client = reading_entries(client)

    async def at(self, partition: str) -> Client:
        return self.client

    async def all(self) -> list[Client]:
        return [self.client]

    def doubt(self, error: Exception) -> bool:
        return False

    async def aclose(self) -> None:
        await self.client.aclose()


class Cluster:
    """The primaries of a Redis Cluster, each with a bounded pool. Where they are is learnt again when it is doubted."""

    lanes = PARTITIONS

    def __init__(self, url: str, *, connections: int, timeout_seconds: float | None) -> None:
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        try:
            self._seeds = [address_of(host, 6379) for host in hosts.split(",")]
        except ValueError as error:
            raise SettingsError(f"REDIS_URL: {error}") from None
        self._head = f"{parts.scheme.partition('+')[0]}://{user}{at}"
        self._connections, self._timeout_seconds = connections, timeout_seconds
        self._clients: dict[Address, Client] = {}
        self._homes: dict[str, Address] = {}
        self._is_doubted = True
        self._learning = asyncio.Lock()

    async def at(self, partition: str) -> Client:
        if self._is_doubted:
            await self._learn()
        return self._client(self._homes[partition])

    async def all(self) -> list[Client]:
        if self._is_doubted:
            await self._learn()
        return [self._client(address) for address in dict.fromkeys(self._homes.values())]

    def doubt(self, error: Exception) -> bool:
        is_elsewhere = isinstance(error, ResponseError) and str(error).startswith(ELSEWHERE)
        self._is_doubted = self._is_doubted or is_elsewhere or isinstance(error, AWAY)
        return is_elsewhere

    async def aclose(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))

    async def _learn(self) -> None:
        async with self._learning:
            if not self._is_doubted:
                return
            for address in dict.fromkeys((*self._homes.values(), *self._clients, *self._seeds)):
                try:
                    async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                        slots = await self._client(address).execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
                    self._homes = _homes(slots, address)
                    self._is_doubted = False
                    return
                except (*AWAY, ResponseError, TimeoutError, KeyError) as error:
                    log.warning("cluster.node_away", error=type(error).__name__)
            await asyncio.sleep(LEARN_AGAIN_SECONDS)
            raise ConnectionError("no node of the Redis Cluster answers for all partitions")

    def _client(self, address: Address) -> Client:
        if address not in self._clients:
            host, port = address
            url = f"{self._head}{f'[{host}]' if ':' in host else host}:{port}/0"
            self._clients[address] = reading_entries(
                connect(url, connections=self._connections, timeout_seconds=self._timeout_seconds, retries=1)
            )
        return self._clients[address]


def servers_of(
    url: str, *, connections: int, timeout_seconds: float | None = COMMAND_TIMEOUT_SECONDS
) -> OneServer | Cluster:
    """The servers behind a REDIS_URL, with at most `connections` to each. Raises SettingsError."""
    if "+cluster:" in url:
        return Cluster(url, connections=connections, timeout_seconds=timeout_seconds)
    return OneServer(connect(url, connections=connections, timeout_seconds=timeout_seconds))


def reading_entries(client: Client) -> Client:
    """The same client; XRANGE and XREVRANGE give entries. The dict that redis-py makes of each costs three times it."""
    for command in ("XRANGE", "XREVRANGE"):
        client.set_response_callback(command, _entries)
    return client


def _entries(response: Any, **options: Any) -> list[Entry]:
    return [Entry(entry_id, fields[1]) for entry_id, fields in response or ()]


def _homes(slots: Any, asked: Address) -> dict[str, Address]:
    """Where each partition is, out of CLUSTER SLOTS. Raises KeyError when one is nowhere."""
    homes = {}
    for partition in PARTITIONS:
        slot = key_slot(partition.encode())
        node = next((primary for first, last, primary, *_ in slots if first <= slot <= last), None)
        if node is None:
            raise KeyError(partition)
        host = (node[0] or b"").decode()
        homes[partition] = (host or asked[0], int(node[1]))  # a node that does not know its own name: whom we asked
    return homes
