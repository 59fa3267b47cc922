"""The scripts one by one, on a real Valkey: each test is a sentence of docs/protocol.md.

Nobody sets a server's clock: `pass_time` moves what is stored into the past instead.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from shared import lua
from shared.config import Settings
from shared.errors import Conflict, NotFound, Unavailable
from shared.event_log import MAX_RELEASES, Answer, Append, Claim, EventLog, Hint, Order, gone, new_id
from shared.events import Cancelled, Completed, Entry, Failed, Queued, Started, TextDelta, decode, encode, fold
from shared.jobs import Jobs, Listing
from shared.prompt import Prompt
from shared.redis import ALIVE_MS, Client, connect
from tests.processes import Processes, valkey

PROMPT = Prompt(model="demo", messages=[{"role": "user", "content": "hello"}])
OTHER = Prompt(model="demo", messages=[{"role": "user", "content": "another"}])
DONE = encode(Completed("stop"))
HOSTILE = 'é\r\n\n\u2028\u2029\x85\x00\x1b\ufeff🦜e\u0301 0-1 {} \\u0000 "}\n\nevent: generation.completed\ndata: {}'


def token(text: str) -> bytes:
    return encode(TextDelta(text))


async def create(log: EventLog, *, prompt: Prompt = PROMPT, **options: Any) -> str:
    generation_id = new_id()
    created = await log.create(generation_id, tenant="t", provider="demo", prompt=prompt, **options)
    assert created.is_new
    return generation_id


async def claim(log: EventLog, generation_id: str, *, nonce: str | None = None, continues: str = "") -> Claim:
    order = await order_of(log, generation_id)
    claimed = await log.claim(Hint(generation_id, order.epoch, order.hints), nonce or new_id(), continues=continues)
    assert claimed is not None
    return claimed


async def running(log: EventLog, **options: Any) -> Claim:
    return await claim(log, await create(log, **options))


async def append(log: EventLog, claimed: Claim, first: int, *events: bytes, final: Any = None) -> Answer:
    (answer,) = await log.append([Append(claimed.generation_id, claimed.epoch, first, events, final)])
    return answer


async def order_of(log: EventLog, generation_id: str) -> Order:
    order = await log.order(generation_id)
    assert order is not None
    return order


async def last_event(log: EventLog, generation_id: str) -> Any:
    entry = await log.tail(generation_id)
    assert entry is not None
    return decode(entry.data)


async def now_ms(redis: Client) -> int:
    seconds, microseconds = await redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def field(log: EventLog, generation_id: str, name: str) -> int:
    return int(await log.servers.client.hget(log.keys.order(generation_id), name))


async def lease(log: EventLog, generation_id: str) -> float | None:
    """Until when, in milliseconds of Redis."""
    return await log.servers.client.zscore(log.keys.leases(generation_id[-1]), generation_id)


async def pass_time(log: EventLog, generation_id: str, seconds: float) -> None:
    """Move the lease and all times of an order into the past."""
    ms = round(seconds * 1000)
    for name in ("queue_until", "deadline", "attended_until", "touched"):
        if await log.servers.client.hexists(log.keys.order(generation_id), name):
            await log.servers.client.hincrby(log.keys.order(generation_id), name, -ms)
    await log.servers.client.zincrby(log.keys.leases(generation_id[-1]), -ms, generation_id)


async def guard(log: EventLog, partition: str, *, last_run: int, not_before: int) -> None:
    """Set what the reaper remembers of one partition, in milliseconds from now."""
    now = await now_ms(log.servers.client)
    memory = {"last_run": now + last_run, "not_before": now + not_before}
    await log.servers.client.hset(log.keys.reaper(partition), mapping=memory)


# --- create


async def test_an_order_is_queued_and_its_first_entry_says_so(event_log: EventLog) -> None:
    """Entry `0-1` is `generation.queued`, and a queued lease ends after `claim_grace`."""
    generation_id = await create(event_log)
    order = await order_of(event_log, generation_id)
    assert (order.status, order.epoch, order.hints, order.ended, order.fresh) == ("queued", 0, 1, False, None)
    assert (order.tenant, order.model, order.on_disconnect) == ("t", "demo", "continue")
    (entry,) = await event_log.read(generation_id)
    assert entry.id == b"0-1"
    assert decode(entry.data) == Queued("demo", order.created_at)
    assert await lease(event_log, generation_id) == order.created_at + 10_000


async def test_fifty_creates_at_once_write_one_order(event_log: EventLog) -> None:
    """The id decides: one of them wrote it, the others found it."""
    generation_id = new_id()
    asking = [event_log.create(generation_id, tenant="t", provider="demo", prompt=PROMPT) for _ in range(50)]
    answers = await asyncio.gather(*asking)
    assert [answer.is_new for answer in answers].count(True) == 1
    assert {answer.order.created_at for answer in answers} == {answers[0].order.created_at}
    assert len(await event_log.read(generation_id)) == 1


async def test_a_create_answers_the_order_as_it_is_stored(event_log: EventLog) -> None:
    """Nobody has to read it again: what a new one answers is what stands there, and a repeat finds how it is doing."""
    prompt = PROMPT.model_copy(update={"metadata": {"é": "🦜"}})
    for on_disconnect in ("continue", "cancel"):
        asked: Any = {"tenant": "t", "provider": "demo", "prompt": prompt, "on_disconnect": on_disconnect}
        order, is_new = await event_log.create(new_id(), **asked)
        assert is_new and order == await event_log.order(order.id)
        await claim(event_log, order.id)
        again, is_new = await event_log.create(order.id, **asked)
        assert not is_new and again.status == "in_progress"
        assert again == await event_log.order(order.id)


async def test_another_request_under_the_same_id_is_a_conflict(event_log: EventLog) -> None:
    """An Idempotency-Key stands for one request, whatever became of it."""
    generation_id = await create(event_log)
    for _ in range(2):
        again = await event_log.create(generation_id, tenant="t", provider="demo", prompt=PROMPT)
        assert not again.is_new
        with pytest.raises(Conflict) as caught:
            await event_log.create(generation_id, tenant="t", provider="demo", prompt=OTHER)
        assert caught.value.code == "idempotency_conflict"
        await event_log.close(generation_id, Cancelled("caller"))


async def test_a_short_queue_time_ends_the_first_wait_in_time(event_log: EventLog, settings: Settings) -> None:
    """No lease of a waiting generation outlasts `max_queue_seconds`."""
    log = EventLog(event_log.servers.client, settings.model_copy(update={"max_queue_seconds": 2}))
    claimed = await running(log)
    await log.release(claimed.generation_id, claimed.epoch)
    for generation_id in (claimed.generation_id, await create(log)):
        assert await lease(log, generation_id) == await field(log, generation_id, "queue_until")


async def test_a_full_redis_is_said_to_be_full(processes: Processes, tmp_path: Path, settings: Settings) -> None:
    """Nothing was lost: the caller may try again."""
    server = valkey(processes, tmp_path / "full")
    server.start()
    redis = connect(server.url, connections=1)
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(Unavailable) as caught:
            await create(EventLog(redis, settings))
        assert caught.value.code == "store_full"
        assert await redis.dbsize() == 0
    finally:
        await redis.aclose(close_connection_pool=True)


# --- claim


async def test_a_claim_begins_an_epoch_that_is_a_time(event_log: EventLog) -> None:
    """The started entry is `<epoch>-0`, the epoch is now, and the claim brings all that a worker needs."""
    before = await now_ms(event_log.servers.client)
    claimed = await running(event_log)
    assert before <= claimed.epoch <= await now_ms(event_log.servers.client)
    assert (claimed.attempt, claimed.model, claimed.provider) == (1, "demo", "demo")
    assert Prompt.from_json(claimed.prompt) == PROMPT
    assert claimed.seconds_left == 3600
    tail = await event_log.tail(claimed.generation_id)
    assert tail is not None and tail.id == b"%d-0" % claimed.epoch
    assert decode(tail.data) == Started(1, "demo", "fresh")
    order = await order_of(event_log, claimed.generation_id)
    assert (order.status, order.epoch, order.fresh) == ("in_progress", claimed.epoch, claimed.epoch)
    assert await lease(event_log, claimed.generation_id) == claimed.epoch + 3000


async def test_a_claim_repeated_with_its_nonce_is_answered_the_same(event_log: EventLog) -> None:
    """The reply was lost, the claim was not: there is one started entry."""
    generation_id = await create(event_log)
    first, second = [await event_log.claim(Hint(generation_id, 0, 1), "nonce") for _ in range(2)]
    assert first is not None and second is not None
    assert (second.epoch, second.attempt, second.prompt) == (first.epoch, first.attempt, first.prompt)
    assert len(await event_log.read(generation_id)) == 2


async def test_a_claim_is_refused_at_another_epoch(event_log: EventLog) -> None:
    """A hint that was delayed or replayed starts nothing."""
    claimed = await running(event_log)
    await event_log.release(claimed.generation_id, claimed.epoch)
    for epoch in (0, claimed.epoch - 1, claimed.epoch + 1):
        assert await event_log.claim(Hint(claimed.generation_id, epoch, 1), "another") is None
    assert len(await event_log.read(claimed.generation_id)) == 2


async def test_a_claim_is_refused_while_another_holds_it(event_log: EventLog) -> None:
    """A doubled hint does not run a generation twice."""
    generation_id = await create(event_log)
    asking = [event_log.claim(Hint(generation_id, 0, 1), f"nonce-{n}") for n in range(20)]
    answers = await asyncio.gather(*asking)
    assert sum(answer is not None for answer in answers) == 1


async def test_a_claim_is_refused_when_it_has_ended(event_log: EventLog) -> None:
    """Also by a hint that carries the right epoch, also of an order that never was."""
    claimed = await running(event_log)
    await event_log.close(claimed.generation_id, Cancelled("caller"))
    order = await order_of(event_log, claimed.generation_id)
    assert await event_log.claim(Hint(order.id, order.epoch, 2), "another") is None
    assert await event_log.claim(Hint(new_id(), 0, 1), "another") is None


async def test_a_continued_claim_goes_on_from_the_tail(event_log: EventLog) -> None:
    """`continues` is the id of the tail; such an attempt voids nothing, and a retry of its claim is told the same."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, token("Hel"))
    await event_log.release(claimed.generation_id, claimed.epoch)
    hint = Hint(claimed.generation_id, claimed.epoch, 2)
    second = await event_log.claim(hint, "nonce", continues=f"{claimed.epoch}-1")
    assert second is not None and second.attempt == 2 and second.continued
    again = await event_log.claim(hint, "nonce", continues=f"{claimed.epoch}-1")
    assert again is not None and (again.epoch, again.continued) == (second.epoch, True)
    await append(event_log, second, 1, token("lo"))
    assert fold(await event_log.read(claimed.generation_id)).text == "Hello"
    assert (await order_of(event_log, claimed.generation_id)).fresh == claimed.epoch


