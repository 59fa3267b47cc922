"""Nobody reads, stops or even learns of another's generation; what is secret stays out of logs and queue; without keys
only this machine is served.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import pkgutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis.asyncio import Redis
from starlette.routing import WebSocketRoute
from websockets.asyncio.client import connect

import api.routes
from api.app import create_app
from api.auth import stream_token
from api.dialects import DIALECTS
from shared.config import Settings
from shared.redis import Keys
from tests.integration.test_bad_input import SOCKETS, SPOKEN, handshake, problem, refused
from tests.processes import PYTHON, Process, Processes, Valkey, free_port
from tests.reader import Reader
from tests.stack import Api, Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

SECRET = "secret-of-the-tenancy-tests"
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
PAIRS = ",".join(f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in KEYS.items())
KEYED = {"REJOIN_API_KEYS": PAIRS, "REJOIN_SECRET": SECRET}
ALICE, BOB = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())
WITHOUT_KEY = {"/healthz", "/readyz"}  # of the documented routes; beside them the page and its assets
UNKNOWN = "0" * 32


def routes() -> list[tuple[str, str]]:
    """Method and path of every route the application documents, so that a new one is tested too."""
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def sockets() -> list[str]:
    """The path of every WebSocket, which no OpenAPI knows of."""
    modules = [import_module(f"api.routes.{found.name}") for found in pkgutil.iter_modules(api.routes.__path__)]
    return [route.path for one in modules for route in one.router.routes if isinstance(route, WebSocketRoute)]


def filled(path: str, generation_id: str, chat_id: str = "chat") -> list[str]:
    """The addresses of a route for one generation, as its clients spell them, and for the chat that is at it."""
    path = path.replace("{chat_id}", chat_id).replace("{generation_id}", generation_id)
    spelled = [path.replace("{dialect}", dialect) for dialect in DIALECTS] if "{dialect}" in path else [path]
    prefixes = {"{completion_id}": ("chatcmpl-", ""), "{response_id}": ("resp_", "")}
    for name, known in prefixes.items():
        if name in path:
            spelled = [path.replace(name, prefix + generation_id) for prefix in known]
    assert not any("{" in one for one in spelled), f"say what {path} is filled with"
    return spelled


ABOUT_ONE = [(method, path) for method, path in routes() if "{" in path]
ABOUT_NONE = [(method, path) for method, path in routes() if "{" not in path]
# What is asked of a family besides its plain addresses.
QUERIES = {
    "/v1/generations": ("", "?snapshot=true", "?after=0-1"),
    "/v1/chat/completions": ("", "?stream=true"),
    "/v1/responses": ("", "?stream=true", "?stream=true&starting_after=0", "?order=asc&limit=100"),
    "/api/chat": ("", "?ended=true", "?stream=text&ended=true", "?resetStep=true"),
}


def family_of(path: str) -> str:
    return next(family for family in QUERIES if path.startswith(family))


def asking(path: str, model: str, words: str = "words of a tenant", **more: Any) -> dict[str, Any]:
    """The body that asks a model for a stream, in the protocol of an address."""
    if path == "/v1/generations":
        return {"model": model, "prompt": words, **more}
    if path == "/v1/chat/completions":
        return {"model": model, "messages": [{"role": "user", "content": words}], "stream": True, **more}
    if path == "/v1/responses":
        return {"model": model, "input": words, "stream": True, **more}
    assert path == "/api/chat"
    turn = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": words}]}
    return {"id": f"chat-{uuid.uuid4().hex[:8]}", "model": model, "messages": [turn], **more}


@pytest.fixture(scope="module")
async def shared(server: Valkey, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """An api with two tenants, and a worker."""
    env = {"REDIS_URL": server.url, "REJOIN_KEY_PREFIX": f"tenancy{uuid.uuid4().hex[:8]}", **KEYED}
    env |= {"OPENAI_BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-test-key-of-the-upstream"}
    processes = Processes(tmp_path_factory.mktemp("tenancy"))
    one = Stack(processes, env)
    try:
        await one.api()
        await one.worker()
        yield one
    finally:
        await one.http.aclose()
        processes.end_all()


async def ask(stack: Stack, method: str, path: str, headers: dict[str, str], **more: Any) -> httpx2.Response:
    """One request to the first api; a stream is read to its end."""
    return await stack.http.request(method, stack.apis[0].url + path, headers=headers, **more)


async def create(stack: Stack, headers: dict[str, str], model: str = "tenancy", **body: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": "words of a tenant", **body}
    answer = await ask(stack, "POST", "/v1/generations", headers, json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def snapshot(stack: Stack, headers: dict[str, str], generation_id: str) -> dict[str, Any]:
    return dict((await ask(stack, "GET", f"/v1/generations/{generation_id}", headers)).json())


async def finished(stack: Stack, headers: dict[str, str], generation_id: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        state = await snapshot(stack, headers, generation_id)
        return state if state["status"] not in ("queued", "in_progress") else None

    return await wait_until(look, timeout=30, every=0.05)


async def spoken(stack: Stack, headers: dict[str, str], path: str, body: dict[str, Any]) -> httpx2.Response:
    """A stream of another protocol, read to its end, and well."""
    answer = await ask(stack, "POST", path, headers, json=body)
    assert answer.status_code == 200, answer.text
    return answer


async def in_every_protocol(stack: Stack, upstream: Upstream) -> tuple[dict[str, str], dict[str, str]]:
    """Bob's generations as each protocol makes them: ids, and the chat of each one (only its id where there is none).

    Those of the model that stalls still run."""
    model = f"bobs-{uuid.uuid4().hex[:6]}"
    upstream.script(f"{model}-runs", Script(chunks=["the words of bob"], stall_at=1))
    upstream.script(model, Script(chunks=["the words of bob"]))
    found, chats = {}, {}
    for path in SPOKEN:
        body = asking(path, model)
        found[path] = (await spoken(stack, BOB, path, body)).headers["x-generation-id"]
        chats[found[path]] = body.get("id", f"none-{uuid.uuid4().hex}")
    whole = await spoken(stack, BOB, "/v1/responses", asking("/v1/responses", model, stream=False, instructions="Bobs"))
    found["whole"] = whole.json()["id"].removeprefix("resp_")
    body = asking("/v1/responses", f"{model}-runs", stream=False, background=True)
    found["background"] = (await spoken(stack, BOB, "/v1/responses", body)).json()["id"].removeprefix("resp_")
    body = asking("/api/chat", f"{model}-runs")
    async with stack.http.stream("POST", f"{stack.apis[0].url}/api/chat", json=body, headers=BOB) as answer:
        found["chat"] = answer.headers["x-generation-id"]
        chats[found["chat"]] = body["id"]
        await upstream.wait_hits(f"{model}-runs", 2)
    return found, chats


async def kinds_of_bob(stack: Stack, upstream: Upstream) -> dict[str, str]:
    """A generation of Bob's in every state, by state."""
    model = f"bob-{uuid.uuid4().hex[:6]}"
    upstream.script(model, Script(chunks=["the words of bob"], stall_at=1))
    running = await create(stack, BOB, model)
    await upstream.wait_hits(model)
    found = {"in_progress": running["id"]}
    for state in ("completed", "deleted", "cancelled"):
        found[state] = (await create(stack, BOB, "tenancy"))["id"]
        await finished(stack, BOB, found[state])
    await ask(stack, "DELETE", f"/v1/generations/{found['deleted']}", BOB)
    stopped = await create(stack, BOB, model)
    await ask(stack, "POST", stopped["cancel_url"], BOB)
    return {**found, "cancelled": stopped["id"]}


