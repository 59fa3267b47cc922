"""Is this process alive, and should it be sent requests?"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import JSONResponse

from api.dependencies import PartsOf
from shared.redis import AWAY

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def alive() -> JSONResponse:
    """200 while the event loop turns."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def ready(parts: PartsOf) -> JSONResponse:
    """200 while Redis answers and the server is not going down; 503 otherwise."""
    if parts.drain.begun:
        return JSONResponse({"status": "draining"}, 503)
    try:
        async with asyncio.timeout(2):
            await parts.event_log.is_reachable()
    except (*AWAY, TimeoutError):
        return JSONResponse({"status": "redis_away"}, 503)
    return JSONResponse({"status": "ok"})