@pytest.mark.parametrize("why", ["the tail moved", "another server", "a server that does not tell its run id"])
async def test_an_attempt_that_cannot_go_on_starts_afresh(event_log: EventLog, why: str) -> None:
    """Words that readers have seen may be missing from what this server has: nothing is spliced to them."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, token("Hel"))
    await event_log.release(claimed.generation_id, claimed.epoch)
    told = {"another server": "0" * 40, "a server that does not tell its run id": ""}
    if why in told:
        await event_log.servers.client.hset(event_log.keys.order(claimed.generation_id), "server", told[why])
    tail = f"{claimed.epoch}-{0 if why == 'the tail moved' else 1}"
    second = await event_log.claim(Hint(claimed.generation_id, claimed.epoch, 2), "nonce", continues=tail)
    assert second is not None and not second.continued
    assert (await order_of(event_log, claimed.generation_id)).fresh == second.epoch
    await append(event_log, second, 1, token("Hello"))
    assert fold(await event_log.read(claimed.generation_id)).text == "Hello"


async def test_ids_are_written_in_digits_however_large(event_log: EventLog) -> None:
    """`1e+15` is no id."""
    generation_id = await create(event_log)
    await event_log.servers.client.hset(event_log.keys.order(generation_id), "epoch", 10**15)
    claimed = await claim(event_log, generation_id)
    assert claimed.epoch == 10**15 + 1
    await append(event_log, claimed, 1, token("a"))
    await event_log.close(generation_id, Cancelled("caller"))
    ids = [entry.id for entry in await event_log.read(generation_id)]
    assert ids == [b"0-1", b"1000000000000001-0", b"1000000000000001-1", b"1000000000000002-0"]


# --- replicas


async def test_without_the_replicas_that_are_wanted_nothing_is_created(settings: Settings, redis: Client) -> None:
    """A server alone cannot keep a promise that names a replica: 503, no trace, and the same key may ask again."""
    log = EventLog(redis, settings.model_copy(update={"wait_replicas": 1, "wait_milliseconds": 20}))
    generation_id = new_id()
    with pytest.raises(Unavailable) as refused:
        await log.create(generation_id, tenant="t", provider="demo", prompt=PROMPT)
    assert refused.value.code == "not_durable"
    assert await log.order(generation_id) is None and await log.tail(generation_id) is None
    assert await redis.zscore(log.keys.leases(generation_id[-1]), generation_id) is None
    again = await EventLog(redis, settings).create(generation_id, tenant="t", provider="demo", prompt=PROMPT)
    assert again.is_new


async def test_a_claimed_order_is_not_taken_back(event_log: EventLog) -> None:
    """Somebody works on it: it stays."""
    claimed = await running(event_log)
    assert not await event_log.retract(claimed.generation_id)
    assert await event_log.order(claimed.generation_id) is not None


async def test_an_order_is_taken_back_as_often_as_it_is_asked(event_log: EventLog) -> None:
    """The reply of the first may have been lost: the second says the same, and no hint or reap brings it back."""
    generation_id = await create(event_log)
    for _ in range(2):
        assert await event_log.retract(generation_id)
        assert await event_log.order(generation_id) is None and await event_log.tail(generation_id) is None
        assert await lease(event_log, generation_id) is None
    assert await event_log.claim(Hint(generation_id, 0, 1), new_id()) is None
    assert await event_log.reap(generation_id) is None


# --- append


async def test_events_are_numbered_by_their_writer(event_log: EventLog) -> None:
    """Entry n of an attempt is `<epoch>-<n>`, in one append or in several."""
    claimed = await running(event_log)
    assert await append(event_log, claimed, 1, token("a"), token("b")) == Answer("OK")
    assert await append(event_log, claimed, 3, token("c"), DONE, final="completed") == Answer("OK")
    entries = await event_log.read(claimed.generation_id, after=f"{claimed.epoch}-0")
    assert [entry.position for entry in entries] == [(claimed.epoch, seq) for seq in (1, 2, 3, 4)]
    assert (await order_of(event_log, claimed.generation_id)).status == "completed"
    assert await lease(event_log, claimed.generation_id) is None


async def test_what_is_appended_survives_byte_for_byte(event_log: EventLog) -> None:
    """Line breaks, NUL, U+2028, a forged event: stored and pushed as the writer encoded them, one line each."""
    claimed = await running(event_log)
    pubsub = event_log.servers.client.pubsub()
    await pubsub.subscribe(event_log.keys.push(claimed.generation_id))
    assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
    await append(event_log, claimed, 1, token(HOSTILE), token("\n"))
    message = await pubsub.get_message(timeout=5)
    await pubsub.aclose()
    entries = await event_log.read(claimed.generation_id, after=f"{claimed.epoch}-0")
    assert entries[0].data == token(HOSTILE)
    assert decode(entries[0].data) == TextDelta(HOSTILE)
    head, *lines = message["data"].split(b"\n")
    assert head == f"{claimed.generation_id} {claimed.epoch}-0".encode()
    assert lines == [b"%s %s" % entry for entry in entries]


async def test_a_repeated_append_is_ok_and_adds_nothing(event_log: EventLog) -> None:
    """The reply was lost, the append was not."""
    claimed = await running(event_log)
    events = [token("a"), token("b")]
    for first, part in ((1, events), (1, events), (1, events[:1]), (2, events[1:])):
        assert await append(event_log, claimed, first, *part) == Answer("OK")
    assert fold(await event_log.read(claimed.generation_id)).text == "ab"


async def test_a_partial_overlap_adds_what_is_new(event_log: EventLog) -> None:
    """The first half was stored before."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, token("a"), token("b"))
    assert await append(event_log, claimed, 2, token("b"), token("c")) == Answer("OK")
    assert fold(await event_log.read(claimed.generation_id)).text == "abc"


