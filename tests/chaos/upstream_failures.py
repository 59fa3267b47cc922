"""Everything an upstream does wrong gives a typed `generation.failed`; nothing that was cut off is called complete."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.house import House, house
from tests.chaos.report import Row, Say
from tests.stack import gather_bounded
from tests.upstream import Script

MAX_TRIES = 4
CUTS = 60  # of each kind of end, at so many different bytes
WORDS = 20
ENV = {
    "REJOIN_FIRST_TOKEN_SECONDS": "1",
    "REJOIN_INTER_TOKEN_SECONDS": "1",
    "REJOIN_UPSTREAM_RETRY_SECONDS": "2",
}


@dataclass(frozen=True)
class Kind:
    """One way to go wrong. `said`: the words that come first, and stay; `tries`: how often it may be asked."""

    script: Script
    code: str
    said: int = 0
    tries: int = 1


KINDS = {
    "hangs before the headers": Kind(Script(stall_headers=True), "upstream_timeout_first_token"),
    "hangs before the first token": Kind(Script(stall_at=0), "upstream_timeout_first_token"),
    "hangs between tokens": Kind(Script(stall_at=5), "upstream_timeout_inter_token", said=5),
    "429": Kind(Script(status=429), "upstream_rate_limited", tries=MAX_TRIES),
    "500": Kind(Script(status=500), "upstream_unavailable", tries=MAX_TRIES),
    "401": Kind(Script(status=401), "upstream_unauthorized"),
    "breaks off amid the body": Kind(Script(cut_at=5, cut="close"), "upstream_reset", said=5),
    "resets the connection": Kind(Script(cut_at=5, cut="reset", pace_seconds=0.02), "upstream_reset", said=4),
    "ends without a finish reason": Kind(Script(finish_reason=None, count=5), "upstream_truncated", said=5),
    "sends a page": Kind(Script(html=True), "upstream_invalid"),
    "sends bad JSON": Kind(Script(bad_json_at=5), "upstream_invalid", said=5),
    "sends an error amid the stream": Kind(Script(error_at=5), "upstream_error", said=5),
    "answers with a document": Kind(Script(body=b'{"choices":[{"message":{"content":"all of it"}}]}'),
                                    "upstream_invalid"),
}  # fmt: skip


async def run(say: Say, quick: bool) -> list[Row]:
    cuts = CUTS // 10 if quick else CUTS
    async with house(ENV, apis=1, workers=2) as one:
        wrong = [text for text in await gather_bounded(20, *(_fails(one, name) for name in KINDS)) if text]
        for text in wrong:
            say(text)
        states = await gather_bounded(20, *(_cut(one, kind, n, cuts) for kind in CUT_KINDS for n in range(cuts)))
        say(f"{len(states)} answers cut: {sorted({(state['status'], _code(state)) for state in states})}")
    failed = [state for state in states if state["status"] == "failed" and _code(state).startswith("upstream_")]
    completed = [state for state in states if state["status"] == "completed"]
    return [
        Row("upstream", "kinds of failure that are typed, and asked again only where nothing was said",
            f"{len(KINDS) - len(wrong)} of {len(KINDS)}", "all", not wrong),
        Row("upstream", "truncated answers called complete", f"{len(completed)} of {len(states)}", "0",
            not completed and len(failed) == len(states) == len(CUT_KINDS) * cuts),
    ]  # fmt: skip


async def _fails(one: House, name: str) -> str | None:
    """Ask an upstream that goes wrong so; what is not as it should be, in words."""
    kind, model = KINDS[name], name.replace(" ", "-")
    one.upstream.script(model, kind.script)
    state = await one.stack.finished(await one.stack.create(model))
    hits = one.upstream.hits(model)
    kept = "".join(map(str, kind.script.outputs("hello")[: kind.said]))
    if state["status"] != "failed" or _code(state) != kind.code:
        return f"{name}: {state['status']} {_code(state)}, and not failed {kind.code}"
    if not (1 if kind.tries == 1 else 2) <= hits <= kind.tries:
        return f"{name}: the upstream was asked {hits} times"
    if not state["text"].startswith(kept):
        return f"{name}: {state['text']!r} is kept, and not {kept!r}"
    return None


# An end amid the body: broken off without a word, reset, and properly ended by an upstream that died behind a proxy.
CUT_KINDS = ("close", "reset", "end")


async def _cut(one: House, kind: str, n: int, cuts: int) -> dict:
    """An answer that ends at one byte of its body, which is before the finish reason."""
    model = f"{kind}-{n}"
    body_bytes = WORDS * 100  # at least: each word comes in a chunk of some 150
    script = Script(count=WORDS, cut_at_byte=1 + n * body_bytes // cuts, cut=kind)  # type: ignore[arg-type]
    one.upstream.script(model, script)
    return await one.stack.finished(await one.stack.create(model))


def _code(state: dict) -> str:
    return str((state.get("error") or {}).get("code", ""))
