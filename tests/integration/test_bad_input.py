"""Whatever is wrong with a request is said in the shape that clients of its address read: what it is, and what to do.
Never a 5xx, never their own words back at length.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect

from shared.redis import Keys
from tests.processes import Valkey
from tests.reader import Reader
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream

MAX_ANSWER_BYTES = 1000
LONG = 300  # from here on a value is not repeated in an answer
UNKNOWN = "0" * 32
CREATE = "POST /v1/generations"
SPOKEN = ("/v1/chat/completions", "/v1/responses", "/api/chat")  # where others' protocols are spoken
SOCKETS = ("/v1/responses", "/api/chat/ws")
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


@dataclass(frozen=True)
class Answer:
    """What a raw connection got."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(api: Api, line: str | bytes, headers: str | bytes = b"", body: bytes = b"") -> Answer:
    """One request with exactly these bytes, which an HTTP client might refuse to send, or tidy up."""
    line, headers = (part.encode() if isinstance(part, str) else part for part in (line, headers))
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=2**22)
    try:
        writer.write(line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers)
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return await answer(reader)
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> Answer:
    async with asyncio.timeout(20):
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(start.split()[1]), headers, body)


async def handshake(api: Api, path: str, headers: str = "Host: localhost\r\n") -> Answer:
    """What a WebSocket's opening handshake gets: 101, or the answer that refuses it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\n{headers}{UPGRADE}\r\n".encode("latin-1"))
        return await answer(reader)
    finally:
        writer.close()


def body_of(given: Any, status: int, media_type: str) -> bytes:
    """The body of a refusal, if it has this status and type, and is short."""
    body = bytes(given.body if isinstance(given, Answer) else given.content)
    status_code = given.status if isinstance(given, Answer) else given.status_code
    assert status_code == status, body[:500]
    assert given.headers["content-type"] == media_type
    assert len(body) < MAX_ANSWER_BYTES
    return body


def refused(given: Any, path: str, status: int, code: str | None = None) -> str:
    """What a refusal says, if it has the shape that clients of this address read, and the code where there is one.

    `status` is what it is there: OpenAI knows no 422."""
    if path.startswith("/api/chat"):
        words = body_of(given, status, "text/plain; charset=utf-8").decode()
        assert len(words) > 10 and words[0] not in "{[<"
        return words
    if path.startswith(("/v1/chat/completions", "/v1/responses", "/v1/models")):
        told = json.loads(body_of(given, status, "application/json"))
        assert told.keys() == {"error"} and told["error"].keys() == {"message", "type", "param", "code"}
        error = told["error"]
        assert error["type"] == KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["code"] and (code is None or error["code"] == code), error
        assert len(error["message"]) > 10
        return str(error["message"])
    return str(problem(given, status, code)["detail"])


def problem(given: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The problem details of an answer, if that is what it is: short, typed, with a code."""
    told = dict(json.loads(body_of(given, status, "application/problem+json")))
    assert {"type", "title", "status", "code", "detail"} <= told.keys()
    assert told["status"] == status
    assert code is None or told["code"] == code, told
    assert len(told["detail"]) > 10
    return told


def nested(depth: int, within: str = '{"prompt": "x", "tools": [{"a": %s}]}') -> bytes:
    return (within % ("[" * depth + "]" * depth)).encode()


