"""The models this deployment answers with, as OpenAI lists them."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from api.dependencies import PartsOf, Tenant

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(parts: PartsOf, tenant: Tenant) -> JSONResponse:
    """Every model by name; with an OpenAI key or base URL other names are passed on too."""
    names = sorted(parts.models.routes, key=lambda name: (name != parts.models.default, name))
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "rejoin"} for name in names]
    return JSONResponse({"object": "list", "data": data})
