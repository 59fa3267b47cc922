import os

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import OpenAI
from pydantic import BaseModel

app = FastAPI()
model = OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"))  # and OPENAI_BASE_URL


class Ask(BaseModel):
    prompt: str


@app.post("/chat/stream")
async def chat(ask: Ask) -> StreamingResponse:
    async def words():
        messages = [{"role": "user", "content": ask.prompt}]
        for chunk in model.chat.completions.create(model="gpt-5", messages=messages, stream=True):
            yield chunk.choices[0].delta.content or ""

    return StreamingResponse(words(), media_type="text/plain")


@app.get("/healthz")
async def healthz() -> str:
    return "ok"
