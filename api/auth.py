"""Who is asking: API keys, stream tokens, and the loopback rule for a deployment without keys. Pure functions.

Keys are known by their SHA-256 only. A stream token reads one generation of one tenant until it expires.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import time
from urllib.parse import urlsplit

from shared.config import Settings

LOCAL_TENANT = "local"
FORWARDING_HEADERS = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via")


def tenant_of_key(settings: Settings, key: str) -> str | None:
    """The tenant an API key belongs to. Every known hash is compared, each in constant time."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    found = None
    for known, tenant in settings.tenants_by_key_hash.items():
        if hmac.compare_digest(digest, known):
            found = tenant
    return found


def bearer(authorization: str) -> str | None:
    """The key of an `Authorization: Bearer …` header (RFC 6750)."""
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def idempotent_id(settings: Settings, tenant: str, idempotency_key: str) -> str:
    """The generation id an Idempotency-Key stands for: the same key of the same tenant is the same id."""
    words = b"generation\0" + tenant.encode() + b"\0" + idempotency_key.encode()
    return hmac.new(settings.secret_bytes, words, hashlib.sha256).hexdigest()[:32]


def stream_token(settings: Settings, tenant: str, generation_id: str, expires_at: int) -> str:
    """The right to read one generation until `expires_at` (Unix seconds), for clients that cannot send headers."""
    claims = f"{expires_at}.{tenant}".encode()
    return _base64(claims) + "." + _signature(settings, generation_id, claims)


def tenant_of_token(settings: Settings, token: str, generation_id: str) -> str | None:
    """The tenant a token speaks for; None when it is forged, expired, or of another generation.

    The whole token is compared, since base64 reads many spellings of the same claims."""
    encoded = token.partition(".")[0]
    try:
        claims = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        expires_at, _, tenant = claims.decode().partition(".")
        genuine = stream_token(settings, tenant, generation_id, int(expires_at))
        is_genuine = hmac.compare_digest(token.encode("utf-8", "replace"), genuine.encode())
        return tenant if is_genuine and int(expires_at) >= time.time() else None
    except ValueError:
        return None


def foreign_to_loopback(
    client_host: str | None, headers: list[tuple[bytes, bytes]], allowed_origins: list[str]
) -> str | None:
    """Why a request is not this machine's own, in words; None when it is.

    Without API keys this is all that keeps a website in the developer's browser, or a proxy, from reading along."""
    if client_host is None or not is_loopback(client_host):
        return "it does not come from this machine"
    names = dict(headers)
    if any(name in names for name in FORWARDING_HEADERS):
        return "it was forwarded by a proxy"
    if not is_loopback(_host_of("//" + names.get(b"host", b"").decode("latin-1"))):
        return "its Host is not this machine"
    origin = names.get(b"origin", b"").decode("latin-1")
    if origin and origin not in allowed_origins and not is_loopback(_host_of(origin)):
        return "it comes from a page of another site"
    return None


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host_of(url: str) -> str:
    """The host a URL names; empty when it names none, or is no URL at all."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "" if parts.port != 0 else ""  # `port` raises for one that is none
    except ValueError:
        return ""


def _signature(settings: Settings, generation_id: str, claims: bytes) -> str:
    words = b"stream\0" + generation_id.encode() + b"\0" + claims
    return _base64(hmac.new(settings.secret_bytes, words, hashlib.sha256).digest())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
