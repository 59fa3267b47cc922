"""Answers over documents, by real workers: sources in every protocol, the model's words, cancels, changes, failures."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import environment, start_rejoin_up
from tests.processes import ROOT, Process, Processes, Valkey
from tests.reader import check_history
from tests.stack import Stack
from tests.test_docs import fenced, section
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

HARBOUR = ROOT / "examples/harbour"
DOGS = "Where may dogs go?"
PROTOCOLS = ("survives", "cancelled", "first", "condensed", "logged", "broken")


def models(folder: Path, upstream: Upstream, *names: str) -> str:
    """The path of a table in which `over-NAME` answers over the documents by the upstream's model `docs-NAME`."""
    path = folder / "models.toml"
    path.write_text(
        "".join(
            f'[over-{name}]\nprovider = "documents"\nupstream_model = "docs-{name}"\n'
            f'[docs-{name}]\nbase_url = "{upstream.base_url}"\n'
            for name in names
        )
    )
    return str(path)


@pytest.fixture(scope="module")
async def library(server: Valkey, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """An api and a worker over the example's documents."""
    folder = tmp_path_factory.mktemp("library")
    processes = Processes(folder)
    env = {
        **environment(server.url, f"library{folder.name[-4:]}", upstream),
        "REJOIN_MODELS": models(folder, upstream, *PROTOCOLS),
        "REJOIN_DOCUMENTS": str(HARBOUR),
        "REJOIN_DOCUMENTS_INDEX": str(folder / "index"),
        "REJOIN_LOG_LEVEL": "debug",
    }
    one = Stack(processes, env)
    try:
        await one.api()
        await one.worker()
        yield one
    finally:
        await one.http.aclose()
        processes.end_all()


def documents(folder: Path) -> dict[str, str]:
    """The settings of a test with a folder of its own, which it may change."""
    docs = folder / "docs"
    docs.mkdir()
    (docs / "dogs.md").write_text("# Dogs\n\nDogs are welcome on a lead.\n")
    return {"REJOIN_DOCUMENTS": str(docs), "REJOIN_DOCUMENTS_INDEX": str(folder / "index")}


async def test_what_the_model_says_survives(library: Stack, upstream: Upstream) -> None:
    """Reasoning, tool calls, finish reason and usage are the upstream's; so are the caller's options and history."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    upstream.script(
        "docs-survives",
        Script(chunks=["On a ", "lead [1]."], reasoning=["Hm, ", "dogs."], tool_calls=[call], finish_reason="length"),
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DOGS}]
    generation = (
        await library.http.post(
            library.apis[0].url + "/v1/generations",
            json={"model": "over-survives", "messages": messages, "temperature": 0.25, "tools": tools},
        )
    ).json()
    reader = await library.reader(generation).read_to_end()
    check_history(reader.blocks)
    state = await library.snapshot(generation)
    assert (state["text"], state["reasoning"]) == ("On a lead [1].", "Hm, dogs.")
    assert (state["status"], state["finish_reason"]) == ("incomplete", "length")
    assert state["tool_calls"] == [{"index": 0, "id": "call_1", "name": "look", "arguments": "{}"}]
    assert state["usage"]["input_tokens"] == 7 and state["usage"]["output_tokens"] == 5
    assert state["sources"][0]["id"] == "rules.pdf#1" and state["sources"][0]["title"] == "Rules of the harbour"
    assert state["first_token_at"] is not None and str(ROOT) not in json.dumps(state)
    (request,) = upstream.requests_of("docs-survives")
    rules, question = request.body["messages"]
    assert rules["role"] == "system" and "data" in rules["content"] and rules["content"].endswith("Be brief.")
    assert "Dogs are welcome on a lead" in question["content"] and question["content"].endswith(DOGS)
    assert request.body["temperature"] == 0.25 and request.body["tools"] == tools


async def test_a_cancel_closes_the_upstream_at_once(library: Stack, upstream: Upstream) -> None:
    """LlamaIndex' generators would let it go on; here the connection is closed with the task."""
    upstream.script("docs-cancelled", Script(count=50, stall_at=5))
    generation = await library.create("over-cancelled", DOGS)
    await upstream.wait_sent("docs-cancelled", 5)
    state = await library.cancel(generation)
    await upstream.wait_closed("docs-cancelled", timeout=2)
    assert upstream.requests_of("docs-cancelled")[0].left_early
    assert state["status"] == "cancelled" and state["sources"]


async def test_a_broken_answer_fails_with_its_code(library: Stack, upstream: Upstream) -> None:
    """The failure is that of the model that answers, and its name is told."""
    upstream.script("docs-broken", Script(count=20, cut_at=5))
    state = await library.finished(await library.create("over-broken", DOGS))
    assert state["error"]["code"] == "upstream_reset" and "docs-broken" in state["error"]["message"]


# ---- Sources, in every protocol ----


async def test_native_has_the_sources_before_the_first_word(library: Stack, upstream: Upstream) -> None:
    """As events of their own, before the model was even asked."""
    upstream.script("docs-first", Script(chunks=["On a lead."], stall_at=0))
    reader = library.reader(await library.create("over-first", DOGS))
    reading = asyncio.create_task(reader.read_to_end())
    await upstream.wait_hits("docs-first")
    await wait_until(lambda: len(reader.blocks) > 3)
    assert {block.event for block in reader.blocks[2:]} == {"source.added"}
    upstream.release("docs-first")
    await reading
    kinds = [block.event for block in reader.blocks]
    assert max(n for n, kind in enumerate(kinds) if kind == "source.added") < kinds.index("text.delta")


def client(library: Stack) -> openai.AsyncOpenAI:
    """A client that refuses what is not exactly as OpenAI declares it."""
    url = library.apis[0].url + "/v1"
    return openai.AsyncOpenAI(api_key="any", base_url=url, max_retries=0, _strict_response_validation=True)


async def test_chat_completions_have_annotations(library: Stack, stack: Stack, tmp_path: Path) -> None:
    """Streamed, before the content; whole, in the message: where the folder is published. The `documents` model quotes,
    offline."""
    asked: dict[str, Any] = {"model": "documents", "messages": [{"role": "user", "content": "dogs"}]}
    async with client(library) as one:
        unpublished = (await one.chat.completions.create(**asked)).choices[0].message
    assert unpublished.annotations == [] and "Dogs are welcome on a lead" in str(unpublished.content)
    stack.env |= {**documents(tmp_path), "REJOIN_DOCUMENTS_URL": "https://docs.example/h"}
    await stack.api()
    await stack.worker()
    async with client(stack) as one:
        deltas = [
            chunk.choices[0].delta
            async for chunk in await one.chat.completions.create(**asked, stream=True)
            if chunk.choices
        ]
        whole = await one.chat.completions.create(**asked)
    cited = [n for n, delta in enumerate(deltas) if "annotations" in (delta.model_extra or {})]
    words = [n for n, delta in enumerate(deltas) if delta.content]
    assert cited and cited[0] < words[0]
    assert whole.choices[0].message.annotations is not None and whole.choices[0].message.content is not None
    cited_as = whole.choices[0].message.annotations[0].url_citation
    assert (cited_as.title, cited_as.url) == ("Dogs", "https://docs.example/h/dogs.md")
    assert "Dogs are welcome on a lead" in whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == len(whole.choices[0].message.content.split())


async def test_responses_have_citations(library: Stack) -> None:
    """A document without an address is cited as a file, before the first delta."""
    async with client(library) as one:
        stream = await one.responses.create(model="documents", input=DOGS, stream=True)
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    first = kinds.index("response.output_text.annotation.added")
    assert first < kinds.index("response.output_text.delta")
    annotation: Any = events[first]
    assert dict(annotation.annotation)["type"] == "file_citation"
    done: Any = events[-1]
    (cited, *_) = done.response.output[0].content[0].annotations
    assert (cited.type, cited.file_id, cited.filename) == ("file_citation", "rules.pdf#1", "rules.pdf")


async def test_the_ai_sdk_has_source_parts(library: Stack) -> None:
    """A document without an address is a `source-document`, before the text begins."""
    message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": DOGS}]}
    body = {"id": "docs-chat", "model": "documents", "messages": [message], "trigger": "submit-message"}
    answer = await library.http.post(library.apis[0].url + "/api/chat", json=body)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    kinds = [chunk["type"] for chunk in chunks]
    first = kinds.index("source-document")
    assert first < kinds.index("text-start")
    assert chunks[first]["sourceId"] == "rules.pdf#1" and chunks[first]["title"] == "Rules of the harbour"


async def test_the_route_of_questions_streams_words_alone(library: Stack) -> None:
    """`/stream-question/`: plain text; the sources are where `Location` leads."""
    url = library.apis[0].url + "/stream-question/"
    answer = await library.http.get(url, params={"query_text": DOGS})
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert "Dogs are welcome on a lead" in answer.text and "source" not in answer.text
    state = (await library.http.get(library.apis[0].url + answer.headers["location"])).json()
    assert state["text"] == answer.text and state["sources"][0]["id"] == "rules.pdf#1"
    listed = (await library.http.get(library.apis[0].url + "/v1/models")).json()
    assert "documents" in [one["id"] for one in listed["data"]]


async def test_published_documents_have_addresses(stack: Stack, tmp_path: Path, upstream: Upstream) -> None:
    """With REJOIN_DOCUMENTS_URL a source is a link, to every client that knows links."""
    stack.env |= {**documents(tmp_path), "REJOIN_DOCUMENTS_URL": "https://docs.example/h"}
    await stack.api()
    await stack.worker()
    async with client(stack) as one:
        answer = await one.responses.create(model="documents", input="dogs")
    content: Any = answer.output[0]
    (cited,) = content.content[0].annotations
    assert (cited.type, cited.url) == ("url_citation", "https://docs.example/h/dogs.md")


# ---- Conversations ----


async def test_a_follow_up_is_condensed(library: Stack, upstream: Upstream) -> None:
    """The model first makes one question of the conversation, which the passages are found by; it is not told to the
    client, but it is counted. The answer rests on the conversation as it was."""
    upstream.script("docs-condensed", Script(chunks=["Where may ", "dogs go?"]), Script(chunks=["On a lead."]))
    messages = [
        {"role": "user", "content": "How high is the tower?"},
        {"role": "assistant", "content": "17 metres."},
        {"role": "user", "content": "And they?"},
    ]
    body = {"model": "over-condensed", "messages": messages}
    generation = (await library.http.post(library.apis[0].url + "/v1/generations", json=body)).json()
    state = await library.finished(generation)
    assert state["text"] == "On a lead." and state["sources"][0]["id"] == "rules.pdf#1"
    assert (state["usage"]["input_tokens"], state["usage"]["output_tokens"]) == (14, 3)
    condensing, answering = upstream.requests_of("docs-condensed")
    assert "17 metres." in condensing.body["messages"][1]["content"]
    assert answering.body["messages"][1:3] == messages[:2]
    assert answering.body["messages"][3]["content"].endswith("And they?")


# ---- Workers ----


async def test_no_question_and_no_document_is_in_a_log(library: Stack, upstream: Upstream) -> None:
    """Not even at `debug`, where LlamaIndex tells all it knows."""
    upstream.script("docs-logged", Script(chunks=["an answer to keep quiet about"]))
    await library.finished(await library.create("over-logged", "Where may otters in confidence go?"))
    await library.http.get(library.apis[0].url + "/stream-question/", params={"query_text": "confidence of otters"})
    for process in (*library.workers, library.apis[0].process):
        log = process.log()
        for words in ("confidence", "otters live", "Dogs are welcome", "quiet about"):
            assert words not in log, process.name
    assert "documents.indexed" in library.workers[0].log()


def loaded(process: Process) -> str:
    """The files that a process has mapped: what it has imported of C."""
    return Path(f"/proc/{process.pid}/maps").read_text()


async def test_only_a_worker_with_documents_loads_llama_index(library: Stack, house: Stack) -> None:
    """It costs a second and a hundred megabytes; no api pays them, and no worker that has no documents."""
    await library.workers[0].says("documents.indexed")
    assert "numpy" in loaded(library.workers[0])
    assert "numpy" not in loaded(library.apis[0].process) and "numpy" not in loaded(house.workers[0])


async def test_two_workers_that_start_at_once_index_once(stack: Stack, tmp_path: Path) -> None:
    """One does it, the other waits for it; both answer."""
    stack.env |= documents(tmp_path)
    for n in range(40):
        (tmp_path / f"docs/{n}.html").write_text(f"<title>Page {n}</title><p>Berth number {n}.")
    await stack.api()
    await asyncio.gather(*(stack.worker() for _ in range(2)))
    for worker in stack.workers:
        await worker.says(r"documents.indexed +documents=41", timeout=40)
    assert sorted("documents.indexing" in worker.log() for worker in stack.workers) == [False, True]
    for worker in stack.workers:
        await worker.kill()
    again = await stack.worker()
    await again.says(r"documents.indexed +documents=41", timeout=40)
    assert "documents.indexing" not in again.log(), "what was kept was not used"
    assert (await stack.finished(await stack.create("documents", "dogs")))["sources"][0]["id"] == "dogs.md#1"


async def test_a_running_worker_sees_what_changes(stack: Stack, tmp_path: Path) -> None:
    """A file that is added, changed, removed; and one that cannot be read, which it names."""
    stack.env |= documents(tmp_path)
    await stack.api()
    worker = await stack.worker()

    async def ids(question: str) -> list[str]:
        state = await stack.finished(await stack.create("documents", question))
        return [source["id"] for source in state["sources"]]

    assert await ids("dogs") == ["dogs.md#1"]
    (tmp_path / "docs/otters.txt").write_text("Otters live at pontoon A.")
    (tmp_path / "docs/broken.pdf").write_bytes(b"%PDF-1.4 secret")

    async def finds(question: str, wanted: list[str]) -> bool:
        return await ids(question) == wanted

    await wait_until(lambda: finds("otters", ["otters.txt#1"]), timeout=20, every=0.1)
    (tmp_path / "docs/otters.txt").unlink()
    (tmp_path / "docs/dogs.md").write_text("Cats sleep on the sails.")
    await wait_until(lambda: finds("otters dogs cats", ["dogs.md#1"]), timeout=20, every=0.1)
    assert "broken.pdf" in worker.log() and "secret" not in worker.log()


async def test_an_attempt_that_follows_a_lost_one_begins_with_its_sources(
    stack: Stack, upstream: Upstream, tmp_path: Path
) -> None:
    """A worker dies amid the answer: what it said is void, sources included, and they are told again."""
    stack.env |= {**documents(tmp_path), "REJOIN_LEASE_SECONDS": "1"}
    stack.env["REJOIN_MODELS"] = models(tmp_path, upstream, "lost")
    upstream.script("docs-lost", Script(count=20, stall_at=5), Script(count=20))
    await stack.api()
    first = await stack.worker()
    generation = await stack.create("over-lost", "dogs")
    reader = stack.reader(generation)
    reading = asyncio.create_task(reader.read_to_end(timeout=60))
    await upstream.wait_sent("docs-lost", 5)
    await wait_until(lambda: reader.text)
    first.signal(signal.SIGKILL)
    await stack.worker()
    await reading
    check_history(reader.blocks)
    kinds = [block.event for block in reader.blocks]
    starts = [n for n, kind in enumerate(kinds) if kind == "generation.started"]
    assert [reader.blocks[n].data["mode"] for n in starts] == ["fresh", "fresh"]
    assert [kinds[n + 1] for n in starts] == ["source.added", "source.added"]
    state = await stack.snapshot(generation)
    assert len(state["sources"]) == 1 and state["text"] == reader.text and state["status"] == "completed"


async def test_without_the_extra_everything_else_works(stack: Stack, tmp_path: Path) -> None:
    """Who asks for `documents` is told what to install; a plain installation serves the rest."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('llama_index', 'bm25s', 'numpy', 'pypdf', 'nltk'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    stack.env |= {**documents(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path / 'bare'}"}
    await stack.api()
    worker = await stack.worker()
    state = await stack.finished(await stack.create("documents", "dogs"))
    assert state["error"]["code"] == "documents_not_installed" and not state["error"]["retryable"]
    assert "pip install '.[documents]'" in state["error"]["message"]
    assert "documents.not_installed" in worker.log()
    assert (await stack.finished(await stack.create("demo", "hello")))["status"] == "completed"
    assert await worker.terminate() == 0


async def test_a_worker_stops_amid_its_index(stack: Stack, tmp_path: Path) -> None:
    """SIGTERM while documents are read: it goes, in order, and the next one has them all."""
    stack.env |= documents(tmp_path)
    for n in range(300):
        (tmp_path / f"docs/{n}.txt").write_text(f"Berth number {n}. " * 200)
    worker = await stack.worker()
    assert await worker.terminate(timeout=20) == 0
    assert "Traceback" not in worker.log() and "documents.not_indexed" not in worker.log()
    again = await stack.worker()
    await again.says(r"documents.indexed +documents=301", timeout=60)


@pytest.mark.parametrize("argv", ["api", "worker", "cli up --port 0 --data {tmp}/data"])
@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
async def test_a_wrong_folder_stops_the_start_with_one_line(stack: Stack, tmp_path: Path, argv: str, name: str) -> None:
    """Of api, worker and `rejoin up`: the setting is named, and exit code 2 says that to try again is no use."""
    (tmp_path / "file.txt").write_text("words")
    command = [sys.executable, "-m", *argv.format(tmp=tmp_path).split()]
    env = {**stack.env, "REJOIN_PORT": "0", "REJOIN_DOCUMENTS": str(tmp_path / name)}
    process = await stack.processes.start("wrong", command, env)
    assert await process.wait() == 2
    (line,) = process.log().strip().splitlines()
    assert line.endswith(f"REJOIN_DOCUMENTS: {tmp_path / name} is not a folder")


# ---- The pages ----


async def test_the_example_of_the_pages_runs(processes: Processes, tmp_path: Path) -> None:
    """The README's commands and those of docs/documents.md, as they stand, print what is shown."""
    if shutil.which("curl") is None:
        pytest.skip("no curl: apt-get install curl")
    shown = section("docs/documents.md", "Try it")
    (command,) = fenced(shown, "sh")
    assert command.strip() in section("README.md", "Over your own documents")
    for page in (shown, section("README.md", "Over your own documents")):
        assert "REJOIN_DOCUMENTS=examples/harbour make up" in page
    folder = {"REJOIN_DOCUMENTS": "examples/harbour", "REJOIN_DOCUMENTS_INDEX": str(tmp_path / "index")}
    up = await start_rejoin_up(processes, tmp_path / "data", REJOIN_DEMO_WORDS_PER_SECOND="500", **folder)
    shell = ["sh", "-c", command.replace("http://127.0.0.1:8000", up.url)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True)
    assert f"```\n{done.stdout}\n```\n" in shown
    assert re.search(r"documents\.indexing +progress='\[█{24}\] 5/5'", up.process.log())
