"""The folder of documents: which files it offers, and the bytes of one.

One rule: nothing outside the folder is ever read, whatever a link in it says. What is not taken is told with a reason,
never silently. Knows nothing of what stands in the files.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".html", ".htm", ".pdf"})
MAX_FILES = 10_000
MAX_FILE_BYTES = 20 * 1024 * 1024
MAX_FOLDER_BYTES = 500 * 1024 * 1024
MAX_PATH_CHARS = 500
_ENDING = re.compile(r"\.[a-z0-9]{1,8}")  # what may be told: anything else may be part of a name


class Unreadable(Exception):
    """A file that is left out. Its argument is the reason, which quotes nothing of what is in it."""


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was seen. `path` is relative to the folder, with `/`; times in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class Listing:
    """What a look into the folder found: the files to read, and why others are left out, by path. `not_read`: how many
    more there are, by the endings of their names, which are none of a document's."""

    files: dict[str, File] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_read: Counter[str] = field(default_factory=Counter)


def look(root: Path) -> Listing:
    """All documents under `root`, in the order of their paths. Raises OSError where there is no such folder."""
    root = root.resolve(strict=True)
    os.listdir(root)  # os.walk would take a folder that cannot be read for an empty one
    found = Listing()
    total = 0
    for path in sorted(_candidates(root, found.not_read)):
        try:
            file = _seen(root, path)
            if len(found.files) == MAX_FILES:
                raise Unreadable(f"the folder has more than {MAX_FILES} documents")
            if total + file.size > MAX_FOLDER_BYTES:
                raise Unreadable(f"the documents before it have {MAX_FOLDER_BYTES} bytes already")
        except (Unreadable, OSError) as error:
            found.left_out[path] = reason_of(error)
            continue
        total += file.size
        found.files[path] = file
    return found


def read(root: Path, path: str) -> bytes:
    """The bytes of one document. Raises Unreadable, or OSError where it went or may not be read."""
    root = root.resolve(strict=True)
    real = _inside(root, path)
    with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # a pipe would be waited for
        _check(os.fstat(file.fileno()))
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise Unreadable(f"it is larger than {MAX_FILE_BYTES} bytes")
    return data


def reason_of(error: Exception) -> str:
    """What to tell of a file that was left out. An OSError's own words would hold the absolute path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def _candidates(root: Path, not_read: Counter[str]) -> list[str]:
    """The relative paths of what looks like a document; what does not is counted. Hidden folders and files are neither;
    links to folders are not followed."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        at = Path(folder).relative_to(root)
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if ending in SUFFIXES:
                paths.append((at / name).as_posix())
            else:
                not_read[ending if _ENDING.fullmatch(ending) else "others"] += 1
    return paths


def _seen(root: Path, path: str) -> File:
    if len(path) > MAX_PATH_CHARS or not path.isprintable():  # half a surrogate pair is not printable either
        raise Unreadable("its path is too long, or has characters that cannot be shown")
    about = os.stat(_inside(root, path))
    _check(about)
    return File(path, about.st_size, about.st_mtime_ns)


def _inside(root: Path, path: str) -> Path:
    """Where a path really leads."""
    real = (root / path).resolve(strict=True)
    if not real.is_relative_to(root):
        raise Unreadable("it is a link that leads out of the folder")
    return real


def _check(about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise Unreadable("it is not a regular file")
    if about.st_size > MAX_FILE_BYTES:
        raise Unreadable(f"it is larger than {MAX_FILE_BYTES} bytes")
