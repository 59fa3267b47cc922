"""What the bench runs that is not Python: its own C programs, and the peers where they can be had.

Everything is built into a folder of the user's cache, named by what it was built from. What is missing is said aloud,
and its system left out; only the C compiler is indispensable."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rejoin-bench"
C_PROGRAMS = ("load", "feed", "floor", "upstream")
INSTALL_SECONDS = 600
NCHAN_MODULE = "usr/lib/nginx/modules/ngx_nchan_module.so"


class Missing(Exception):
    """Something the bench needs is not here, and why."""


def compiler() -> str:
    """The C compiler. Raises Missing."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise Missing("no C compiler: on Debian, apt-get install gcc libc6-dev")
    return found


def compiled() -> dict[str, Path]:
    """The C programs of this folder, by name. Raises Missing, with what the compiler said."""
    sources = sorted((*HERE.glob("*.c"), *HERE.glob("*.h")))
    folder = _folder("c", *sources)
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in C_PROGRAMS:
            _run([compiler(), "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")], HERE)
        (folder / "ready").touch()
    return {name: folder / name for name in C_PROGRAMS}


def python_with_peers() -> Path:
    """A Python that has requirements.lock, in a virtual environment of its own. Raises Missing."""
    lock = HERE / "requirements.lock"
    folder = _folder("python", lock)
    python = folder / "bin" / "python"

    def install() -> None:
        _run([sys.executable, "-m", "venv", str(folder)], HERE)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "--require-hashes", "-r", str(lock)], HERE)

    _made(folder, install)
    return python


def node_with_peers() -> tuple[str, Path]:
    """Node, and a folder that has the packages of node/package-lock.json. Raises Missing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Missing("no Node.js or no npm: on Debian, apt-get install nodejs npm")
    source = HERE / "node"
    folder = _folder("node", *sorted(source.glob("*.json")), *sorted(source.glob("*.mjs")))

    def install() -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
        # Not `npm ci`: it refuses the lock where a registry lacks an optional package for another platform.
        _run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save"], folder)

    _made(folder, install)
    return node, folder


def nchan() -> tuple[str, Path]:
    """nginx and Nchan's module: the system's, or out of Debian's package, which needs no root. Raises Missing."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        raise Missing("no nginx: on Debian, apt-get install nginx-light libnginx-mod-nchan")
    if (installed := Path("/") / NCHAN_MODULE).exists():
        return nginx, installed
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg")
    if apt is None or dpkg is None:
        raise Missing("no Nchan module for this nginx: on Debian, apt-get install libnginx-mod-nchan")
    folder = CACHE / "nchan"

    def unpack() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _run([apt, "download", "--quiet", "libnginx-mod-nchan"], folder)
        for package in folder.glob("*.deb"):
            _run([dpkg, "-x", str(package), str(folder)], folder)

    _made(folder, unpack)
    return nginx, folder / NCHAN_MODULE


def _made(folder: Path, make: Callable[[], None]) -> None:
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    make()
    (folder / "ready").touch()


def _folder(name: str, *made_from: Path) -> Path:
    content = b"".join(path.read_bytes() for path in made_from) + sys.version.encode()
    return CACHE / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"


def _run(argv: Sequence[str], cwd: Path) -> None:
    try:
        done = subprocess.run(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{Path(argv[0]).name}: {type(error).__name__}") from None
    if done.returncode:
        raise Missing(f"{Path(argv[0]).name} failed: {(done.stderr or done.stdout)[-300:].strip()}")
