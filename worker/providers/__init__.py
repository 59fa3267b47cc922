"""Providers turn a prompt into events. Found by a table of import strings, so that only what is used is imported.

A provider knows the upstream and the vocabulary; it knows neither Redis, nor the queue, nor the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from importlib import import_module
from typing import Protocol, TypeAlias

from shared.config import ModelRoute, Settings
from shared.events import Completed, Output
from shared.prompt import Prompt

PROVIDERS = {
    "demo": "worker.providers.demo:build",
    "openai_compatible": "worker.providers.openai_compatible:build",
}


class Provider(Protocol):
    """One upstream, open for the life of the worker process."""

    def stream(self, prompt: Prompt) -> AsyncIterator[Output | Completed]:
        """The events of one answer, as they come; the last is `Completed`.

        Raises UpstreamError, always typed, for every way an upstream can fail; a stream that ends without
        `Completed` was truncated. Cancelling the task that iterates closes the upstream connection at once."""

    async def aclose(self) -> None:
        """Close what the provider holds open."""


Build: TypeAlias = Callable[[Settings, ModelRoute], Provider]


def build(settings: Settings, route: ModelRoute) -> Provider:
    """Import the provider a route names, and build it. Raises SettingsError for one that does not exist."""
    from shared.errors import SettingsError

    if route.provider not in PROVIDERS:
        raise SettingsError(f"model {route.name!r}: no provider {route.provider!r}; there are {', '.join(PROVIDERS)}")
    module, _, name = PROVIDERS[route.provider].partition(":")
    builder: Build = getattr(import_module(module), name)
    return builder(settings, route)
