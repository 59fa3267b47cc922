"""The documentation is complete, leads somewhere and works: read from the code, held against the pages."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

import api.routes
from api.error_handlers import STATUS
from shared import errors, metrics
from shared.config import Settings, setting_name
from shared.events import EVENTS
from shared.redis import Keys
from tests.conftest import RejoinUp
from tests.processes import ROOT
from tests.reader import Reader
from worker.providers.upstream_http import FAILURES

OWN_CODE = ("api", "worker", "shared", "cli")
PAGES = sorted(
    page.relative_to(ROOT)
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md"))
    if not {".venv", "node_modules"} & set(page.parts)
)
COMPOSE_ALONE = {"PUBLISH"}
SAMPLE = {"{p}": "{a}", "<id>": "0" * 31 + "a", "<n>": "1", "<tenant>": "local"}


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text()


def section(page: str, heading: str) -> str:
    """The text under a heading of level two or three, up to the next one of that level or above."""
    found = re.search(rf"(?ms)^(##+) {re.escape(heading)}\n(.*?)(?=^##? |^\1 |\Z)", text_of(page))
    assert found is not None, f"{page} has no section {heading!r}"
    return found[2]


def rows(markdown: str) -> Iterator[list[str]]:
    """The cells of each table row, heads and rules left out."""
    for line in re.findall(r"(?m)^\|(.+)\|$", markdown):
        cells = [cell.strip() for cell in line.split("|")]
        if "`" in cells[0]:
            yield cells


def quoted(markdown: str) -> list[str]:
    """What stands in backticks, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", markdown))


def fenced(markdown: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", markdown)


# ---- Settings ----


def test_every_setting_is_documented() -> None:
    """`.env.example` has each field of Settings, under the name of its variable."""
    shown = set(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]*)=", text_of(".env.example")))
    assert shown == {setting_name(field) for field in Settings.model_fields} | COMPOSE_ALONE


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_setting_a_page_names_exists(page: Path) -> None:
    """A page speaks of no setting that was renamed or removed."""
    named = set(re.findall(r"\bREJOIN_[A-Z_]+\b", text_of(page)))
    assert named <= {setting_name(field) for field in Settings.model_fields}


# ---- The HTTP API ----


def routes() -> set[str]:
    """`METHOD /path` of everything that a file in api/routes serves."""
    found = set()
    for module in pkgutil.iter_modules(api.routes.__path__):
        for route in importlib.import_module(f"api.routes.{module.name}").router.routes:
            found |= {f"{method} {route.path_format}" for method in getattr(route, "methods", set()) - {"HEAD"}}
    return found


def routes_in(markdown: str) -> set[str]:
    return {found for cells in rows(markdown) for found in re.findall(r"`((?:GET|POST|DELETE|PUT) /[^`]*)`", cells[0])}


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    """The first table of docs/api.md is the list of routes; the README has those that are not the page's own."""
    introduction = text_of("docs/api.md").split("\n## ")[0]
    assert routes_in(introduction) == routes()
    page = {"GET /", "GET /playground/{name}", "GET /favicon.ico"}
    assert routes_in(section("README.md", "Routes")) == routes() - page


def test_every_event_and_field_is_documented() -> None:
    """The table of events has each event with exactly its fields."""
    documented = {quoted(cells[0])[0]: quoted(cells[1]) for cells in rows(section("docs/api.md", "Events"))}
    assert documented == {event.type: [field.name for field in dataclasses.fields(event)] for event in EVENTS}


def codes_in_source() -> set[str]:
    """Every code that the source can raise or write: keywords `code=`, class attributes, events, tables, Lua."""
    found = set(FAILURES)
    for path in (path for package in OWN_CODE for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                    found.add(code)
                case ast.Call(func=ast.Name(id="Failed"), args=[ast.Constant(value=str(code)), *_]):
                    found.add(code)
                case ast.Call(func=ast.Name(id="_response"), args=[ast.Constant(), ast.Constant(value=str(code)), *_]):
                    found.add(code)
                case ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code))):
                    found.add(code)
    for path in (ROOT / "shared/lua").glob("*.lua"):
        found |= set(re.findall(r"failure\('(\w+)'", path.read_text()))
    return found