# --- keys


@pytest.mark.parametrize(("method", "path"), [route for route in routes() if route[1] not in WITHOUT_KEY])
async def test_every_route_wants_a_key(shared: Stack, method: str, path: str) -> None:
    """No key, a wrong key, another scheme, half a key: 401, with the scheme that is wanted."""
    good = KEYS["alice"]
    wrong = ["", "Bearer", "Bearer wrong", f"Bearer {good}x", f"Bearer {good[:-1]}", f"Basic {good}", good]
    wrong += [f"Bearer {hashlib.sha256(good.encode()).hexdigest()}", "Bearer caf\xe9"]
    for given in wrong:
        headers = {"Authorization": given.encode("latin-1")} if given else {}
        for address in filled(path, UNKNOWN):
            answer = await ask(shared, method, address, headers)  # type: ignore[arg-type]
            refused(answer, path, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


def test_every_websocket_is_known_here() -> None:
    """A new one has to be put to the tests below."""
    assert sorted(sockets()) == sorted(SOCKETS)


@pytest.mark.parametrize("path", SOCKETS)
async def test_every_websocket_wants_a_key(shared: Stack, path: str) -> None:
    """The handshake itself is refused, also to a page of this machine and to a stream token; with a key it is not."""
    made, good = await create(shared, ALICE), KEYS["alice"]
    wrong = ["", "Authorization: Bearer", "Authorization: Bearer wrong", f"Authorization: Bearer {good}x"]
    wrong += [f"Authorization: Basic {good}", f"Cookie: key={good}", f"Sec-WebSocket-Protocol: {good}"]
    wrong += [f"Origin: http://127.0.0.1:{shared.apis[0].port}"]
    for given in wrong:
        for query in ("", f"?token={token_of(made)}", f"?token={good}", f"?api_key={good}"):
            lines = "Host: localhost\r\n" + (f"{given}\r\n" if given else "")
            answer = await handshake(shared.apis[0], path + query, lines)
            refused(answer, path, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    right = f"Host: localhost\r\nAuthorization: Bearer {good}\r\n"
    assert (await handshake(shared.apis[0], path, right)).status == 101


async def test_the_page_and_health_want_no_key(shared: Stack) -> None:
    """The page asks for a key itself, and a load balancer has none."""
    for path in ("/", "/playground/app.js", "/favicon.ico", *WITHOUT_KEY):
        assert (await ask(shared, "GET", path, {})).status_code == 200


async def test_an_address_that_is_none_wants_a_key_too(shared: Stack) -> None:
    """Without a key nobody learns which addresses there are; `/docs` is one of them."""
    around = ("/v1/responses/a/b/c", "/v1/chat/completions/a/b", "/api/chat", "/api/chat/ws", "/v1/models/x")
    for path in ("/v1/nothing", "/docs", "/openapi.json", "/playgroundx", "//", "/healthz/x", *around):
        refused(await ask(shared, "GET", path, {}), path, 401, "unauthorized")
    for path in ("/v1/ws", "/v1/nothing"):
        refused(await handshake(shared.apis[0], path), path, 401, "unauthorized")


# --- tenants


async def test_a_tenant_meets_none_of_anothers_generations_on_any_route(shared: Stack, upstream: Upstream) -> None:
    """The very answer of an id that never was, on every route: 404, 204 for a chat; nothing of it is changed."""
    made, chats = await in_every_protocol(shared, upstream)
    found = {**await kinds_of_bob(shared, upstream), **made}
    before = {state: await snapshot(shared, BOB, bobs) for state, bobs in found.items()}
    assert {family_of(path) for _, path in ABOUT_ONE} == set(QUERIES)
    for method, path in ABOUT_ONE:
        for query in QUERIES[family_of(path)]:
            nothing = [await ask(shared, method, one + query, ALICE, json={}) for one in filled(path, UNKNOWN)]
            for bobs in found.values():
                for address, none in zip(filled(path, bobs, chats.get(bobs, bobs)), nothing, strict=True):
                    answer = await ask(shared, method, address + query, ALICE, json={})
                    if path.startswith("/api/chat"):
                        assert (answer.status_code, answer.content) == (204, b""), (method, path)
                    else:
                        refused(answer, path, 404)
                    assert answer.content == none.content
    await unchanged(shared, found, before)
    running = [state for state, told in before.items() if told.get("status") == "in_progress"]
    assert running == ["in_progress", "background", "chat"]


async def unchanged(stack: Stack, found: dict[str, str], before: dict[str, dict[str, Any]]) -> None:
    """Bob's generations are as they were."""
    for state, bobs in found.items():
        after = await snapshot(stack, BOB, bobs)
        assert after.get("status", after.get("outcome")) == before[state].get("status", before[state].get("outcome"))
        assert after.get("text") == before[state].get("text")


async def test_a_tenant_cannot_name_anothers_generation_in_a_body(shared: Stack, upstream: Upstream) -> None:
    """As what went before, as an item, as what is to be stopped, over HTTP and a socket: it is as if it never was."""
    made, chats = await in_every_protocol(shared, upstream)
    found = {**await kinds_of_bob(shared, upstream), **made}
    before = {state: await snapshot(shared, BOB, bobs) for state, bobs in found.items()}
    mine = asking("/api/chat", "tenancy")
    await spoken(shared, ALICE, "/api/chat", mine)

    async def told(generation_id: str) -> list[Any]:
        item = {"type": "item_reference", "id": f"msg_{generation_id}_0"}
        bodies = [{"previous_response_id": f"resp_{generation_id}"}, {"previous_response_id": generation_id}]
        bodies += [{"input": [item]}, {"input": [item], "background": True, "stream": False}]
        answers = []
        for body in bodies:
            body = asking("/v1/responses", "tenancy", **body)
            for more in ({}, {"Idempotency-Key": f"names-{uuid.uuid4().hex}"}):
                answers.append(await ask(shared, "POST", "/v1/responses", ALICE | more, json=body))
                refused(answers[-1], "/v1/responses", 404, "response_not_found")
            await socket.send(json.dumps({"type": "response.create", **body, "background": False}))
            answers.append(json.loads(await socket.recv()))
            assert (answers[-1]["type"], answers[-1]["status"]) == ("error", 404)
        stop = {"activeStreamId": generation_id}
        answers.append(await ask(shared, "POST", f"/api/chat/{mine['id']}/stop", ALICE, json=stop))
        assert answers[-1].status_code == 204
        return [one if isinstance(one, dict) else one.content for one in answers]

    async with socket_of(shared, ALICE, "/v1/responses") as socket, asyncio.timeout(60):
        nothing = await told(UNKNOWN)
        for bobs in found.values():
            assert await told(bobs) == nothing
    async with socket_of(shared, ALICE, "/api/chat/ws") as socket, asyncio.timeout(30):
        for chat_id in chats.values():
            await socket.send(json.dumps({"type": "resume", "requestId": "1", "id": chat_id}))
            assert json.loads(await socket.recv()) == {"type": "no-active", "requestId": "1"}
    await unchanged(shared, found, before)


async def test_one_chat_id_of_two_tenants_is_two_chats(shared: Stack, upstream: Upstream) -> None:
    """Who takes the id of another's chat neither stops nor hears what that one is saying, and keeps the own one."""
    made, chats = await in_every_protocol(shared, upstream)
    body = asking("/api/chat", "tenancy", id=chats[made["chat"]])
    answer = await spoken(shared, ALICE, "/api/chat", body)
    assert answer.headers["x-generation-id"] not in made.values() and "words of bob" not in answer.text
    address = f"/api/chat/{body['id']}"
    again = await ask(shared, "GET", f"{address}/stream?ended=true", ALICE)
    assert again.headers["x-generation-id"] == answer.headers["x-generation-id"]
    assert (await ask(shared, "POST", f"{address}/stop", ALICE)).status_code == 204
    assert (await snapshot(shared, BOB, made["chat"]))["status"] == "in_progress"
    async with shared.http.stream("GET", shared.apis[0].url + address + "/stream", headers=BOB) as bobs:
        assert bobs.headers["x-generation-id"] == made["chat"]


async def test_routes_about_no_generation_show_nothing_of_another(shared: Stack, upstream: Upstream) -> None:
    """Whatever a route without an id answers, asked plainly or with Bob's id, Bob's ids and words are not in it."""
    found = await kinds_of_bob(shared, upstream)
    for method, path in ABOUT_NONE:
        for query in ("", *(f"?after={bobs}" for bobs in found.values())):
            answer = await ask(shared, method, path + query, ALICE, json={})
            assert answer.status_code < 500, (method, path)
            assert not any(bobs in answer.text for bobs in found.values())
            assert "words of" not in answer.text


async def test_the_list_is_ones_own(shared: Stack) -> None:
    """Each tenant's list holds its own and only them."""
    mine = {(await create(shared, ALICE))["id"] for _ in range(3)}
    his = {(await create(shared, BOB))["id"] for _ in range(3)}
    listed = {}
    for name, headers in (("alice", ALICE), ("bob", BOB)):
        answer = await ask(shared, "GET", "/v1/generations?limit=100", headers)
        listed[name] = {one["id"] for one in answer.json()["data"]}
    assert mine <= listed["alice"] and his <= listed["bob"]
    assert not listed["alice"] & listed["bob"]


async def test_one_idempotency_key_of_two_tenants_is_two_generations(shared: Stack) -> None:
    """A key is a tenant's own: neither the other's generation nor a conflict with it can be met through it."""
    key = {"Idempotency-Key": f"same-{uuid.uuid4().hex}"}
    mine = await create(shared, ALICE | key)
    his = await create(shared, BOB | key, prompt="another prompt")
    assert mine["id"] != his["id"]
    assert (await create(shared, ALICE | key))["id"] == mine["id"]


@pytest.mark.parametrize("path", SPOKEN)
@pytest.mark.parametrize("words", ["words of bob", "other words"], ids=["the same body", "another body"])
async def test_an_idempotency_key_attaches_to_ones_own_in_every_protocol(
    shared: Stack, upstream: Upstream, path: str, words: str
) -> None:
    """Bob's key in Alice's hand is a generation of hers: neither his words nor a conflict; in his own it is his."""
    model, key = f"key-{uuid.uuid4().hex[:6]}", {"Idempotency-Key": f"bobs-{uuid.uuid4().hex}"}
    upstream.script(model, Script(chunks=["the ", "answer"]))
    body = asking(path, model, "words of bob")
    his = await spoken(shared, BOB | key, path, body)
    mine = await spoken(shared, ALICE | key, path, asking(path, model, words, id=body.get("id", "chat")))
    assert mine.headers["x-generation-id"] != his.headers["x-generation-id"]
    assert his.headers["x-generation-id"] not in mine.text
    assert upstream.hits(model) == 2
    again = await spoken(shared, BOB | key, path, body)
    assert again.headers["x-generation-id"] == his.headers["x-generation-id"] and again.content == his.content
    assert upstream.hits(model) == 2


# --- stream tokens


def token_of(generation: dict[str, Any]) -> str:
    return str(generation["events_url"].partition("token=")[2])


async def test_a_stream_token_reads_one_generation_and_does_nothing_else(shared: Stack) -> None:
    """Events and text of its generation, with GET; no other route (dialects, sockets), method or generation."""
    generation, other = await create(shared, BOB), await create(shared, BOB)
    await finished(shared, BOB, generation["id"])
    token = token_of(generation)
    full = await Reader(shared.apis[0].url + generation["events_url"]).read_to_end()
    assert full.terminal is not None
    text = await ask(shared, "GET", f"/v1/generations/{generation['id']}/text?token={token}", {})
    assert (text.status_code, text.text) == (200, full.text)
    base = "/v1/generations/{generation_id}"
    readable = [("GET", f"{base}/events"), ("GET", f"{base}/text")]
    assert set(readable) < set(routes())
    for method, path in routes():
        if path in WITHOUT_KEY:
            continue
        ids = [other["id"]] if (method, path) in readable else [generation["id"], other["id"]]
        for address in (one for generation_id in ids for one in filled(path, generation_id)):
            answer = await ask(shared, method, f"{address}?token={token}", {}, json={})
            refused(answer, path, 401, "unauthorized")
    for method in ("POST", "HEAD", "PUT"):
        assert (await ask(shared, method, generation["events_url"], {})).status_code == 401


async def test_a_token_that_was_touched_is_worth_nothing(shared: Stack) -> None:
    """Expired, tampered with at any place, truncated anywhere, doubled or of another secret: 401."""
    generation, other = await create(shared, BOB), await create(shared, BOB)
    settings, soon = Settings(_env_file=None, secret=SECRET), int(time.time()) + 600
    good = stream_token(settings, "bob", generation["id"], soon)
    path = f"/v1/generations/{generation['id']}/events"
    bad = [stream_token(settings, "bob", generation["id"], int(time.time()) - 1), token_of(other)]
    bad += [stream_token(Settings(_env_file=None, secret="guessed"), "bob", generation["id"], soon)]
    bad += [good[:end] for end in range(0, len(good), 3)]
    bad += [good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :] for at in range(len(good))]
    bad += [good + "A", good + "=", good + good, good.replace(".", ""), good.replace(".", ".."), "%00", "caf%C3%A9"]
    for token in bad:
        problem(await ask(shared, "GET", f"{path}?token={token}", {}), 401, "unauthorized")
    await finished(shared, BOB, generation["id"])
    assert (await ask(shared, "GET", f"{path}?token={good}", {})).status_code == 200


async def test_a_token_of_another_tenant_finds_nothing(shared: Stack) -> None:
    """Even a genuine token only speaks for its tenant: the order decides whose the generation is."""
    generation = await create(shared, BOB)
    token = stream_token(Settings(_env_file=None, secret=SECRET), "alice", generation["id"], int(time.time()) + 600)
    for tail in ("events", "text"):
        problem(await ask(shared, "GET", f"/v1/generations/{generation['id']}/{tail}?token={token}", {}), 404)


# --- what must not be written down

CANARY = "canary-7c2e"


def hidden(what: str) -> str:
    return f"{CANARY}-{what}"


BODIES = [
    Script(status=400, body=json.dumps({"error": {"message": hidden("error-body"), "code": hidden("code")}}).encode()),
    Script(status=401, body=hidden("plain-body").encode(), headers={"WWW-Authenticate": hidden("header")}),
    Script(status=500, body=hidden("body").encode(), headers={"X-Request-Id": hidden("header")}),
    Script(status=302, headers={"Location": f"http://127.0.0.1:9/{hidden('location')}"}, body=b""),
    Script(chunks=[hidden("answer"), b'data: {"error": {"message": "%s"}}\n\n' % hidden("event").encode()]),
    Script(chunks=[hidden("answer"), b'data: {"choices": "%s"}\n\n' % hidden("shape").encode()]),
    Script(chunks=[hidden("answer"), b'data: {"%s\n\n' % hidden("half").encode()]),
    Script(chunks=[hidden("answer")], cut_at=1),
    Script(chunks=[hidden("answer")], finish_reason=None),
]


async def secrets_written_down(stack: Stack, server: Valkey) -> str:
    """All that the processes wrote, and all that Redis holds beside orders and logs."""
    async with Redis.from_url(server.url) as redis:
        found = "".join(process.log() for process in stack.processes.started)
        async for key in redis.scan_iter(f"*{stack.env['REJOIN_KEY_PREFIX']}*"):
            name = key.decode()
            if ":order:" not in name and ":log:" not in name:
                found += f"\n{name} " + repr(await everything(redis, key))
    return found


async def everything(redis: Redis, key: bytes) -> Any:
    match await redis.type(key):
        case b"string":
            return await redis.get(key)
        case b"zset":
            return await redis.zrange(key, 0, -1)
        case b"list":
            return await redis.lrange(key, 0, -1)  # type: ignore[misc]
        case b"hash":
            return await redis.hgetall(key)  # type: ignore[misc]


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_no_secret_is_written_down(stack: Stack, upstream: Upstream, server: Valkey, log_format: str) -> None:
    """At the most talkative level, through every failure: no prompt, answer, key or token in a log or in the queue."""
    key = hidden("api-key")
    stack.env |= {"REJOIN_LOG_LEVEL": "debug", "REJOIN_LOG_FORMAT": log_format, "REJOIN_SECRET": hidden("secret")}
    stack.env |= {"REJOIN_API_KEYS": f"alice:{hashlib.sha256(key.encode()).hexdigest()}", "OPENAI_API_KEY": key}
    stack.env |= {"REJOIN_UPSTREAM_RETRY_SECONDS": "0"}
    headers = {"Authorization": f"Bearer {key}"}
    api = await stack.api()
    body = {
        "prompt": hidden("prompt"),
        "metadata": {hidden("label"): hidden("metadata")},
        "stop": [hidden("stop")],
        "tools": [{"type": "function", "function": {"name": hidden("tool")}}],
    }
    made = []
    for n, script in enumerate([Script(chunks=[hidden("answer"), "!"]), *BODIES]):
        upstream.script(f"secret-{n}", script)
        made.append(
            await create(stack, headers | {"Idempotency-Key": hidden(f"idempotency-{n}")}, f"secret-{n}", **body)
        )
    broken = await create(stack, headers, "secret-0", **body)
    async with Redis.from_url(server.url) as redis:
        order = Keys(stack.env["REJOIN_KEY_PREFIX"]).order(broken["id"])
        await redis.hset(order, "prompt", json.dumps({"model": hidden("model"), "messages": hidden("shape")}))  # type: ignore[misc]
    assert CANARY not in await secrets_written_down(stack, server)  # all are in the queue: no worker is there yet
    await stack.worker()
    statuses = [(await finished(stack, headers, one["id"]))["status"] for one in [*made, broken]]
    assert statuses == ["completed"] + ["failed"] * (len(BODIES) + 1)
    state = await snapshot(stack, headers, broken["id"])
    assert state["error"]["code"] == "internal_error" and CANARY not in state["error"]["message"]
    await secrets_in_every_protocol(stack, headers, upstream)
    for one in made:
        await Reader(api.url + one["events_url"]).read_to_end()
        error = (await snapshot(stack, headers, one["id"]))["error"]
        assert error is None or CANARY not in error["message"]
    await refused_secrets(stack, headers)
    async with Redis.from_url(server.url) as redis:
        order = Keys(stack.env["REJOIN_KEY_PREFIX"]).order(broken["id"])
        await redis.hset(order, "epoch", hidden("in-an-exception"))  # type: ignore[misc]
        await redis.set(Keys(stack.env["REJOIN_KEY_PREFIX"]).chat("alice", "broken"), broken["id"], ex=60)
    await broken_in_every_protocol(stack, headers, broken["id"])
    for process in stack.processes.started:
        assert await process.terminate() == 0  # so that its last line is written
    found = await secrets_written_down(stack, server)
    assert "api.broke" in found and "generation.broke" in found and "generation.started" in found
    for secret in (CANARY, *(token_of(one) for one in made)):
        assert secret not in found, found[max(0, found.index(secret) - 500) :][:1000]


async def secrets_in_every_protocol(stack: Stack, headers: dict[str, str], upstream: Upstream) -> None:
    """Prompts and answers through the other protocols: streamed, whole, attached to, failed, over sockets."""
    scripts = [Script(chunks=[hidden("answer"), "!"]), *BODIES]
    models = [f"spoken-{n}" for n in range(len(scripts))]
    secret: dict[str, Any] = {"metadata": {hidden("label"): hidden("metadata")}, "instructions": hidden("instructions")}
    secret |= {"user": hidden("user"), "stop": hidden("stop")}
    for model, script in zip(models, scripts, strict=True):
        upstream.script(model, script)
        for path in SPOKEN:
            key = headers | {"Idempotency-Key": hidden(model + path)}
            body = asking(path, model, hidden("prompt"), **secret)
            streamed = [await spoken(stack, each, path, body) for each in (headers, key, key)]
            assert hidden("answer") in streamed[0].text or model != models[0], path
            whole = await ask(stack, "POST", path, headers, json=body | {"stream": False})
            assert whole.status_code == 200 or model != models[0], whole.text
            generation_id = streamed[-1].headers["x-generation-id"]
            for _, known in (route for route in ABOUT_ONE if route[0] == "GET"):
                for query in QUERIES[family_of(known)]:
                    address = filled(known, generation_id, body.get("id", "chat"))[0]
                    with suppress(httpx2.RemoteProtocolError):  # plain text that is not whole is broken off
                        assert (await ask(stack, "GET", address + query, headers)).status_code not in (404, 500)
        await secrets_over_sockets(stack, headers, model)


async def secrets_over_sockets(stack: Stack, headers: dict[str, str], model: str) -> None:
    """A key in the handshake, a token in its query, a prompt in its frames; what is no JSON and what is no request."""
    response = {"type": "response.create", **asking("/v1/responses", model, hidden("prompt"))}
    turn = asking("/api/chat", model, hidden("prompt"))
    chat = {"type": "send", "requestId": hidden("request"), "id": turn["id"], "messages": turn["messages"]}
    for path, good in (("/v1/responses", response), ("/api/chat/ws", chat | {"body": {"model": model}})):
        async with socket_of(stack, headers, f"{path}?token={hidden('query')}") as socket, asyncio.timeout(30):
            for bad in (hidden("no JSON"), json.dumps({**good, "input": [hidden("bad")], "messages": hidden("bad")})):
                await socket.send(bad)
                assert json.loads(await socket.recv())["type"] == "error"
            await socket.send(json.dumps(good))
            while json.loads(await socket.recv())["type"] not in LAST_ON_SOCKETS:
                pass


LAST_ON_SOCKETS = ("end", "error", "response.completed", "response.failed", "response.incomplete")


def socket_of(stack: Stack, headers: dict[str, str], path: str) -> connect:
    return connect(stack.apis[0].url.replace("http", "ws") + path, additional_headers=headers, proxy=None)


async def broken_in_every_protocol(stack: Stack, headers: dict[str, str], broken: str) -> None:
    """An order that cannot be read, and the chat that is at it: a mistake of ours, told without the words of it."""
    for _, path in (route for route in ABOUT_ONE if route[0] == "GET"):
        refused(await ask(stack, "GET", filled(path, broken, "broken")[0], headers), path, 500, "internal_error")
    body = asking("/v1/responses", "secret-0", previous_response_id=f"resp_{broken}")
    resume = {"type": "resume", "requestId": "1", "id": "broken"}
    for path, frame in (("/v1/responses", {"type": "response.create", **body}), ("/api/chat/ws", resume)):
        async with socket_of(stack, headers, path) as socket, asyncio.timeout(30):
            await socket.send(json.dumps(frame))
            said = str(await socket.recv())
            assert json.loads(said)["type"] == "error" and "our mistake" in said and CANARY not in said


async def refused_secrets(stack: Stack, headers: dict[str, str]) -> None:
    """Requests that are refused, with a secret in every place of them."""
    secret = hidden("refused")
    json_body = {"prompt": secret, "temperature": secret}
    assert (await ask(stack, "POST", "/v1/generations", headers, json=json_body)).status_code == 422
    assert (await ask(stack, "POST", "/v1/generations", headers, content=secret)).status_code == 400
    for path in SPOKEN:
        body = asking(path, secret, secret, temperature=secret, **{secret: secret})
        assert (await ask(stack, "POST", path, headers, json=body)).status_code == 400
        assert (await ask(stack, "POST", path, headers, content=secret)).status_code == 400
        assert (await ask(stack, "POST", f"{path}?token={secret}", {}, json=body)).status_code == 401
    body = asking("/v1/responses", "secret-0", previous_response_id=secret)
    assert (await ask(stack, "POST", "/v1/responses", headers, json=body)).status_code == 404
    assert (await ask(stack, "GET", f"/v1/nothing?token={secret}", headers)).status_code == 404
    assert (await ask(stack, "GET", f"/v1/generations?token={secret}&after={secret}", headers)).status_code == 422
    assert (await ask(stack, "GET", "/v1/models", {"Authorization": f"Bearer {secret}"})).status_code == 401
    assert (await ask(stack, "GET", "/v1/models", {"Cookie": secret, "Referer": secret})).status_code == 401


# --- without keys


def refusals(api: Api) -> list[dict[str, str]]:
    here = f"127.0.0.1:{api.port}"
    return [
        *({"Host": host} for host in ("rejoin.example.org", f"evil.test:{api.port}", "0.0.0.0", "10.0.0.1")),
        *({"Host": host} for host in ("localhost.evil.test", "127.0.0.1.evil.test", "[::2]", "localhost@evil.test")),
        *({name: "127.0.0.1"} for name in ("X-Forwarded-For", "X-Real-IP", "X-Forwarded-Host")),
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"X-Forwarded-Proto": "http"},
        *({"Origin": origin} for origin in ("null", "https://evil.test", f"http://{here}.evil.test", "file://", "x")),
        *({"Origin": origin} for origin in ("http://localhost@evil.test", "http://[::2]", "chrome-extension://abc")),
    ]


