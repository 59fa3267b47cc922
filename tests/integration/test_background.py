"""An upstream that goes on without us: whoever dies here, its answer is taken up and never paid for twice, and who
stops an answer stops it there too."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis as sync_redis

from shared.redis import Keys
from tests.conftest import environment, key_leaks
from tests.processes import Process, Processes
from tests.reader import Reader, check_history
from tests.responses_upstream import Background, Generation, ResponsesUpstream
from tests.stack import Stack
from tests.upstream import Script, Upstream
from tests.waiting import wait_until

QUESTION = "Tell me a long story"
LONG = Background(count=200, pace_seconds=0.02)


@pytest.fixture
async def background() -> AsyncIterator[ResponsesUpstream]:
    async with ResponsesUpstream() as one:
        yield one


def _models(folder: Path, base_url: str, *more: str) -> dict[str, str]:
    """The environment of a house whose one model, `bg`, is a background response at `base_url`."""
    path = folder / "background.toml"
    path.write_text("\n".join(["[bg]", 'provider = "openai_responses"', f'base_url = "{base_url}"', *more]))
    return {"REJOIN_MODELS": str(path), "REJOIN_LEASE_SECONDS": "1"}


@pytest.fixture
def models(tmp_path: Path, background: ResponsesUpstream) -> dict[str, str]:
    return _models(tmp_path, background.base_url)


def _modes(reader: Reader) -> list[str]:
    return [block.data["mode"] for block in reader.blocks if block.event == "generation.started"]


def _check_taken_up(reader: Reader, one: Generation, script: Background) -> None:
    """Two attempts, one response, every token once, and the upstream was never told to stop."""
    check_history(reader.blocks)
    kinds = [block.event for block in reader.blocks]
    assert kinds.index("upstream.accepted") < kinds.index("text.delta")
    assert kinds.count("upstream.accepted") == 1
    assert _modes(reader) == ["fresh", "continued"]
    assert reader.text == script.text(QUESTION)
    assert reader.terminal is not None and reader.terminal.event == "generation.completed"
    assert (one.generated, one.cancels) == (len(script.outputs(QUESTION)), 0)


async def _begun(stack: Stack, models: dict[str, str], blocks: int) -> tuple[Process, dict, Reader]:
    """A generation of which a reader has seen so many events, and the worker that runs it."""
    await stack.api(**models)
    victim = await stack.worker(**models)
    generation = await stack.create("bg", QUESTION)
    reader = stack.reader(generation)
    await reader.connect(stop_after=blocks)
    return victim, generation, reader


async def test_a_killed_workers_answer_is_taken_up_behind_its_last_event(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """`kill -9` amid the words: the next worker asks the same response for what follows, and pays for nothing twice."""
    background.script("bg", LONG)
    victim, generation, reader = await _begun(stack, models, 20)
    reading = asyncio.create_task(reader.read_to_end())
    await victim.kill()
    await stack.worker(**models)
    await reading
    one = background.only("bg")
    _check_taken_up(reader, one, LONG)
    (after,) = one.starts
    assert after is not None and after > 10
    assert (await stack.reader(generation).read_to_end()).raw == reader.raw, "who comes late sees the same"


async def test_a_worker_killed_before_the_first_token_loses_nothing(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """The id stands in the log before the first word, so even then there is no second response."""
    script = Background(count=30, hold_at=0)
    background.script("bg", script)
    victim, _, reader = await _begun(stack, models, 3)
    assert [block.event for block in reader.blocks][-1] == "upstream.accepted"
    reading = asyncio.create_task(reader.read_to_end())
    await victim.kill()
    await stack.worker(**models)
    one = background.only("bg")
    await wait_until(lambda: one.starts, timeout=30)
    one.released.set()
    await reading
    _check_taken_up(reader, one, script)
    assert one.starts == [None]


async def test_a_stopping_worker_hands_the_answer_over_and_does_not_stop_it(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """SIGTERM: the connection is closed, the response goes on, and the next worker is behind the last event."""
    background.script("bg", LONG)
    victim, _, reader = await _begun(stack, {**models, "REJOIN_DRAIN_SECONDS": "0"}, 20)
    reading = asyncio.create_task(reader.read_to_end())
    await stack.worker(**models)
    assert await victim.terminate() == 0
    await reading
    _check_taken_up(reader, background.only("bg"), LONG)


async def test_an_answer_that_a_failover_made_void_is_stopped(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str], redis_url: str, key_prefix: str
) -> None:
    """Another server took over: the next attempt begins afresh, and the first response is not left to run."""
    background.script("bg", Background(count=5000, pace_seconds=0.02))
    victim, generation, reader = await _begun(stack, models, 10)
    background.script("bg", Background(count=10))
    with sync_redis.Redis.from_url(redis_url) as client:
        client.hset(Keys(key_prefix).order(generation["id"]), "server", "0" * 40)
    await victim.kill()
    await stack.worker(**models)
    await reader.read_to_end()
    assert _modes(reader) == ["fresh", "fresh"]
    first, second = background.of("bg")
    await wait_until(lambda: first.cancels == 1)
    assert second.cancels == 0 and reader.text == Background(count=10).text(QUESTION)


async def test_a_worker_that_was_taken_for_dead_does_not_stop_what_another_took_up(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """It wakes up, is fenced, and leaves the response to the one that has it now."""
    script = Background(count=60, hold_at=40, pace_seconds=0.01)
    background.script("bg", script)
    victim, _, reader = await _begun(stack, models, 20)
    reading = asyncio.create_task(reader.read_to_end())
    victim.signal(signal.SIGSTOP)
    await stack.worker(**models)
    one = background.only("bg")
    await wait_until(lambda: one.starts, timeout=30)
    victim.signal(signal.SIGCONT)
    await victim.says("generation.lost", timeout=30)
    assert "upstream.stopped" not in victim.log()
    one.released.set()
    await reading
    _check_taken_up(reader, one, script)


@pytest.mark.parametrize("moment", ["before the first token", "amid the words"])
async def test_a_cancel_stops_the_response(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str], moment: str
) -> None:
    """To close the connection would stop nothing: the upstream is told."""
    background.script("bg", Background(count=1000, hold_at=0 if moment.startswith("before") else 30))
    _, generation, reader = await _begun(stack, models, 3 if moment.startswith("before") else 20)
    assert (await stack.cancel(generation))["status"] == "cancelled"
    one = background.only("bg")
    await wait_until(lambda: one.cancelled_at, timeout=20)
    assert one.cancels == 1 and one.generated < 1000
    await reader.read_to_end()
    assert reader.terminal is not None and reader.terminal.event == "generation.cancelled"


async def test_what_a_second_worker_took_up_can_be_cancelled_too(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """The id is in the log: the second worker knows it, too."""
    background.script("bg", Background(count=1000, hold_at=30))
    victim, generation, _ = await _begun(stack, models, 20)
    await victim.kill()
    await stack.worker(**models)
    one = background.only("bg")
    await wait_until(lambda: one.starts, timeout=30)
    await stack.cancel(generation)
    await wait_until(lambda: one.cancelled_at, timeout=20)


@pytest.mark.parametrize("end", ["nobody reads", "deleted", "out of time"])
async def test_every_other_end_stops_the_response_too(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str], end: str
) -> None:
    """Nobody will come back to it: it is not paid for any longer."""
    background.script("bg", Background(count=1000, hold_at=30))
    env = {**models, "REJOIN_DISCONNECT_GRACE_SECONDS": "1"}
    env |= {"REJOIN_MAX_GENERATION_SECONDS": "3"} if end == "out of time" else {}
    api = await stack.api(**env)
    await stack.worker(**env)
    generation = await stack.create("bg", QUESTION, on_disconnect="cancel" if end == "nobody reads" else "continue")
    one = await background.wait_generated("bg", 30)
    if end == "deleted":
        answer = await stack.http.delete(f"{api.url}/v1/generations/{generation['id']}")
        assert answer.status_code == 204
    await wait_until(lambda: one.cancelled_at, timeout=30)


async def test_a_response_that_is_lost_there_fails_the_answer(
    stack: Stack, background: ResponsesUpstream, models: dict[str, str]
) -> None:
    """The upstream has forgotten it: the answer fails and says so, and what was said stays."""
    background.script("bg", Background(count=200, hold_at=30, attach_status=404))
    victim, generation, reader = await _begun(stack, models, 20)
    await victim.kill()
    await stack.worker(**models)
    state = await stack.finished(generation)
    assert (state["status"], state["error"]["code"]) == ("failed", "upstream_lost_response")
    assert state["text"].startswith(reader.text)
    assert len(background.posts) == 1


# Another Rejoin as the upstream


@pytest.fixture
def second_prefix(redis_url: str) -> Iterator[str]:
    prefix = f"u{uuid.uuid4().hex[:8]}"
    yield prefix
    client = sync_redis.Redis.from_url(redis_url)
    leaks = key_leaks(client, prefix)
    client.close()
    assert not leaks


async def test_another_rejoin_is_such_an_upstream(
    stack: Stack, upstream: Upstream, processes: Processes, redis_url: str, second_prefix: str, tmp_path: Path
) -> None:
    """A worker of the first house dies: the second house goes on, and is asked for the rest of its one generation."""
    script = Script(count=200, pace_seconds=0.02)
    upstream.script("chained", script)
    second = Stack(processes, environment(redis_url, second_prefix, upstream), http=stack.http)
    far = await second.api()
    await second.worker()
    models = _models(tmp_path, f"{far.url}/v1", 'upstream_model = "chained"')
    victim, _, reader = await _begun(stack, models, 20)
    reading = asyncio.create_task(reader.read_to_end())
    await victim.kill()
    await stack.worker(**models)
    await reading
    check_history(reader.blocks)
    assert _modes(reader) == ["fresh", "continued"]
    assert reader.text == script.text(QUESTION)
    (listed,) = (await stack.http.get(f"{far.url}/v1/generations")).json()["data"]
    accepted = next(block.data["id"] for block in reader.blocks if block.event == "upstream.accepted")
    assert accepted == f"resp_{listed['id']}" and upstream.hits("chained") == 1
    assert (await second.snapshot(listed["id"]))["attempt"] == 1


async def test_a_cancel_goes_through_to_another_rejoins_model(
    stack: Stack, upstream: Upstream, processes: Processes, redis_url: str, second_prefix: str, tmp_path: Path
) -> None:
    """Cancelled here, cancelled there, and the model's own connection is closed."""
    upstream.script("chained-cancel", Script(count=20, stall_at=10))
    second = Stack(processes, environment(redis_url, second_prefix, upstream), http=stack.http)
    far = await second.api()
    await second.worker()
    models = _models(tmp_path, f"{far.url}/v1", 'upstream_model = "chained-cancel"')
    _, generation, _ = await _begun(stack, models, 8)
    await stack.cancel(generation)
    await upstream.wait_closed("chained-cancel", timeout=20)
    (listed,) = (await stack.http.get(f"{far.url}/v1/generations")).json()["data"]
    assert listed["status"] == "cancelled"
