"""`rejoin up`: the store, the api and the workers as supervised processes on this machine. Prints `ready http://…`."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from redis.exceptions import NoPermissionError

from cli.addresses import LOCK, Addresses, holder
from cli.supervisor import Child, Supervisor
from cli.valkey import server_argv, socket_fits
from shared.cluster import servers_of
from shared.config import Settings, model_table
from shared.errors import SettingsError
from shared.event_log import EventLog, process_name
from shared.jobs import Jobs
from shared.reaper import reap_owner
from shared.redis import TROUBLE, Client, Keys, connect, queue_url

READY_SECONDS = 60.0
HAND_OVER_SECONDS = 2.0  # beyond it the leases end by themselves anyway
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    host: str
    port: int
    workers: int
    data: Path


async def up(options: Options, settings: Settings) -> int:
    """Run until SIGINT or SIGTERM, then drain. Raises SettingsError before anything is started."""
    if options.host not in LOOPBACK and not settings.tenants_by_key_hash:
        raise SettingsError(
            f"--host {options.host} would be reachable from other machines: set REJOIN_API_KEYS and REJOIN_SECRET first"
        )
    model_table(settings)
    try:
        options.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(options.data, error) from None
    with _only_one(options.data) as lock_fd, _listen(options) as listening:
        house = House(options, settings, listening, lock_fd, *_store(options.data, settings))
        house.leave_word()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, house.supervisor.ending.set)
        try:
            return await house.run()
        finally:
            Addresses.remove(options.data)


class House:
    """The processes of one `rejoin up`. `store_argv` is None where REDIS_URL names a store that runs elsewhere."""

    def __init__(
        self,
        options: Options,
        settings: Settings,
        listening: socket.socket,
        lock_fd: int,
        redis_url: str,
        store_argv: list[str] | None,
    ) -> None:
        self.supervisor = Supervisor()
        self._settings = settings
        self._listening = listening
        self._lock_fd = lock_fd
        self._redis_url = redis_url
        self._queue_url = queue_url(settings, redis_url)
        self._store_argv = store_argv
        self._data = options.data
        self._env = _environment(options, settings, redis_url)
        self._workers = [f"worker{n}" if options.workers > 1 else "worker" for n in range(1, options.workers + 1)]

    def leave_word(self) -> None:
        """Say in the data folder where api and store are, for the other commands. Of another store REDIS_URL tells."""
        addresses = Addresses(self.url, self._redis_url if self._store_argv is not None else None)
        addresses.write(self._data)

    async def run(self) -> int:
        fd = self._listening.fileno()
        async with asyncio.TaskGroup() as group:
            if self._store_argv is not None:
                # It holds the lock too: as long as the store runs, no other may run on its files.
                store = Child("valkey", self._store_argv, self._env, stop_seconds=20, pass_fds=(self._lock_fd,))
                group.create_task(self.supervisor.keep(store))
            await self._until_store_answers()
            api = [sys.executable, "-m", "api", "--fd", str(fd)]
            group.create_task(self.supervisor.keep(Child("api", api, self._env_of(0), stop_seconds=15, pass_fds=(fd,))))
            for number, name in enumerate(self._workers, 1):
                stop_seconds = self._settings.drain_seconds + 10
                argv = [sys.executable, "-m", "worker"]
                worker = Child(name, argv, self._env_of(number), stop_seconds, on_death=self._hand_over)
                group.create_task(self.supervisor.keep(worker))
            if await self._until_ready():
                self.supervisor.tell(f"ready {self.url}", sys.stdout)
            await self.supervisor.ending.wait()
            self.supervisor.tell(f"stopping: running generations have {self._settings.drain_seconds} s to end")
            await self.supervisor.end(["api", *self._workers])
            await self.supervisor.end(["valkey"])
        return 0

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _env_of(self, number: int) -> dict[str, str]:
        """The api is number 0. Each process answers Prometheus on a port of its own, if any."""
        port = self._settings.metrics_port
        return {**self._env, "REJOIN_METRICS_PORT": str(port + number)} if port else self._env

    async def _hand_over(self, pid: int) -> None:
        """A worker died: what it held is for the others at once, not only when its leases end."""
        queue, servers = connect(self._queue_url, connections=1), servers_of(self._redis_url, connections=2)
        event_log, count = EventLog(servers, self._settings), 0
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                count = await reap_owner(event_log, Jobs(queue, event_log.keys), process_name(pid))
        except (*TROUBLE, TimeoutError) as error:
            self.supervisor.tell(f"the leases of process {pid} will end by themselves ({type(error).__name__})")
        finally:
            await servers.aclose()
            await queue.aclose()
        if count:
            self.supervisor.tell(f"{count} generations of process {pid} are handed to another worker")

    async def _until_store_answers(self) -> None:
        async with aclosing(servers_of(self._redis_url, connections=1)) as servers:
            waited = 0.0
            while not self.supervisor.ending.is_set():
                try:
                    for client in await servers.all():
                        await client.config_get("maxmemory-policy")  # as PING does not, it needs the right password
                    return
                except NoPermissionError:
                    return
                except TROUBLE as error:
                    if waited > 3:
                        self.supervisor.tell(
                            f"the store does not answer ({type(error).__name__}: {error}); trying again"
                        )
                        waited = 0
                    waited += 0.1
                    await asyncio.sleep(0.1)

    async def _until_ready(self) -> bool:
        """Until the api says that it is ready and every worker has shown life. False when the end came first."""
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + READY_SECONDS
        async with connect(self._queue_url, connections=1) as client:
            while not self.supervisor.ending.is_set():
                if await self._living_workers(client) == len(self._workers) and await self._api_is_ready():
                    return True
                if loop.time() > patience_ends:
                    self.supervisor.tell(f"not everything is up after {READY_SECONDS:g} s; the lines above say why")
                    patience_ends = float("inf")
                await asyncio.sleep(0.05)
        return False

    async def _living_workers(self, client: Client) -> int:
        pids = {str(child.process.pid) for child in self.supervisor.children if child.process is not None}
        try:
            names = await client.zrange(Keys(self._settings.key_prefix).workers, 0, -1)
        except TROUBLE:
            return 0
        return sum(name.decode().rpartition(":")[2] in pids for name in names)

    async def _api_is_ready(self) -> bool:
        host, port = self._listening.getsockname()[:2]
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(2):
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()


class _only_one:
    """One `rejoin up` for each data folder: two would fight over the store."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def __enter__(self) -> int:
        """A file descriptor that holds the lock. Raises SettingsError."""
        try:
            self._file = (self._data / LOCK).open("a+")
        except OSError as error:
            raise _no_folder(self._data, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            pid = holder(self._data)
            who = f"{self._data} (pid {pid})" if pid else f"{self._data}, or the store of one that was just killed"
            raise SettingsError(f"another `rejoin up` uses {who}; stop it, or give --data DIR") from None
        self._file.truncate(0)
        print(os.getpid(), file=self._file, flush=True)
        return self._file.fileno()

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _listen(options: Options) -> socket.socket:
    """The listening socket is the supervisor's, so that the address stays while the api restarts."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((options.host, options.port))
        listening.listen(2048)
    except OverflowError:
        listening.close()
        raise SettingsError(f"--port {options.port}: a port is 0 to 65535; 0 takes a free one") from None
    except OSError as error:
        listening.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            what = f"--port {options.port}: {error.strerror}; another port, or --port 0 for a free one"
        else:
            what = f"--host {options.host}: {error.strerror}; an address of this machine, such as 127.0.0.1"
        raise SettingsError(what) from None
    listening.set_inheritable(True)
    return listening


def _no_folder(data: Path, error: OSError) -> SettingsError:
    return SettingsError(f"--data {data}: {error.strerror}; name a folder that you may write, or that may be made")


def _environment(options: Options, settings: Settings, redis_url: str) -> dict[str, str]:
    """What the children are told beyond what we were told ourselves."""
    root = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "REDIS_URL": redis_url, "REJOIN_HOST": options.host}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    if settings.secret is None:
        env["REJOIN_SECRET"] = _secret(options.data)
    if "documents_index" not in settings.model_fields_set:
        env["REJOIN_DOCUMENTS_INDEX"] = str(options.data / "documents")
    return env


def _store(data: Path, settings: Settings) -> tuple[str, list[str] | None]:
    """The store's URL, and the command line of the embedded one; None when REDIS_URL names one that runs elsewhere."""
    if "redis_url" in settings.model_fields_set:
        return settings.redis_url, None
    folder = data.resolve() / "valkey"
    folder.mkdir(exist_ok=True)
    path = data.resolve() / "valkey.sock"
    if socket_fits(path):
        return f"unix://{path}", server_argv(folder, socket=path)
    with socket.socket() as free:  # the path is too long for a Unix socket: a free loopback port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"redis://127.0.0.1:{port}/0", server_argv(folder, port=port)


def _secret(data: Path) -> str:
    """The HMAC key of this data folder, made once, readable by its owner only."""
    path = data / "secret"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip()
