"""The `documents` model: answers over a folder, found by LlamaIndex, said by any model that is configured here.

One rule: the sources come before the first word, and what the answering model says comes as it says it. LlamaIndex is
an extra and slow to import: nothing imports it before it is needed, and then in a thread. Knows no log and no queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.config import ModelRoute, Settings

if TYPE_CHECKING:
    from worker.providers import Provider


def build(settings: Settings, route: ModelRoute) -> Provider:
    """Raises SettingsError where there is no such folder."""
    from worker.providers.documents import provider  # not when a file is read, in a process of its own

    return provider.build(settings, route)
