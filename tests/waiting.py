"""Wait for a condition instead of for a time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_until(condition: Callable[[], T | Awaitable[T]], timeout: float = 10, every: float = 0.01) -> T:
    """The condition's first truthy value. Asks again each `every` seconds; AssertionError after `timeout` seconds."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    while True:
        outcome = condition()
        value: T = await outcome if inspect.isawaitable(outcome) else outcome
        if value:
            return value
        if clock() >= deadline:
            raise AssertionError(f"after {timeout:g} s there is still only {value!r} from {_name(condition)}")
        await asyncio.sleep(every)


def _name(condition: Callable[..., object]) -> str:
    code = getattr(condition, "__code__", None)
    place = f" (line {code.co_firstlineno} of {code.co_filename.rsplit('/', 1)[-1]})" if code else ""
    return f"{getattr(condition, '__qualname__', repr(condition))}{place}"
