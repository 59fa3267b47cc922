"""A worker that hurts itself when its prompt says so: `block 4` holds up its event loop for 4 s, `die` ends it.

`python -m tests.chaos.hurt_worker` is `python -m worker` with that done after the first event of an answer.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shared.prompt import Prompt
from worker import providers
from worker.__main__ import main


class Hurting:
    """Another provider, and what its prompts do to the worker."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    async def stream(self, prompt: Prompt, *rest: Any) -> AsyncIterator[Any]:
        hurt = False
        async with aclosing(self._provider.stream(prompt, *rest)) as events:
            async for event in events:
                yield event
                if not hurt:
                    hurt = True
                    _obey(prompt.last_user_text())


def _obey(prompt: str) -> None:
    match prompt.split():
        case ["block", seconds]:
            time.sleep(float(seconds))
        case ["die"]:
            os._exit(70)


if __name__ == "__main__":
    build = providers.build
    providers.build = lambda settings, route: Hurting(build(settings, route))
    sys.exit(main(sys.argv[1:]))