BODIES: list[tuple[str, bytes, int, str, str]] = [
    ("empty", b"", 400, "invalid_json", "empty"),
    ("half an object", b'{"prompt": "x"', 400, "invalid_json", "byte"),
    ("words", b"prompt=x&model=demo", 400, "invalid_json", "byte"),
    ("two objects", b'{"prompt": "x"} {}', 400, "invalid_json", "byte"),
    ("NaN", b'{"prompt": "x", "temperature": NaN}', 400, "invalid_json", "byte"),
    ("Infinity", b'{"prompt": "x", "temperature": Infinity}', 400, "invalid_json", "byte"),
    ("-Infinity", b'{"prompt": "x", "temperature": -Infinity}', 400, "invalid_json", "byte"),
    ("1e400", b'{"prompt": "x", "temperature": 1e400}', 400, "invalid_json", "byte"),
    ("1e400 deep inside", b'{"prompt": "x", "tools": [{"a": -1e400}]}', 400, "invalid_json", "byte"),
    ("an escaped lone surrogate", b'{"prompt": "\\ud800"}', 400, "invalid_json", "byte"),
    ("an escaped lone low surrogate", b'{"prompt": "\\udfff x"}', 400, "invalid_json", "byte"),
    ("a raw lone surrogate", b'{"prompt": "\xed\xa0\x80"}', 400, "invalid_json", "byte"),
    ("not UTF-8", b'{"prompt": "caf\xe9"}', 400, "invalid_json", "byte"),
    ("overlong UTF-8", b'{"prompt": "\xc0\xaf"}', 400, "invalid_json", "byte"),
    ("UTF-16", '{"prompt": "x"}'.encode("utf-16"), 400, "invalid_json", "byte"),
    ("a raw NUL", b'{"prompt": "\x00"}', 400, "invalid_json", "byte"),
    ("100,000 brackets", b"[" * 100_000, 400, "invalid_json", "byte"),
    ("100,000 balanced brackets", nested(100_000), 400, "invalid_json", "byte"),
    ("1,000 levels", nested(1000), 422, "too_deep", "250"),
    ("260 levels", nested(260), 422, "too_deep", "250"),
    ("252 levels", nested(252), 422, "too_deep", "250"),
    ("a list", b"[]", 422, "invalid_value", "object"),
    ("null", b"null", 422, "invalid_value", "object"),
    ("a string", b'"prompt"', 422, "invalid_value", "object"),
    ("a number", b"1" * 100, 422, "invalid_value", "object"),
    ("neither prompt nor messages", b'{"model": "demo"}', 422, "invalid_value", "`prompt`: there is neither"),
    ("no messages", b'{"messages": []}', 422, "invalid_value", "`prompt`: there is neither"),
    ("both", b'{"prompt": "x", "messages": [{"role": "user"}]}', 422, "invalid_value", "`prompt`, not both"),
    ("an empty prompt", b'{"prompt": ""}', 422, "invalid_value", "prompt: "),
    ("a prompt of the wrong type", b'{"prompt": 7}', 422, "invalid_value", "prompt: "),
    ("messages of the wrong type", b'{"messages": "hi"}', 422, "invalid_value", "messages: "),
    ("a message without a role", b'{"messages": [{"content": "hi"}]}', 422, "invalid_value", "messages.0.role: "),
    ("an unknown role", b'{"messages": [{"role": "root"}]}', 422, "invalid_value", "messages.0.role: "),
    ("2,049 messages", json.dumps({"messages": [{"role": "user"}] * 2049}).encode(), 422, "invalid_value", "2048"),
    ("a model of the wrong type", b'{"prompt": "x", "model": ["a"]}', 422, "invalid_value", "model: "),
    ("a long model", json.dumps({"prompt": "x", "model": "m" * 5000}).encode(), 422, "invalid_value", "256"),
    ("too warm", b'{"prompt": "x", "temperature": 2.1}', 422, "invalid_value", "temperature: "),
    ("a temperature in words", b'{"prompt": "x", "temperature": "warm"}', 422, "invalid_value", "temperature: "),
    ("a negative maximum", b'{"prompt": "x", "max_tokens": -1}', 422, "invalid_value", "max_tokens: "),
    ("half a token", b'{"prompt": "x", "max_tokens": 1.5}', 422, "invalid_value", "max_tokens: "),
    ("a seed of 300 digits", b'{"prompt": "x", "seed": %s}' % (b"9" * 300), 422, "invalid_value", "seed: "),
    ("tools of the wrong type", b'{"prompt": "x", "tools": {}}', 422, "invalid_value", "tools: "),
    ("an unknown policy", b'{"prompt": "x", "on_disconnect": "explode"}', 422, "invalid_value", "on_disconnect: "),
    ("17 labels", json.dumps({"prompt": "x", "metadata": {str(n): "" for n in range(17)}}).encode(), 422, "", "16"),
    ("a long label", json.dumps({"prompt": "x", "metadata": {"k" * 5000: ""}}).encode(), 422, "", "metadata."),
    ("a label that is a number", b'{"prompt": "x", "metadata": {"a": 1}}', 422, "invalid_value", "metadata.a: "),
    ("an upstream of their own", b'{"prompt": "x", "base_url": "http://evil/"}', 422, "", "base_url: unknown field"),
    ("a stream where there is none", b'{"prompt": "x", "stream": true}', 422, "", "/v1/chat/stream always streams"),
    ("a key of their own", b'{"prompt": "x", "api_key": "sk-1"}', 422, "invalid_value", "api_key: "),
    ("a field with a long name", b'{"prompt": "x", "%s": 1}' % (b"n" * 100_000), 422, "invalid_value", "nnn"),
    (
        "an unknown field of a message",
        b'{"messages": [{"role": "user", "url": "x"}]}',
        422,
        "",
        "messages.0.url: unknown",
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "code", "hint"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES]
)
async def test_a_bad_body_is_a_problem_that_names_it(
    house: Stack, body: bytes, status: int, code: str, hint: str
) -> None:
    """Malformed JSON is a 400 with the byte, a wrong value a 422 with the field; neither repeats what was sent."""
    told = problem(await ask(house.apis[0], CREATE, body=body), status, code or None)
    assert hint in told["detail"]
    assert len(body) < LONG or body[-LONG:].decode("latin-1") not in told["detail"]


MALFORMED = [row for row in BODIES if row[3] in ("invalid_json", "too_deep") or row[4] == "object"]


@pytest.mark.parametrize("path", SPOKEN)
@pytest.mark.parametrize(
    ("body", "status", "code", "hint"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
async def test_a_body_that_is_no_object_is_refused_in_every_protocol(
    house: Stack, path: str, body: bytes, status: int, code: str, hint: str
) -> None:
    """What is wrong with the JSON itself is a 400 in all of them, with the same words as in our own."""
    given = await ask(house.apis[0], f"POST {path}", body=body)
    told = refused(given, path, 400, code)
    assert hint in told
    assert len(body) < LONG or body[-LONG:].decode("latin-1") not in told


HI = {"role": "user", "content": "hi"}
TURN = {"role": "user", "parts": [{"type": "text", "text": "hi"}]}
DEEP_TYPE: Any = [{"type": ["input_text"]}]


def asked(path: str, **more: Any) -> dict[str, Any]:
    """A body that is taken there, or would be but for `more`."""
    body: dict[str, Any] = {
        "/v1/generations": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [HI]},
        "/v1/responses": {"input": "hi"},
        "/api/chat": {"id": "bad-input", "messages": [TURN]},
    }[path]
    return {name: value for name, value in {"model": "demo", **body, **more}.items() if value is not ...}


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "parts": list(parts)}]}


