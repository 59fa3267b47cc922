"""The `rejoin` command: the table of what can be typed. A command's own file is loaded when it is asked for."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from cli.addresses import Addresses
from shared.config import Settings, load
from shared.errors import RejoinError
from shared.events import Status

if TYPE_CHECKING:
    from cli.client import Server

Running: TypeAlias = Coroutine[Any, Any, int]
Command: TypeAlias = Callable[[argparse.Namespace, Settings], Running]
DATA = Path(".rejoin")
USUAL_URL = str(Settings.model_fields["url"].default)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 for what was done, 2 for a wrong setting or option (named in one line); see docs/terminal.md."""
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # with the usage of that command
    run: Command = options.run
    if run is not _up:
        for number in (signal.SIGTERM, signal.SIGHUP):  # leave as Ctrl-C does, with the terminal as it was
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return asyncio.run(run(options, load()))
    except RejoinError as error:
        return _complain(error)
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _complain(error: RejoinError) -> int:
    from cli.ask import exit_code
    from cli.screens import notice

    notice(error.message)
    return exit_code(error)


def _up(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.up import Options, up

    host = settings.host if options.host is None else options.host
    port = settings.port if options.port is None else options.port
    return up(Options(host, port, options.workers, options.data or DATA), settings)


def _ask(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.ask import Question, ask, prompt_of

    question = Question(prompt_of(options.prompt), options.model, options.system, options.on_disconnect)
    return ask(question, _server(options, settings), detach=options.detach, as_json=options.json)


def _join(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.ask import join

    return join(options.id, options.after, _server(options, settings), as_json=options.json)


def _cancel(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.ask import cancel

    return cancel(options.id, _server(options, settings), as_json=options.json)


def _list(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.ask import list_own

    return list_own(options.limit, options.status, _server(options, settings), as_json=options.json)


def _top(options: argparse.Namespace, settings: Settings) -> Running:
    from cli.top import top

    return top(options.data, DATA, options.url, settings, options.interval, once=options.once, as_json=options.json)


def _server(options: argparse.Namespace, settings: Settings) -> Server:
    from cli.client import Server

    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Server(_url(options, settings), key, options.patience)


def _url(options: argparse.Namespace, settings: Settings) -> str:
    """What was said, or the `rejoin up` of this folder, or where one usually is."""
    if options.url is not None:
        return str(options.url)
    if "url" in settings.model_fields_set and settings.url:
        return settings.url
    found = Addresses.read(DATA)
    return found.api if found else USUAL_URL


def parser() -> argparse.ArgumentParser:
    """The table."""
    table = argparse.ArgumentParser(prog="rejoin", description="LLM streams that you can leave and rejoin.")
    table.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = table.add_subparsers(dest="command", required=True)

    up = _command(commands, "up", _up, "start the store, the api and the workers on this machine")
    up.add_argument("--host", help="address to serve on (default REJOIN_HOST, 127.0.0.1)")
    up.add_argument("--port", type=int, help="port to serve on; 0 takes a free one (default REJOIN_PORT, 8000)")
    up.add_argument(
        "--workers",
        type=_at_least(1, int),
        default=2,
        help="how many worker processes (default 2: one goes on when the other dies)",
    )
    up.add_argument("--data", type=Path, help=f"where the store keeps its data (default {DATA})")

    ask = _command(commands, "ask", _ask, "ask, and read the answer as it comes; Ctrl-C cancels it")
    ask.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to ask; - stands for standard input")
    ask.add_argument("--model", help="model to ask (default: the server's)")
    ask.add_argument("--system", help="a system message, before the prompt")
    ask.add_argument("--detach", action="store_true", help="start it, print its id and leave")
    ask.add_argument(
        "--on-disconnect",
        choices=["continue", "cancel"],
        help="what becomes of it when nobody reads it any more (default: continue)",
    )
    _asks_a_server(ask, "each event as a line of JSON")

    join = _command(commands, "join", _join, "read an answer from its start; Ctrl-C leaves, and cancels nothing")
    join.add_argument("id", metavar="ID")
    join.add_argument("--after", metavar="EVENT_ID", help="only what follows this event")
    _asks_a_server(join, "each event as a line of JSON")

    cancel = _command(commands, "cancel", _cancel, "end a generation; what was said stays")
    cancel.add_argument("id", metavar="ID")
    _asks_a_server(cancel, "the final snapshot as JSON")

    own = _command(commands, "list", _list, "show one's own generations, newest first")
    own.add_argument("--status", choices=get_args(Status))
    own.add_argument("--limit", type=_at_least(1, int), default=20, help="how many (default 20)")
    _asks_a_server(own, "as JSON")

    top = _command(commands, "top", _top, "watch the queue, the workers, what runs, and the store; reads Redis itself")
    top.add_argument("--data", type=Path, help=f"the folder of a `rejoin up` (default: REDIS_URL if set, else {DATA})")
    top.add_argument("--url", help="address of the api to look at (default REJOIN_URL, or the one of that `rejoin up`)")
    top.add_argument(
        "--interval", type=_at_least(0.1, float), default=1.0, help="seconds between two looks (default 1)"
    )
    top.add_argument("--once", action="store_true", help="look for one interval, print, and leave")
    top.add_argument("--json", action="store_true", help="each look as a line of JSON")
    return table


class _Version(argparse.Action):
    """Of this checkout, or of the package that is installed."""

    def __call__(self, parser: argparse.ArgumentParser, *typed: object) -> None:
        import tomllib
        from importlib.metadata import version

        project = Path(__file__).parent.parent / "pyproject.toml"
        is_checkout = project.exists()
        found = tomllib.loads(project.read_text())["project"]["version"] if is_checkout else version("rejoin")
        print(f"rejoin {found}")
        parser.exit()


def _command(commands: Any, name: str, run: Command, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _asks_a_server(parser: argparse.ArgumentParser, json_gives: str) -> None:
    parser.add_argument(
        "--url", help=f"address of the Rejoin (default: REJOIN_URL, the `rejoin up` of this folder, {USUAL_URL})"
    )
    parser.add_argument("--json", action="store_true", help=json_gives)
    parser.add_argument(
        "--patience",
        type=_at_least(0, float),
        default=60.0,
        metavar="SECONDS",
        help="for how long a lost connection is tried again (default 60)",
    )


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not least <= value < float("inf"):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r}: write a {name}, at least {least}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
