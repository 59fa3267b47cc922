"""`rejoin up` as a newcomer runs it: one command, no Redis, no key, no container; and what it does when parts die."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from shared.redis import Keys, connect
from tests.conftest import start_rejoin_up
from tests.processes import ROOT, Processes, free_port
from tests.reader import Reader, check_history
from tests.waiting import wait_until


async def _post(url: str, prompt: str = "hello", model: str = "demo") -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False) as http:
        return await http.post(f"{url}/v1/generations", json={"model": model, "prompt": prompt})


def _children(pid: int, word: str) -> list[int]:
    """The pids of the supervisor's own children whose command line holds `word`."""
    found = []
    for line in subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines():
        child, parent, args = line.strip().split(None, 2)
        if int(parent) == pid and word in args:
            found.append(int(child))
    return found


async def test_the_main_journey_survives_every_part_dying_once(processes: Processes, tmp_path: Path) -> None:
    """Start, stream; then the worker, the api and the store are killed in turn, and the text is whole in the end."""
    up = await start_rejoin_up(processes, tmp_path / "data", REJOIN_DEMO_WORDS_PER_SECOND="20")
    generation = (await _post(up.url)).json()
    reader = Reader(up.url + generation["events_url"])
    reading = asyncio.create_task(reader.read_to_end(timeout=90))
    for word in ("-m worker", "-m api", "valkey"):
        seen = len(reader.blocks)
        await wait_until(lambda seen=seen: len(reader.blocks) > seen + 10, timeout=30)
        victims = _children(up.process.pid, word)
        assert len(victims) == (2 if word == "-m worker" else 1), word
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    await reading
    check_history(reader.blocks)
    again = await Reader(reader.url).read_to_end()
    assert again.text == reader.text and again.terminal is not None
    assert again.terminal.event == "generation.completed"
    up.process.signal(signal.SIGINT)
    assert await up.process.wait() == 0


async def test_ctrl_c_drains_and_the_next_start_finds_everything(processes: Processes, tmp_path: Path) -> None:
    """Ctrl-C lets a running generation end; after the next start its text is still there."""
    data = tmp_path / "data"
    up = await start_rejoin_up(processes, data, REJOIN_DEMO_WORDS_PER_SECOND="60")
    generation = (await _post(up.url)).json()
    await Reader(up.url + generation["events_url"]).connect(stop_after=10)
    up.process.signal(signal.SIGINT)
    assert await up.process.wait() == 0
    assert not _children(up.process.pid, "")
    up = await start_rejoin_up(processes, data)
    reader = await Reader(up.url + generation["events_url"]).read_to_end()
    assert reader.terminal is not None and reader.terminal.event == "generation.completed"
    starts = [block for block in reader.blocks if block.event == "generation.started"]
    assert len(starts) == 1, "it was run again, though there was time to end it"


async def test_what_a_dead_worker_held_is_handed_over_at_once(processes: Processes, tmp_path: Path) -> None:
    """The supervisor sees a worker die and ends its leases: nobody waits a minute for them to end."""
    slow = {"REJOIN_LEASE_SECONDS": "60", "REJOIN_DEMO_WORDS_PER_SECOND": "20"}
    up = await start_rejoin_up(processes, tmp_path / "data", **slow)
    generation = (await _post(up.url)).json()
    reader = Reader(up.url + generation["events_url"])
    reading = asyncio.create_task(reader.read_to_end(timeout=45))
    await wait_until(lambda: len(reader.blocks) > 10, timeout=30)
    pids = dict(re.findall(r"(worker\d) *\|.*worker.ready.* pid=(\d+)", up.process.log()))
    (holder,) = re.findall(r"(worker\d) *\|.*generation.started", up.process.log())
    os.kill(int(pids[holder]), signal.SIGKILL)
    await reading
    starts = [block.data for block in reader.blocks if block.event == "generation.started"]
    assert [start["mode"] for start in starts] == ["fresh", "continued"]
    assert "are handed to another worker" in up.process.log()