WRONG_VALUES: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/chat/completions", {"messages": ...}, 400, "messages: "),
    ("/v1/chat/completions", {"messages": []}, 400, "messages: "),
    ("/v1/chat/completions", {"messages": "hi"}, 400, "messages: "),
    ("/v1/chat/completions", {"messages": ["hi"]}, 400, "messages.0: "),
    ("/v1/chat/completions", {"messages": [HI] * 2049}, 400, "2048"),
    ("/v1/chat/completions", {"messages": [{"role": "root", "content": "hi"}]}, 400, "messages.0.role: "),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": "x"}]}, 400, "messages.0.tool_calls: "),
    ("/v1/chat/completions", {"model": ["demo"]}, 400, "model: "),
    ("/v1/chat/completions", {"model": "m" * 5000}, 400, "256"),
    ("/v1/chat/completions", {"temperature": 2.1}, 400, "temperature: "),
    ("/v1/chat/completions", {"max_completion_tokens": -1}, 400, "max_completion_tokens: "),
    ("/v1/chat/completions", {"seed": int("9" * 300)}, 400, "seed: "),
    ("/v1/chat/completions", {"stream": "perhaps"}, 400, "stream: "),
    ("/v1/chat/completions", {"stream_options": "usage"}, 400, "stream_options: "),
    ("/v1/chat/completions", {"n": 2}, 400, "n: "),
    ("/v1/chat/completions", {"n": [[]]}, 400, "n: "),
    ("/v1/chat/completions", {"logit_bias": {"50256": -100}}, 400, "logit_bias: "),
    ("/v1/chat/completions", {"tools": {}}, 400, "tools: "),
    ("/v1/chat/completions", {"tools": [{"type": ["function"]}]}, 400, "function"),
    ("/v1/chat/completions", {"metadata": {str(n): "" for n in range(17)}}, 400, "16"),
    ("/v1/responses", {"input": ...}, 400, "input: "),
    ("/v1/responses", {"input": 7}, 400, "input"),
    ("/v1/responses", {"input": []}, 400, "input: "),
    ("/v1/responses", {"input": ["hi"]}, 400, "input"),
    ("/v1/responses", {"input": [HI] * 2049}, 400, "2048"),
    ("/v1/responses", {"input": [{"type": ["message"]}]}, 400, "input[0]"),
    ("/v1/responses", {"input": [{"type": "message", "role": ["user"], "content": "x"}]}, 400, "input[0].role"),
    ("/v1/responses", {"input": [{"role": "user", "content": 7}]}, 400, "input[0].content"),
    ("/v1/responses", {"input": [{"role": "user", "content": ["hi"]}]}, 400, "input[0].content[0]"),
    ("/v1/responses", {"input": [{"role": "user", "content": DEEP_TYPE}]}, 400, "input[0].content[0]"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "output": DEEP_TYPE}]}, 400, "input[0].call_id"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": ["x"]}]}, 400, "input[0].id"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x" * 5000}]}, 404, "response"),
    ("/v1/responses", {"previous_response_id": 7}, 400, "previous_response_id: "),
    ("/v1/responses", {"previous_response_id": "resp_" + "x" * 5000}, 404, "response"),
    ("/v1/responses", {"previous_response_id": "resp_\x00"}, 404, "response"),
    ("/v1/responses", {"model": "m" * 5000}, 400, "256"),
    ("/v1/responses", {"temperature": 2.1}, 400, "temperature: "),
    ("/v1/responses", {"max_output_tokens": 0}, 400, "max_output_tokens: "),
    ("/v1/responses", {"max_tool_calls": int("9" * 300)}, 400, "max_tool_calls: "),
    ("/v1/responses", {"tools": [{"type": ["function"]}]}, 400, "tools[0]"),
    ("/v1/responses", {"tools": [{"type": "function", "name": {}}]}, 400, "tools[0].name"),
    ("/v1/responses", {"tool_choice": "perhaps"}, 400, "tool_choice: "),
    ("/v1/responses", {"tool_choice": {"type": ["function"]}}, 400, "tool_choice: "),
    ("/v1/responses", {"text": {"format": ["text"]}}, 400, "text.format: "),
    ("/v1/responses", {"text": {"format": {"type": ["text"]}}}, 400, "text.format: "),
    ("/v1/responses", {"reasoning": {"effort": 7}}, 400, "reasoning.effort"),
    ("/v1/responses", {"reasoning": {"effort": "x" * 5000}}, 400, "64"),
    ("/v1/responses", {"include": [["x"]]}, 400, "include"),
    ("/v1/responses", {"include": ["file_search_call.results"]}, 400, "include: "),
    ("/v1/responses", {"conversation": "conv_1"}, 400, "conversation: "),
    ("/v1/responses", {"background": True, "store": False}, 400, "store"),
    ("/v1/responses", {"metadata": {"k" * 5000: ""}}, 400, "metadata."),
    ("/api/chat", {"id": ...}, 400, "id: "),
    ("/api/chat", {"id": ""}, 400, "id: "),
    ("/api/chat", {"id": 7}, 400, "id: "),
    ("/api/chat", {"id": "chat\n"}, 400, "id: "),
    ("/api/chat", {"id": "c" * 257}, 400, "id: "),
    ("/api/chat", {"messages": ...}, 400, "`messages` or `message`"),
    ("/api/chat", {"message": TURN}, 400, "`messages` or `message`"),
    ("/api/chat", {"messages": []}, 400, "messages: "),
    ("/api/chat", {"messages": [TURN] * 2049}, 400, "2048"),
    ("/api/chat", turn(role="tool"), 400, "messages.0.role: "),
    ("/api/chat", turn(), 400, "neither text nor a picture"),
    ("/api/chat", turn(role="assistant"), 400, "messages: "),
    ("/api/chat", turn("hi"), 400, "messages.0.parts.0: "),
    ("/api/chat", turn({"type": ["text"]}), 400, "part"),
    ("/api/chat", turn({"type": "text", "text": 7}), 400, "text part"),
    ("/api/chat", turn({"type": "x" * 5000}), 400, "part"),
    ("/api/chat", turn({"type": "file", "url": 7}), 400, "file part"),
    ("/api/chat", turn({"type": "file", "mediaType": "image/png", "url": "file:///etc/passwd"}), 400, "pictures"),
    ("/api/chat", turn({"type": "tool-x", "toolCallId": ["x"]}, role="assistant"), 400, "tool part"),
    ("/api/chat", {"temperature": 7}, 400, "temperature: "),
    ("/api/chat", {"seed": int("9" * 300)}, 400, "seed: "),
    ("/api/chat", {"onDisconnect": "explode"}, 400, "onDisconnect: "),
    ("/api/chat", {"model": "m" * 5000}, 400, "256"),
]


