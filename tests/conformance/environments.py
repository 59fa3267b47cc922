"""Clients that are none of our dependencies, each installed from its lock file into a folder of the cache.

A lock file of Python's is written by `uv pip compile --universal --python-version 3.11 --generate-hashes
--no-emit-index-url --no-annotate --no-header`, from langchain-openai and langchain-tests, and from
llama-index-llms-openai-like; one of Node's by `npm install --package-lock-only`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rejoin-conformance"
INSTALL_SECONDS = 600


async def run(*argv: str | Path, cwd: Path, timeout: float = 240, **env: str) -> tuple[int, str]:
    """The exit code of a program and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        cwd=cwd,
        env={**os.environ, **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), timeout)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, said.decode(errors="replace")


def _folder(name: str, lock: Path) -> Path:
    """The same lock, the same Python: the same folder. It is ready when it holds a file of that name."""
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:16]
    return CACHE / f"{name}-{key}"


async def python_with(name: str) -> Path:
    """The Python of a virtual environment that has `<name>-requirements.lock`; skips where it cannot be installed."""
    lock = HERE / f"{name}-requirements.lock"
    folder = _folder(name, lock)
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        await run(sys.executable, "-m", "venv", folder, cwd=HERE)
        install = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", lock)
        code, said = await run(*install, cwd=HERE, timeout=INSTALL_SECONDS)
        if code:
            pytest.skip(
                f"NOT TESTED with {name}: `pip install -r {lock.name}` failed, is there a network? {said[-300:]}"
            )
        (folder / "ready").touch()
    return python


async def node_with(name: str) -> tuple[str, Path]:
    """Node, and a folder with the packages and programs of the folder `name`; skips where either is missing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(f"NOT TESTED with {name}: install Node.js and npm (Debian: apt-get install nodejs npm)")
    source = HERE / name
    folder = _folder(name, source / "package-lock.json")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    if not (folder / "ready").exists():
        install = (npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
        code, said = await run(*install, cwd=folder, timeout=INSTALL_SECONDS)
        if code:
            pytest.skip(f"NOT TESTED with {name}: `npm ci` failed, is there a network? {said[-300:]}")
        (folder / "ready").touch()
    return node, folder
