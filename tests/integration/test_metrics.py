"""What Prometheus is told moves with what happens, by exactly as much, and says nothing of whom or what."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import environment, start_rejoin_up
from tests.processes import Process, Processes, free_port, valkey
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

ENDLESS = Script(count=10_000, pace_seconds=0.05)
SHORT = Script(chunks=["Two ", "words."])


@dataclass
class Figures:
    """The metrics of one process, as a scrape finds them."""

    process: Process
    port: int

    async def text(self) -> str:
        async with httpx2.AsyncClient(timeout=30, trust_env=False) as http:
            answer = await http.get(f"http://127.0.0.1:{self.port}/metrics")
            assert answer.status_code == 200
            return answer.text

    async def samples(self) -> dict[str, float]:
        """Each sample by name and label value: `rejoin_attempts_lost_total FENCED`."""
        families = text_string_to_metric_families(await self.text())
        found = (sample for family in families for sample in family.samples)
        return {" ".join([one.name.removeprefix("rejoin_"), *one.labels.values()]): one.value for one in found}

    async def become(self, timeout: float = 20, **wanted: float) -> None:
        """Wait until these are the figures; `attempts_lost_total__FENCED` is one with its label."""
        names = {name.replace("__", " "): value for name, value in wanted.items()}
        seen: dict[str, float] = {}

        async def look() -> bool:
            samples = await self.samples()
            seen.update({name: samples[name] for name in names})
            return seen == names

        try:
            await wait_until(look, timeout=timeout, every=0.05)
        except AssertionError:
            raise AssertionError(f"expected {names}, found {seen}") from None


async def api_of(stack: Stack, **env: str) -> Figures:
    port = free_port()
    api = await stack.api(REJOIN_METRICS_PORT=str(port), **env)
    return Figures(api.process, port)


async def worker_of(stack: Stack, **env: str) -> Figures:
    port = free_port()
    return Figures(await stack.worker(REJOIN_METRICS_PORT=str(port), **env), port)


def seq(event_id: str) -> int:
    return int(event_id.rpartition("-")[2])


async def test_a_generation_and_a_resume_are_counted(stack: Stack, upstream: Upstream) -> None:
    """One generation, read from the start, left and resumed: every figure of it is there, once."""
    upstream.script("counted", Script(count=40, pace_seconds=0.02))
    api, worker = await api_of(stack), await worker_of(stack)
    await api.become(generations_created_total=0, open_readers=0, readers_started_total__no=0, tail_connections_total=1)
    await worker.become(attempts_started_total__fresh=0, generations_ended_total__completed=0)
    generation = await stack.create("counted")
    reader = stack.reader(generation)
    await reader.connect(stop_after=10)
    await api.become(generations_created_total=1, open_readers=0, readers_started_total__no=1)
    await reader.read_to_end()
    await api.become(readers_started_total__yes=1, open_readers=0, queue_depth=0, readers_timed_out_total=0)
    events = seq((await stack.snapshot(generation))["last_event_id"])
    await worker.become(
        attempts_started_total__fresh=1,
        attempts_started_total__continued=0,
        generations_ended_total__completed=1,
        events_appended_total=events,
        attempts_running=0,
        pending_bytes=0,
        attempts_lost_total__FENCED=0,
        appends_failed_total=0,
    )
    samples = await worker.samples()
    assert samples["append_seconds_count"] >= 1 and samples["append_seconds_sum"] > 0
    assert samples["loop_lag_seconds_count"] > 1


async def test_a_frozen_worker_shows_in_the_figures(stack: Stack, upstream: Upstream) -> None:
    """Its generation is hinted again and begun a second time; awake, it is fenced, and knows that it was late."""
    upstream.script("counted-frozen", ENDLESS)
    api, zombie = await api_of(stack), await worker_of(stack)
    generation = await stack.create("counted-frozen")
    await zombie.become(attempts_running=1)
    other = await worker_of(stack)
    upstream.script("counted-frozen", SHORT)
    zombie.process.signal(signal.SIGSTOP)
    assert (await stack.finished(generation))["attempt"] == 2
    zombie.process.signal(signal.SIGCONT)
    await zombie.become(attempts_lost_total__FENCED=1, attempts_running=0, generations_ended_total__completed=0)
    await other.become(attempts_started_total__fresh=1, generations_ended_total__completed=1)
    late = await zombie.samples()
    assert late["loop_lag_seconds_count"] > late["loop_lag_seconds_bucket 1.0"]
    hinted = [await one.samples() for one in (api, zombie, other)]
    assert sum(samples["generations_hinted_again_total"] for samples in hinted) == 1


async def test_a_killed_worker_is_counted_by_those_that_are_left(stack: Stack, upstream: Upstream) -> None:
    """A kill is a lease that ends: one hint more. A cancel ends the log from the api, and fences the attempt."""
    upstream.script("counted-killed", ENDLESS)
    api = await api_of(stack)
    victim = await worker_of(stack)
    generation = await stack.create("counted-killed")
    await stack.attempt(generation, 1)
    heir = await worker_of(stack)
    await victim.process.kill()
    await stack.attempt(generation, 2)
    await heir.become(attempts_started_total__fresh=1, attempts_running=1)
    hinted = [await one.samples() for one in (api, heir)]
    assert sum(samples["generations_hinted_again_total"] for samples in hinted) == 1
    await stack.cancel(generation)
    await api.become(generations_ended_total__cancelled=1, generations_ended_total__failed=0, queue_depth=0)
    await heir.become(attempts_lost_total__FENCED=1, attempts_running=0, generations_ended_total__cancelled=0)


async def test_figures_are_told_while_redis_is_away(processes: Processes, upstream: Upstream, tmp_path: Path) -> None:
    """The depth of the queue is NaN, and soon; what cannot be appended shows, and that the subscription came back."""
    upstream.script("counted-away", Script(count=100, pace_seconds=0.05))
    store = valkey(processes, tmp_path / "store", append_only=True)
    store.start()
    stack = Stack(processes, environment(store.url, "away", upstream))
    api, worker = await api_of(stack), await worker_of(stack)
    generation = await stack.create("counted-away")
    await worker.become(attempts_running=1)
    await api.become(queue_depth=0, tail_connections_total=1)
    await store.kill()

    async def something_waits() -> bool:
        samples = await worker.samples()
        return samples["appends_failed_total"] >= 1 and samples["pending_bytes"] > 0

    await wait_until(something_waits, timeout=20, every=0.05)
    depth = (await asyncio.wait_for(api.samples(), 10))["queue_depth"]
    assert math.isnan(depth)
    store.start()

    async def is_connected_again() -> bool:
        samples = await api.samples()
        return samples["tail_connections_total"] >= 2 and samples["queue_depth"] == 0

    await wait_until(is_connected_again, timeout=20, every=0.05)
    assert (await stack.finished(generation))["status"] == "completed"
    await worker.become(generations_ended_total__completed=1, pending_bytes=0, attempts_running=0)
    await stack.http.aclose()


async def test_figures_say_nothing_of_whom_or_what(stack: Stack, upstream: Upstream) -> None:
    """No prompt, answer, model, tenant, key or id is in them, and the port is open on loopback alone."""
    key = "canary-key"
    stack.env |= {"REJOIN_API_KEYS": f"canary-tenant:{hashlib.sha256(key.encode()).hexdigest()}"}
    stack.env |= {"REJOIN_SECRET": "canary-secret"}
    stack.http.headers["Authorization"] = f"Bearer {key}"
    upstream.script("canary-model", Script(chunks=["canary-answer"]))
    upstream.script("canary-broken", Script(status=400, body=b"canary-error"))
    api, worker = await api_of(stack), await worker_of(stack)
    names = [(await figures.samples()).keys() for figures in (api, worker)]
    ids = []
    for model in ("canary-model", "canary-broken"):
        generation = await stack.create(model, "canary-prompt", metadata={"canary-label": "x"}, key=f"canary-{model}")
        await stack.finished(generation)
        await stack.reader(generation).read_to_end()
        ids.append(generation["id"])
    await worker.become(generations_ended_total__completed=1, generations_ended_total__failed=1)
    for figures, known in zip((api, worker), names, strict=True):
        assert (await figures.samples()).keys() == known, "there is a name or a label that was not there at the start"
        text = await figures.text()
        assert "canary" not in text and not any(one in text for one in ids)
    answer = await stack.http.get(stack.apis[0].url + "/metrics")
    assert answer.status_code == 404


async def test_a_taken_port_stops_the_start_with_one_line(stack: Stack, rejoin_env: dict[str, str]) -> None:
    """Whoever starts a second process with the same port is told which setting to change."""
    taken = (await worker_of(stack)).port
    env = rejoin_env | {"REJOIN_METRICS_PORT": str(taken), "REJOIN_PORT": str(free_port())}
    for role in ("api", "worker"):
        process = await stack.processes.start(role, [sys.executable, "-m", role], env)
        assert await process.wait() == 2
        assert process.log().startswith(f"rejoin {role}: REJOIN_METRICS_PORT: 127.0.0.1:{taken}: ")
        assert process.log().count("\n") == 1


def two_ports() -> int:
    """The first of two neighbours that are both free, out of the range from which the system gives ports away."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


async def test_rejoin_up_gives_each_process_a_port(processes: Processes, tmp_path: Path) -> None:
    """The api takes the port that was named, the worker the next one."""
    port = two_ports()
    up = await start_rejoin_up(processes, tmp_path, "--workers", "1", REJOIN_METRICS_PORT=str(port))
    api, worker = Figures(up.process, port), Figures(up.process, port + 1)
    await api.become(tail_connections_total=1)
    async with httpx2.AsyncClient(timeout=30, trust_env=False) as http:
        assert (await http.post(up.url + "/v1/generations", json={"prompt": "hello"})).status_code == 202
    await api.become(generations_created_total=1)
    await worker.become(attempts_started_total__fresh=1)