def admissions(api: Api) -> list[dict[str, str]]:
    hosts = ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "[::1]"]
    hosts += [f"{host}:{api.port}" for host in hosts]
    origins = ["http://localhost", "http://localhost:3000", "https://127.0.0.1:8443", "http://[::1]:3000"]
    return [{}, *({"Host": host} for host in hosts), *({"Origin": origin} for origin in origins)]


async def check_the_loopback_rule(stack: Stack, api: Api) -> None:
    """Asks every documented route, since a new one must keep the rule too."""
    for headers in refusals(api):
        for method, path in [*routes(), ("GET", "/"), ("GET", "/docs")]:
            answer = await stack.http.request(method, api.url + filled(path, UNKNOWN)[0], headers=headers)
            refused(answer, path, 403, "loopback_only")
        lines = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "localhost"} | headers).items())
        for path in SOCKETS:
            refused(await handshake(api, path, lines), path, 403, "loopback_only")
    for headers in admissions(api):
        answer = await stack.http.get(api.url + "/v1/models", headers=headers)
        assert answer.status_code == 200, headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "localhost"} | headers).items())
        for path in SOCKETS:
            assert (await handshake(api, path, lines)).status == 101, headers


async def test_without_keys_only_this_machine_is_served(house: Stack) -> None:
    """A foreign Host (a rebound name), a trace of a proxy or a foreign page: 403, on every route and socket."""
    await check_the_loopback_rule(house, house.apis[0])


