"""A real nginx, with the deployed configuration, in front of a real api: words pass at once, tokens stay secret."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.processes import PYTHON, Process, Processes, free_port
from tests.unit.test_deploy_files import render_nginx
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: apt-get install nginx-light")

API_KEY = "key-of-the-deployment-tests"
AUTHORIZED = {"Authorization": f"Bearer {API_KEY}"}
PROMPT = {"model": "demo", "prompt": "Tell me, in a few sentences, how a stream finds its way to the sea."}
WORDS_PER_SECOND = 40
TERMINAL = {"generation.completed", "generation.failed", "generation.cancelled"}


@dataclass(frozen=True)
class Arrival:
    """One event of a stream, and when it came (seconds of the monotonic clock)."""

    id: str
    type: str
    data: str
    seconds: float

    @property
    def said(self) -> tuple[str, str, str]:
        return self.id, self.type, self.data


@dataclass
class Deployment:
    """nginx before one api, and a worker."""

    url: str
    folder: Path
    api: Process
    worker: Process
    nginx: Process

    def logs(self) -> str:
        """All that nginx and the api have written down."""
        files = [self.folder / "access.log", self.folder / "error.log"]
        return "".join(file.read_text() for file in files) + self.nginx.log() + self.api.log()


async def arrivals(response: httpx2.Response) -> AsyncIterator[Arrival]:
    """The events of an SSE response as they come; comments and `retry:` are passed over."""
    buffer = b""
    async for piece in response.aiter_bytes():
        buffer += piece
        *frames, buffer = buffer.split(b"\n\n")
        for frame in frames:
            fields = dict(re.findall(r"(?m)^(id|event|data): ?(.*)$", frame.decode()))
            if "data" in fields:
                yield Arrival(fields.get("id", ""), fields["event"], fields["data"], time.monotonic())


def client(url: str, **options: Any) -> httpx2.AsyncClient:
    """A client that asks no proxy of the environment and waits a while, never for ever."""
    return httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30, **options)


async def create(http: httpx2.AsyncClient, **changes: Any) -> dict[str, Any]:
    """Ask for a generation; what the api answers."""
    response = await http.post("/v1/generations", json={**PROMPT, **changes}, headers=AUTHORIZED)
    assert response.status_code == 202, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def read(http: httpx2.AsyncClient, url: str, headers: dict[str, str] | None = None) -> list[Arrival]:
    """Follow a stream to its end."""
    async with http.stream("GET", url, headers=headers or {}) as response:
        assert response.status_code == 200, await response.aread()
        return [arrival async for arrival in arrivals(response)]


async def answers(url: str) -> None:
    """Wait until this URL is served with 200."""

    def look() -> bool:
        try:
            return httpx2.get(url, trust_env=False, timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    await wait_until(look, timeout=30)


@pytest.fixture
def keyed_env(redis_url: str, key_prefix: str) -> dict[str, str]:
    """The environment of an api and a worker with one tenant, at an easy pace."""
    return {
        "REDIS_URL": redis_url,
        "REJOIN_KEY_PREFIX": key_prefix,
        "REJOIN_API_KEYS": f"tests:{hashlib.sha256(API_KEY.encode()).hexdigest()}",
        "REJOIN_SECRET": "a-secret-of-the-deployment-tests",
        "REJOIN_DEMO_WORDS_PER_SECOND": str(WORDS_PER_SECOND),
        "REJOIN_DISCONNECT_GRACE_SECONDS": "1",
    }


async def start_behind_nginx(processes: Processes, folder: Path, env: dict[str, str]) -> Deployment:
    """Start a worker, an api and nginx, and wait for the api alone."""
    api_port, port = free_port(), free_port()
    worker = await processes.start("worker", [PYTHON, "-m", "worker"], env)
    api = await processes.start("api", [PYTHON, "-m", "api"], {**env, "REJOIN_PORT": str(api_port)})
    nginx = await processes.start("nginx", render_nginx(folder, port=port, api_port=api_port))
    await answers(f"http://127.0.0.1:{api_port}/healthz")
    return Deployment(f"http://127.0.0.1:{port}", folder, api, worker, nginx)


@pytest.fixture
async def deployment(processes: Processes, tmp_path: Path, keyed_env: dict[str, str]) -> Deployment:
    """nginx, api and worker, ready."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    ready = await start_behind_nginx(processes, folder, keyed_env)
    await answers(f"{ready.url}/healthz")
    return ready


async def test_words_arrive_one_by_one_through_nginx(deployment: Deployment) -> None:
    """The first word is there long before the last, and the words come spread over the time between."""
    async with client(deployment.url) as http:
        generation = await create(http)
        events = await read(http, generation["events_url"])
    words = [event.seconds for event in events if event.type == "text.delta"]
    assert events[-1].type == "generation.completed"
    assert len(words) >= 5
    span = words[-1] - words[0]
    assert span > 0.5 * (len(words) - 1) / WORDS_PER_SECOND, "faster than they were said: something held them back"
    gaps = [later - earlier for earlier, later in itertools.pairwise(words)]
    assert max(gaps) < span / 2, f"the words came in a burst: {gaps}"


