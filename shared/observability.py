"""Logs as facts with fields: `generation.completed generation_id=… tokens=…`. Never a prompt, an answer or a key.

One set-up for our own lines and for those of uvicorn and arq; query strings (they carry stream tokens) are cut off.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import structlog

_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def logger(name: str) -> structlog.stdlib.BoundLogger:
    return cast(structlog.stdlib.BoundLogger, structlog.get_logger(name))


def configure(log_format: str, log_level: str) -> None:
    """Send every log line to standard error, as `console` or `json`. Called once, at the start of a process."""
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        pad_event_to=30,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,  # the pretty ones print local variables: prompts, keys
    )
    renderer: Any = structlog.processors.JSONRenderer() if log_format == "json" else console
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(log_level.upper())),
        cache_logger_on_first_use=True,
    )
    finishing = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        renderer,
    ]
    if log_format == "console":
        finishing.pop(1)
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=finishing))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "arq"):
        foreign = logging.getLogger(name)
        foreign.handlers.clear()
        foreign.propagate = True
    for chatty in ("arq", "httpx2", "httpcore2", "openai"):  # their lines repeat ours, or hold addresses
        logging.getLogger(chatty).setLevel("WARNING")
    cut_query_strings()


def place_of(error: BaseException) -> str:
    """File and line where an exception was raised. Its message and its locals might be somebody's words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"


def causes_of(error: BaseException) -> dict[str, list[str]]:
    """The names and the places of what went wrong, whatever groups it came in: fields of a log line."""
    errors = [error]
    while any(isinstance(one, BaseExceptionGroup) for one in errors):
        errors = [inner for one in errors for inner in getattr(one, "exceptions", (one,))]
    return {"error": [type(one).__name__ for one in errors], "at": [place_of(one) for one in errors]}


def cut_query_strings() -> None:
    """Keep query strings out of uvicorn's logs, whoever configured them, and headers and frames of a WebSocket too:
    `uvicorn.error` tells a socket's query string, and at `debug` keys, prompts and answers."""
    for name in ("uvicorn.access", "uvicorn.error"):
        lines = logging.getLogger(name)
        if not any(isinstance(found, _NoQueryString) for found in lines.filters):
            lines.addFilter(_NoQueryString())
    told = logging.getLogger("uvicorn.error")
    told.setLevel(max(told.getEffectiveLevel(), logging.INFO))


class _NoQueryString(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True
