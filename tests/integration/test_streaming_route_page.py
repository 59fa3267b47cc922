"""The commands of docs/from-a-streaming-route.md, as they stand: the usual route, and Rejoin, before one slow model."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import RejoinUp, start_rejoin_up
from tests.processes import Process, Processes, free_port
from tests.test_docs import fenced, section, text_of
from tests.unit.test_deploy_files import needs_nginx
from tests.waiting import wait_until

PAGE = "docs/from-a-streaming-route.md"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl")


@dataclass
class Setup:
    """What the page's reader has in three terminals."""

    processes: Processes
    folder: Path
    model: Process
    usual: Process
    usual_url: str
    up: RejoinUp

    def run(self, heading: str, which: int | None = None) -> str:
        """The `sh` blocks under a heading, run in one shell: all of them, or one; what they print."""
        blocks = fenced(section(PAGE, heading), "sh")
        script = "\n".join(blocks if which is None else [blocks[which]])
        addresses = f"USUAL={self.usual_url}\nREJOIN={self.up.url}\nUSUAL_PID={self.usual.pid}\n[ -f env ] && . ./env\n"
        keep = '\necho "LOCATION=$LOCATION" > env\n'
        done = subprocess.run(
            ["sh"],
            input=addresses + script + keep,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    async def taken(self, answer: int) -> int:
        """How many words of an answer were taken, once the model's server says it."""
        return int(await self.model.says(rf"answer {answer}: (\d+) of 100", timeout=30))

    async def usual_is_free(self) -> None:
        """Until the usual route has done with the answers of those who have left."""
        await wait_until(lambda: asyncio.to_thread(self._is_free), timeout=30)

    def _is_free(self) -> bool:
        argv = ["curl", "-s", "--max-time", "1", f"{self.usual_url}/healthz"]
        return subprocess.run(argv, capture_output=True).returncode == 0


def shown(heading: str, which: int = 0) -> str:
    """What the page says that the commands print."""
    blocks = re.findall(r"(?ms)^```(\S*)\n(.*?)^```$", section(PAGE, heading))
    return [text for language, text in blocks if not language][which]


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    (tmp_path / "log").mkdir()
    (tmp_path / "shell").mkdir()
    processes = Processes(tmp_path / "log")
    try:
        model_port, usual_port = free_port(), free_port()
        upstream = {"OPENAI_BASE_URL": f"http://127.0.0.1:{model_port}/v1"}
        model = await processes.start("model", [sys.executable, "examples/slow_model.py", str(model_port)])
        usual = [sys.executable, "-m", "uvicorn", "examples.usual_route:app", "--port", str(usual_port)]
        route = await processes.start("usual", usual, upstream)
        await route.says("Uvicorn running", timeout=40)
        await model.says("ready", timeout=40)
        grace = {"REJOIN_DEFAULT_MODEL": "slow", "REJOIN_DISCONNECT_GRACE_SECONDS": "1"}
        up = await start_rejoin_up(processes, tmp_path / "data", **upstream, **grace)
        one = Setup(processes, tmp_path / "shell", model, route, f"http://127.0.0.1:{usual_port}", up)
        await one.usual_is_free()
        yield one
    finally:
        processes.end_all()


def test_the_page_shows_the_file_that_it_speaks_of() -> None:
    """The code on the page is examples/usual_route.py, and short enough for one."""
    (code,) = fenced(text_of(PAGE), "python")
    assert code == text_of("examples/usual_route.py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 21


def test_every_command_of_the_page_is_run() -> None:
    """A section with a command has its test here, and what is set up first is what the tests set up."""
    headings = re.findall(r"(?m)^## (.+)$", text_of(PAGE))
    with_commands = [heading for heading in headings if fenced(section(PAGE, heading), "sh")]
    tests = Path(__file__).read_text()
    assert len(with_commands) == 6
    for heading in with_commands:
        assert f'run("{heading}"' in tests, heading
    commands = fenced(text_of(PAGE), "console")[0]
    names = re.findall(r"(?m)^(\w+)=", fenced(text_of(PAGE), "sh")[0])
    assert names == ["USUAL", "REJOIN", "USUAL_PID"]
    for word in (
        "examples/slow_model.py 9000",
        "examples.usual_route:app",
        "REJOIN_DISCONNECT_GRACE_SECONDS=1 make up",
    ):
        assert word in commands


def test_no_command_tells_the_status_of_another() -> None:
    """`$?` behind a `$(…)` of the same line is the status of what stands in the brackets."""
    for block in fenced(text_of(PAGE), "sh"):
        assert not re.search(r"\$\(.*\$\?", block), block


@needs_curl
@pytest.mark.timeout(180)
async def test_one_at_a_time_and_who_leaves(setup: Setup) -> None:
    """The usual route answers nobody while one answer runs, and takes it to the end for nobody; Rejoin does neither."""
    assert setup.run("One answer at a time") == shown("One answer at a time")
    assert await setup.taken(1) == 100 and await setup.taken(2) < 100
    setup.run("Who leaves goes on paying")
    assert await setup.taken(3) < 100
    told = "".join(fenced(section(PAGE, "Who leaves goes on paying"), "text"))
    numbers = re.findall(r"(?m)^answer (\d): (\d+) of 100 words were taken$", told)
    assert [number for number, _ in numbers] == ["1", "2", "3"]
    assert [int(taken) == 100 for _, taken in numbers] == [True, False, False]


@needs_curl
@pytest.mark.timeout(180)
async def test_a_reload_and_half_an_answer(setup: Setup) -> None:
    """Where to come back to, and whether what came was all: the usual route knows neither."""
    said = setup.run("A reload is another answer")
    expected = re.escape(shown("A reload is another answer") + shown("A reload is another answer", 1))
    assert re.fullmatch(re.sub(r"after\\ \d+", r"after\\ [1-9][0-9]?", expected), said), said
    await setup.usual_is_free()
    assert setup.run("Half an answer that looks whole") == shown("Half an answer that looks whole")


@needs_curl
@pytest.mark.timeout(180)
async def test_a_deploy(setup: Setup) -> None:
    """Stopped and started again, the one has lost its answer, and the other has it whole."""
    said = await asyncio.to_thread(setup.run, "A deploy cuts it off", 0)
    expected = re.escape(shown("A deploy cuts it off"))
    assert re.fullmatch(re.sub(r"after\\ \d+", r"after\\ [1-9][0-9]?", expected), said), said
    assert await setup.usual.wait() == -signal.SIGKILL, "it obeyed SIGTERM, and the page says that it does not"

    setup.run("A deploy cuts it off", 1)
    setup.up.process.signal(signal.SIGINT)
    assert await setup.up.process.wait() == 0
    env = {name: value for name, value in setup.up.process.env.items() if name.startswith(("OPENAI", "REJOIN"))}
    setup.up = await start_rejoin_up(setup.processes, setup.up.data, **env)
    assert setup.run("A deploy cuts it off", 2) == shown("A deploy cuts it off", 1)


@needs_curl
@needs_nginx
@pytest.mark.timeout(180)
async def test_a_proxy(setup: Setup, tmp_path: Path) -> None:
    """By the headers, and by an nginx that compresses and knows nothing of streams: how much comes at first?"""
    assert setup.run("A proxy holds the words back") == shown("A proxy holds the words back")
    await setup.usual_is_free()
    port = free_port()
    await setup.processes.start(
        "nginx", nginx_before(tmp_path, port, {"/usual/": setup.usual_url, "/rejoin/": setup.up.url})
    )
    body = '{"prompt": "hello", "on_disconnect": "continue"}'
    for path, is_held_back in (("/usual/chat/stream", True), ("/rejoin/v1/chat/stream", False)):
        argv = [
            "curl",
            "-sN",
            "--compressed",
            "--retry",
            "20",
            "--retry-connrefused",
            "--json",
            body,
            f"http://127.0.0.1:{port}{path}",
        ]
        reading = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        assert reading.stdout is not None
        first = await asyncio.wait_for(reading.stdout.read(65536), 30)
        rest = await asyncio.wait_for(reading.stdout.read(), 30)
        assert len((first + rest).split()) == 100
        assert (len(first.split()) == 100) == is_held_back, (path, first)
        await reading.wait()


def nginx_before(folder: Path, port: int, servers: dict[str, str]) -> list[str]:
    """The command of an nginx that compresses what it passes on. A path's beginning says to which server it goes."""
    places = "\n".join(f"location {path} {{ proxy_pass {url}/; }}" for path, url in servers.items())
    temporary = "\n".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf = folder / "nginx.conf"
    conf.write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        f"{'user root;' if os.geteuid() == 0 else ''}\n"
        "events {}\nhttp { access_log off; gzip on; gzip_types text/plain; gzip_proxied any; gzip_min_length 0;\n"
        f"{temporary}\nserver {{ listen 127.0.0.1:{port};\n{places}\n}} }}\n"
    )
    return ["nginx", "-e", str(folder / "error.log"), "-c", str(conf)]
