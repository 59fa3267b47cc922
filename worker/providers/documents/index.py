"""The index over the folder: made once, kept on disk, brought up to date when a file has changed, asked from memory.

One process at a time works on what is kept; another one that comes meanwhile waits, and finds it done. A file that
cannot be read is named in the log with a reason, once, and left out. No question and no word of a document is ever
logged. Everything here takes its time: it belongs in a thread.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import BaseRetriever

from shared.observability import logger
from worker.providers.documents import folder
from worker.providers.documents.embedding import Embedding
from worker.providers.documents.folder import File, Unreadable
from worker.providers.documents.kept import FORMAT, Kept, Seen, Stopped, opened
from worker.providers.documents.reading import Reader, Text
from worker.providers.documents.retrieval import retriever_of

CHUNK_TOKENS = 256
OVERLAP_TOKENS = 32
MAX_PASSAGES = 50_000  # ten kilobytes of memory each, in every worker
TELL_SECONDS = 2.0  # between two lines of progress
BAR_CHARS = 24
_SENTENCE = re.compile(r"[^.!?。！？\n]*[.!?。！？\n]*\s*")
log = logger("documents")


@dataclass(frozen=True)
class Library:
    """What questions are asked of: one version of the index, in memory."""

    version: int
    documents: int
    passages: int
    retriever: BaseRetriever


class Index:
    """The index of one folder. `refresh` is for one thread at a time; `library` is the newest version there is."""

    def __init__(self, root: Path, kept_in: Path, way: str, embedding: Embedding | None) -> None:
        self._root = root
        self._way = way
        self._embedding = embedding
        self._path = kept_in / f"{_name(root, embedding)}.sqlite"
        self._stopping = threading.Event()
        self._reader = Reader(root)
        self._told: dict[str, str] = {}  # why which file is left out
        self._told_not_read: Counter[str] = Counter()
        self.library: Library | None = None
        _be_quiet()

    def refresh(self) -> Library:
        """Take in what has changed in the folder. The newest version, also where nothing has.

        Raises OSError, sqlite3.Error, UpstreamError of the embedding model, and Stopped once closed."""
        with opened(self._path, self._stopping) as kept:
            self._take_in(kept)
            if self.library is None or self.library.version != kept.version:
                self.library = self._load(kept)
        return self.library

    def close(self) -> None:
        """End a refresh that runs; from any thread."""
        self._stopping.set()
        self._reader.close()
        if self._embedding is not None:
            self._embedding.stop()

    def _take_in(self, kept: Kept) -> None:
        found, known = folder.look(self._root), kept.files()
        for path in known.keys() - found.files.keys():
            kept.remove(path)
        changed = [file for path, file in found.files.items() if path not in known or known[path].file != file]
        left_out = dict(found.left_out)
        with self._reader:
            for file in _progress(changed):
                try:
                    self._put(kept, file, known.get(file.path))
                except OSError as error:  # it may be readable the next time, without another date
                    kept.remove(file.path)
                    left_out[file.path] = folder.reason_of(error)
        left_out |= {path: seen.problem for path, seen in kept.files().items() if seen.problem}
        self._tell(left_out, found.not_read)

    def _put(self, kept: Kept, file: File, before: Seen | None) -> None:
        digest, text, problem = b"", Text("", ""), None
        try:
            digest = hashlib.sha256(folder.read(self._root, file.path)).digest()
            if before is not None and before.digest == digest:
                return kept.touch(file)
            text = self._reader.read(file.path)
        except Unreadable as error:
            problem = folder.reason_of(error)
        if self._stopping.is_set():  # then it may be the reader that was ended, not the file that is broken
            raise Stopped
        words = _chunks(text.words)
        kept.put(Seen(file, digest, problem), text.title, words, self._vectors(text.title, words))

    def _vectors(self, title: str, words: Sequence[str]) -> list[bytes | None]:
        if self._embedding is None:
            return [None] * len(words)
        texts = [f"{title}\n\n{one}" for one in words]
        found = self._embedding.get_text_embedding_batch(texts) if texts else []
        return [np.array(vector, np.float32).tobytes() for vector in found]

    def _load(self, kept: Kept) -> Library:
        chunks = kept.chunks(MAX_PASSAGES)
        if (count := kept.count()) > len(chunks):
            log.warning("documents.too_many", passages=count, taken=len(chunks))
        documents = len({chunk.path for chunk in chunks})
        library = Library(kept.version, documents, len(chunks), retriever_of(chunks, self._way))
        log.info("documents.indexed", documents=documents, passages=len(chunks))
        return library

    def _tell(self, left_out: dict[str, str], not_read: Counter[str]) -> None:
        if not_read != self._told_not_read:
            endings = ", ".join(f"{ending} {count}" for ending, count in sorted(not_read.items()))
            log.info("documents.not_read", files=not_read.total(), endings=endings)
        self._told_not_read = not_read
        for path, reason in left_out.items():
            if self._told.get(path) != reason:
                log.warning("documents.left_out", path=path, reason=reason)
        self._told = left_out


def _chunks(words: str) -> list[str]:
    """Passages of whole sentences, where there are any, the end of one repeated in the next."""
    splitter = SentenceSplitter(
        chunk_size=CHUNK_TOKENS,
        chunk_overlap=OVERLAP_TOKENS,
        paragraph_separator="\n\n",
        tokenizer=_tokens,  # the default ones would look for data of tiktoken and of nltk
        chunking_tokenizer_fn=_sentences,
    )
    return splitter.split_text(words) if words else []


def _tokens(text: str) -> range:
    """As many as a model would count, roughly: only the length of this is asked for."""
    return range((len(text.encode()) + 3) // 4)


def _sentences(text: str) -> list[str]:
    return list(takewhile(bool, (found[0] for found in _SENTENCE.finditer(text))))


def _progress(files: Sequence[File]) -> Iterator[File]:
    """The files, with a bar that grows: on a terminal in one line, else as a line of the log now and then."""
    told_at = time.monotonic()
    for done, file in enumerate(files):
        is_last = done + 1 == len(files)
        yield file
        if sys.stderr.isatty():
            print(f"\rdocuments {_bar(done + 1, len(files))}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last or time.monotonic() - told_at > TELL_SECONDS:
            told_at = time.monotonic()
            log.info("documents.indexing", progress=_bar(done + 1, len(files)))


def _bar(done: int, of: int) -> str:
    filled = BAR_CHARS * done // of
    return f"[{'█' * filled}{'·' * (BAR_CHARS - filled)}] {done}/{of}"


def _name(root: Path, embedding: Embedding | None) -> str:
    """Another folder, another embedding model, other chunks: another file."""
    model = embedding.identity if embedding else ""
    made_of = f"{root.resolve()}\0{model}\0{FORMAT}\0{CHUNK_TOKENS}\0{OVERLAP_TOKENS}"
    return hashlib.sha256(made_of.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _be_quiet() -> None:
    """The libraries log prompts and passages at `debug`."""
    for name in ("llama_index", "bm25s", "pypdf"):
        logging.getLogger(name).setLevel("WARNING")


UNAVAILABLE = (OSError, sqlite3.Error)  # what `refresh` raises where folder or disk are to blame
