"""`python -m bench.profiled FILE api|worker`: Rejoin's own process under cProfile, which writes FILE when it ends."""

from __future__ import annotations

import cProfile
import sys
from importlib import import_module


def main(file: str, role: str) -> None:
    own_main = import_module(f"{role}.__main__").main
    profile = cProfile.Profile()
    try:
        profile.runcall(own_main, [])
    finally:
        profile.dump_stats(file)


if __name__ == "__main__":
    main(*sys.argv[1:3])