async def test_a_gap_is_answered_with_the_last_seq_and_adds_nothing(event_log: EventLog) -> None:
    """Redis came back without the last writes: the writer sends again from there."""
    claimed = await running(event_log)
    assert await append(event_log, claimed, 3, token("c")) == Answer("GAP", 0)
    await append(event_log, claimed, 1, token("a"))
    assert await append(event_log, claimed, 3, token("c"), DONE, final="completed") == Answer("GAP", 1)
    assert await append(event_log, claimed, 3) == Answer("GAP", 1)
    assert await append(event_log, claimed, 2, token("b"), token("c"), DONE, final="completed") == Answer("OK")
    assert fold(await event_log.read(claimed.generation_id)).text == "abc"


async def test_an_append_of_another_epoch_is_fenced(event_log: EventLog) -> None:
    """A zombie learns that it is not the writer any more, and leaves no trace."""
    old = await running(event_log)
    await append(event_log, old, 1, token("old"))
    await event_log.release(old.generation_id, old.epoch)
    assert await append(event_log, old, 2, token("zombie")) == Answer("FENCED")
    new = await claim(event_log, old.generation_id)
    assert await append(event_log, old, 2, token("zombie")) == Answer("FENCED")
    assert await append(event_log, old, 1, token("old")) == Answer("FENCED")
    assert await append(event_log, old, 2) == Answer("FENCED")
    assert await append(event_log, new, 1, token("new")) == Answer("OK")
    assert fold(await event_log.read(old.generation_id)).text == "new"


