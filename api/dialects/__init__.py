"""Dialects: one file of pure functions over the log for each client protocol. They do not know one another."""

from collections.abc import Callable

from api.dialects.chat_completions import ChatCompletions
from api.dialects.native import Native
from api.dialects.responses import Asked, Responses
from api.dialects.text import Text
from api.dialects.ui_messages import UiMessages
from api.frames import Dialect

# Each by name, made for a generation id, with its protocol's own defaults.
DIALECTS: dict[str, Callable[[str], Dialect]] = {
    "native": lambda generation_id: Native(),
    "text": lambda generation_id: Text(),
    "chat_completions": lambda generation_id: ChatCompletions(generation_id, include_usage=True),
    "responses": lambda generation_id: Responses(Asked(generation_id)),
    "ui_messages": UiMessages,
}
