"""The gate: who may come in at all. Pure ASGI, since a wrapping middleware would hide the client's leaving.

Without API keys only this machine's own requests are served, whatever server or proxy stands in front.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

from api import auth
from api.error_handlers import problem
from shared.config import Settings
from shared.errors import Forbidden, RejoinError, Unauthorized

TENANT = "rejoin.tenant"
OPEN_PATHS = ("/", "/healthz", "/readyz", "/favicon.ico")
READABLE_BY_TOKEN = re.compile(r"/v1/generations/([0-9a-f]{32})/(?:events|text)")


class Gate:
    """Finds the tenant and leaves it in the scope, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._has_keys = bool(settings.tenants_by_key_hash)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        try:
            scope[TENANT] = self._tenant(scope)
        except RejoinError as error:
            return await problem(error, scope["path"])(scope, receive, send)
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        if not self._has_keys:
            return self._local(scope)
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith("/playground/") or scope.get("method") == "OPTIONS":
            return ""
        headers = dict(scope["headers"])
        key = auth.bearer(headers.get(b"authorization", b"").decode("latin-1"))
        tenant = auth.tenant_of_key(self._settings, key) if key else self._by_token(scope)
        if tenant is None:
            raise Unauthorized(
                "send your API key as `Authorization: Bearer …`, or use an events_url that is still valid"
            )
        return tenant

    def _local(self, scope: Scope) -> str:
        client = scope.get("client")
        reason = auth.foreign_to_loopback(
            client[0] if client else None, scope["headers"], self._settings.allowed_origins
        )
        if reason is not None:
            raise Forbidden(
                f"without REJOIN_API_KEYS only this machine is served, and this request is refused: {reason}",
                code="loopback_only",
            )
        return auth.LOCAL_TENANT

    def _by_token(self, scope: Scope) -> str | None:
        found = READABLE_BY_TOKEN.fullmatch(scope["path"])
        tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if found is None or not tokens or scope.get("method") != "GET":
            return None
        return auth.tenant_of_token(self._settings, tokens[0], found[1])