async def test_a_repeat_of_the_end_is_ok_when_it_was_our_own(event_log: EventLog) -> None:
    """Repeats are tested first; anything new after the end is fenced."""
    claimed = await running(event_log)
    for _ in range(2):
        assert await append(event_log, claimed, 1, token("a"), DONE, final="completed") == Answer("OK")
    assert await append(event_log, claimed, 3, token("more")) == Answer("FENCED")
    assert len(await event_log.read(claimed.generation_id)) == 4


async def test_an_append_after_somebody_elses_end_is_fenced(event_log: EventLog) -> None:
    """Exactly one terminal event: who closed first has closed it."""
    claimed = await running(event_log)
    await event_log.close(claimed.generation_id, Cancelled("caller"))
    assert await append(event_log, claimed, 1, DONE, final="completed") == Answer("FENCED")
    assert (await order_of(event_log, claimed.generation_id)).status == "cancelled"


async def test_an_append_to_a_missing_order_is_gone_and_creates_no_key(event_log: EventLog) -> None:
    """Redis was flushed: a log without its order would live for ever."""
    missing = Claim(new_id(), 5, 1, "demo", "demo", b"", 1)
    for events in ((), (token("a"),)):
        assert await append(event_log, missing, 1, *events) == Answer("GONE")
    assert await append(event_log, missing, 1, DONE, final="completed") == Answer("GONE")
    claimed = await running(event_log)
    await event_log.servers.client.delete(event_log.keys.order(claimed.generation_id))
    assert await append(event_log, claimed, 1, token("a")) == Answer("GONE")
    assert [key async for key in event_log.servers.client.scan_iter(f"*{missing.generation_id}*")] == []
    assert len(await event_log.read(claimed.generation_id)) == 2


async def test_one_append_serves_many_generations(event_log: EventLog) -> None:
    """Each is answered for itself, in the order given."""
    first, second = await running(event_log), await running(event_log)
    answers = await event_log.append(
        [
            Append(first.generation_id, first.epoch, 1, [token("a"), token("b")]),
            Append(new_id(), 1, 1, [token("x")]),
            Append(second.generation_id, second.epoch, 2, [token("x")]),
            Append(second.generation_id, second.epoch, 1, [DONE], "completed"),
            Append(first.generation_id, first.epoch, 3, [token("c")]),
        ]
    )
    assert answers == [Answer("OK"), Answer("GONE"), Answer("GAP", 0), Answer("OK"), Answer("OK")]
    assert fold(await event_log.read(first.generation_id)).text == "abc"


@pytest.mark.parametrize("events", [(), (token("a"),)])
async def test_an_append_renews_the_lease(event_log: EventLog, events: tuple[bytes, ...]) -> None:
    """An append of nothing is the heartbeat; a lease that ended but was not reaped is still ours."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 30)
    before = await now_ms(event_log.servers.client)
    assert await append(event_log, claimed, 1, *events) == Answer("OK")
    renewed = await lease(event_log, claimed.generation_id)
    assert renewed is not None and renewed >= before + 3000


# --- close


async def test_a_close_is_the_next_epoch(event_log: EventLog) -> None:
    """The terminal event is its entry 0, so Redis itself refuses every older id from then on."""
    claimed = await running(event_log)
    assert await event_log.close(claimed.generation_id, Cancelled("caller")) == "cancelled"
    tail = await event_log.tail(claimed.generation_id)
    order = await order_of(event_log, claimed.generation_id)
    assert tail is not None and tail.id == b"%d-0" % order.epoch
    assert order.epoch > claimed.epoch
    event = decode(tail.data)
    assert isinstance(event, Cancelled) and event.by == "caller" and event.at is not None


async def test_a_second_close_answers_the_first_outcome(event_log: EventLog) -> None:
    """Cancel races finish: one of them wins, both are told."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, DONE, final="completed")
    assert await event_log.close(claimed.generation_id, Cancelled("caller")) == "completed"
    generation_id = await create(event_log)
    closing = [event_log.close(generation_id, event) for event in (Cancelled("caller"), Failed("code", "no")) * 10]
    assert len(set(await asyncio.gather(*closing))) == 1
    assert len(await event_log.read(generation_id)) == 2


async def test_a_close_ends_what_is_still_queued(event_log: EventLog) -> None:
    """No worker ever saw it, and none will."""
    generation_id = await create(event_log)
    assert await event_log.close(generation_id, Cancelled("caller")) == "cancelled"
    assert await lease(event_log, generation_id) is None
    assert fold(await event_log.read(generation_id)).status == "cancelled"


async def test_a_close_of_what_is_held_nudges_its_holder(event_log: EventLog) -> None:
    """The owner learns it at once; nobody is nudged for what nobody held."""
    queued, claimed = await create(event_log), await running(event_log)
    pubsub = event_log.servers.client.pubsub()
    await pubsub.subscribe(event_log.keys.nudge)
    assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
    await event_log.close(queued, Cancelled("caller"))
    await event_log.close(claimed.generation_id, Cancelled("caller"))
    message = await pubsub.get_message(timeout=5)
    await pubsub.aclose()
    assert message["data"].decode() == claimed.generation_id