@pytest.mark.parametrize(
    ("path", "more", "status", "hint"), WRONG_VALUES, ids=lambda value: ascii(value)[:48] if value != {} else "{}"
)
async def test_a_wrong_value_is_refused_in_the_protocols_own_shape(
    house: Stack, path: str, more: dict[str, Any], status: int, hint: str
) -> None:
    """Each names what is to blame, and repeats none of it at length."""
    given = await ask(house.apis[0], f"POST {path}", body=json.dumps(asked(path, **more)).encode())
    assert hint in refused(given, path, status)


@pytest.mark.parametrize(
    "line",
    [
        "POST /api/chat?stream=perhaps",
        "POST /api/chat?resetStep=" + "x" * 5000,
        "GET /api/chat/c/stream?stream=perhaps",
        "GET /api/chat/c/stream?ended=perhaps",
        "GET /api/chat/%00/stream",
        "GET /api/chat/c%09/stream",
        "GET /api/chat//stream",
        "GET /api/chat/" + "c" * 257 + "/stream",
        "POST /api/chat/" + "c" * 20_000 + "/stop",
    ],
    ids=lambda line: line[:32],
)
async def test_a_chats_address_that_cannot_be_is_refused(house: Stack, line: str) -> None:
    """A chat's id is 1 to 256 characters without control characters; a flag takes what it takes."""
    refused(await ask(house.apis[0], line, body=json.dumps(asked("/api/chat")).encode()), "/api/chat", 422)


@pytest.mark.parametrize("chat_id", ["c", "c" * 256, "..%2Fc", "a/b", "%FF", "%ED%A0%80", "%2A", "caf%C3%A9", "{0}"])
async def test_an_unknown_chat_says_nothing(house: Stack, chat_id: str) -> None:
    """204, to a resume and to a stop: the SDK asks before anything was said, and takes an error for one."""
    for line in ("GET /api/chat/%s/stream", "GET /api/chat/%s/stream?ended=true", "POST /api/chat/%s/stop"):
        given = await ask(house.apis[0], line % chat_id)
        assert (given.status, given.body) == (204, b"")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"activeStreamId": NaN}', b'{"activeStreamId": "\\ud800"}'])
async def test_a_stop_that_is_not_understood_stops_nothing(house: Stack, body: bytes) -> None:
    """A body that was meant and is no JSON object is refused, not taken for a stop of anything."""
    headers = f"Content-Type: application/json\r\n{'Transfer-Encoding: chunked' if not body else 'X-Is: told'}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", house.apis[0].port)
    framed = f"Content-Length: {len(body)}\r\n\r\n".encode() + body if body else b"\r\n0\r\n\r\n"
    writer.write(f"POST /api/chat/c/stop HTTP/1.1\r\nHost: localhost\r\n{headers}".encode() + framed)
    refused(await answer(reader), "/api/chat", 422 if body == b"[]" else 400)
    writer.close()


async def test_deep_but_bearable_nesting_is_served(house: Stack, upstream: Upstream) -> None:
    """What is just under the limit reaches the upstream as it was sent."""
    upstream.script("deep", Script(count=1))
    tools = json.loads(nested(240))["tools"]
    generation = await house.create("deep", tools=tools)
    assert (await house.finished(generation))["status"] == "completed"
    assert upstream.requests_of("deep")[0].body["tools"] == tools


def resident_bytes(api: Api) -> int:
    asked = subprocess.run(["ps", "-o", "rss=", "-p", str(api.process.pid)], capture_output=True, check=True)
    return int(asked.stdout) * 1024


