"""The bench can be believed: its load generator counts right, and its verdicts say what the figures say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench import pictures
from bench.drive import Counts, Target, faults, loading
from bench.figures import Figures, table
from bench.goals import GOALS, verdict_table, verdicts
from bench.page import page
from bench.programs import Missing, compiled
from bench.systems import listens
from tests.processes import Processes, free_port

COUNT = 6


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    try:
        return compiled()
    except Missing as why:
        pytest.skip(f"NOT TESTED: the bench's programs: {why}")


def event(seq: int, stream: int = 0, line_end: str = "\n") -> str:
    text = f'{{"text":"@{time.monotonic_ns()}:{stream}:{seq}@ a word "}}'
    return line_end.join([f"id: 1-{seq}", f"data: {text}", "", ""])


@asynccontextmanager
async def served(body: Sequence[str], *, end: bool = True) -> AsyncIterator[int]:
    """A server that answers every request with these pieces, each a chunk, and then ends the body or breaks it off."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in body:
            writer.write(b"%x\r\n%b\r\n" % (len(piece.encode()), piece.encode()))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n" if end else b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield int(server.sockets[0].getsockname()[1])


async def counted(program: Path, folder: Path, body: Sequence[str], *, first: int = 0, end: bool = True) -> Counts:
    async with served(body, end=end) as port:
        target = Target(port, 0, COUNT, "/", first=first)
        async with loading(program, folder, [target], "--seconds", "5") as load:
            return await load.result()


def seqs(*numbers: int) -> list[str]:
    return [event(n) for n in numbers]


RIGHT = tuple(range(COUNT))
WRONGS = {
    "lost": (seqs(0, 1, 3, 4, 5), {"lost": 1, "broken": 1}),
    "doubled": (seqs(0, 1, 2, 2, 3, 4, 5), {"doubled": 1}),
    "reordered": (seqs(0, 2, 1, 3, 4, 5), {"reordered": 1}),
    "foreign": ([event(0, stream=7), *seqs(*RIGHT)], {"foreign": 1}),
    "sent away": ([": come back later\n\n"], {"turned_away": 1}),
}


async def test_the_load_generator_finds_nothing_wrong_with_what_is_right(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    """Each event once and in order is no fault, however the bytes are cut and the lines are ended."""
    whole = "".join([": hello\n\n", "retry: 1000\n\n", *seqs(*RIGHT)])
    letters = list(whole)
    carriage = ["".join(event(n, line_end="\r\n") for n in RIGHT)]
    for body in (seqs(*RIGHT), [whole], letters, carriage):
        counts = await counted(programs["load"], tmp_path, body)
        assert counts["events"] == COUNT and faults(counts) == 0, counts
        assert counts["latency"]["count"] == COUNT
        assert 0 < counts["latency"]["p50"] <= counts["latency"]["max"] < 5000


@pytest.mark.parametrize("wrong", WRONGS)
async def test_the_load_generator_finds_what_is_wrong(wrong: str, programs: dict[str, Path], tmp_path: Path) -> None:
    """A lost, doubled, reordered or foreign event, and a client sent away, are each counted as what they are."""
    body, expected = WRONGS[wrong]
    counts = await counted(programs["load"], tmp_path, body)
    names = ("lost", "doubled", "reordered", "foreign", "broken", "turned_away")
    assert {name: counts[name] for name in names if counts[name]} == expected


async def test_an_event_without_its_blank_line_does_not_count(programs: dict[str, Path], tmp_path: Path) -> None:
    """As for a browser: what was broken off in the middle did not come."""
    counts = await counted(programs["load"], tmp_path, [*seqs(*RIGHT[:-1]), event(COUNT - 1).rstrip("\n")], end=False)
    assert (counts["events"], counts["lost"], counts["broken"]) == (COUNT - 1, 1, 1)


async def test_a_client_may_begin_amid_a_stream(programs: dict[str, Path], tmp_path: Path) -> None:
    """A resumed client expects the rest, and an event from before its cursor is none of its own."""
    counts = await counted(programs["load"], tmp_path, seqs(4, 5), first=4)
    assert counts["events"] == 2 and faults(counts) == 0
    counts = await counted(programs["load"], tmp_path, seqs(3, 4, 5), first=4)
    assert counts["foreign"] == 1


async def test_the_benchs_upstream_speaks_chat_completions(programs: dict[str, Path], tmp_path: Path) -> None:
    """Many paced streams at once, and one without a pace: every chunk once and in order."""
    processes = Processes(tmp_path)
    try:
        port = free_port()
        await listens(processes.launch("upstream", [str(programs["upstream"]), str(port)]), port)
        clients = [Target(port, n, 20, "/", method="POST", body=f"bench {n} 20 {1000 * (n > 0)} ") for n in range(20)]
        async with loading(programs["load"], tmp_path, clients, "--seconds", "10") as load:
            counts = await load.result()
        assert counts["events"] == 400 and faults(counts) == 0, counts
    finally:
        processes.end_all()


def test_a_verdict_says_what_the_figures_say() -> None:
    """Met, missed, or open where a figure or a peer is missing; and the table has each figure."""
    figures = Figures()
    assert {goal["verdict"] for goal in verdicts(figures)} == {"open"}
    for system, values in {"rejoin": (2.0, 3.0, 100.0), "taskiq": (2.0, 2.0, 2.0)}.items():
        for value in values:
            figures.add("job start: p50", system, value, "ms")
    found = {goal["goal"]: (goal["found"], goal["verdict"]) for goal in verdicts(figures)}
    assert found["job start over taskiq's"] == (1.5, "met")
    figures.add("job start: p50", "arq", 6.0, "ms")
    assert "MISSED" in verdict_table(figures)
    assert "job start: p50" in table(figures)
    assert len(GOALS) == len(verdict_table(figures).splitlines()) - 1


def test_the_picture_and_the_page_are_made_of_whatever_was_measured() -> None:
    """A section that was left out leaves a panel empty, not the picture undone."""
    about = {"cores": 2, "cpu": "x", "kernel": "6", "python": "3.11", "at": "2026-01-01T00:00", "quick": True}
    assert "not measured" in pictures.picture({"about": about, "figures": {}, "curves": {}})
    figures = Figures()
    figures.add("relay 10k/s: cpu per event", "rejoin", 40, "µs")
    figures.add("cpu per event, 10 streams at 5,000/s", "rejoin", 40, "µs")
    figures.add("memory per idle connection, 500", "rejoin", 10, "KiB")
    figures.curve("relay 10k/s", "rejoin", [[0.1, 10], [1.5, 5]])
    results = {"about": about, "goals": verdicts(figures), **figures.as_json()}
    drawn = pictures.picture(results)
    assert "| relay 10k/s: cpu per event | µs | 40 |" in page(results)
    assert drawn.count("not measured") == 2 and drawn.endswith("</svg>\n")
