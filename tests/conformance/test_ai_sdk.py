"""The real AI SDK, `ai` 6 and `ai` 7, against `/api/chat`: in Node, and as `useChat` in React on jsdom.

npm ci --prefix tests/conformance/ai_sdk/v6
npm ci --prefix tests/conformance/ai_sdk/v7        # brings the Node that it needs
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect

from shared.config import Settings
from shared.event_log import Append, EventLog, Hint
from shared.events import Completed, SourceAdded, TextDelta, encode
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

HERE = Path(__file__).parent / "ai_sdk"
LONG = Script(count=120, pace_seconds=0.02)
ENDLESS = Script(count=10_000, pace_seconds=0.02)
SEVEN = pytest.mark.parametrize("sdk", [7], ids=["ai-7"], indirect=True)  # what `ai` 6 does not have
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
ARGUMENTS = [{"index": 0, "function": {"arguments": part}} for part in ('{"city":', ' "Paris"}')]


class Client:
    """A Node process that is a client; it says JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.texts: list[str] = []

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "text" in said:
                self.texts.append(said["text"])
            yield said

    async def shows(self, characters: int) -> None:
        """Wait until it shows so much text."""
        async with asyncio.timeout(30):
            async for said in self.lines():
                if len(said.get("text", "")) >= characters:
                    return
        raise AssertionError(await self._complaint())

    async def result(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            async for said in self.lines():
                if "result" in said:
                    await self._process.wait()
                    return dict(said["result"])
        raise AssertionError(await self._complaint())

    async def end(self) -> None:
        """Wait until it has left."""
        async with asyncio.timeout(30):
            async for _ in self.lines():
                pass
            await self._process.wait()

    async def _complaint(self) -> str:
        assert self._process.stderr is not None
        return (await self._process.stderr.read()).decode()


@dataclass
class Sdk:
    """One version of the SDK, installed."""

    version: int
    node: str
    folder: Path
    started: list[asyncio.subprocess.Process]

    async def start(self, script: str, **task: Any) -> Client:
        arguments = (self.node, str(self.folder / script), json.dumps(task))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*arguments, stdout=pipe, stderr=pipe, limit=16 * 1024 * 1024)
        self.started.append(process)
        return Client(process)

    async def chat(self, **task: Any) -> dict[str, Any]:
        return await (await self.start("chat.mjs", **task)).result()

    async def raw(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self.chat(do="raw", request={"method": method, "url": url, "body": body})


def installed(version: int) -> str:
    """The Node to run this version with. Skips, saying what to install."""
    modules = HERE / f"v{version}" / "node_modules"
    if not (modules / "ai").exists():
        pytest.skip(f"no `ai` {version}: npm ci --prefix tests/conformance/ai_sdk/v{version}")
    own = HERE / "v7/node_modules/.bin/node"
    node = str(own) if own.exists() else shutil.which("node") if version == 6 else None
    if node is None:
        pytest.skip("no Node for it: npm ci --prefix tests/conformance/ai_sdk/v7")
    return node


@pytest.fixture(params=[6, 7], ids=["ai-6", "ai-7"])
async def sdk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sdk]:
    """The scripts beside the packages of one version, where Node finds these."""
    node = installed(request.param)
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, tmp_path)
    (tmp_path / "node_modules").symlink_to(HERE / f"v{request.param}/node_modules")
    one = Sdk(request.param, node, tmp_path, [])
    yield one
    for process in one.started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def name(words: str, sdk: Sdk) -> str:
    """A model or chat of this test's own."""
    return f"{words}-{sdk.version}-{uuid.uuid4().hex[:6]}"


def chat_url(api: Api) -> str:
    return f"{api.url}/api/chat"


def user(text: str) -> dict[str, Any]:
    return {"id": "u1", "role": "user", "parts": [{"type": "text", "text": text}]}


def parts_of(message: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for part in message["parts"] if part["type"] == kind]