@pytest.mark.parametrize("framing", ["Content-Length: 200000000", "Transfer-Encoding: chunked"])
async def test_200_megabytes_are_refused_without_being_kept(house: Stack, framing: str) -> None:
    """The 413 comes after a few of them; the rest costs the api no memory, whether their number was told or not."""
    api, before = house.apis[0], resident_bytes(house.apis[0])
    piece = b" " * 1_000_000
    wire = b"%x\r\n%b\r\n" % (len(piece), piece) if "chunked" in framing else piece
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        writer.write(f"{CREATE} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
        for _ in range(10):
            writer.write(wire)
            await writer.drain()
        told = problem(await answer(reader), 413, "too_large")
        assert "4194304 bytes" in told["detail"]
        try:
            for _ in range(190):
                writer.write(wire)
                await writer.drain()
        except ConnectionError:
            pass  # it need not listen to the rest
        assert resident_bytes(api) - before < 40_000_000
    finally:
        writer.close()
    assert (await house.http.get(api.url + "/healthz")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/generations", *SPOKEN, "/api/chat/c/stop"])
async def test_a_told_length_is_refused_before_the_first_byte(house: Stack, path: str) -> None:
    """Who says beforehand that a body is too large need not send it."""
    headers = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 200000000\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", house.apis[0].port)
    writer.write(f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode())
    refused(await answer(reader), path, 413, "too_large")
    writer.close()


@pytest.mark.parametrize("path", SPOKEN)
async def test_an_untold_length_is_refused_at_the_limit(house: Stack, path: str) -> None:
    """A chunked body that grows past the limit is a 413 in every protocol."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.apis[0].port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(5):
        writer.write(b"%x\r\n%b\r\n" % (1_000_000, b" " * 1_000_000))
        await writer.drain()
    assert "4194304 bytes" in refused(await answer(reader), path, 413, "too_large")
    writer.close()


async def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(stack: Stack) -> None:
    """Half a body and a closed socket leave no stack of frames in the log."""
    api = await stack.api()
    _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"{CREATE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode() + b'{"prompt"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    problem(await ask(api, CREATE), 400, "invalid_json")
    assert await api.process.terminate() == 0
    assert "Traceback" not in api.process.log() and "api.broke" not in api.process.log()


async def test_an_unknown_model_is_named_with_what_to_set(stack: Stack) -> None:
    """Without an upstream for every other name, the answer says which variable there is and which models."""
    api = await stack.api(OPENAI_API_KEY="", OPENAI_BASE_URL="")
    given = await stack.http.post(api.url + "/v1/generations", json={"model": "gpt-9", "prompt": "x"})
    told = problem(given, 422, "model_not_found")
    assert told["param"] == "model"
    details = [told["detail"]]
    for path, status in (("/v1/chat/completions", 404), ("/v1/responses", 404), ("/api/chat", 400)):
        for stream in (False, True):
            given = await stack.http.post(api.url + path, json=asked(path, model="gpt-9", stream=stream))
            details.append(refused(given, path, status, "model_not_found"))
    for detail in details:
        assert all(word in detail for word in ("gpt-9", "OPENAI_API_KEY", "REJOIN_MODELS", "demo"))


@pytest.mark.parametrize(
    "key", [b"", b"k" * 256, b"k" * 1_000_000, b"caf\xc3\xa9", b"caf\xe9", b"tab\tkey"], ids=lambda key: str(len(key))
)
async def test_a_bad_idempotency_key_is_refused(house: Stack, key: bytes) -> None:
    """A key has 1 to 255 printable ASCII characters, so that it means the same to everything between."""
    for path in ("/v1/generations", *SPOKEN):
        body = json.dumps(asked(path)).encode()
        given = await ask(house.apis[0], f"POST {path}", b"Idempotency-Key: " + key + b"\r\n", body)
        assert "255" in refused(given, path, 400, "bad_request")


CURSORS = [
    "9999999999999999999-0",
    "1-9999999999999999999",
    "-",
    "+",
    "$",
    "*",
    "(1-1",
    "1-1; DROP",
    "-1-1",
    "1--1",
    "1",
    "1-",
    "01-1",
    "1-1-1",
    "1e3-1",
    "0x1-1",
    "१-१",
    "1٢-1",
    "\x00",
    "1-1\x00",
    "1-1\n",
    "\ud800",
    "1" * 1000,
]


@pytest.mark.parametrize("cursor", CURSORS, ids=ascii)
async def test_a_malformed_cursor_is_refused(house: Stack, upstream: Upstream, cursor: str) -> None:
    """What is not an event id never reaches Redis, neither from the query nor from the header."""
    generation = await house.create("cursors")
    path = f"GET /v1/generations/{generation['id']}/events"
    raw = cursor.encode("utf-8", "surrogatepass")
    told = problem(await ask(house.apis[0], f"{path}?after={quote(raw)}"), 400, "bad_cursor")
    assert "Last-Event-ID" in told["detail"] or "`id:`" in told["detail"]
    if not set(raw) & set(b"\x00\n"):
        problem(await ask(house.apis[0], path, b"Last-Event-ID: " + raw + b"\r\n"), 400, "bad_cursor")


async def test_a_cursor_of_a_megabyte_is_refused(house: Stack) -> None:
    """A header of that size is a bad cursor like any other, and not repeated."""
    generation = await house.create("cursors")
    path = f"GET /v1/generations/{generation['id']}/events"
    header = b"Last-Event-ID: " + b"1" * 1_000_000 + b"\r\n"
    problem(await ask(house.apis[0], path, header), 400, "bad_cursor")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=many", "limit"),
        ("limit=1e400", "limit"),
        ("limit=NaN", "limit"),
        ("limit=" + "9" * 6000, "limit"),
        ("status=done", "status"),
        ("status=" + "x" * 6000, "status"),
        ("status=%00", "status"),
        ("after=nonsense", "after"),
        ("after=" + "0" * 33, "after"),
        ("after=" + "G" * 32, "after"),
        ("after=%00", "after"),
        ("after=%ff", "after"),
        ("after=" + "0" * 32 + "%0a", "after"),
        ("after=" + "x" * 6000, "after"),
    ],
    ids=lambda value: value[:24],
)
async def test_a_bad_list_query_names_its_field(house: Stack, query: str, param: str) -> None:
    """Limits, statuses and ids that cannot be are a 422 with the field."""
    told = problem(await ask(house.apis[0], f"GET /v1/generations?{query}"), 422, "invalid_value")
    assert told["param"] == param and told["detail"].startswith(f"{param}: ")


async def test_a_bad_snapshot_flag_names_its_field(house: Stack) -> None:
    """`?snapshot=` takes a truth value."""
    told = problem(await ask(house.apis[0], f"GET /v1/generations/{UNKNOWN}/events?snapshot=perhaps"), 422)
    assert told["param"] == "snapshot"


IDS = [
    UNKNOWN,
    "0",
    "0" * 31,
    "0" * 33,
    "F" * 32,
    "g" * 32,
    "*",
    "%2A",
    "%00",
    "0" * 32 + "%00",
    "0" * 32 + "%0A",
    "%C3%A9",
    "%FF",
    "%ED%A0%80",
    "%zz",
    "..%2F" + "0" * 32,
    "{0}",
    "'%20OR%201=1",
    "0" * 20_000,
]


@pytest.mark.parametrize("generation_id", IDS, ids=lambda value: value[:16] + f"…{len(value)}")
async def test_an_unknown_generation_is_not_found(house: Stack, generation_id: str) -> None:
    """Whatever the shape of the id and whatever is asked of it: 404."""
    for line in ("GET %s", "GET %s/events", "GET %s/text", "GET %s/dialects/text", "POST %s/cancel", "DELETE %s"):
        problem(await ask(house.apis[0], line % f"/v1/generations/{generation_id}"), 404, "not_found")


@pytest.mark.parametrize("prefix", ["", "chatcmpl-", "resp_", "resp_resp_", "RESP_"])
@pytest.mark.parametrize("generation_id", IDS, ids=lambda value: value[:16] + f"…{len(value)}")
async def test_an_unknown_completion_or_response_is_not_found(house: Stack, generation_id: str, prefix: str) -> None:
    """404, an error object as OpenAI's clients read it, whatever stands for the id."""
    for family, lines in (
        ("/v1/chat/completions", ("GET %s", "DELETE %s")),
        ("/v1/responses", ("GET %s", "GET %s?stream=true", "POST %s/cancel", "GET %s/input_items", "DELETE %s")),
    ):
        for line in lines:
            given = await ask(house.apis[0], line % f"{family}/{prefix}{generation_id}")
            refused(given, family, 404)


@pytest.mark.parametrize("query", ["starting_after=-1", "starting_after=x", "starting_after=1e400", "stream=perhaps"])
async def test_a_bad_query_of_a_response_is_refused(house: Stack, query: str) -> None:
    """400 with the parameter, for a response that is there."""
    made = await house.http.post(f"{house.apis[0].url}/v1/responses", json=asked("/v1/responses", background=True))
    assert made.status_code == 200, made.text
    given = await ask(house.apis[0], f"GET /v1/responses/{made.json()['id']}?{query}")
    assert query.partition("=")[0] in refused(given, "/v1/responses", 400, "invalid_value")


@pytest.mark.parametrize("query", ["limit=0", "limit=NaN", "order=up", "after=%00", "after=" + "x" * 6000])
async def test_a_bad_query_of_input_items_is_refused(house: Stack, query: str) -> None:
    """400 with the parameter, for a response that is there."""
    made = await house.http.post(f"{house.apis[0].url}/v1/responses", json=asked("/v1/responses", background=True))
    given = await ask(house.apis[0], f"GET /v1/responses/{made.json()['id']}/input_items?{query}")
    assert query.partition("=")[0] in refused(given, "/v1/responses", 400)


@pytest.mark.parametrize("dialect", ["nothing", "%00", "Native", "native%0A", "x" * 20_000])
async def test_an_unknown_dialect_is_not_found(house: Stack, dialect: str) -> None:
    """404 with the dialects there are, for a generation that is there."""
    generation = await house.create("demo")
    given = await ask(house.apis[0], f"GET /v1/generations/{generation['id']}/dialects/{dialect}")
    assert "chat_completions" in problem(given, 404, "not_found")["detail"]


async def test_bytes_that_are_no_address_are_refused(house: Stack) -> None:
    """What the server itself refuses before we see it is a 400 too, and the api lives on."""
    for line in (b"GET /v1/generations/\xff", b"GET /v1/generations/\x00", b"G\x00T /", b"\x16\x03\x01\x02\x00"):
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # hung up on: as good a refusal
            assert (await ask(house.apis[0], line)).status == 400
    assert (await house.http.get(house.apis[0].url + "/healthz")).status_code == 200
    assert "Traceback" not in house.apis[0].process.log()


@pytest.mark.parametrize(
    "line",
    [
        "PUT /v1/generations",
        "DELETE /v1/generations",
        f"PATCH /v1/generations/{UNKNOWN}",
        f"POST /v1/generations/{UNKNOWN}",
        f"POST /v1/generations/{UNKNOWN}/events",
        f"DELETE /v1/generations/{UNKNOWN}/text",
        f"GET /v1/generations/{UNKNOWN}/cancel",
        f"POST /v1/generations/{UNKNOWN}/dialects/text",
        "POST /v1/models",
        "GET /v1/chat/completions",
        f"POST /v1/chat/completions/chatcmpl-{UNKNOWN}",
        "GET /v1/responses",
        f"PUT /v1/responses/resp_{UNKNOWN}",
        f"GET /v1/responses/resp_{UNKNOWN}/cancel",
        "GET /api/chat",
        "DELETE /api/chat/c/stream",
        "GET /api/chat/c/stop",
        "OPTIONS /v1/generations",
        "TRACE /healthz",
    ],
)
async def test_a_wrong_method_is_told(house: Stack, line: str) -> None:
    """405, with the methods there are."""
    given = await ask(house.apis[0], line)
    refused(given, line.partition(" ")[2], 405, "method_not_allowed")
    assert given.headers["allow"]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1", "/v2/generations", "/v1/generations/a/b/c", "/.env", "/playground/../app.py", "/" + "x" * 20_000),
        *("/v1/chat/completions/a/b", "/v1/responses/a/b/c", "/api/chat/c", "/api/chat/ws", "/v1/models/demo"),
    ],
)
async def test_an_unknown_address_is_not_found(house: Stack, path: str) -> None:
    """404, in the shape of the addresses around it."""
    refused(await ask(house.apis[0], f"GET {path}"), path, 404, "not_found")