async def test_uvicorns_factory_keeps_the_rule_and_logs_no_query(stack: Stack) -> None:
    """Started by uvicorn itself, which trusts forwarding headers from loopback and logs each request."""
    port = free_port()
    argv = ["-m", "uvicorn", "api.app:create_app", "--factory", "--host", "127.0.0.1", "--port", str(port)]
    process = await stack.processes.start("uvicorn", [PYTHON, *argv], stack.env)
    api = Api(process, port)
    await stack.ready(api)
    await check_the_loopback_rule(stack, api)
    for path in ("/v1/generations", "/v1/nothing", "/healthz", f"/v1/generations/{UNKNOWN}/events"):
        await stack.http.get(f"{api.url}{path}?token={CANARY}")
    await process.says(rf"GET /v1/generations/{UNKNOWN}/events")
    for path in SOCKETS:
        assert (await handshake(api, f"{path}?token={CANARY}")).status == 101
        assert (await handshake(api, f"{path}?token={CANARY}", "Host: evil.test\r\n")).status == 403
        await process.says(rf'WebSocket {path}" \[accepted\]')
        await process.says(rf'WebSocket {path}" 403')
    assert CANARY not in process.log()


# --- what stops the start


async def says_one_line(process: Process) -> str:
    """The one line a process ended with; its exit code must be 2."""
    assert await process.wait(timeout=60) == 2, process.log()
    (line,) = process.log().splitlines()
    return line


