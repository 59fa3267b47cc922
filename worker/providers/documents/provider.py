"""The provider of `documents`: the question, the passages, their sources, then the words of the model that answers."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import dropwhile
from typing import TYPE_CHECKING

from shared.config import DOCUMENTS, ModelRoute, Settings, model_table
from shared.errors import CallerError, OurError, SettingsError, UpstreamError
from shared.events import Completed, Output, SourceAdded, TextDelta, UpstreamAccepted, Usage
from shared.observability import logger, place_of
from shared.prompt import Prompt
from worker import providers
from worker.providers import Provider, Said
from worker.providers.documents import sentences
from worker.providers.documents.conversation import asked_alone, condensing, with_passages
from worker.providers.documents.passages import Passage, source_of
from worker.providers.documents.quoting import Quoting

if TYPE_CHECKING:
    from worker.providers.documents.embedding import Embedding
    from worker.providers.documents.index import Index, Library

MODULES = ("llama_index.core", "llama_index.retrievers.bm25", "numpy", "pypdf")
HOW_TO_INSTALL = "install the extra rejoin[documents]; in the repository: pip install '.[documents]'"
LOOK_SECONDS = 2.0  # between two looks into the folder
PATIENCE_SECONDS = 5.0  # that a question waits for changes to be taken in, where there is an older index
MAX_QUESTION_CHARS = 2_000
log = logger("documents")


def build(settings: Settings, route: ModelRoute) -> Provider:
    """Raises SettingsError where there is no such folder, or no model that answers."""
    if settings.documents is None:
        raise SettingsError(f"model {route.name!r}: set REJOIN_DOCUMENTS to a folder of documents")
    if not settings.documents.is_dir():
        raise SettingsError(f"REJOIN_DOCUMENTS: {settings.documents} is not a folder")
    answering = _answering(settings, route)
    voice = None if answering.provider == "demo" else providers.build(settings, answering)
    documents = Documents(settings, route, voice)
    with suppress(RuntimeError):  # no loop runs: then the first question starts it
        asyncio.get_running_loop().call_soon(
            documents.start
        )  # after the other providers: imports are not for two at once
    return documents


def _answering(settings: Settings, route: ModelRoute) -> ModelRoute:
    try:
        answering = model_table(settings).resolve(route.upstream_model)
    except CallerError as error:
        raise SettingsError(f"model {route.name!r} is to be answered by another: {error.message}") from None
    if answering.provider == DOCUMENTS:
        raise SettingsError(f"model {route.name!r}: give it an upstream_model that answers, and is not over documents")
    return answering


class Documents:
    """One folder and the model that answers over it: `voice`, or where there is none, the passages themselves.

    One thread keeps the index up to date, a few others ask it."""

    def __init__(self, settings: Settings, route: ModelRoute, voice: Provider | None) -> None:
        self._settings = settings
        self._route = route
        self._voice = voice
        self._missing = [name for name in MODULES if not _is_there(name)]
        self._refreshing: Future[Library] | None = None
        self._looked_at = 0.0
        self._index: Index | None = None
        self._embedding: Embedding | None = None
        self._closing = threading.Event()
        self._keeper = ThreadPoolExecutor(1, "documents-index")
        self._finders = ThreadPoolExecutor(2, "documents-find")

    def start(self) -> None:
        """Begin with the index, if nobody has."""
        if self._missing:
            log.warning("documents.not_installed", missing=self._missing, do=HOW_TO_INSTALL)
        elif self._refreshing is None and not self._closing.is_set():
            self._refreshing = self._keeper.submit(self._refresh)

    async def aclose(self) -> None:
        self._closing.set()
        if self._index is not None:
            self._index.close()
        await asyncio.to_thread(self._keeper.shutdown)
        self._finders.shutdown()
        if self._embedding is not None:
            await self._embedding.aclose()
        if self._voice is not None:
            await self._voice.aclose()

    async def abandon(self, upstream_id: str) -> None:
        if self._voice is not None:
            await self._voice.abandon(upstream_id)

    def can_continue(self, prompt: Prompt, said: Said) -> bool:
        """Only an answer that goes on in the background: for any other the passages would be looked for again, and
        might be others."""
        return (
            said.accepted_id is not None and self._voice is not None and self._voice.can_continue(prompt, _voiced(said))
        )

    async def stream(self, prompt: Prompt, said: Said | None = None) -> AsyncGenerator[Output | Completed, None]:
        """The sources, then the events of the model that answers. Raises UpstreamError with a code of its own, of
        FAILURES, or `documents_unavailable`; OurError(`documents_not_installed`)."""
        if said is not None and self._voice is not None:
            rest = self._voice.stream(self._for_voice(prompt), _voiced(said))
            async with aclosing(rest) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
            return
        library = await self._newest()
        question, spent = await self._question(prompt)
        passages = await self._find(library, question)
        best = sentences.best(question, [passage.words for passage in passages])
        for passage, one in zip(passages, best, strict=True):
            yield source_of(passage, one.without(passage.title), self._settings.documents_url)
        async with aclosing(self._answer(library, prompt, question, passages)) as events:
            async for event in events:
                yield replace(event, usage=_sum(event.usage, spent)) if isinstance(event, Completed) else event

    async def _answer(
        self, library: Library, prompt: Prompt, question: str, passages: Sequence[Passage]
    ) -> AsyncGenerator[Output | Completed, None]:
        from worker.providers.documents import engine  # imported by the index before

        opened: list[AsyncGenerator[Output | Completed, None]] = []

        def ask(rules: str, with_question: str) -> AsyncGenerator[Output | Completed, None]:
            if self._voice is None:
                quoting = Quoting(passages, self._settings.demo_words_per_second, library.documents > 0)
                opened.append(quoting.stream(prompt, question))
            else:
                full = with_passages(self._for_voice(prompt), rules, with_question)
                opened.append(self._voice.stream(full))  # type: ignore[arg-type]
            return opened[-1]

        try:
            asked = prompt.last_user_text()
            async with aclosing(engine.answer(library.retriever, asked, passages, ask)) as events:
                async for event in events:
                    yield event
        finally:
            for one in opened:  # a cancel has closed it already; a consumer that stops early has not
                await one.aclose()

    async def _question(self, prompt: Prompt) -> tuple[str, Usage | None]:
        """What to look for: the question, or where it follows others, one that says all of it by itself."""
        question = prompt.last_user_text()[-MAX_QUESTION_CHARS:]
        if (conversation := condensing(self._for_voice(prompt))) is None:
            return question, None
        if self._voice is None:
            return asked_alone(prompt, question), None
        words, usage = await self._say(conversation)
        return words.strip()[:MAX_QUESTION_CHARS] or question, usage

    async def _say(self, prompt: Prompt) -> tuple[str, Usage | None]:
        """A whole answer of the model, which no client sees; if it breaks off, nothing of it goes on elsewhere."""
        assert self._voice is not None
        words: list[str] = []
        accepted: str | None = None
        try:
            async with aclosing(self._voice.stream(prompt)) as events:  # type: ignore[type-var]
                async for event in events:
                    match event:
                        case TextDelta(text=text):
                            words.append(text)
                        case UpstreamAccepted(id=accepted):
                            pass
                        case Completed(usage=usage):
                            accepted = None
                            return "".join(words), usage
        finally:
            if accepted is not None:
                with suppress(UpstreamError):
                    await asyncio.shield(self._voice.abandon(accepted))
        raise UpstreamError(
            "the question's condensing ended without saying that it was complete", code="upstream_truncated"
        )

    async def _find(self, library: Library, question: str) -> list[Passage]:
        from worker.providers.documents import engine  # imported by the index before

        if not question.strip():
            return []
        embedding = await self._embedding.aget_query_embedding(question) if self._embedding else None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._finders, engine.passages_of, library.retriever, question, embedding)

    async def _newest(self) -> Library:
        """The index with all changes, or where they take long, the one before them. Without any, as long as it takes.

        Raises OurError(`documents_not_installed`), UpstreamError."""
        if self._missing:
            raise OurError(
                f"model {self._route.name!r} needs packages that are not there: {HOW_TO_INSTALL}",
                code="documents_not_installed",
            )
        if self._refreshing is None or (self._refreshing.done() and time.monotonic() - self._looked_at > LOOK_SECONDS):
            self._refreshing = self._keeper.submit(self._refresh)
        known = self._index.library if self._index is not None else None
        refreshing = asyncio.wrap_future(self._refreshing)
        refreshing.add_done_callback(lambda done: done.cancelled() or done.exception())  # told already, where it failed
        await asyncio.wait([refreshing], timeout=PATIENCE_SECONDS if known else None)
        if refreshing.done() and (known is None or refreshing.exception() is None):
            return refreshing.result()
        assert known is not None
        return known

    def _refresh(self) -> Library:
        """In the keeper's thread. What goes wrong is told once, here."""
        try:
            if self._index is None:
                self._index = self._open()
                if self._closing.is_set():  # while LlamaIndex was being imported
                    self._index.close()
            library = self._index.refresh()
            self._looked_at = time.monotonic()
            return library
        except UpstreamError as error:
            log.warning("documents.not_indexed", code=error.code)
            raise
        except Exception as error:
            if not self._closing.is_set():
                log.warning("documents.not_indexed", **self._to_blame(error))
            raise UpstreamError(
                f"model {self._route.name!r}: its folder or its index cannot be read ({type(error).__name__}); the "
                "worker's log says where",
                code="documents_unavailable",
            ) from None

    def _to_blame(self, error: Exception) -> dict[str, str]:
        """For the log: the setting whose folder cannot be read, or else the place in the code."""
        assert self._settings.documents is not None
        try:
            os.listdir(self._settings.documents)
        except OSError as reason:
            return {"setting": "REJOIN_DOCUMENTS", "reason": f"the folder cannot be read: {reason.strerror}"}
        if isinstance(error, OSError):
            reason_of = error.strerror or type(error).__name__
            return {"setting": "REJOIN_DOCUMENTS_INDEX", "reason": f"the index cannot be read or written: {reason_of}"}
        return {"error": type(error).__name__, "at": place_of(error)}

    def _open(self) -> Index:
        from worker.providers.documents.embedding import Embedding  # LlamaIndex: a second, and a hundred MB
        from worker.providers.documents.index import Index

        settings, name = self._settings, self._settings.documents_embedding
        way = settings.documents_retrieval or ("fused" if name else "bm25")
        assert settings.documents is not None
        if name is not None and way != "bm25":
            self._embedding = Embedding(settings, model_table(settings).resolve(name), name)
        return Index(settings.documents, settings.documents_index, way, self._embedding)

    def _for_voice(self, prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"model": self._route.upstream_model})


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _voiced(said: Said) -> Said:
    """What the answering model said of what the log has: our sources come before all else."""
    return Said(list(dropwhile(lambda output: isinstance(output, SourceAdded), said.outputs)))


def _sum(usage: Usage | None, more: Usage | None) -> Usage | None:
    if usage is None or more is None:
        return usage
    return Usage(*(getattr(usage, name) + getattr(more, name) for name in Usage.__slots__))