async def test_a_close_by_the_holder_touches_nobody_elses_attempt(event_log: EventLog) -> None:
    """`held_at`: only while that epoch holds it."""
    claimed = await running(event_log)
    failed = Failed("upstream_error", "It broke off.")
    assert await event_log.close(claimed.generation_id, failed, held_at=claimed.epoch - 1) == "in_progress"
    await event_log.release(claimed.generation_id, claimed.epoch)
    assert await event_log.close(claimed.generation_id, failed, held_at=claimed.epoch) == "in_progress"
    second = await claim(event_log, claimed.generation_id)
    assert await event_log.close(claimed.generation_id, failed, held_at=second.epoch) == "failed"


async def test_a_close_of_nothing_is_not_found(event_log: EventLog) -> None:
    """So is its deletion."""
    with pytest.raises(NotFound):
        await event_log.close(new_id(), Cancelled("caller"))
    with pytest.raises(NotFound):
        await event_log.delete(new_id())


# --- due: the grace guard


async def test_the_first_look_gives_everyone_one_more_lease(event_log: EventLog) -> None:
    """Nobody had looked before: an outage of Redis must not restart every generation."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 60)
    partition = claimed.generation_id[-1]
    assert await event_log.due(partition) == []
    not_before = int(await event_log.servers.client.hget(event_log.keys.reaper(partition), "not_before"))
    assert not_before > await now_ms(event_log.servers.client) + 2000
    await guard(event_log, partition, last_run=-500, not_before=-1)
    assert await event_log.due(partition) == [claimed.generation_id]


@pytest.mark.parametrize(("last_run", "found"), [(-900, True), (-1500, False), (60_000, False)])
async def test_a_look_after_silence_or_a_step_of_the_clock_waits(
    event_log: EventLog, last_run: int, found: bool
) -> None:
    """More than a second without a reaper, or a clock that stepped back: one more lease first."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 600)
    await guard(event_log, claimed.generation_id[-1], last_run=last_run, not_before=-1)
    assert await event_log.due(claimed.generation_id[-1]) == ([claimed.generation_id] if found else [])
    assert await event_log.due(claimed.generation_id[-1]) == ([claimed.generation_id] if found else [])


async def test_leases_step_back_with_the_clock(event_log: EventLog) -> None:
    """A clock set back by an hour does not keep a dead worker's lease for an hour."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, -3600)
    await guard(event_log, claimed.generation_id[-1], last_run=3_600_000, not_before=0)
    assert await event_log.due(claimed.generation_id[-1]) == []
    until = await lease(event_log, claimed.generation_id)
    assert until is not None and until < await now_ms(event_log.servers.client) + 3500


async def test_what_is_not_due_is_not_found(event_log: EventLog) -> None:
    """At most `limit` at a time, the longest ended first."""
    ids = [f"{n:031x}a" for n in range(4)]
    for n, generation_id in enumerate(ids):
        await event_log.create(generation_id, tenant="t", provider="demo", prompt=PROMPT)
        await pass_time(event_log, generation_id, 20 * n)
    await guard(event_log, "a", last_run=-100, not_before=-1)
    assert await event_log.due("a") == ids[:0:-1]
    assert await event_log.due("a", limit=2) == ids[:1:-1]


# --- reap


async def test_a_reaped_attempt_is_charged_and_hinted(event_log: EventLog) -> None:
    """The worker died: claimable at the same epoch, with the next hint, and still in progress for readers."""
    claimed = await running(event_log)
    assert await event_log.reap(claimed.generation_id) is None
    await pass_time(event_log, claimed.generation_id, 4)
    hint = await event_log.reap(claimed.generation_id)
    assert hint == Hint(claimed.generation_id, claimed.epoch, 2)
    assert await field(event_log, claimed.generation_id, "charged") == 1
    assert (await order_of(event_log, claimed.generation_id)).status == "in_progress"
    assert await append(event_log, claimed, 1, token("zombie")) == Answer("FENCED")
    assert (await claim(event_log, claimed.generation_id)).attempt == 2


async def test_a_lost_hint_is_sent_again_and_not_charged(event_log: EventLog) -> None:
    """From `claim_grace` the patience doubles up to a minute."""
    generation_id = await create(event_log)
    for n, patience in enumerate([20, 40, 60, 60], start=2):
        await pass_time(event_log, generation_id, 61)
        before = await now_ms(event_log.servers.client)
        assert await event_log.reap(generation_id) == Hint(generation_id, 0, n)
        until = await lease(event_log, generation_id)
        assert until is not None and abs(until - before - patience * 1000) < 900
    assert await field(event_log, generation_id, "charged") == 0


async def test_attempts_are_bounded(event_log: EventLog) -> None:
    """A prompt that kills its workers ends as `attempts_exhausted` with the last attempt allowed."""
    claimed = await running(event_log)
    for _ in range(2):
        await pass_time(event_log, claimed.generation_id, 4)
        assert await event_log.reap(claimed.generation_id) is not None
        claimed = await claim(event_log, claimed.generation_id)
    assert claimed.attempt == 3
    await pass_time(event_log, claimed.generation_id, 4)
    assert await event_log.reap(claimed.generation_id) is None
    event = await last_event(event_log, claimed.generation_id)
    assert isinstance(event, Failed) and event.code == "attempts_exhausted"
    assert await lease(event_log, claimed.generation_id) is None


async def test_a_wait_is_bounded(event_log: EventLog) -> None:
    """No worker came: `queue_timeout`; the wait begins anew when an attempt was lost."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 3500)
    assert await event_log.reap(claimed.generation_id) is not None
    await pass_time(event_log, claimed.generation_id, 3500)
    assert await event_log.reap(claimed.generation_id) is not None
    await pass_time(event_log, claimed.generation_id, 101)
    assert await event_log.reap(claimed.generation_id) is None
    event = await last_event(event_log, claimed.generation_id)
    assert isinstance(event, Failed) and (event.code, event.retryable) == ("queue_timeout", True)


