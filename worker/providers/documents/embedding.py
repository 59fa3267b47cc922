"""Texts to vectors, by any upstream that speaks OpenAI's embeddings: a BaseEmbedding of LlamaIndex on our own HTTP.

Questions are embedded on the event loop, so that a cancel closes the connection at once; passages in the index's
thread. Every failure is an UpstreamError with one of the codes that answers have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial

import httpx2  # the openai SDK's own client
import numpy as np
import orjson
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from shared.config import ModelRoute, Settings
from worker.providers.documents.kept import Stopped
from worker.providers.upstream_http import UpstreamHTTP, broken, failure

BATCH = 64  # passages in one request
MAX_ANSWER_BYTES = 64 * 1024 * 1024
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)


class Embedding(BaseEmbedding):
    """The embedding model behind a route, asked for by `name`. Vectors have length 1."""

    _settings: Settings = PrivateAttr()
    _route: ModelRoute = PrivateAttr()
    _http: UpstreamHTTP = PrivateAttr()
    _batch: asyncio.Task[list[list[float]]] | None = PrivateAttr(None)
    _is_stopped: bool = PrivateAttr(False)

    def __init__(self, settings: Settings, route: ModelRoute, name: str) -> None:
        upstream_name = name if route.upstream_model == "*" else route.upstream_model
        super().__init__(model_name=upstream_name, embed_batch_size=BATCH)
        self._settings, self._route = settings, route
        self._http = UpstreamHTTP(settings, route)

    @property
    def identity(self) -> str:
        """What makes its vectors those of no other model."""
        return f"{self._http.client.base_url}\0{self.model_name}"

    def stop(self) -> None:
        """End the batch that is being embedded, and those to come; from any thread."""
        self._is_stopped = True
        if (batch := self._batch) is not None:
            with suppress(RuntimeError):  # its loop has just been closed
                batch.get_loop().call_soon_threadsafe(batch.cancel)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._ask(self._http, [query]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        """In a thread without an event loop: one for this batch, with a connection of its own. Raises Stopped."""
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self._batch = loop.create_task(self._ask_once(texts))
            if self._is_stopped:
                self._batch.cancel()
            try:
                return loop.run_until_complete(self._batch)
            except asyncio.CancelledError:
                raise Stopped from None
            finally:
                self._batch = None

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _ask_once(self, texts: list[str]) -> list[list[float]]:
        http = UpstreamHTTP(self._settings, self._route)
        try:
            return await self._ask(http, texts)
        finally:
            await http.aclose()

    async def _ask(self, http: UpstreamHTTP, texts: Sequence[str]) -> list[list[float]]:
        create = http.client.embeddings.with_streaming_response.create
        request = partial(create, model=self.model_name, input=list(texts), encoding_format="float")

        async def send(deadline: float) -> bytes:
            async with AsyncExitStack() as connection:
                response = await http.send(self.model_name, request, connection, deadline)
                return await self._body(response, deadline)

        return self._vectors(await http.retried(send), len(texts))

    async def _body(self, response: httpx2.Response, deadline: float) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout_at(deadline), aclosing(response.aiter_bytes()) as chunks:
                async for data in chunks:
                    body += data
                    if len(body) > MAX_ANSWER_BYTES:
                        raise failure(self.model_name, "upstream_invalid", "an answer without an end")
        except TimeoutError:
            waited = f"{self._route.first_token_seconds:g} s"
            raise failure(self.model_name, "upstream_timeout_first_token", waited) from None
        except httpx2.HTTPError as error:
            raise broken(self.model_name, error) from None
        return bytes(body)

    def _vectors(self, body: bytes, count: int) -> list[list[float]]:
        """The vectors in the order of the texts, each of length 1."""
        try:
            data = sorted(orjson.loads(body)["data"], key=lambda one: one["index"])
            found = np.array([one["embedding"] for one in data], np.float32)
            lengths = np.linalg.norm(found, axis=1, keepdims=True)
            if len(found) != count or not np.isfinite(lengths).all() or not lengths.all():
                raise ValueError("vectors")
        except UNREADABLE as error:
            raise failure(self.model_name, "upstream_invalid", type(error).__name__) from None
        vectors: list[list[float]] = (found / lengths).tolist()
        return vectors
