"""What is kept on disk of the documents between starts: each file as it was seen, and its chunks.

One SQLite file for one folder and one embedding model; who opens it holds the lock. A file's chunks are written in one
transaction, so whatever is interrupted goes on from there, and a file that is no index of ours is begun anew.
Knows no LlamaIndex.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from worker.providers.documents.folder import File

FORMAT = 2  # of what is kept; chunks that are made another way are another format
LOCK_SECONDS = 0.1  # between two looks whether another process has finished
_TABLES = """
CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB, title TEXT, problem TEXT);
CREATE TABLE chunks (path TEXT, number INTEGER, words TEXT, vector BLOB, PRIMARY KEY (path, number));
CREATE TABLE state (version INTEGER);
INSERT INTO state VALUES (abs(random() >> 2));
"""


class Stopped(Exception):
    """The process is going down; what was not done is for the next one."""


class Seen(NamedTuple):
    """A file as it was when its chunks were made. `problem`: why it has none."""

    file: File
    digest: bytes
    problem: str | None


class Chunk(NamedTuple):
    """A passage of a document. `number` counts from 1; `vector`: float32, or none."""

    path: str
    number: int
    title: str
    words: str
    vector: bytes | None


@contextmanager
def opened(path: Path, stopping: threading.Event) -> Iterator[Kept]:
    """What is kept in the file `path`, for this process alone. Another one that has it is waited for.

    Raises Stopped, OSError, and sqlite3.Error for a disk that fails."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(lock, stopping)
        with closing(_database(path)) as database:
            yield Kept(database)
    finally:
        os.close(lock)


class Kept:
    """An open index file."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @property
    def version(self) -> int:
        """Another one after each change, and in each file."""
        return int(self._database.execute("SELECT version FROM state").fetchone()[0])

    def files(self) -> dict[str, Seen]:
        rows = self._database.execute("SELECT path, size, mtime_ns, digest, problem FROM files")
        return {
            path: Seen(File(path, size, mtime_ns), digest, problem) for path, size, mtime_ns, digest, problem in rows
        }

    def chunks(self, most: int) -> list[Chunk]:
        """The first of them, in the order of paths and places."""
        query = "SELECT path, number, title, words, vector FROM chunks JOIN files USING (path) ORDER BY path, number"
        return [Chunk(*row) for row in self._database.execute(f"{query} LIMIT ?", (most,))]

    def count(self) -> int:
        """How many chunks there are."""
        return int(self._database.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def put(self, seen: Seen, title: str, words: Sequence[str], vectors: Sequence[bytes | None]) -> None:
        """In place of whatever there was of this file."""
        path, size, mtime_ns = seen.file.path, seen.file.size, seen.file.mtime_ns
        rows = [(path, n, words, vector) for n, (words, vector) in enumerate(zip(words, vectors, strict=True), 1)]
        with self._database:
            self._erase(path)
            about = (path, size, mtime_ns, seen.digest, title, seen.problem)
            self._database.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", about)
            self._database.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?)", rows)

    def touch(self, file: File) -> None:
        """The same words under another time."""
        with self._database:
            about = (file.size, file.mtime_ns, file.path)
            self._database.execute("UPDATE files SET size = ?, mtime_ns = ? WHERE path = ?", about)

    def remove(self, path: str) -> None:
        with self._database:
            self._erase(path)

    def _erase(self, path: str) -> None:
        self._database.execute("DELETE FROM files WHERE path = ?", (path,))
        self._database.execute("DELETE FROM chunks WHERE path = ?", (path,))
        self._database.execute("UPDATE state SET version = version + 1")


def _wait_for(lock: int, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stopping.wait(LOCK_SECONDS)
    raise Stopped


def _database(path: Path) -> sqlite3.Connection:
    try:
        return _connected(path)
    except sqlite3.DatabaseError:  # cut short by a full disk, or of another format: it can all be made again
        path.unlink(missing_ok=True)
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
        return _connected(path)


def _connected(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would let others read it
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        if database.execute("PRAGMA user_version").fetchone()[0] == 0 and not _has_tables(database):
            with database:
                database.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
        if database.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            raise sqlite3.DatabaseError("another format")
        if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("broken")
        database.execute("SELECT version FROM state").fetchone()[0]
    except BaseException:
        database.close()
        raise
    return database


def _has_tables(database: sqlite3.Connection) -> bool:
    return bool(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
