"""Providers turn a prompt into events. Found by a table of import strings, so that only what is used is imported.

A provider knows the upstream and the vocabulary; it knows neither Redis, nor the queue, nor the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, TypeAlias

from shared.config import ModelRoute, Settings
from shared.events import Completed, Output, TextDelta, UpstreamAccepted
from shared.prompt import Prompt

PROVIDERS = {
    "demo": "worker.providers.demo:build",
    "documents": "worker.providers.documents:build",
    "openai_compatible": "worker.providers.openai_compatible:build",
    "openai_responses": "worker.providers.openai_responses:build",
}


@dataclass(frozen=True, slots=True)
class Said:
    """What the log already holds of an answer whose worker was lost: the outputs that stand, in order."""

    outputs: Sequence[Output]

    def texts(self) -> Iterator[str]:
        return (event.text for event in self.outputs if isinstance(event, TextDelta))

    @property
    def is_text_only(self) -> bool:
        return bool(self.outputs) and all(isinstance(event, TextDelta) for event in self.outputs)

    @property
    def accepted_id(self) -> str | None:
        """The id under which the upstream took the prompt, if it told one."""
        ids = [event.id for event in self.outputs if isinstance(event, UpstreamAccepted)]
        return ids[-1] if ids else None


class Provider(Protocol):
    """One upstream, open for the life of the worker process."""

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """Could `stream` go on behind `said`, so that nobody sees a seam?"""

    def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncIterator[Output | Completed]:
        """The events of one answer, as they come; the last is `Completed`. With `said`: those that follow it.

        Raises UpstreamError, always typed, for every way an upstream can fail; a stream that ends without
        `Completed` was truncated. Cancelling the task that iterates closes the upstream connection at once."""

    async def abandon(self, upstream_id: str) -> None:
        """Stop what the upstream goes on saying under this id, of `UpstreamAccepted`: nobody will ask for it again.

        Called when the answer has ended without it, never when another worker may take it up. Bounded in time;
        raises UpstreamError where the upstream could not be told."""

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