@pytest.mark.parametrize("header", ["Host: [::1", "Host: [", "Host: a]b", "Origin: http://[", "Origin: http://[::1"])
async def test_an_address_that_cannot_be_parsed_is_refused(house: Stack, header: str) -> None:
    """A Host or an Origin that is no address is foreign, not an error of ours."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.apis[0].port)
    host = "" if header.startswith("Host") else "Host: localhost\r\n"
    writer.write(f"GET /v1/models HTTP/1.1\r\n{host}{header}\r\n\r\n".encode())
    given = await answer(reader)
    writer.close()
    assert given.status in (400, 403), given
    if given.status == 403:
        refused(given, "/v1/models", 403, "loopback_only")


@pytest.mark.parametrize("path", ["/v1/ws", "/v1/generations", f"/v1/generations/{UNKNOWN}/events", "/v1/responses/x"])
async def test_a_websocket_where_there_is_none_is_refused(house: Stack, path: str) -> None:
    """The handshake gets a refusal, not a socket."""
    given = await handshake(house.apis[0], path)
    assert 400 <= given.status < 500


@dataclass(frozen=True)
class Frames:
    """How one socket is spoken to: a frame it takes, how its answer ends, and the field that is told again."""

    good: dict[str, Any]
    last: str
    own_id: str

    def told(self, said: dict[str, Any]) -> str:
        assert said["type"] == "error", said
        return str(said["errorText"] if "errorText" in said else said["message"])


FRAMES = {
    "/v1/responses": Frames(
        {"type": "response.create", "model": "demo", "input": "hi"}, "response.completed", "stream_id"
    ),
    "/api/chat/ws": Frames(
        {"type": "send", "requestId": "1", "id": "frames", "messages": [TURN], "body": {"model": "demo"}},
        "end",
        "requestId",
    ),
}
BAD_FRAMES: list[tuple[bytes | str, str]] = [
    *((row[1], row[4]) for row in MALFORMED),
    (b"[" * 5_000_000, "4194304 bytes"),
    ('{"input": "hi"}', "type"),
    ('{"input": "hi", "type": ["response.create"]}', "type"),
    ("x" * 1_000_000, "byte"),
]


@pytest.mark.parametrize("path", SOCKETS)
async def test_a_bad_frame_costs_a_socket_only_its_answer(house: Stack, path: str) -> None:
    """What would be a bad body over HTTP is an error frame, short; the socket goes on, and answers what is right."""
    frames = FRAMES[path]
    long = [(json.dumps({**frames.good, name: "x" * 1_000_000}), name) for name in ("type", frames.own_id)]
    async with asyncio.timeout(60), connect(house.apis[0].url.replace("http", "ws") + path, proxy=None) as socket:
        for frame, hint in [*BAD_FRAMES, *long]:
            await socket.send(frame)
            said = str(await socket.recv())
            assert len(said) < MAX_ANSWER_BYTES
            assert hint in frames.told(json.loads(said))
        await socket.send(json.dumps(frames.good))
        while json.loads(await socket.recv())["type"] != frames.last:
            pass
    assert "Traceback" not in house.apis[0].process.log() and "api.broke" not in house.apis[0].process.log()


# --- the table of cursors


async def _ended(house: Stack, upstream: Upstream, model: str) -> tuple[dict, Reader]:
    upstream.script(model, Script(count=8))
    generation = await house.create(model)
    return generation, await house.reader(generation).read_to_end()


async def _resumed(house: Stack, generation: dict, cursor: str) -> Reader:
    reader = house.reader(generation)
    reader.headers["Last-Event-ID"] = cursor
    response = await reader.connect()
    assert response.status == 200 and response.clean
    return reader


def _beyond(event_id: str, seq: int = 1, epoch: int = 0) -> str:
    head, _, tail = event_id.partition("-")
    return f"{int(head) + epoch}-{int(tail) + seq}"


async def test_no_cursor_is_the_whole_log(house: Stack, upstream: Upstream) -> None:
    """Without a cursor, or with an empty one, a reader begins at `0-1`."""
    generation, full = await _ended(house, upstream, "no-cursor")
    assert (full.blocks[0].id, full.responses[0].headers["rejoin-resumed-from"]) == ("0-1", "0-1")
    assert (await _resumed(house, generation, "")).raw == full.raw


async def test_a_live_cursor_gets_what_follows_it(house: Stack, upstream: Upstream) -> None:
    """From an id of the newest attempt a reader goes on; the header wins over the query."""
    generation, full = await _ended(house, upstream, "live-cursor")
    reader = house.reader(generation, query=f"&after={full.blocks[1].id}")
    reader.headers["Last-Event-ID"] = full.blocks[4].id
    response = await reader.connect()
    assert response.headers["rejoin-resumed-from"] == full.blocks[4].id
    assert reader.blocks == full.blocks[5:]


async def test_a_cursor_ahead_of_an_open_log_waits_for_it(house: Stack, upstream: Upstream) -> None:
    """Redis may have lost what a reader has seen: it waits until the writer has written that again, and goes on."""
    upstream.script("ahead", Script(count=20, stall_at=5))
    generation = await house.create("ahead")
    before = house.reader(generation)
    await before.connect(stop_after=7)  # queued, started, five words
    reader = house.reader(generation)
    reader.headers["Last-Event-ID"] = cursor = _beyond(before.blocks[-1].id, 4)
    waiting = asyncio.create_task(reader.connect())
    other = house.reader(generation, query="&snapshot=true")
    await other.connect(stop_after=1)  # the api answers others meanwhile, and this reader has nothing yet
    assert reader.blocks == [] and not waiting.done()
    upstream.release("ahead")
    response = await waiting
    full = await house.reader(generation).read_to_end()
    at = [block.id for block in full.blocks].index(cursor)
    assert response.headers["rejoin-resumed-from"] == cursor
    assert reader.blocks == full.blocks[at + 1 :]


async def test_a_cursor_ahead_of_a_closed_log_is_reset(house: Stack, upstream: Upstream) -> None:
    """What a closed log does not hold is void: the reader gets the newest attempt from its start, and is told."""
    generation, full = await _ended(house, upstream, "closed")
    start = next(n for n, block in enumerate(full.blocks) if block.event == "generation.started")
    last = full.blocks[-1].id
    for cursor in (_beyond(last), _beyond(last, 100), _beyond(last, 0, 1), "999999999999999-999999999999999", "5-5"):
        reader = await _resumed(house, generation, cursor)
        assert reader.responses[0].headers["rejoin-resumed-from"] == full.blocks[start].id
        assert reader.blocks == full.blocks[start:]


async def test_a_foreign_cursor_of_a_log_that_never_started_begins_at_its_head(stack: Stack) -> None:
    """A generation cancelled in the queue has no attempt to begin from."""
    await stack.api()
    generation = await stack.create("demo")
    await stack.cancel(generation)
    reader = await _resumed(stack, generation, "7-7")
    assert reader.responses[0].headers["rejoin-resumed-from"] == "0-1"
    assert [block.event for block in reader.blocks] == ["generation.queued", "generation.cancelled"]


async def test_the_terminal_id_is_the_end(house: Stack, upstream: Upstream) -> None:
    """204 stops an EventSource."""
    generation, full = await _ended(house, upstream, "terminal")
    given = await house.http.get(
        house.apis[1].url + generation["events_url"], headers={"Last-Event-ID": full.blocks[-1].id}
    )
    assert (given.status_code, given.content) == (204, b"")


async def test_a_deleted_generation_is_gone_with_its_outcome(house: Stack, upstream: Upstream) -> None:
    """410, on every way to read it and for every cursor; deleting it again is fine, cancelling it is not."""
    generation, full = await _ended(house, upstream, "deleted")
    url = f"{house.apis[0].url}/v1/generations/{generation['id']}"
    assert (await house.http.delete(url)).status_code == 204
    for path in ("", "/events", "/events?snapshot=true", "/text", f"/events?after={full.blocks[3].id}"):
        assert problem(await house.http.get(url + path), 410, "deleted")["outcome"] == "completed"
    problem(await house.http.post(url + "/cancel"), 410, "deleted")
    assert (await house.http.delete(url)).status_code == 204


async def test_what_is_gone_is_gone_in_every_protocol(house: Stack, server: Valkey) -> None:
    """Deleted or expired: 410 for a completion, OpenAI's own 404 for a deleted response, 204 for a chat."""
    api = house.apis[0]
    made = {}
    for state in ("deleted", "expired"):
        given = await house.http.post(f"{api.url}/api/chat", json=asked("/api/chat", id=f"gone-{state}"))
        assert given.status_code == 200
        made[state] = given.headers["x-generation-id"]
    assert (await house.http.delete(f"{api.url}/v1/generations/{made['deleted']}")).status_code == 204
    async with Redis.from_url(server.url) as redis:
        assert await redis.delete(Keys(house.env["REJOIN_KEY_PREFIX"]).log(made["expired"])) == 1
    for state, one in made.items():
        for path in (f"/v1/generations/{one}/dialects/text", f"/v1/chat/completions/chatcmpl-{one}"):
            refused(await house.http.get(api.url + path), path, 410, state)
        for query in ("", "?stream=true"):
            given = await house.http.get(f"{api.url}/v1/responses/resp_{one}{query}")
            refused(given, "/v1/responses", 404 if state == "deleted" else 410)
        for query in ("", "?ended=true", "?ended=true&stream=text"):
            given = await house.http.get(f"{api.url}/api/chat/gone-{state}/stream{query}")
            assert (given.status_code, given.content) == (204, b"")
        assert (await house.http.post(f"{api.url}/api/chat/gone-{state}/stop")).status_code == 204


async def test_an_expired_log_is_gone_with_its_outcome(house: Stack, upstream: Upstream, server: Valkey) -> None:
    """When the events are no more and the order still stands, 410 says how it ended."""
    generation, full = await _ended(house, upstream, "expired")
    async with Redis.from_url(server.url) as redis:
        assert await redis.delete(Keys(house.env["REJOIN_KEY_PREFIX"]).log(generation["id"])) == 1
    url = f"{house.apis[0].url}/v1/generations/{generation['id']}"
    for path in ("", "/events", "/events?snapshot=true", "/text", f"/events?after={full.blocks[-1].id}"):
        assert problem(await house.http.get(url + path), 410, "expired")["outcome"] == "completed"
