"""openai-python 2.x, strict; run by test_llama_index.py in the environment of LlamaIndex, which brings it."""

from __future__ import annotations

import os

import openai

SENSE = "This is, all in all, a sensible answer."
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
client = openai.OpenAI(
    base_url=os.environ["REJOIN_URL"], api_key="any", max_retries=0, timeout=30, _strict_response_validation=True
)
chat = client.chat.completions


def text() -> None:
    whole = chat.create(model="sensible", messages=HELLO)
    assert whole.choices[0].message.content == SENSE and whole.usage.total_tokens
    asked = {"model": "sensible", "messages": HELLO, "stream_options": {"include_usage": True}}
    chunks = list(chat.create(stream=True, **asked))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == SENSE
    assert chunks[-1].usage.total_tokens and chunks[-2].choices[0].finish_reason == "stop"
    with chat.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.content == SENSE
    assert chat.retrieve(whole.id) == whole


def tools() -> None:
    asked = {"model": "sensible", "messages": [{"role": "user", "content": "weather of 'Rome'"}], "tools": [WEATHER]}
    with chat.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    whole = chat.create(**asked).choices[0].message.tool_calls[0]
    for call in (streamed, whole):
        assert (call.id, call.function.name, call.function.arguments) == (
            "call_sensible",
            "weather",
            '{"city": "Rome"}',
        )


def failures() -> None:
    for raised, ask in (
        (openai.BadRequestError, lambda: chat.create(model="sensible", messages=HELLO, n=2)),
        (openai.NotFoundError, lambda: chat.retrieve("chatcmpl-x")),
        (openai.InternalServerError, lambda: chat.create(model="broken", messages=HELLO)),
        (openai.APIError, lambda: list(chat.create(model="broken", messages=HELLO, stream=True))),
    ):
        try:
            ask()
        except raised:
            continue
        raise AssertionError(f"no {raised.__name__}")


if __name__ == "__main__":
    text()
    tools()
    failures()
    print("3 parts passed with openai", openai.__version__)
