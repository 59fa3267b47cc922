"""The `rejoin` command: `rejoin up`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from cli.up import Options, up
from shared.config import load
from shared.errors import SettingsError


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after an orderly stop, 2 for a wrong setting or option (named in one line)."""
    parser = argparse.ArgumentParser(prog="rejoin", description="LLM streams that you can leave and rejoin.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start the store, the api and the workers on this machine")
    start.add_argument("--host", help="address to serve on (default REJOIN_HOST, 127.0.0.1)")
    start.add_argument("--port", type=int, help="port to serve on; 0 takes a free one (default REJOIN_PORT, 8000)")
    start.add_argument(
        "--workers", type=int, default=2, help="how many worker processes (default 2: one goes on when the other dies)"
    )
    start.add_argument(
        "--data", type=Path, default=Path(".rejoin"), help="where the store keeps its data (default .rejoin)"
    )
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error("--workers: at least 1")
    try:
        settings = load()
        host = settings.host if options.host is None else options.host
        port = settings.port if options.port is None else options.port
        return asyncio.run(up(Options(host, port, options.workers, options.data), settings))
    except SettingsError as error:
        print(f"rejoin: {error.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