def test_every_error_code_is_documented_and_every_documented_code_exists() -> None:
    """The section on errors names each code, and its tables name no other."""
    errors_section = section("docs/api.md", "Errors")
    source = codes_in_source()
    assert {"loopback_only", "store_full", "queue_timeout", "log_lost", "internal_error"} <= source
    assert source - set(quoted(errors_section)) == set()
    of_http = {status.phrase.lower().replace(" ", "_") for status in HTTPStatus}
    assert {quoted(cells[0])[0] for cells in rows(errors_section)} - source - of_http == set()


def test_every_error_code_has_its_true_status() -> None:
    """A class's own code stands in the table with the status its answers have."""
    documented = {
        quoted(cells[0])[0]: cells[1]
        for cells in rows(section("docs/api.md", "Errors").split("### ")[0])
        if cells[1][:1].isdigit()
    }
    for cls, status in STATUS.items():
        if cls.code in documented and issubclass(cls, errors.CallerError | errors.OurError):
            assert documented[cls.code] == str(status), cls.code


def test_every_upstream_failure_says_truly_whether_to_try_again() -> None:
    """The table's `retryable` is the one that the event carries."""
    table = section("docs/api.md", "Codes of `generation.failed`")
    documented = {quoted(cells[0])[0]: cells[1] for cells in rows(table)}
    assert {
        code: "yes" if retryable else "no" for code, (_, retryable) in FAILURES.items()
    }.items() <= documented.items()


# ---- The log protocol ----


def test_the_key_table_is_the_one_in_the_code() -> None:
    """Each kind of key is in docs/protocol.md with its type, and with a time to live where it has one."""
    kinds = list(Keys("rejoin").kinds())
    documented = list(rows(section("docs/protocol.md", "Keys")))
    assert len(documented) == len(kinds)
    for key, redis_type, lives, _ in documented:
        name = re.sub(r"\{p\}|<\w+>", lambda found: SAMPLE[found[0]], key.strip("`"))
        (kind,) = (kind for kind in kinds if re.fullmatch(kind.pattern, name))
        assert redis_type == kind.redis_type, key
        assert lives.startswith("none") == (kind.lives is None), key
        kinds.remove(kind)


def test_every_script_is_described() -> None:
    """The table of scripts has one row for each script there is."""
    files = {path.stem for path in (ROOT / "shared/lua").glob("*.lua")} - {"prelude"}
    assert {quoted(cells[0])[0] for cells in rows(section("docs/protocol.md", "The scripts"))} == files


# ---- The faults ----

FAULTS = 28


def test_every_fault_has_its_row_and_every_row_its_tests() -> None:
    """docs/faults.md goes from F1 to the last one, and each row names tests that exist."""
    lines = re.findall(r"(?m)^\| (F\d+) \|.*\|(.*)\|$", text_of("docs/faults.md"))
    found = {fault: re.findall(r"`(tests/[^`]*)`", shown_by) for fault, shown_by in lines}
    assert list(found) == [f"F{n}" for n in range(1, FAULTS + 1)]
    for fault, tests in found.items():
        assert tests, f"{fault} names no test"
        for path, _, name in (test.partition("::") for test in tests):
            assert re.search(rf"(?m)^(async )?def {name}\(", text_of(path)), f"{fault}: no {name} in {path}"


# ---- Metrics ----


def test_the_table_of_metrics_is_the_code() -> None:
    """Each metric is in docs/metrics.md with its type, its label and all values of that, and no other metric is."""
    documented = {
        quoted(cells[0])[0]: (cells[1], quoted(cells[2])) for cells in rows(section("docs/metrics.md", "The table"))
    }
    told = {}
    for family in metrics.REGISTRY.collect():
        if family.name.startswith("rejoin_"):
            labels = [label for one in family.samples for label in one.labels.items() if label[0] != "le"]
            names = list(dict.fromkeys(name for name, _ in labels))
            values = list(dict.fromkeys(value for _, value in labels))
            told[family.name + "_total" * (family.type == "counter")] = (family.type, names + values)
    assert documented == told


def test_every_metric_that_is_asked_for_exists() -> None:
    """The queries of docs/metrics.md name what a scrape has, or a metric as a whole."""
    families = list(metrics.REGISTRY.collect())
    known = {family.name for family in families} | {sample.name for family in families for sample in family.samples}
    assert set(re.findall(r"\brejoin_[a-z_]+\b", text_of("docs/metrics.md"))) <= known


# ---- The house ----


