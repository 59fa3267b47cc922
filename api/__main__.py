"""`python -m api`: one api process on REJOIN_HOST and REJOIN_PORT, or on a socket it is handed (`--fd N`)."""

from __future__ import annotations

import argparse
import signal
import sys

import uvicorn

from api.app import create_app
from api.auth import is_loopback
from shared import metrics, observability
from shared.config import load
from shared.errors import SettingsError

GRACEFUL_SECONDS = 10  # the hard stop after SIGTERM; the relays end themselves well before


def main(argv: list[str]) -> int:
    """Exit code 0 after an orderly stop, 2 for a wrong setting (named in one line)."""
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("--fd", type=int, default=None, help="serve on this listening socket")
    fd = parser.parse_args(argv).fd
    try:
        settings = load()
        if not settings.tenants_by_key_hash and not is_loopback(settings.host):
            raise SettingsError(
                f"REJOIN_HOST: {settings.host} would be reachable from other machines; set REJOIN_API_KEYS and "
                "REJOIN_SECRET first, or serve on 127.0.0.1"
            )
        observability.configure(settings.log_format, settings.log_level)
        app = create_app(settings)
        metrics.serve(settings.metrics_host, settings.metrics_port)
    except SettingsError as error:
        print(f"rejoin api: {error.message}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _ended_in_order)  # uvicorn raises the signal again when it is done
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        fd=fd,
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        timeout_keep_alive=75,
        proxy_headers=False,
        server_header=False,
    )
    return 0


def _ended_in_order(number: int, frame: object) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