async def test_a_chat_sends_and_streams(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """`Chat` with the default transport: text as it comes, one assistant message, usage in its metadata."""
    model, chat_id = name("plain", sdk), name("chat", sdk)
    script = Script(count=60, pace_seconds=0.005)
    upstream.script(model, script)
    client = await sdk.start("chat.mjs", do="send", id=chat_id, api=chat_url(house.apis[0]), body={"model": model})
    result = await client.result()
    assert (result["status"], result["error"]) == ("ready", None)
    assert result["text"] == script.text("hello")
    assert len(client.texts) > 5, "the text did not come as a stream"
    _, answer = result["messages"]
    assert answer["id"] == f"msg_{answer['metadata']['generationId']}"
    assert answer["metadata"]["model"] == model
    assert answer["metadata"]["usage"]["outputTokens"] == 60
    assert parts_of(answer, "text")[0]["state"] == "done"
    (finish,) = result["finishes"]
    assert finish == {"isAbort": False, "isDisconnect": False, "isError": False, "finishReason": "stop"}


async def test_every_chunk_is_one_the_sdk_knows(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """Reasoning, text, refusal and tool calls pass the SDK's own schema and make one message."""
    model = name("all", sdk)
    upstream.script(
        model,
        Script(
            chunks=["Let me ", "look."],
            reasoning=["The user ", "asks."],
            refusal=["I will not ", "say."],
            tool_calls=[CALL, *ARGUMENTS],
            finish_reason="tool_calls",
        ),
    )
    body = {"id": name("chat", sdk), "messages": [user("hello")], "trigger": "submit-message", "model": model}
    result = await sdk.raw("POST", chat_url(house.apis[0]), body)
    assert result["headers"]["x-vercel-ai-ui-message-stream"] == "v1"
    assert result["headers"]["content-type"].startswith("text/event-stream")
    assert result["chunks"][-1]["finishReason"] == "tool-calls"
    message = result["message"]
    assert [part["text"] for part in parts_of(message, "reasoning")] == ["The user asks."]
    assert [part["text"] for part in parts_of(message, "text")] == ["Let me look.", "I will not say."]
    (tool,) = parts_of(message, "tool-weather")
    assert (tool["state"], tool["input"]) == ("input-available", {"city": "Paris"})


async def test_sources_of_an_answer_are_parts_of_the_message(
    sdk: Sdk, stack: Stack, redis: Redis, key_prefix: str
) -> None:
    """What `source.added` names comes before the words, as parts of the message that the SDK makes. The log is written
    here, by its protocol: no provider retrieves documents yet."""
    api = await stack.api()
    chat_id = name("chat", sdk)
    client = await sdk.start("chat.mjs", do="send", id=chat_id, api=chat_url(api), body={"model": "retrieved"})
    generation_id = await wait_until(lambda: _newest(stack, api), timeout=20)
    log = EventLog(redis, Settings(_env_file=None, redis_url=stack.env["REDIS_URL"], key_prefix=key_prefix))
    claim = await log.claim(Hint(generation_id, 0, 1), "nonce")
    assert claim is not None
    events = [
        SourceAdded("s1", "The manual", "https://manual.example/streams", 0.9),
        SourceAdded("s2", "Notes", None, 0.5),
        TextDelta("Streams can be left."),
        Completed("stop"),
    ]
    (answer,) = await log.append([Append(generation_id, claim.epoch, 1, [encode(one) for one in events], "completed")])
    assert answer.code == "OK"
    result = await client.result()
    assert (result["status"], result["text"]) == ("ready", "Streams can be left.")
    message = result["messages"][1]
    (url,) = parts_of(message, "source-url")
    assert (url["url"], url["title"]) == ("https://manual.example/streams", "The manual")
    (document,) = parts_of(message, "source-document")
    assert document["title"] == "Notes"


async def _newest(stack: Stack, api: Api) -> str | None:
    listed = (await stack.http.get(f"{api.url}/v1/generations")).json()["data"]
    return listed[0]["id"] if listed else None


async def test_a_call_with_arguments_that_are_not_json_is_an_error_of_the_tool(
    sdk: Sdk, house: Stack, upstream: Upstream
) -> None:
    """The message stays; its tool part says what is wrong with it."""
    model = name("bad-arguments", sdk)
    upstream.script(model, Script(chunks=[], tool_calls=[CALL, ARGUMENTS[0]], finish_reason="tool_calls"))
    body = {"id": name("chat", sdk), "messages": [user("hello")], "model": model}
    result = await sdk.raw("POST", chat_url(house.apis[0]), body)
    (tool,) = parts_of(result["message"], "tool-weather")
    assert tool["state"] == "output-error" and "not valid JSON" in tool["errorText"]


async def test_a_tool_of_the_client_is_called_and_the_answer_goes_on(
    sdk: Sdk, house: Stack, upstream: Upstream
) -> None:
    """The client's tool runs, its output is sent back, and the rest comes in the same message."""
    model, chat_id = name("tools", sdk), name("chat", sdk)
    upstream.script(
        model,
        Script(chunks=["Let me look."], tool_calls=[CALL, *ARGUMENTS], finish_reason="tool_calls"),
        Script(chunks=["It rains ", "in Paris."]),
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    body = {"model": model, "tools": tools}
    result = await sdk.chat(do="send", id=chat_id, api=chat_url(house.apis[0]), body=body, tools={"rain": True})
    assert (result["status"], len(result["messages"])) == ("ready", 2)
    answer = result["messages"][1]
    (tool,) = parts_of(answer, "tool-weather")
    assert (tool["state"], tool["output"]) == ("output-available", {"rain": True})
    assert [part["text"] for part in parts_of(answer, "text")] == ["Let me look.", "It rains in Paris."]
    asked, again = (request.body for request in upstream.requests_of(model))
    assert asked["tools"] == tools
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "tool"]
    (call,) = again["messages"][1]["tool_calls"]
    assert (call["id"], json.loads(call["function"]["arguments"])) == ("call_1", {"city": "Paris"})
    assert (again["messages"][2]["tool_call_id"], json.loads(again["messages"][2]["content"])) == (
        "call_1",
        {"rain": True},
    )


async def test_a_client_that_left_resumes_on_another_api(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """A process that leaves in mid-answer and another that resumes the chat elsewhere: the whole text, under one id."""
    model, chat_id = name("left", sdk), name("chat/with a slash ☃", sdk)
    upstream.script(model, LONG)
    gone = await sdk.start(
        "chat.mjs", do="send", id=chat_id, api=chat_url(house.apis[0]), body={"model": model}, leaveAfter=40
    )
    await gone.end()
    client = await sdk.start("chat.mjs", do="resume", id=chat_id, api=chat_url(house.apis[1]), messages=[user("hello")])
    result = await client.result()
    assert (result["status"], result["error"], len(result["messages"])) == ("ready", None, 2)
    assert result["text"] == LONG.text("hello")
    assert upstream.hits(model) == 1
    assert gone.texts and result["text"].startswith(gone.texts[-1])


async def test_a_resumed_message_is_rebuilt_not_doubled(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """A client that kept half of the answer has it once after resuming, with all its parts."""
    model, chat_id = name("half", sdk), name("chat", sdk)
    script = Script(count=120, pace_seconds=0.02, reasoning=["I ", "think."])
    upstream.script(model, script)
    api = chat_url(house.apis[0])
    gone = await sdk.start("chat.mjs", do="send", id=chat_id, api=api, body={"model": model}, leaveAfter=40)
    await gone.end()
    (newest,) = (await house.http.get(f"{house.apis[0].url}/v1/generations?limit=1")).json()["data"]
    parts = [{"type": "reasoning", "text": "I think."}, {"type": "text", "text": gone.texts[-1]}]
    kept = [user("hello"), {"id": f"msg_{newest['id']}", "role": "assistant", "parts": parts}]
    result = await sdk.chat(do="resume", id=chat_id, api=api, messages=kept)
    assert [message["id"] for message in result["messages"]] == [message["id"] for message in kept]
    assert [part["text"] for part in parts_of(result["messages"][1], "reasoning")] == ["I think."]
    assert [part["text"] for part in parts_of(result["messages"][1], "text")] == [script.text("hello")]


async def test_use_chat_unmounted_in_mid_stream_and_mounted_again(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """React: send, leave the page, come back with `resume: true`: the full text in one assistant message."""
    model, chat_id = name("react", sdk), name("chat", sdk)
    upstream.script(model, LONG)
    api = chat_url(house.apis[0])
    client = await sdk.start("use_chat.mjs", id=chat_id, api=api, body={"model": model}, leaveAfter=40)
    result = await client.result()
    assert result["requests"] == [
        f"GET /api/chat/{chat_id}/stream 204",
        "POST /api/chat 200",
        f"GET /api/chat/{chat_id}/stream 200",
    ]
    assert [role for role, _ in result["shown"]] == ["user", "assistant"]
    assert result["messages"][1]["parts"][-1]["text"] == LONG.text("hello")
    assert upstream.hits(model) == 1


async def test_there_is_nothing_to_resume(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """An unknown chat and a chat whose answer is complete: 204, and the client stays as it was."""
    model, chat_id = name("done", sdk), name("chat", sdk)
    upstream.script(model, Script(count=3))
    api = chat_url(house.apis[0])
    await sdk.chat(do="send", id=chat_id, api=api, body={"model": model})
    for known in (chat_id, "never-heard-of"):
        result = await sdk.chat(do="resume", id=known, api=api, messages=[user("hello")])
        assert (result["status"], result["error"], len(result["messages"])) == ("ready", None, 1)


async def test_an_answer_that_ended_can_be_fetched_on_request(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """With `?ended=true` a client that missed the end of its answer gets all of it."""
    model, chat_id = name("ended", sdk), name("chat", sdk)
    upstream.script(model, Script(count=30))
    api = chat_url(house.apis[0])
    await sdk.chat(do="send", id=chat_id, api=api, body={"model": model})
    result = await sdk.chat(do="resume", id=chat_id, api=f"{api}?ended=true", messages=[user("hello")])
    assert result["text"] == Script(count=30).text("hello")


async def test_stop_reaches_the_model(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """`POST …/stop` ends the generation: the model's connection closes, the client is told, what was said stays."""
    model, chat_id = name("stop", sdk), name("chat", sdk)
    upstream.script(model, ENDLESS)
    api = chat_url(house.apis[0])
    client = await sdk.start("chat.mjs", do="send", id=chat_id, api=api, body={"model": model})
    await client.shows(40)
    other = await house.http.post(f"{api}/{chat_id}/stop", json={"activeStreamId": "0" * 32})
    assert other.status_code == 204 and upstream.open_requests(model) == 1
    stopped = await house.http.post(f"{chat_url(house.apis[1])}/{chat_id}/stop")
    assert stopped.status_code == 204
    await upstream.wait_closed(model)
    result = await client.result()
    assert (result["status"], result["error"]) == ("ready", None)
    assert len(result["text"]) >= 40
    assert parts_of(result["messages"][1], "text")[0]["state"] == "done"
    assert (await house.http.get(f"{api}/{chat_id}/stream")).status_code == 204


async def test_a_failure_is_an_error_with_a_sentence(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """A model that fails in mid-answer: status `error` and the reason; the words that came stay."""
    model = name("fails", sdk)
    upstream.script(model, Script(count=20, error_at=5))
    result = await sdk.chat(do="send", id=name("chat", sdk), api=chat_url(house.apis[0]), body={"model": model})
    assert result["status"] == "error"
    assert model in result["error"] and "secret words" not in result["error"]
    assert result["text"] == "".join(Script(count=20).outputs("hello")[:5])  # type: ignore[arg-type]


async def test_a_refused_request_is_an_error_with_a_sentence(sdk: Sdk, house: Stack) -> None:
    """What the api cannot understand comes back as plain text, which the SDK shows as it is."""
    api = chat_url(house.apis[0])
    result = await sdk.chat(do="send", id="c", api=api, body={"model": "demo", "temperature": 7})
    assert result["status"] == "error" and "temperature" in result["error"]


async def test_a_new_message_stops_what_the_chat_was_saying(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """Regenerating while an answer still runs ends that answer, and the chat is at the new one."""
    first, second, chat_id = name("first", sdk), name("second", sdk), name("chat", sdk)
    upstream.script(first, ENDLESS)
    upstream.script(second, Script(count=30))
    api = chat_url(house.apis[0])
    gone = await sdk.start("chat.mjs", do="send", id=chat_id, api=api, body={"model": first}, leaveAfter=40)
    await gone.end()
    kept = [user("hello"), {"id": "a1", "role": "assistant", "parts": [{"type": "text", "text": "half"}]}]
    result = await sdk.chat(do="regenerate", id=chat_id, api=api, body={"model": second}, messages=kept)
    assert result["text"] == Script(count=30).text("hello")
    assert len(result["messages"]) == 2
    await upstream.wait_closed(first)


async def test_a_killed_worker_is_an_error_that_can_be_resumed(sdk: Sdk, stack: Stack, upstream: Upstream) -> None:
    """`kill -9` of the worker: the client is told that its words are void, and resuming gives the new answer whole."""
    result, _ = await _kill_the_worker(sdk, stack, upstream, query="", then="resume")
    assert result["finishes"][0]["isError"]
    assert (result["status"], len(result["messages"])) == ("ready", 2)
    assert result["text"] == LONG.text("hello")


@SEVEN
async def test_a_killed_worker_resets_the_step_of_a_client_that_asked_for_it(
    sdk: Sdk, stack: Stack, upstream: Upstream
) -> None:
    """With `resetStep` the new attempt takes the place of the lost one, in the same stream."""
    result, _ = await _kill_the_worker(sdk, stack, upstream, query="?resetStep=true")
    assert (result["status"], result["error"], len(result["messages"])) == ("ready", None, 2)
    assert result["text"] == LONG.text("hello")
    assert len(result["finishes"]) == 1


async def _kill_the_worker(
    sdk: Sdk, stack: Stack, upstream: Upstream, query: str, **task: Any
) -> tuple[dict[str, Any], Client]:
    model, chat_id = name("killed", sdk), name("chat", sdk)
    upstream.script(model, ENDLESS)
    api = await stack.api()
    victim = await stack.worker()
    client = await sdk.start(
        "chat.mjs", do="send", id=chat_id, api=chat_url(api) + query, body={"model": model}, **task
    )
    await client.shows(40)
    upstream.script(model, LONG)
    await victim.kill()
    await stack.worker()
    return await client.result(), client


async def test_a_draining_api_is_left_and_the_chat_resumed(sdk: Sdk, stack: Stack, upstream: Upstream) -> None:
    """An api that stops breaks the stream off: status `error`, and the chat resumes on another api."""
    model, chat_id = name("drained", sdk), name("chat", sdk)
    upstream.script(model, Script(count=200, pace_seconds=0.05))
    stopping, staying = await stack.api(), await stack.api()
    await stack.worker()
    client = await sdk.start("chat.mjs", do="send", id=chat_id, api=chat_url(stopping), body={"model": model})
    await client.shows(20)
    await stopping.process.terminate()
    result = await client.result()
    assert result["status"] == "error"
    again = await sdk.chat(do="resume", id=chat_id, api=chat_url(staying), messages=result["messages"])
    assert (again["status"], len(again["messages"])) == ("ready", 2)
    assert again["text"] == Script(count=200).text("hello")


async def test_the_text_transport_streams_the_words(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """`TextStreamChatTransport` on `/api/chat?stream=text`."""
    model = name("text", sdk)
    script = Script(count=40, pace_seconds=0.005)
    upstream.script(model, script)
    api = f"{chat_url(house.apis[0])}?stream=text"
    result = await sdk.chat(do="send", id=name("chat", sdk), api=api, body={"model": model}, transport="text")
    assert (result["status"], result["text"]) == ("ready", script.text("hello"))


# ---- WebSocket ----


def socket_url(api: Api) -> str:
    return f"ws://127.0.0.1:{api.port}/api/chat/ws"


@SEVEN
async def test_a_chat_over_a_websocket(sdk: Sdk, house: Stack, upstream: Upstream) -> None:
    """`WebSocketChatTransport`: send, leave, resume on another api, and nothing to resume afterwards."""
    model, chat_id = name("socket", sdk), name("chat", sdk)
    upstream.script(model, LONG)
    first, second = (socket_url(api) for api in house.apis)
    task: dict[str, Any] = {"id": chat_id, "transport": "websocket"}
    gone = await sdk.start("chat.mjs", do="send", api=first, body={"model": model}, leaveAfter=40, **task)
    await gone.end()
    result = await sdk.chat(do="resume", api=second, messages=[user("hello")], **task)
    assert (result["status"], result["error"], len(result["messages"])) == ("ready", None, 2)
    assert result["text"] == LONG.text("hello")
    assert upstream.hits(model) == 1
    result = await sdk.chat(do="resume", api=second, messages=[user("hello")], **task)
    assert (result["status"], result["error"], len(result["messages"])) == ("ready", None, 1)


@SEVEN
async def test_a_websocket_tells_what_is_wrong_and_goes_on(sdk: Sdk, house: Stack) -> None:
    """A request that is refused is an error of that request."""
    task: dict[str, Any] = {"do": "send", "id": "c", "transport": "websocket", "body": {"temperature": 7}}
    result = await sdk.chat(api=socket_url(house.apis[0]), **task)
    assert result["status"] == "error" and "temperature" in result["error"]


@SEVEN
async def test_a_draining_api_closes_its_websockets(sdk: Sdk, stack: Stack, upstream: Upstream) -> None:
    """An api that stops does not leave a client waiting: it errors, and resumes elsewhere."""
    model, task = name("drained-socket", sdk), {"id": name("chat", sdk), "transport": "websocket"}
    upstream.script(model, LONG)
    stopping, staying = await stack.api(), await stack.api()
    await stack.worker()
    client = await sdk.start("chat.mjs", do="send", api=socket_url(stopping), body={"model": model}, **task)
    await client.shows(20)
    assert await stopping.process.terminate() == 0
    result = await client.result()
    assert result["status"] == "error"
    again = await sdk.chat(do="resume", api=socket_url(staying), messages=result["messages"], **task)
    assert (again["status"], again["text"]) == ("ready", LONG.text("hello"))


# ---- Without the SDK ----


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def test_a_page_of_another_site_gets_no_websocket(house: Stack) -> None:
    """Without API keys the loopback rule holds for the handshake too."""
    foreign = {**UPGRADE, "Origin": "https://example.org"}
    assert (await house.http.get(f"{chat_url(house.apis[0])}/ws", headers=foreign)).status_code == 403


async def test_a_frame_that_is_wrong_is_answered_and_the_socket_stays(house: Stack) -> None:
    """Garbage, an unknown type, a chat without messages: an error each, and the next request works."""
    user_message = {"messages": [user("hello")], "body": {"model": "demo"}}
    wrong: list[Any] = [
        "no JSON",
        [],
        {"type": "dance", "requestId": "1"},
        {"type": "send", "requestId": "1", "id": "c"},
    ]
    wrong += [{"type": "send", "requestId": "1", "id": "", **user_message}]
    async with connect(socket_url(house.apis[0]), proxy=None) as socket:
        for frame in wrong:
            await socket.send(json.dumps(frame))
            said = json.loads(await socket.recv())
            assert said["type"] == "error" and said["errorText"]
            assert said["requestId"] == ("1" if isinstance(frame, dict) else "")
        await socket.send(json.dumps({"type": "abort", "requestId": "unknown"}))
        await socket.send(json.dumps({"type": "send", "requestId": "2", "id": uuid.uuid4().hex, **user_message}))
        said = [json.loads(await socket.recv())]
        while said[-1]["type"] != "end":
            said.append(json.loads(await socket.recv()))
    assert [frame["type"] for frame in said] == ["start", *["chunk"] * (len(said) - 2), "end"]
    assert [frame["sequence"] for frame in said[1:-1]] == list(range(len(said) - 2))
    assert {frame["requestId"] for frame in said} == {"2"}
    assert said[-2]["chunk"]["type"] == "finish"


async def test_a_request_that_is_aborted_stops_and_the_answer_goes_on(house: Stack, upstream: Upstream) -> None:
    """After `abort` nothing more of that request is said; another on the same socket takes the answer up again."""
    model = f"aborted-{uuid.uuid4().hex[:6]}"
    upstream.script(model, LONG)
    told = {"id": model, "body": {"model": model}, "messages": [user("hello")]}
    async with connect(socket_url(house.apis[0]), proxy=None) as socket, asyncio.timeout(30):
        await socket.send(json.dumps({"type": "send", "requestId": "1", **told}))
        while json.loads(await socket.recv()).get("sequence") != 5:
            pass
        await socket.send(json.dumps({"type": "abort", "requestId": "1"}))
        await socket.send(json.dumps({"type": "resume", "requestId": "2", "id": model}))
        said: list[dict[str, Any]] = []
        while not said or said[-1]["type"] != "end":
            said.append(json.loads(await socket.recv()))
    begun = next(n for n, frame in enumerate(said) if frame["requestId"] == "2")
    assert {frame["requestId"] for frame in said[begun:]} == {"2"}
    chunks = [frame["chunk"] for frame in said[begun:] if frame["type"] == "chunk"]
    assert "".join(chunk.get("delta", "") for chunk in chunks) == LONG.text("hello")


async def test_the_same_key_again_is_the_same_answer(house: Stack, upstream: Upstream) -> None:
    """A message sent again with its Idempotency-Key attaches to the answer instead of ending it."""
    model = f"key-{uuid.uuid4().hex[:6]}"
    upstream.script(model, Script(count=30, pace_seconds=0.02))
    body = {"id": model, "messages": [user("hello")], "model": model}
    headers = {"Idempotency-Key": model}
    posts = [house.http.post(chat_url(api), json=body, headers=headers) for api in house.apis]
    first, second = await asyncio.gather(*posts)
    assert first.content == second.content and b'"type":"finish"' in first.content
    assert upstream.hits(model) == 1


async def test_an_answer_in_the_queue_can_be_stopped(stack: Stack) -> None:
    """Without a worker: the chat is told of its message at once, and of the stop."""
    api = await stack.api()
    body = {"id": "chat", "messages": [user("hello")], "model": "demo"}
    async with stack.http.stream("POST", chat_url(api), json=body) as answer:
        assert (await stack.http.post(f"{chat_url(api)}/chat/stop", json={"activeStreamId": None})).status_code == 204
        chunks = [line for line in (await answer.aread()).decode().split("\n") if line.startswith("data: ")]
    assert [json.loads(chunk.removeprefix("data: "))["type"] for chunk in chunks[:-1]] == ["start", "abort"]


async def test_a_chat_is_its_tenants_own(stack: Stack, upstream: Upstream) -> None:
    """Another tenant's chat of the same id cannot be read, stopped or replaced; without a key there is nothing."""
    model = f"tenants-{uuid.uuid4().hex[:6]}"
    upstream.script(model, Script(count=10, stall_at=5))
    pairs = ",".join(f"{who}:{hashlib.sha256(who.encode()).hexdigest()}" for who in ("alice", "bob"))
    api = await stack.api(REJOIN_API_KEYS=pairs, REJOIN_SECRET="secret of this test")
    await stack.worker()
    alice, bob = ({"Authorization": f"Bearer {who}"} for who in ("alice", "bob"))
    body = {"id": "chat", "messages": [user("hello")], "model": model}
    async with stack.http.stream("POST", chat_url(api), json=body, headers=alice) as answer:
        assert answer.status_code == 200
        await upstream.wait_hits(model)
        assert (await stack.http.get(f"{chat_url(api)}/chat/stream", headers=bob)).status_code == 204
        assert (await stack.http.post(f"{chat_url(api)}/chat/stop", headers=bob)).status_code == 204
        refused = await stack.http.get(f"{chat_url(api)}/chat/stream")
        assert refused.status_code == 401 and refused.headers["content-type"].startswith("text/plain")
        assert (await stack.http.get(f"{chat_url(api)}/ws", headers=UPGRADE)).status_code == 401
        theirs = {**body, "model": "demo"}
        assert (await stack.http.post(chat_url(api), json=theirs, headers=bob)).status_code == 200
        assert upstream.open_requests(model) == 1
        assert (await stack.http.post(f"{chat_url(api)}/chat/stop", headers=alice)).status_code == 204
        await upstream.wait_closed(model)
        assert b'"type":"abort"' in await answer.aread()


async def test_leaving_cancels_when_the_chat_asked_for_it(stack: Stack, upstream: Upstream) -> None:
    """`onDisconnect: "cancel"`: an answer that nobody reads is ended after the grace."""
    model = f"left-{uuid.uuid4().hex[:6]}"
    upstream.script(model, ENDLESS)
    grace = {"REJOIN_DISCONNECT_GRACE_SECONDS": "0.5"}
    api = await stack.api(**grace)
    await stack.worker(**grace)
    body = {"id": "chat", "messages": [user("hello")], "model": model, "onDisconnect": "cancel"}
    async with stack.http.stream("POST", chat_url(api), json=body) as answer:
        assert answer.status_code == 200
        await upstream.wait_sent(model, 3)
    await upstream.wait_closed(model)