def test_the_floors_are_the_ones_that_are_checked() -> None:
    """ARCHITECTURE.md shows the layers that import-linter is told of."""
    (diagram,) = fenced(section("ARCHITECTURE.md", "Floors"), "")
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in re.sub(r"\n +", " ", diagram).splitlines()}
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    checked = {one["containers"][0]: " > ".join(one["layers"]) for one in contracts if "containers" in one}
    assert shown == checked


def test_every_file_has_its_line() -> None:
    """The table of who does what names each file of the source, by itself or with its folder."""
    table = section("ARCHITECTURE.md", "Who does what")
    named = {name for cells in rows(table) for name in quoted(cells[0])}
    for package in OWN_CODE:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if path.name not in ("__init__.py", "__main__.py"):
                assert any(name == one or (one.endswith("/") and name.startswith(one)) for one in named), name
    for name in named:
        assert (ROOT / name).exists(), name


# ---- Links and commands ----


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file that is there, and an anchor that the file has."""
    prose = re.sub(r"(?ms)^```.*?^```", "", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(found) for found in re.findall(r"(?m)^#+ (.+)$", file.read_text())}, target


def test_every_page_is_in_the_list_of_pages() -> None:
    """docs/README.md links each page of the folder; the README leads to those that a newcomer wants first."""
    listed = set(re.findall(r"\]\(([a-z-]+\.md)\)", text_of("docs/README.md")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} == listed
    for name in ("from-a-streaming-route", "documents", "terminal", "playground"):
        assert f"](docs/{name}.md)" in text_of("README.md"), name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page: Path) -> None:
    """Each `make …` that a page tells its reader to run is in the Makefile."""
    text = text_of(page)
    code = "\n".join([*quoted(text), *fenced(text, "(?:sh|console)")])
    targets = set(re.findall(r"\bmake ([a-z0-9-]+)", code))
    assert targets <= set(re.findall(r"(?m)^([a-z0-9-]+):.*## ", text_of("Makefile")))


def test_every_decision_is_in_the_index() -> None:
    """docs/decisions/README.md lists each decision, and each has its three parts."""
    decisions = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", text_of("docs/decisions/README.md")) == [
        d.name for d in decisions
    ]
    for decision in decisions:
        assert re.findall(r"(?m)^## (.+)$", decision.read_text()) == ["Context", "Decision", "Consequences"]


def test_pre_commit_calls_make() -> None:
    """The hooks are local and run targets that exist: nothing is checked otherwise than by `make check`."""
    config = text_of(".pre-commit-config.yaml")
    assert re.findall(r"repo: (.+)", config) == ["local"]
    assert re.findall(r"entry: (.+)", config) == ["make lint", "make types", "make floors"]


# ---- The README's demo ----


def test_make_up_runs_rejoin_up() -> None:
    """The README's first command starts what the demo is tested on."""
    assert any("make up" in block for block in fenced(section("README.md", "Try it"), "console"))
    done = subprocess.run(["make", "-n", "up"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert re.search(r"python -m cli up\s*$", done.stdout, re.MULTILINE)


async def test_the_demo_runs_and_the_resumed_stream_continues_exactly(rejoin_up: RejoinUp, tmp_path: Path) -> None:
    """The commands of the README, as they stand: what came before the cut and after it is the uninterrupted stream."""
    if shutil.which("curl") is None:
        pytest.skip("no curl: apt-get install curl")
    script = "\n".join(fenced(section("README.md", "Try it"), "sh"))
    for shown, tested in (("http://127.0.0.1:8000", rejoin_up.url), ("--max-time 3", "--max-time 1")):
        assert script.count(shown) == 1
        script = script.replace(shown, tested)
    done = subprocess.run(
        ["sh", "-u"],
        input=script,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    generation_id = done.stdout.split()[0]
    assert re.fullmatch(r"[0-9a-f]{32}", generation_id)

    full = await Reader(f"{rejoin_up.url}/v1/generations/{generation_id}/events").read_to_end()
    first, rest = (blocks((tmp_path / name).read_bytes()) for name in ("first.txt", "rest.txt"))
    assert 1 < len(first) < len(full.blocks), "the cut was not in the middle"
    assert b"".join(first + rest) == full.raw
    assert done.stdout.endswith(full.text)


def blocks(stream: bytes) -> list[bytes]:
    """The events that came whole, each with its blank line."""
    whole = stream[: stream.rindex(b"\n\n") + 2]
    return [block for block in re.split(rb"(?<=\n\n)", whole) if b"data: " in block]
