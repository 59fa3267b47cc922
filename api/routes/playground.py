"""The web page at `/` and its assets, under a strict Content-Security-Policy. Files, no build step."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from shared.errors import NotFound

router = APIRouter(include_in_schema=False)
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ASSETS = (
    *("app.js", "answer.js", "answers.js", "connection.js", "conversations.js", "hub.js", "live.js"),
    *("markdown.js", "markdown-it.js", "server.js", "sidebar.js", "strip.js", "theme.js", "turn.js"),
    *("style.css", "favicon.svg", "dialects.html", "dialects.js", "dialects.css"),
)


@router.get("/")
async def page() -> Response:
    return _file("index.html")


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    if name not in ASSETS:
        raise NotFound(f"the playground has no {name[:40]!r}")
    return _file(name)


@router.get("/favicon.ico")
async def icon() -> Response:
    return _file("favicon.svg")


def _file(name: str) -> Response:
    body = files("api.playground").joinpath(name).read_bytes()
    return Response(body, media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=HEADERS)
