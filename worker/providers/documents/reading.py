"""From the bytes of a document to its title and its words: text, Markdown, HTML, PDF.

A hostile HTML or PDF file can take all the time and memory there is, so both are read in a process of their own
(`python -m worker.providers.documents.reading`), which is ended when it takes too much. Knows no index.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from worker.providers.documents import folder
from worker.providers.documents.folder import Unreadable

READ_SECONDS = 30.0  # that one file may take
READ_BYTES = 1024 * 1024 * 1024  # of memory
MAX_TEXT_CHARS = 5_000_000
MAX_PAGES = 5_000
MAX_TITLE_CHARS = 120
_ROOT = str(Path(__file__).parents[3])
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)
_FIRST_LINE = re.compile(r"\s*(\S[^\r\n]{0,79})\r?\n[ \t]*\r?\n")  # with nothing below it
_BLANKS = re.compile(r"[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_UNTOLD = frozenset({"script", "style", "template", "noscript", "head", "svg", "nav"})
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote br dd details div dl dt figcaption footer form h1 h2 h3 h4 h5 h6 header hr "
        "li main ol option p pre section summary table tr ul",
    )
)


class Text(NamedTuple):
    """What a document says. `title` is of the file's own giving, or its name."""

    title: str
    words: str


class Reader:
    """Reads one file after the other; the dangerous ones in a process of their own. For one thread; `close` may come
    from any, and ends what is being read."""

    def __init__(self, root: Path, read_seconds: float = READ_SECONDS) -> None:
        self._root = root
        self._read_seconds = read_seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, path: str) -> Text:
        """Raises Unreadable, or OSError."""
        if PurePosixPath(path).suffix.lower() in READERS_AT_HOME:
            return text_of(path, folder.read(self._root, path))
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        killing = threading.Timer(self._read_seconds, process.kill)
        killing.start()
        try:
            process.stdin.write(json.dumps([str(self._root), path]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            killing.cancel()
        if not line:
            self.close()
            raise Unreadable(f"reading it took more than {self._read_seconds:g} s or too much memory")
        answer = json.loads(line)
        if "problem" in answer:
            raise Unreadable(answer["problem"])
        return Text(answer["title"], answer["words"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not written has no reader any more
                    assert pipe is not None
                    pipe.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.providers.documents.reading"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # parsers quote what they stumble over
                env={"PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))},  # no keys
                text=True,
                encoding="utf-8",
            )
        return self._process


def text_of(path: str, data: bytes) -> Text:
    """The title and the words of a document, by the ending of its name. Raises Unreadable."""
    name = PurePosixPath(path)
    try:
        title, words = READERS[name.suffix.lower()](data)
    except (Unreadable, MemoryError):
        raise
    except Exception:  # a parser's, for which any file may be the reason
        raise Unreadable(f"it cannot be read as {KINDS.get(name.suffix.lower(), 'text')}") from None
    words = _tidy(words)
    if not words:
        raise Unreadable("it holds no words")
    if len(words) > MAX_TEXT_CHARS:
        raise Unreadable(f"it has more than {MAX_TEXT_CHARS} characters of text")
    title = " ".join(_tidy(title).split()) or name.stem
    return Text(title if len(title) <= MAX_TITLE_CHARS else title[: MAX_TITLE_CHARS - 1] + "…", words)


def _plain(data: bytes) -> tuple[str, str]:
    words = _decoded(data)
    heading = _FIRST_LINE.match(words)
    return heading[1] if heading else "", words


def _markdown(data: bytes) -> tuple[str, str]:
    words = _decoded(data)
    heading = _HEADING.search(words)
    return heading[1] if heading else "", words


def _html(data: bytes) -> tuple[str, str]:
    page = _Page()
    page.feed(_decoded(data))
    page.close()
    return "".join(page.title), "\n".join(line.strip() for line in _BLANKS.sub(" ", "".join(page.words)).split("\n"))


def _pdf(data: bytes) -> tuple[str, str]:
    from pypdf import PdfReader  # slow to import; and part of the extra

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("it is encrypted")
    if len(reader.pages) > MAX_PAGES:
        raise Unreadable(f"it has more than {MAX_PAGES} pages")
    words = "\n\n".join(page.extract_text() for page in reader.pages)
    if not words.strip():
        raise Unreadable("it holds no words: a scan, perhaps; OCR would give it some")
    return (reader.metadata.title if reader.metadata else None) or "", words


READERS_AT_HOME: dict[str, Callable[[bytes], tuple[str, str]]] = {
    ".txt": _plain,
    ".text": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
}
KINDS = {".html": "HTML", ".htm": "HTML", ".pdf": "PDF"}
READERS = {**READERS_AT_HOME, ".html": _html, ".htm": _html, ".pdf": _pdf}


class _Page(HTMLParser):
    """The words that a browser would show, a line for each block, and the title."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.words: list[str] = []
        self._untold: list[str] = []  # the elements we are in whose text is not shown
        self._in_title = False
        self._in_row = False  # of a table: its cells stand in one line

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "title":
            self._in_title = not self.title
        elif tag in ("body", "main", "article"):
            self._untold.clear()  # `</head>` may be left out
        elif tag in _UNTOLD:
            self._untold.append(tag)
        elif tag in ("td", "th"):
            is_on_a_new_line = "".join(self.words[-3:]).rstrip(" ").endswith("\n")
            self.words.append("" if is_on_a_new_line else " | " if self._in_row else "\n")
        elif tag in _BLOCKS:
            self._in_row = tag == "tr" or (self._in_row and tag != "table")
            self.words.append("\n\n" if tag in ("p", "h1", "h2", "h3", "section", "article", "table") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._untold:
            del self._untold[self._untold.index(tag) :]
        elif tag in _BLOCKS:
            self._in_row = self._in_row and tag not in ("tr", "table")
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._untold:
            self.words.append(data.replace("\n", " ") if self._in_row else data)


def _decoded(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, or else in what Windows wrote for long. Raises Unreadable for what is no text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\x00" in data:
        raise Unreadable("it is not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _tidy(words: str) -> str:
    words = _CONTROL.sub(" ", words.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]+\n", "\n", words)).strip()


def main() -> None:
    """One JSON line in, `[folder, path]`; one JSON line out: `title` and `words`, or the `problem`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the worker: a file would be taken for a deadly one
    resource.setrlimit(resource.RLIMIT_AS, (READ_BYTES, READ_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        root, path = json.loads(line)
        try:
            answer = text_of(path, folder.read(Path(root), path))._asdict()
        except (Unreadable, OSError) as error:
            answer = {"problem": folder.reason_of(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
