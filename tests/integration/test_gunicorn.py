"""Gunicorn with two uvicorn workers, as in docs/deployment.md: whichever process answers, the stream is the same."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import anyio
import httpx2

from tests.integration.test_nginx import AUTHORIZED, PROMPT, TERMINAL, Arrival, answers, arrivals, client, create, read
from tests.integration.test_nginx import keyed_env as keyed_env
from tests.processes import PYTHON, Process, Processes, free_port

DOCS = Path(__file__).parents[2] / "docs/deployment.md"


def gunicorn_argv(port: int) -> list[str]:
    """The documented command, with this Python and a port of our own."""
    (line,) = re.findall(r"(?m)^\$ gunicorn (.+)$", DOCS.read_text())
    return [PYTHON, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--no-control-socket", *shlex.split(line)]


async def start_gunicorn(processes: Processes, env: dict[str, str]) -> tuple[Process, str]:
    """Start it and wait until it serves; the process and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    process = await processes.start("gunicorn", gunicorn_argv(port), env)
    await answers(f"{url}/healthz")
    return process, url


async def test_two_gunicorn_workers_serve_one_stream(processes: Processes, keyed_env: dict[str, str]) -> None:
    """Many readers on connections of their own, spread over both processes, see the same events to the end."""
    await processes.start("worker", [PYTHON, "-m", "worker"], keyed_env)
    gunicorn, url = await start_gunicorn(processes, keyed_env)
    streams: list[list[Arrival]] = []

    async def follow(events_url: str) -> None:
        async with client(url) as http:
            streams.append(await read(http, events_url))

    async with client(url) as http:
        generation = await create(http)
    async with anyio.create_task_group() as readers:
        for _ in range(8):
            readers.start_soon(follow, generation["events_url"])
    said = [[event.said for event in stream] for stream in streams]
    assert len(said) == 8
    assert all(stream == said[0] for stream in said)
    assert said[0][-1][1] == "generation.completed"
    assert len(re.findall(r"Booting worker with pid", gunicorn.log())) == 2
    assert httpx2.URL(generation["events_url"]).query.decode() not in gunicorn.log()


async def test_resume_under_gunicorn_at_every_cursor(processes: Processes, keyed_env: dict[str, str]) -> None:
    """Each resume, on a new connection to either process, is the exact tail."""
    await processes.start("worker", [PYTHON, "-m", "worker"], {**keyed_env, "REJOIN_DEMO_WORDS_PER_SECOND": "500"})
    _, url = await start_gunicorn(processes, keyed_env)
    async with client(url) as http:
        events_url = (await create(http))["events_url"]
        full = [event.said for event in await read(http, events_url)]
    for position, (event_id, _, _) in enumerate(full[:-1]):
        async with client(url) as http:
            tail = await read(http, events_url, {"Last-Event-ID": event_id})
        assert [event.said for event in tail] == full[position + 1 :]


async def test_a_stream_outlives_its_gunicorn(processes: Processes, keyed_env: dict[str, str]) -> None:
    """SIGTERM ends Gunicorn in time, and the reader resumes at another one where it was."""
    await processes.start("worker", [PYTHON, "-m", "worker"], keyed_env)
    first, url = await start_gunicorn(processes, {**keyed_env, "REJOIN_DRAIN_SECONDS": "2"})
    _, other_url = await start_gunicorn(processes, keyed_env)
    seen: list[Arrival] = []
    async with client(url) as http:
        events_url = (await create(http))["events_url"]
        try:
            async with http.stream("GET", events_url) as response:
                async for arrival in arrivals(response):
                    seen.append(arrival)
                    if len(seen) == 4:
                        first.signal(signal.SIGTERM)
        except httpx2.RemoteProtocolError:
            pass  # cut, not ended: as good a reason to resume
    assert await first.wait(timeout=45) == 0
    async with client(other_url) as http:
        path = httpx2.URL(events_url).raw_path.decode()
        ended = seen[-1].type in TERMINAL  # a short answer may end within the drain
        rest = [] if ended else await read(http, path, {"Last-Event-ID": seen[-1].id})
        full = await read(http, path)
    assert [event.said for event in seen + rest] == [event.said for event in full]


async def test_without_keys_gunicorn_serves_loopback_alone(processes: Processes, keyed_env: dict[str, str]) -> None:
    """A loopback Host is served without a key; a foreign Host, a forwarding header or a foreign Origin is not."""
    env = {name: value for name, value in keyed_env.items() if name not in ("REJOIN_API_KEYS", "REJOIN_SECRET")}
    _, url = await start_gunicorn(processes, env)
    foreign = [
        {"Host": "rejoin.example.org"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Origin": "http://evil.example.org"},
    ]
    async with client(url) as http:
        assert (await http.get("/v1/models")).status_code == 200
        for headers in foreign:
            response = await http.post("/v1/generations", json=PROMPT, headers=headers)
            assert response.status_code in (401, 403), headers
        assert (await http.get("/v1/models", headers={**AUTHORIZED, "Host": "rejoin.example.org"})).status_code != 200