async def test_a_run_is_bounded(event_log: EventLog) -> None:
    """Past its deadline a generation is neither reaped nor claimed into another attempt: `deadline_exceeded`."""
    reaped, released = await running(event_log), await running(event_log)
    await pass_time(event_log, reaped.generation_id, 3601)
    assert await event_log.reap(reaped.generation_id) is None
    hint = await event_log.release(released.generation_id, released.epoch)
    await pass_time(event_log, released.generation_id, 3601)
    assert hint is not None and await event_log.claim(hint, "nonce") is None
    for claimed in (reaped, released):
        event = await last_event(event_log, claimed.generation_id)
        assert isinstance(event, Failed) and event.code == "deadline_exceeded"


async def test_a_second_attempt_keeps_the_first_ones_deadline(event_log: EventLog) -> None:
    """The bound is on the generation, not on the attempt."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 1000)
    await event_log.reap(claimed.generation_id)
    assert 2590 < (await claim(event_log, claimed.generation_id)).seconds_left <= 2600


async def test_a_supervisor_expires_only_what_its_child_held(event_log: EventLog) -> None:
    """`expire_epoch` needs no ended lease, but the epoch; it is charged like any reap."""
    claimed = await running(event_log)
    assert await event_log.reap(claimed.generation_id, expire_epoch=claimed.epoch - 1) is None
    hint = await event_log.reap(claimed.generation_id, expire_epoch=claimed.epoch)
    assert hint == Hint(claimed.generation_id, claimed.epoch, 2)
    assert await field(event_log, claimed.generation_id, "charged") == 1
    assert await event_log.reap(claimed.generation_id, expire_epoch=claimed.epoch) is None


async def test_the_lease_of_a_lost_order_is_removed(event_log: EventLog) -> None:
    """The index stays bounded, whatever expired before anyone looked."""
    generation_id = await create(event_log)
    await pass_time(event_log, generation_id, 11)
    await event_log.servers.client.delete(event_log.keys.order(generation_id), event_log.keys.log(generation_id))
    assert await event_log.reap(generation_id) is None
    assert await lease(event_log, generation_id) is None
    assert not await event_log.servers.client.exists(event_log.keys.log(generation_id))


# --- release


async def test_a_release_is_hinted_at_once_and_not_charged(event_log: EventLog) -> None:
    """A deploy costs nobody an attempt, ten times; from then on it does."""
    claimed = await running(event_log)
    for n in range(1, MAX_RELEASES + 1):
        hint = await event_log.release(claimed.generation_id, claimed.epoch)
        assert hint == Hint(claimed.generation_id, claimed.epoch, n + 1)
        assert await field(event_log, claimed.generation_id, "charged") == 0
        claimed = await claim(event_log, claimed.generation_id)
    for charged in (1, 2):
        assert await event_log.release(claimed.generation_id, claimed.epoch) is not None
        assert await field(event_log, claimed.generation_id, "charged") == charged
        claimed = await claim(event_log, claimed.generation_id)
    assert await event_log.release(claimed.generation_id, claimed.epoch) is None
    event = await last_event(event_log, claimed.generation_id)
    assert isinstance(event, Failed) and event.code == "attempts_exhausted"


async def test_a_release_of_what_is_not_ours_does_nothing(event_log: EventLog) -> None:
    """Another epoch, a second time, after the end, of nothing."""
    claimed = await running(event_log)
    assert await event_log.release(claimed.generation_id, claimed.epoch - 1) is None
    assert await event_log.release(claimed.generation_id, claimed.epoch) is not None
    assert await event_log.release(claimed.generation_id, claimed.epoch) is None
    await event_log.close(claimed.generation_id, Cancelled("caller"))
    assert await event_log.release(claimed.generation_id, claimed.epoch) is None
    assert await event_log.release(new_id(), 1) is None
    assert await field(event_log, claimed.generation_id, "hints") == 2


# --- abandonment


async def abandoned(log: EventLog, *, held: bool = True, outage: bool = False) -> Claim:
    """Asked with `on_disconnect: cancel`, and nobody has been reading for longer than the grace; the worker (or the
    queue) still has its lease, unless it was an outage of Redis that kept everybody from saying anything."""
    generation_id = await create(log, on_disconnect="cancel")
    claimed = await claim(log, generation_id) if held else Claim(generation_id, 0, 0, "", "", b"", 0)
    await pass_time(log, generation_id, 10.5)
    if not outage:
        lives_until = await now_ms(log.servers.client) + 2000
        await log.servers.client.zadd(log.keys.leases(generation_id[-1]), {generation_id: lives_until})
    return claimed


async def check_cancelled_by_disconnect(log: EventLog, generation_id: str) -> None:
    event = await last_event(log, generation_id)
    assert isinstance(event, Cancelled) and event.by == "disconnect"
    assert (await order_of(log, generation_id)).status == "cancelled"
    assert await lease(log, generation_id) is None


@pytest.mark.parametrize("events", [(), (token("a"),)])
async def test_an_abandoned_generation_ends_at_its_next_append(event_log: EventLog, events: tuple[bytes, ...]) -> None:
    """Nobody reads any more: the worker is told, and stops paying."""
    claimed = await abandoned(event_log)
    assert await append(event_log, claimed, 1, *events) == Answer("ABANDONED")
    await check_cancelled_by_disconnect(event_log, claimed.generation_id)
    assert await append(event_log, claimed, 1, *events) == Answer("FENCED")


async def test_an_abandoned_generation_that_has_finished_is_finished(event_log: EventLog) -> None:
    """The answer is there; throwing it away would help nobody."""
    claimed = await abandoned(event_log)
    assert await append(event_log, claimed, 1, DONE, final="completed") == Answer("OK")


async def test_an_abandoned_generation_is_not_started(event_log: EventLog) -> None:
    """The caller left while it was waiting."""
    waiting = await abandoned(event_log, held=False)
    assert await event_log.claim(Hint(waiting.generation_id, 0, 1), "nonce") is None
    await check_cancelled_by_disconnect(event_log, waiting.generation_id)


@pytest.mark.parametrize("held", [True, False])
async def test_an_abandoned_generation_is_not_hinted_again(event_log: EventLog, held: bool) -> None:
    """The reaper ends it instead."""
    left = await abandoned(event_log, held=held, outage=True)
    assert await event_log.reap(left.generation_id) is None
    await check_cancelled_by_disconnect(event_log, left.generation_id)


async def test_an_outage_is_not_taken_for_a_reader_that_left(event_log: EventLog) -> None:
    """Where the lease ended too, nobody could say anything: the readers get one more grace time."""
    held, queued = await abandoned(event_log, outage=True), await abandoned(event_log, held=False, outage=True)
    assert await append(event_log, held, 1, token("a")) == Answer("OK")
    assert await event_log.claim(Hint(queued.generation_id, 0, 1), "nonce") is not None
    for one in (held, queued):
        assert (
            await field(event_log, one.generation_id, "attended_until") > await now_ms(event_log.servers.client) + 9000
        )


async def test_a_repeat_renews_the_lease(event_log: EventLog) -> None:
    """The writer takes its answer for a sign that the lease stands, so it does."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, token("a"))
    await pass_time(event_log, claimed.generation_id, 2)
    assert await append(event_log, claimed, 1, token("a")) == Answer("OK")
    assert (await lease(event_log, claimed.generation_id) or 0) > await now_ms(event_log.servers.client) + 2000


