"""A server of embeddings for tests: a text's vector counts its words, so texts that share words are near one another.

It knows some words as the same (`SAME`), as a model would: that is how to tell it from a search by words. A raw asyncio
server, which notes what it was asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from contextlib import AbstractAsyncContextManager, suppress

DIMENSIONS = 64
SAME = {"dog": "dogs", "hound": "dogs", "hounds": "dogs", "beacon": "lamp", "light": "lamp"}


def vector(text: str) -> list[float]:
    counts = [0.01] * DIMENSIONS
    for word in re.findall(r"\w{3,}", text.lower()):
        counts[zlib.crc32(SAME.get(word, word).encode()) % DIMENSIONS] += 1
    return counts


class Embeddings(AbstractAsyncContextManager["Embeddings"]):
    """Listening while its `async with` lasts. `status`, `body`: what it answers; `stalls`: it answers nothing."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.status = 200
        self.body: bytes | None = None
        self.stalls = False
        self.open = 0

    async def __aenter__(self) -> Embeddings:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                assert head.startswith("POST /v1/embeddings "), head
                texts = json.loads(body)["input"]
                self.asked.append(texts)
                if self.stalls:
                    await reader.read()  # until the client has left
                else:
                    await self._answer(writer, texts)
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, texts: list[str]) -> None:
        data = [{"object": "embedding", "index": n, "embedding": vector(text)} for n, text in enumerate(texts)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = {"object": "list", "data": data[::-1], "model": "test", "usage": usage}  # in no order
        body = json.dumps(answer).encode() if self.body is None else self.body
        head = f"HTTP/1.1 {self.status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
