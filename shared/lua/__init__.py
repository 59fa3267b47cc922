"""The scripts of the log protocol, one atomic step each: `prelude.lua` followed by the script's own file.

The version is part of the text, so of the SHA by which Redis knows a script: two versions of Rejoin can share
a Redis during a rolling deploy. docs/protocol.md is the contract.
"""

from importlib.resources import files

LOG_SCRIPTS = ("create", "claim", "append", "close", "due", "reap", "release", "attend", "erase", "retract")
QUEUE_SCRIPTS = ("announce", "enqueue", "take")  # on the queue's server, which may be another
SCRIPTS = LOG_SCRIPTS + QUEUE_SCRIPTS


def source(name: str) -> str:
    """The text of one script, ready for EVAL."""
    folder = files(__name__)
    return folder.joinpath("prelude.lua").read_text() + folder.joinpath(f"{name}.lua").read_text()
