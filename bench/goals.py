"""The goals, each with what was found and a verdict. A goal whose figure or peer is missing is said to be open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from bench.figures import OWN, Figures, aligned, short

Measure: TypeAlias = Callable[[Figures], float | None]
Verdict: TypeAlias = Literal["met", "MISSED", "open"]

GROWN_STREAMS = tuple(f"cpu per event, {n} streams at 5,000/s" for n in (10, 100, 500, 2000))
GROWN_RATES = tuple(f"cpu per event, 100 streams at {n:,}/s" for n in (1000, 5000, 10_000, 20_000, 30_000))
IDLE = "memory per idle connection, {}"


@dataclass(frozen=True)
class Goal:
    """One promise: a number that is to be at most, or at least, so much."""

    what: str
    sense: Literal["at most", "at least"]
    limit: float
    unit: str
    measure: Measure

    def found(self, figures: Figures) -> tuple[float | None, Verdict]:
        value = self.measure(figures)
        if value is None:
            return None, "open"
        met = value <= self.limit if self.sense == "at most" else value >= self.limit
        return value, "met" if met else "MISSED"


def own(figure: str) -> Measure:
    return lambda figures: figures.median(figure)


def over(figure: str, peer: str) -> Measure:
    """Rejoin's over the peer's."""
    return lambda figures: figures.ratio(figure, peer)


def under(figure: str, peer: str) -> Measure:
    """The peer's over Rejoin's: how many times less it is."""
    return lambda figures: figures.ratio(figure, OWN, peer)


def spread(names: tuple[str, ...]) -> Measure:
    """The dearest over the cheapest of these."""

    def measure(figures: Figures) -> float | None:
        found = [value for name in names if (value := figures.median(name)) is not None]
        return max(found) / min(found) if len(found) > 1 else None

    return measure


def idle(figures: Figures) -> str:
    """The memory figure of the largest size that was measured."""
    sizes = [
        int(name.rpartition(" ")[2]) for name in figures.samples if name.startswith(IDLE.format("")) and ":" not in name
    ]
    return IDLE.format(max(sizes, default=0))


def linear(figures: Figures) -> float | None:
    """What a connection costs among most, over what it costs among fewest."""
    sizes = [name for name in figures.samples if name.startswith(IDLE.format("")) and ":" not in name]
    values = [value for name in sizes if (value := figures.median(name)) is not None]
    return values[-1] / values[0] if len(values) > 1 else None


def wrong(figures: Figures) -> float | None:
    return float(figures.faults[OWN]) if OWN in figures.faults else None


WORKER_CPU = "worker cpu per chunk, 100 x 80/s"
REPLAY = "replay of 5,000 events: p50"
GOALS = (
    Goal(
        "POST to first token over the direct route, p50",
        "at most",
        3,
        "ms",
        own("first token over the direct route: p50"),
    ),
    Goal("the same, p99", "at most", 10, "ms", own("first token over the direct route: p99")),
    Goal("job start over taskiq's", "at most", 2, "x", over("job start: p50", "taskiq")),
    Goal("job start: ARQ's default takes so many times longer", "at least", 100, "x", under("job start: p50", "arq")),
    Goal("relay p50 over the floor, 10,000 events/s", "at most", 1.3, "x", over("relay 10k/s: p50", "floor")),
    Goal("relay p50 over the floor, 30,000 events/s", "at most", 1.5, "x", over("relay 30k/s: p50", "floor")),
    Goal(
        "relay p99: XREAD per client is so many times later, 10,000/s",
        "at least",
        20,
        "x",
        under("relay 10k/s: p99", "naive"),
    ),
    Goal("relay p99 over the floor, 30,000 events/s", "at most", 5, "x", over("relay 30k/s: p99", "floor")),
    Goal(
        "relay cpu per event over the floor, 10,000 events/s",
        "at most",
        1.6,
        "x",
        over("relay 10k/s: cpu per event", "floor"),
    ),
    Goal("relay p50 over Nchan, 10,000 events/s", "at most", 1.25, "x", over("relay 10k/s: p50", "nchan")),
    Goal("memory of an idle connection", "at most", 12, "KiB", lambda figures: figures.median(idle(figures))),
    Goal(
        "memory of an idle connection over naive's",
        "at most",
        0.2,
        "x",
        lambda figures: figures.ratio(idle(figures), "naive"),
    ),
    Goal(
        "the same over resumable-stream's",
        "at most",
        0.25,
        "x",
        lambda figures: figures.ratio(idle(figures), "resumable"),
    ),
    Goal("replay: naive takes so many times longer", "at least", 5, "x", under(REPLAY, "naive")),
    Goal("replay: Nchan takes so many times longer", "at least", 5, "x", under(REPLAY, "nchan")),
    Goal(
        "worker cpu per chunk: the SDK's objects cost so many times more",
        "at least",
        3,
        "x",
        under(WORKER_CPU, "sdk objects"),
    ),
    Goal("tokens/s of one worker over naive's", "at least", 3, "x", over("tokens/s of one worker, saturated", "naive")),
    Goal("Redis commands sent per token, 100 x 80/s", "at most", 0.2, "", own("redis: commands sent per token")),
    Goal("cpu per event from 10 to 2,000 streams, most over least", "at most", 1.3, "x", spread(GROWN_STREAMS)),
    Goal("cpu per event from 1,000 to 30,000 events/s, most over least", "at most", 1.3, "x", spread(GROWN_RATES)),
    Goal("memory of a connection among most, over among fewest", "at most", 1.3, "x", linear),
    Goal("events lost, doubled, reordered or foreign", "at most", 0, "", wrong),
)


def verdicts(figures: Figures) -> list[dict[str, object]]:
    """Each goal as it came out, for the JSON."""
    return [
        {
            "goal": goal.what,
            "sense": goal.sense,
            "limit": goal.limit,
            "unit": goal.unit,
            "found": value,
            "verdict": verdict,
        }
        for goal in GOALS
        for value, verdict in [goal.found(figures)]
    ]


def verdict_table(figures: Figures) -> str:
    lines = [("goal", "wanted", "found", "")]
    for goal in GOALS:
        value, verdict = goal.found(figures)
        found = "not measured" if value is None else f"{short(value)} {goal.unit}".strip()
        lines.append((goal.what, f"{goal.sense} {short(goal.limit)} {goal.unit}".strip(), found, verdict))
    return aligned(lines)
