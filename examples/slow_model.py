"""A model's server to try things out with: an answer of 100 words in five seconds, and a line for what became of it.

    python examples/slow_model.py 9000

To a prompt with the word `cut` in it, the stream ends after 20 words, as when a proxy in between is restarted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

WORDS, CUT_AT, PACE_SECONDS = 100, 20, 0.05
app = FastAPI()
numbers = itertools.count(1)


@app.post("/v1/chat/completions")
async def answer(request: Request) -> StreamingResponse:
    body = await request.json()
    is_cut = "cut" in str(body["messages"][-1]["content"])
    return StreamingResponse(chunks(next(numbers), is_cut), media_type="text/event-stream")


async def chunks(number: int, is_cut: bool) -> AsyncIterator[str]:
    taken = 0
    try:
        for taken in range(1, WORDS + 1):
            yield chunk({"content": f"word{taken} "})
            if is_cut and taken == CUT_AT:
                return
            await asyncio.sleep(PACE_SECONDS)
        yield chunk({}, "stop")
        yield "data: [DONE]\n\n"
    finally:
        print(f"answer {number}: {taken} of {WORDS} words were taken", flush=True)


def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "slow", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


if __name__ == "__main__":
    print("ready", flush=True)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