async def test_plain_text_arrives_piece_by_piece_through_nginx(deployment: Deployment) -> None:
    """A text/plain stream is not held back either, though nothing in it says that it is a stream."""
    moments = []
    async with client(deployment.url, headers=AUTHORIZED) as http:
        url = f"/v1/generations/{(await create(http))['id']}/text"
        async with http.stream("GET", url) as response:
            assert response.status_code == 200, await response.aread()
            assert "content-encoding" not in response.headers
            async for _ in response.aiter_bytes():
                moments.append(time.monotonic())
    assert len(moments) >= 5
    assert moments[-1] - moments[0] > 0.2


async def test_resume_through_nginx_gives_the_exact_tail(deployment: Deployment) -> None:
    """Last-Event-ID passes nginx, and a resumed stream is the tail of the full one, also while it is being written."""
    async with client(deployment.url) as http:
        generation = await create(http)
        url = generation["events_url"]
        seen: list[Arrival] = []
        async with http.stream("GET", url) as response:
            async for arrival in arrivals(response):
                seen.append(arrival)
                if len(seen) == 5:
                    break
        rest = await read(http, url, {"Last-Event-ID": seen[-1].id})
        full = await read(http, url)
        ended = await http.get(url, headers={"Last-Event-ID": full[-1].id})
    assert [event.said for event in seen + rest] == [event.said for event in full]
    assert full[-1].type in TERMINAL
    assert ended.status_code == 204


async def test_a_reader_that_leaves_behind_nginx_is_missed(deployment: Deployment) -> None:
    """nginx closes its side when a client goes, so `on_disconnect: cancel` works behind it."""
    async with client(deployment.url, headers=AUTHORIZED) as http:
        generation = await create(http, on_disconnect="cancel")
        async with http.stream("GET", generation["events_url"]) as response:
            async for arrival in arrivals(response):
                if arrival.type == "text.delta":
                    break
    url = f"{deployment.url}/v1/generations/{generation['id']}"

    def ended() -> str | None:
        status = httpx2.get(url, headers=AUTHORIZED, trust_env=False, timeout=5).json()["status"]
        return None if status in ("queued", "in_progress") else str(status)

    assert await wait_until(ended, timeout=15) == "cancelled"


async def test_tokens_are_in_no_log(deployment: Deployment) -> None:
    """Neither a served request nor one that fails for want of an api writes its query string down."""
    async with client(deployment.url) as http:
        generation = await create(http)
        url = httpx2.URL(generation["events_url"])
        secret = url.query.decode().split("=", 1)[1]
        assert len(secret) > 20
        await read(http, generation["events_url"])
        await deployment.api.kill()
        assert (await http.get("/v1/models", params=url.params)).status_code == 502
        assert (await http.get(generation["events_url"])).status_code == 200
    logged = deployment.logs()
    assert url.path in logged
    assert secret not in logged
    assert API_KEY not in logged


async def test_without_an_api_an_event_source_is_told_to_come_back(deployment: Deployment) -> None:
    """While no api answers, /events is an empty stream with `retry:`, since an EventSource takes a 502 for final."""
    async with client(deployment.url) as http:
        generation = await create(http)
        await deployment.api.kill()
        response = await http.get(generation["events_url"])
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert re.fullmatch(r"retry: \d{4}\n\n", response.text)


async def test_the_api_itself_refuses_a_body_that_is_too_large(deployment: Deployment) -> None:
    """Just above the api's limit the caller still gets problem details, not nginx's page."""
    body = json.dumps({"model": "demo", "prompt": "x" * (4 * 1024 * 1024)})
    async with client(deployment.url) as http:
        response = await http.post(
            "/v1/generations", content=body, headers={**AUTHORIZED, "Content-Type": "application/json"}
        )
    assert response.status_code == 413
    assert response.headers["content-type"].startswith("application/problem+json")


async def test_without_keys_nothing_is_served_behind_nginx(
    processes: Processes, tmp_path: Path, keyed_env: dict[str, str]
) -> None:
    """nginx connects from loopback, but says for whom: an api without keys refuses."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    env = {name: value for name, value in keyed_env.items() if name not in ("REJOIN_API_KEYS", "REJOIN_SECRET")}
    open_to_all = await start_behind_nginx(processes, folder, env)
    await wait_until(lambda: (folder / "nginx.pid").exists(), timeout=10)
    async with client(open_to_all.url) as http:
        refused = [await http.get("/v1/models"), await http.post("/v1/generations", json=PROMPT)]
    assert {response.status_code for response in refused} <= {401, 403}