async def test_a_reader_keeps_a_generation_running(event_log: EventLog) -> None:
    """`attend` pushes the end forward, for those that asked for one, as long as they run."""
    watched, other, ended = await abandoned(event_log), await running(event_log), await abandoned(event_log)
    await event_log.close(ended.generation_id, Cancelled("caller"))
    left = await field(event_log, ended.generation_id, "attended_until")
    await event_log.attend([watched.generation_id, other.generation_id, ended.generation_id, new_id()])
    assert await append(event_log, watched, 1, token("a")) == Answer("OK")
    assert (
        await field(event_log, watched.generation_id, "attended_until") > await now_ms(event_log.servers.client) + 9000
    )
    assert not await event_log.servers.client.hexists(event_log.keys.order(other.generation_id), "attended_until")
    assert await field(event_log, ended.generation_id, "attended_until") == left


async def test_a_client_that_leaves_stops_nothing_unless_it_asked_for_that(event_log: EventLog) -> None:
    """The policy `continue` knows no end of attention."""
    claimed = await running(event_log)
    await pass_time(event_log, claimed.generation_id, 1000)
    assert await append(event_log, claimed, 1, token("a")) == Answer("OK")


# --- deletion


async def test_deletion_leaves_a_tombstone(event_log: EventLog) -> None:
    """The words are gone, that it was and how it ended is not; its key is never used again."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, token("secret"), DONE, final="completed")
    for _ in range(2):
        await event_log.delete(claimed.generation_id)
    order = await order_of(event_log, claimed.generation_id)
    assert (order.deleted, order.status) == (True, "completed")
    assert await event_log.read(claimed.generation_id) == []
    assert not await event_log.servers.client.hexists(event_log.keys.order(claimed.generation_id), "prompt")
    assert (gone(order).code, gone(order).outcome) == ("deleted", "completed")
    for prompt in (PROMPT, OTHER):
        with pytest.raises(Conflict) as caught:
            await event_log.create(claimed.generation_id, tenant="t", provider="demo", prompt=prompt)
        assert caught.value.code == "deleted"


async def test_deletion_ends_what_runs(event_log: EventLog) -> None:
    """Its readers are told before the log goes, its worker at its next append."""
    claimed = await running(event_log)
    pubsub = event_log.servers.client.pubsub()
    await pubsub.subscribe(event_log.keys.push(claimed.generation_id))
    assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
    await event_log.delete(claimed.generation_id)
    message = await pubsub.get_message(timeout=5)
    await pubsub.aclose()
    assert b'{"type":"generation.cancelled","by":"delete"' in message["data"]
    assert (await append(event_log, claimed, 1, token("a"))).code in ("GONE", "FENCED")
    assert not await event_log.servers.client.exists(event_log.keys.log(claimed.generation_id))


# --- times to live


async def lives(log: EventLog, generation_id: str) -> tuple[int, int]:
    """What is left to the order and to the log, in seconds."""
    keys = (log.keys.order(generation_id), log.keys.log(generation_id))
    left = [await log.servers.client.pttl(key) for key in keys]
    return round(left[0] / 1000), round(left[1] / 1000)


async def test_a_generation_lives_a_day_and_its_end_as_long_as_is_set(event_log: EventLog, settings: Settings) -> None:
    """`log_retention` and `order_retention` begin at the terminal event, whoever writes it."""
    update = {"log_retention_seconds": 1000, "order_retention_seconds": 2000}
    log = EventLog(event_log.servers.client, settings.model_copy(update=update))
    closed, finished, reaped = await create(log), await running(log), await create(log)
    assert await lives(log, closed) == await lives(log, finished.generation_id) == (86_400, 86_400)
    await log.close(closed, Cancelled("caller"))
    await append(log, finished, 1, DONE, final="completed")
    await pass_time(log, reaped, 3601)
    await log.reap(reaped)
    for generation_id in (closed, finished.generation_id, reaped):
        assert await lives(log, generation_id) == (2000, 1000)


@pytest.mark.parametrize(("idle", "left"), [(59, 1000), (61, ALIVE_MS // 1000)])
async def test_a_running_generation_never_expires(event_log: EventLog, idle: int, left: int) -> None:
    """Its keys are given a day again, at most once a minute."""
    claimed = await running(event_log)
    for key in (event_log.keys.order(claimed.generation_id), event_log.keys.log(claimed.generation_id)):
        await event_log.servers.client.expire(key, 1000)
    await pass_time(event_log, claimed.generation_id, idle)
    await append(event_log, claimed, 1)
    assert await lives(event_log, claimed.generation_id) == (left, left)


async def test_a_waiting_generation_never_expires(event_log: EventLog) -> None:
    """A hint sent again renews the keys, and so does a claim."""
    generation_id = await create(event_log)
    for renew in (event_log.reap, lambda one: claim(event_log, one)):
        for key in (event_log.keys.order(generation_id), event_log.keys.log(generation_id)):
            await event_log.servers.client.expire(key, 1000)
        await pass_time(event_log, generation_id, 61)
        await renew(generation_id)
        assert await lives(event_log, generation_id) == (86_400, 86_400)


# --- reading


async def test_a_log_is_read_from_any_cursor(event_log: EventLog) -> None:
    """What follows an id, one page at a time; the id need not be there."""
    claimed = await running(event_log)
    await append(event_log, claimed, 1, *[token(str(n)) for n in range(5)])
    generation_id, epoch = claimed.generation_id, claimed.epoch
    whole = await event_log.read(generation_id)
    assert [entry.id for entry in whole[:2]] == [b"0-1", b"%d-0" % epoch]
    for position, entry in enumerate(whole):
        assert await event_log.read(generation_id, after=entry.id.decode()) == whole[position + 1 :]
    assert await event_log.read(generation_id, after="0-1", count=2) == whole[1:3]
    assert await event_log.read(generation_id, after="5-5") == whole[1:]
    assert await event_log.read(generation_id, after=f"{epoch}-99") == []
    assert await event_log.entry(generation_id, f"{epoch}-1") == Entry(b"%d-1" % epoch, token("0"))
    assert await event_log.entry(generation_id, f"{epoch}-99") is None
    assert await event_log.tail(generation_id) == whole[-1]


async def test_what_never_was_is_none(event_log: EventLog) -> None:
    """No order, no log, no error."""
    assert await event_log.order(new_id()) is None
    assert await event_log.tail(new_id()) is None
    assert await event_log.read(new_id()) == []


async def test_orders_are_read_many_at_once(event_log: EventLog) -> None:
    """In the order given, without those that are gone."""
    first, second = await create(event_log), await create(event_log)
    found = await event_log.orders([second, new_id(), first])
    assert [order.id for order in found] == [second, first]


async def test_an_expired_log_is_gone_with_its_outcome(event_log: EventLog) -> None:
    """The order stands for longer, to say how it ended."""
    generation_id = await create(event_log)
    await event_log.close(generation_id, Cancelled("caller"))
    await event_log.servers.client.delete(event_log.keys.log(generation_id))
    order = await order_of(event_log, generation_id)
    assert (gone(order).code, gone(order).outcome) == ("expired", "cancelled")


# --- the scripts as such


def test_every_script_has_its_file_and_every_file_its_script() -> None:
    """Each is the prelude and its own file."""
    names = {path.name.removesuffix(".lua") for path in files(lua).iterdir() if path.name.endswith(".lua")}
    assert names == {*lua.SCRIPTS, "prelude"}
    for name in lua.SCRIPTS:
        assert lua.source(name).startswith(lua.source("create")[:40])


async def test_every_script_is_known_to_the_server_by_its_text(redis: Client) -> None:
    """The version is in the text, so in the SHA: two versions share a Redis during a rolling deploy."""
    shas = [await redis.script_load(lua.source(name)) for name in lua.SCRIPTS]
    assert len(set(shas)) == len(lua.SCRIPTS)
    assert all("protocol, v1" in lua.source(name) for name in lua.SCRIPTS)


async def test_scripts_touch_only_the_keys_and_channels_they_are_given(
    redis: Client, redis_url: str, settings: Settings
) -> None:
    """A user who may use nothing but the keys of one generation can live its whole life, in every script."""
    generation_id, user = new_id(), f"user-{settings.key_prefix}"
    log = EventLog(redis, settings)
    keys = log.keys
    own = [keys.order(generation_id), keys.log(generation_id)]
    own += [keys.leases(generation_id[-1]), keys.reaper(generation_id[-1]), keys.queue, keys.doorbell, keys.recent("t")]
    hints = [keys.hint(generation_id, n) for n in (1, 2)]
    own += [f"arq:{kind}:{hint}" for kind in ("job", "in-progress", "retry") for hint in ("", *hints)]
    channels = [keys.push(generation_id), keys.nudge]
    rules = [f"%RW~{key}" for key in own] + [f"&{channel}" for channel in channels]
    await redis.execute_command(
        "ACL", "SETUSER", user, "reset", "on", ">pw", "-@all", *rules, "+@all", "-@admin", "-flushall", "-keys"
    )
    limited = connect(redis_url.replace("//", f"//{user}:pw@"), connections=1)
    try:
        await live_a_whole_life(EventLog(limited, settings), Jobs(limited, keys), generation_id)
    finally:
        await limited.aclose(close_connection_pool=True)
        await redis.execute_command("ACL", "DELUSER", user)


async def live_a_whole_life(log: EventLog, jobs: Jobs, generation_id: str) -> None:
    asked: Any = {"tenant": "t", "provider": "demo", "prompt": PROMPT, "on_disconnect": "cancel"}
    order, _ = await log.create(generation_id, **asked)
    assert await log.retract(generation_id)
    order, _ = await log.create(generation_id, **asked)
    assert await jobs.announce(order, Listing(log.keys.recent("t"), 10, 60), 10)
    assert await jobs.take([log.keys.hint(generation_id, 1)], 1) == ([ANY], 0)
    claimed = await claim(log, generation_id)
    await append(log, claimed, 1, token("a"))
    hint = await log.release(generation_id, claimed.epoch)
    assert hint is not None
    await jobs.send(hint)
    await log.attend([generation_id])
    claimed = await claim(log, generation_id)
    await log.due(generation_id[-1])
    assert await log.reap(generation_id, expire_epoch=claimed.epoch) is not None
    await claim(log, generation_id)
    await log.delete(generation_id)
