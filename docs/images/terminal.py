"""Draw the pictures of docs/terminal.md again: `python docs/images/terminal.py`. Needs Chromium.

A canned answer and a canned look go through the very code that draws them in a terminal; nothing is served or asked.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from cli.screens import Harmless, Terminal  # noqa: E402
from cli.top import Generation, Look, Store, Worker, drawn  # noqa: E402
from shared.events import (  # noqa: E402
    Completed,
    Entry,
    Event,
    Queued,
    ReasoningDelta,
    Snapshot,
    Started,
    TextDelta,
    Usage,
    encode,
)

ID = "9f3b0c6e5d2a48e7b1c4d7f0a3e65182"
T = 1_795_184_280_000
QUESTION = 'rejoin ask "Quicksort in Python, with a short explanation" --model fast'
REASONING = "A short version with list comprehensions shows the idea best; name what it costs.\n"
ANSWER = """## Quicksort

Choose a **pivot**, put what is smaller before it and what is larger behind it, and do the same with both parts.

```python
def quicksort(items):
    if len(items) < 2:
        return items
    pivot, *rest = items
    smaller = [item for item in rest if item < pivot]
    larger = [item for item in rest if item >= pivot]
    return quicksort(smaller) + [pivot] + quicksort(larger)
```

| case | time |
|---|---|
| on average | `O(n log n)` |
| sorted already | `O(n²)` |

* It needs memory for the two lists; sorting in place does not.
* A random pivot makes the bad case unlikely.
"""


def recorder(width: int) -> Console:
    """A console that remembers what it was given, and shows it to nobody."""
    return Console(
        record=True, file=io.StringIO(), width=width, height=40, force_terminal=True, color_system="truecolor",
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip


def ask() -> Console:
    """An answer at its end."""
    out = recorder(96)
    out.print(Text(f"$ {QUESTION}\n", style="bold"))
    terminal, state = Terminal(ID, out), Snapshot()
    words = re.findall(r"\S+\s*|\s+", ANSWER)
    events: list[Event] = [Queued("fast", T), Started(1, "openai_compatible"), ReasoningDelta(REASONING, at=T + 210)]
    ending = Completed("stop", Usage(21, 187, 208), at=T + 3_660)
    for n, event in enumerate([*events, *map(TextDelta, words), ending]):
        entry = Entry(b"0-1" if n == 0 else b"%d-%d" % (T, n - 1), encode(event))
        state.add(entry)
        terminal.hear(entry, event, state)
    terminal.end(state)
    return out


def top() -> Console:
    out = recorder(132)
    out.print(Text("$ rejoin top\n", style="bold"))
    rows = [("9f3b0c6e5d2a48e7b1c4d7f0a3e65182", "fast", 1, 12.4, 612, 54.2, 2), (
        "1c7a5e90b44f4d0e9a2f6b8d3c5e7f01", "gpt-5", 1, 71.0, 1840, 31.5, 1), (
        "b2e4f6a8c0d14e3f95a7b9c1d3e5f708", "fast", 2, 6.1, 219, 49.8, 0)]  # fmt: skip
    workers = ["web1:4121", "web2:3977", "web1:4121"]
    running = [
        Generation(i, "in_progress", m, a, w, s, n, r, k)
        for (i, m, a, s, n, r, k), w in zip(rows, workers, strict=True)
    ]
    waiting = Generation("e0d1c2b3a4958677685a4b3c2d1e0f94", "queued", "gpt-5", 0, "", 0.4, 0, 0.0, 1)
    store = Store("10.0.0.5:6379", "Valkey 9.1.2", 48_300_000, 2**32, "noeviction", 3120, 61)
    signs = [Worker("web1:4121", 2, 2), Worker("web2:3977", 4, 1)]
    look = Look(T / 1000, 1, 4, 135.5, "https://chat.example.org", "ok", signs, [*running, waiting], [store])
    out.print(Harmless(drawn(look, rows=20)))
    return out


def draw(out: Console, name: str) -> None:
    """As PNG, without the fonts that rich's SVG would load from elsewhere."""
    svg = re.sub(r"@font-face \{.*?\}", "", out.export_svg(title="rejoin"), flags=re.DOTALL)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{name}.svg"
        source.write_text(svg)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
        flags += [f"--window-size={int(width)},{int(height)}", "--default-background-color=00000000"]
        picture = f"--screenshot={HERE / name}.png"
        subprocess.run(["chromium", *flags, picture, source.as_uri()], check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    draw(ask(), "terminal-ask")
    draw(top(), "terminal-top")
