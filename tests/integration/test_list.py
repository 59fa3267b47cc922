"""The list of one's own generations: newest first, page by page, each exactly once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.redis import Keys
from tests.processes import Valkey
from tests.stack import Stack
from tests.upstream import Script, Upstream


async def listed(stack: Stack, api: int = 0, **query: Any) -> dict[str, Any]:
    answer = await stack.http.get(stack.apis[api].url + "/v1/generations", params=query)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def paged(stack: Stack, limit: int, **query: Any) -> list[str]:
    """The ids of all pages, one after the other, from either api in turn."""
    ids: list[str] = []
    for n in range(1000):
        page = await listed(stack, n % len(stack.apis), limit=limit, **query)
        assert len(page["data"]) == limit if page["has_more"] else len(page["data"]) <= limit
        ids += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            return ids
        query["after"] = ids[-1]
    raise AssertionError("the pages have no end")


async def create_in_order(stack: Stack, count: int) -> list[str]:
    """The ids, newest first; made one after the other, so that there is an order."""
    return [(await stack.create("demo"))["id"] for _ in range(count)][::-1]


async def test_an_empty_list(stack: Stack) -> None:
    """Who has asked nothing yet has an empty page and no more."""
    await stack.api()
    assert await listed(stack) == {"data": [], "has_more": False}


async def test_newest_first_with_what_one_needs_to_go_on(stack: Stack) -> None:
    """Twenty by default, the newest on top, each with its id, status, model and time."""
    await stack.api()
    ids = await create_in_order(stack, 25)
    page = await listed(stack)
    assert [one["id"] for one in page["data"]] == ids[:20] and page["has_more"]
    times = [one["created_at"] for one in page["data"]]
    assert times == sorted(times, reverse=True)
    for one in page["data"]:
        state = await stack.snapshot(one["id"])
        assert one == {name: state[name] for name in ("id", "status", "model", "created_at")}


@pytest.mark.parametrize("limit", [1, 2, 7, 23, 24, 100])
async def test_paging_reaches_every_generation_once(stack: Stack, limit: int) -> None:
    """Whatever the size of a page, also where the last one is full."""
    await stack.api()
    ids = await create_in_order(stack, 23)
    assert await paged(stack, limit) == ids


async def test_paging_over_many_made_at_once(stack: Stack) -> None:
    """Over a hundred, made at the same moment on two apis, on pages from either: each once, in one order."""
    await stack.api()
    await stack.api()
    made = await asyncio.gather(*(stack.create("demo", api=stack.apis[n % 2]) for n in range(130)))
    ids = await paged(stack, 9)
    assert sorted(ids) == sorted(one["id"] for one in made)
    assert ids == await paged(stack, 100)


async def test_what_comes_meanwhile_does_not_move_the_pages(stack: Stack) -> None:
    """New generations stand before the page one is on: nothing is shown twice."""
    await stack.api()
    ids = await create_in_order(stack, 6)
    first = await listed(stack, limit=3)
    await create_in_order(stack, 5)
    second = await listed(stack, limit=3, after=first["data"][-1]["id"])
    assert [one["id"] for one in first["data"] + second["data"]] == ids


async def test_the_status_filter(house: Stack, upstream: Upstream) -> None:
    """Only those of the status asked for, page by page as well."""
    upstream.script("list-runs", Script(stall_at=1))
    upstream.script("list-fails", Script(status=400))
    upstream.script("list-is-cut", Script(finish_reason="length"))
    made = {status: await house.create(model) for status, model in (("in_progress", "list-runs"),)}
    await upstream.wait_hits("list-runs")
    made |= {"failed": await house.create("list-fails"), "incomplete": await house.create("list-is-cut")}
    made["completed"] = await house.create("list-ends")
    for status in ("failed", "incomplete", "completed"):
        await house.finished(made[status])
    made["cancelled"] = await house.create("list-runs")
    await house.cancel(made["cancelled"])
    for status, generation in made.items():
        page = await listed(house, status=status, limit=100)
        assert {one["status"] for one in page["data"]} == {status}
        assert generation["id"] in await paged(house, 2, status=status)
    assert generation["id"] not in await paged(house, 100, status="queued")
    upstream.release("list-runs")


async def test_the_filter_looks_behind_the_first_hundred(stack: Stack) -> None:
    """A rare status is found behind many others, and the page says that there is no more."""
    await stack.api()
    first = await stack.create("demo")
    await stack.cancel(first)
    await asyncio.gather(*(stack.create("demo") for _ in range(120)))
    page = await listed(stack, status="cancelled", limit=1)
    assert [one["id"] for one in page["data"]] == [first["id"]] and not page["has_more"]


async def test_the_deleted_are_not_listed(stack: Stack) -> None:
    """A deleted generation is gone from every page, under any filter."""
    await stack.api()
    ids = await create_in_order(stack, 6)
    for deleted in ids[1:5:2]:
        await stack.http.delete(f"{stack.apis[0].url}/v1/generations/{deleted}")
    assert await paged(stack, 1) == await paged(stack, 100) == [ids[0], ids[2], ids[4], ids[5]]
    assert await paged(stack, 100, status="cancelled") == []


async def test_deleting_page_by_page_reaches_everything(stack: Stack) -> None:
    """The page after a generation is found though it was deleted meanwhile: so one clears one's list."""
    await stack.api()
    ids = await create_in_order(stack, 7)
    seen: list[str] = []
    query: dict[str, Any] = {}
    while len(seen) < len(ids):
        page = await listed(stack, limit=2, **query)
        assert page["data"], "the rest was lost"
        for one in page["data"]:
            seen.append(one["id"])
            await stack.http.delete(f"{stack.apis[0].url}/v1/generations/{one['id']}")
        query["after"] = seen[-1]
    assert seen == ids and await paged(stack, 100) == []


async def test_an_unknown_place_in_the_list_is_its_end(stack: Stack) -> None:
    """An id that is not in the list (another's, or long gone) has nothing after it; it is not told which."""
    await stack.api()
    await create_in_order(stack, 3)
    assert await listed(stack, after="0" * 32) == {"data": [], "has_more": False}


async def test_the_list_is_bounded(stack: Stack, server: Valkey) -> None:
    """The newest thousand are kept: a hint for people, not an archive."""
    await stack.api()
    await asyncio.gather(*(stack.create("demo") for _ in range(3)))
    key = Keys(stack.env["REJOIN_KEY_PREFIX"]).recent("local")
    async with Redis.from_url(server.url) as redis:
        await redis.zadd(key, {f"{n:032x}": n for n in range(2000)})
        newest = await stack.create("demo")
        assert await redis.zcard(key) == 1000
    assert (await listed(stack))["data"][0]["id"] == newest["id"]