def bare(stack: Stack) -> dict[str, str]:
    return {name: value for name, value in stack.env.items() if not name.startswith("OPENAI_")}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    assert not folder.exists(), "a refused start leaves nothing behind"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
async def test_an_open_door_without_keys_is_refused(stack: Stack, folder: Path, host: str) -> None:
    """Neither `rejoin up` nor `python -m api` listens beyond this machine before keys are set."""
    up = [PYTHON, "-m", "cli", "up", "--host", host, "--port", "0", "--data", str(folder)]
    started = [
        await stack.processes.start("up", up, bare(stack)),
        await stack.processes.start("api", [PYTHON, "-m", "api"], bare(stack) | {"REJOIN_HOST": host}),
    ]
    for process in started:
        line = await says_one_line(process)
        assert host in line and "REJOIN_API_KEYS" in line and "REJOIN_SECRET" in line


async def test_keys_without_a_secret_stop_the_start(stack: Stack) -> None:
    """The secret signs the stream tokens: there is no default that could be kept."""
    env = bare(stack) | {"REJOIN_API_KEYS": PAIRS}
    line = await says_one_line(await stack.processes.start("api", [PYTHON, "-m", "api"], env))
    assert line.startswith("rejoin api: ") and "REJOIN_SECRET" in line
    assert PAIRS.partition(":")[2] not in line


WRONG = {
    "REJOIN_LEASE_SECONDS": "soon",
    "REJOIN_PORT": "99999",
    "REJOIN_API_KEYS": "alice:key-in-the-clear",
    "REJOIN_LOG_LEVEL": "loud",
    "REJOIN_KEY_PREFIX": "with spaces",
    "REJOIN_MODELS": "/nowhere/models.toml",
    "REJOIN_DEFAULT_MODEL": "unheard-of",
    "REJOIN_ORDER_RETENTION_SECONDS": "5",
    "REDIS_URL": "http://127.0.0.1:6379",
}


@pytest.mark.parametrize("role", ["api", "worker"])
async def test_a_wrong_setting_stops_the_start_with_its_name(stack: Stack, role: str) -> None:
    """Exit code 2, and one line that names the variable, for each setting that cannot be."""
    started = {
        name: await stack.processes.start(role, [PYTHON, "-m", role], bare(stack) | {name: value})
        for name, value in WRONG.items()
    }
    lines = await asyncio.gather(*(says_one_line(process) for process in started.values()))
    for name, line in zip(started, lines, strict=True):
        assert line.startswith(f"rejoin {role}: ") and name in line
        assert "key-in-the-clear" not in line
