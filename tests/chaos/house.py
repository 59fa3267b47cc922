"""A whole deployment for one scenario, outside pytest: a Valkey of its own, apis, workers, the scripted upstream.

Everything listens on loopback and is ended, by pid, when the `async with` ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import Process, Processes, Valkey, valkey
from tests.proxy import Proxy
from tests.stack import Api, Stack
from tests.upstream import Upstream


@dataclass
class House:
    """What a scenario may hurt. With `through_proxy` each process has a proxy of its own before Valkey."""

    stack: Stack
    processes: Processes
    store: Valkey
    upstream: Upstream
    through_proxy: bool
    proxies: dict[int, Proxy] = field(default_factory=dict)  # by the pid of the process behind it
    _open: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def apis(self) -> list[Api]:
        return self.stack.apis

    @property
    def workers(self) -> list[Process]:
        return self.stack.workers

    async def api(self, **env: str) -> Api:
        """One more api, ready."""
        proxy = await self.proxy() if self.through_proxy else None
        one = await self.stack.api(**_over(proxy), **env)
        self._keep(one.process, proxy)
        return one

    async def worker(self, **env: str) -> Process:
        """One more worker, ready."""
        proxy = await self.proxy() if self.through_proxy else None
        one = await self.stack.worker(**_over(proxy), **env)
        self._keep(one, proxy)
        return one

    def proxy_of(self, process: Process) -> Proxy:
        return self.proxies[process.pid]

    async def proxy(self) -> Proxy:
        """One more proxy before Valkey, for as long as the house stands."""
        return await self._open.enter_async_context(Proxy(self.store.port))

    def _keep(self, process: Process, proxy: Proxy | None) -> None:
        if proxy is not None:
            self.proxies[process.pid] = proxy


def _over(proxy: Proxy | None) -> dict[str, str]:
    return {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"} if proxy is not None else {}


@asynccontextmanager
async def house(
    env: Mapping[str, str] | None = None,
    *,
    apis: int = 2,
    workers: int = 2,
    through_proxy: bool = False,
    upstream: Upstream | None = None,
    folder: Path | None = None,
) -> AsyncIterator[House]:
    """A house with so many apis and workers, all ready; `env` goes to each of them. Valkey has an append-only file.
    `upstream`: one that is not open yet, in place of a plain one. `folder`: where the logs of the processes stay."""
    with tempfile.TemporaryDirectory(prefix="rejoin-chaos-") as name:
        folder = folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        processes = Processes(folder)
        store = valkey(processes, folder / "valkey", append_only=True)
        async with AsyncExitStack() as open_things:
            try:
                store.start()
                model = await open_things.enter_async_context(upstream or Upstream())
                stack = Stack(processes, {**_environment(store, model), **(env or {})})
                open_things.push_async_callback(stack.http.aclose)
                one = House(stack, processes, store, model, through_proxy, _open=open_things)
                for _ in range(apis):
                    await one.api()
                for _ in range(workers):
                    await one.worker()
                yield one
            finally:
                processes.end_all()


def _environment(store: Valkey, upstream: Upstream) -> dict[str, str]:
    return {
        "REDIS_URL": store.url,
        "REJOIN_KEY_PREFIX": "chaos",
        "OPENAI_BASE_URL": upstream.base_url,
        "OPENAI_API_KEY": "sk-test-key-of-the-upstream",
    }