def _lives(pid: int) -> bool:
    """Whether a process still runs; one that has ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children can outlive a killed supervisor")


@linux_only
async def test_nothing_outlives_a_supervisor_that_is_killed(processes: Processes, tmp_path: Path) -> None:
    """`kill -9` of `rejoin up` ends its store, api and workers too; the next start has the folder for itself."""
    data = tmp_path / "data"
    up = await start_rejoin_up(processes, data)
    children = _children(up.process.pid, "")
    assert len(children) == 4
    await up.process.kill()
    await wait_until(lambda: not any(map(_lives, children)), timeout=40)
    again = await start_rejoin_up(processes, data)
    assert (await _post(again.url)).status_code == 202


@linux_only
async def test_a_closed_pipe_ends_the_house_in_order(tmp_path: Path) -> None:
    """`rejoin up 2>&1 | head -2`: at the next line it drains, stops what it started, and takes its address away."""
    data = tmp_path / "data"
    argv = [sys.executable, "-m", "cli", "up", "--port", "0", "--data", str(data)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ours, theirs = os.pipe()
    up = subprocess.Popen(argv, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        with open(ours, "rb") as heard:
            async with asyncio.timeout(40):
                while b"ready http" not in await asyncio.to_thread(heard.readline):
                    pass
            children = _children(up.pid, "")
            assert len(children) == 4 and (data / "addresses.json").exists()
        os.kill(_children(up.pid, "-m worker")[0], signal.SIGKILL)  # of which it wants to tell
        await wait_until(lambda: up.poll() is not None, timeout=60)
        assert up.returncode == 0
        await wait_until(lambda: not any(map(_lives, children)), timeout=5)
        assert not (data / "addresses.json").exists()
    finally:
        up.kill()
        up.wait()


async def test_two_workers_and_a_secret_of_its_own(processes: Processes, tmp_path: Path) -> None:
    """There are two; the secret is made once and readable by its owner only; one house for one folder."""
    data = tmp_path / "data"
    up = await start_rejoin_up(processes, data)
    assert len(_children(up.process.pid, "-m worker")) == 2
    assert stat.S_IMODE((data / "secret").stat().st_mode) == 0o600
    second = await processes.start("rejoin-up", [sys.executable, "-m", "cli", "up", "--port", "0", "--data", str(data)])
    assert await second.wait() == 2
    assert f"another `rejoin up` uses {data} (pid {up.process.pid})" in second.log()
    assert "Traceback" not in second.log()


async def test_a_long_path_gets_a_loopback_port_instead_of_a_socket(processes: Processes, tmp_path: Path) -> None:
    """A folder whose path is too long for a Unix socket works all the same."""
    up = await start_rejoin_up(processes, tmp_path / ("long" * 25), REJOIN_DEMO_WORDS_PER_SECOND="1000")
    assert (await _post(up.url)).status_code == 202


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (["--host", "0.0.0.0"], {}, "set REJOIN_API_KEYS"),
        ([], {"REJOIN_LEASE_SECONDS": "soon"}, "REJOIN_LEASE_SECONDS"),
        ([], {"REJOIN_MODELS": "/nowhere.toml"}, "REJOIN_MODELS"),
        ([], {"REJOIN_DEFAULT_MODEL": "gpt-x"}, "REJOIN_DEFAULT_MODEL"),
        (["--port", "BUSY"], {}, "another port, or --port 0"),
        (["--port", "99999"], {}, "--port 99999: a port is 0 to 65535"),
        (["--host", "no.such.host.invalid"], {"REJOIN_API_KEYS": f"me:{'0' * 64}"}, "--host no.such.host.invalid: "),
        (["--data", "/proc/nowhere"], {}, "--data /proc/nowhere: "),
    ],
)
async def test_what_is_wrong_stops_the_start_with_one_line(
    processes: Processes, tmp_path: Path, busy_port: int, arguments: list[str], env: dict[str, str], says: str
) -> None:
    """A wrong setting or option ends the start at once, with exit code 2 and one line that names it."""
    if "BUSY" in arguments:
        arguments = ["--port", str(busy_port)]
    argv = [sys.executable, "-m", "cli", "up", "--data", str(tmp_path / "data"), *arguments]
    process = await processes.start("rejoin-up", argv, env)
    assert await process.wait() == 2
    lines = process.log().strip().splitlines()
    assert len(lines) == 1 and says in lines[0], process.log()


async def test_an_unknown_model_says_which_key_is_missing(rejoin_up: object) -> None:
    """Without an OpenAI key, asking for another model than `demo` names the variable to set."""
    answer = await _post(rejoin_up.url, model="gpt-5")  # type: ignore[attr-defined]
    assert answer.status_code == 422
    assert answer.json()["code"] == "model_not_found" and "OPENAI_API_KEY" in answer.json()["detail"]


async def test_arqs_own_command_runs_the_worker_too(processes: Processes, rejoin_env: dict[str, str]) -> None:
    """`arq worker.settings.WorkerSettings` and `uvicorn api.app:create_app --factory` work, only slower to start."""
    port = free_port()
    uvicorn = ["-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port), "--no-access-log"]
    await processes.start("api", [sys.executable, *uvicorn], rejoin_env)
    worker = await processes.start(
        "worker", [sys.executable, "-m", "arq", "worker.settings.WorkerSettings"], rejoin_env
    )
    await worker.says("worker.ready")
    url = f"http://127.0.0.1:{port}"

    async def reachable() -> bool:
        try:
            async with httpx2.AsyncClient(trust_env=False) as http:
                return (await http.get(url + "/readyz")).status_code == 200
        except httpx2.HTTPError:
            return False

    await wait_until(reachable, timeout=20)
    generation = (await _post(url)).json()
    reader = await Reader(url + generation["events_url"]).read_to_end()
    assert reader.terminal is not None and reader.terminal.event == "generation.completed"
    assert await worker.terminate() in (0, 1, -signal.SIGTERM)


async def test_the_worker_says_whether_it_is_alive(processes: Processes, rejoin_env: dict[str, str]) -> None:
    """`python -m worker --health` fails while no worker lives, and succeeds when one does."""
    health = [sys.executable, "-m", "worker", "--health"]
    assert await (await processes.start("health", health, rejoin_env)).wait() == 1
    worker = await processes.start("worker", [sys.executable, "-m", "worker"], rejoin_env)
    await worker.says("worker.ready")

    async def alive() -> bool:
        return await (await processes.start("health", health, rejoin_env)).wait() == 0

    await wait_until(alive, timeout=15, every=0.1)


def test_version_and_help_answer_without_a_store() -> None:
    """`rejoin --help` explains itself, and `--version` is that of pyproject.toml."""
    asked = {
        option: subprocess.run(
            [sys.executable, "-m", "cli", option], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        for option in ("--help", "--version")
    }
    assert asked["--help"].returncode == 0 and re.search(r"up\s+start the store", asked["--help"].stdout)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (asked["--version"].returncode, asked["--version"].stdout) == (0, f"rejoin {version}\n")


async def test_a_worker_that_stops_in_order_is_no_longer_listed(
    processes: Processes, rejoin_env: dict[str, str]
) -> None:
    """`top` does not count for alive, nor `--health` for well, a worker that was asked to stop and did."""
    worker = await processes.start("worker", [sys.executable, "-m", "worker"], rejoin_env)
    async with connect(rejoin_env["REDIS_URL"], connections=1) as redis:
        workers = Keys(rejoin_env["REJOIN_KEY_PREFIX"]).workers

        async def names() -> list[str]:
            return [name.decode().rpartition(":")[2] for name in await redis.zrange(workers, 0, -1)]

        async def is_listed() -> bool:
            return str(worker.pid) in await names()

        await wait_until(is_listed, timeout=20)
        await worker.terminate()
        assert str(worker.pid) not in await names()
