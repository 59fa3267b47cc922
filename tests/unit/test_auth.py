"""Who is asking: keys by their hashes, tokens for one generation, and what this machine's own requests look like."""

from __future__ import annotations

import hashlib
import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api import auth
from shared.config import Settings
from shared.errors import SettingsError

ID, OTHER_ID = "0123456789abcdef" * 2, "f" * 32


def deployment(secret: str | None = "secret", **tenants: str) -> Settings:
    pairs = ",".join(f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in tenants.items())
    return Settings(_env_file=None, secret=secret, api_keys=pairs)


def in_a_minute() -> int:
    return int(time.time()) + 60


# --- keys


def test_a_key_is_its_tenants() -> None:
    """Each key is known by its hash; a tenant may have several, an unknown key has none."""
    both = deployment(alice="key-1", bob="key-2")
    assert auth.tenant_of_key(both, "key-1") == "alice"
    assert auth.tenant_of_key(both, "key-2") == "bob"
    for wrong in ("", "key-3", "key-1 ", "KEY-1", hashlib.sha256(b"key-1").hexdigest(), "caf\xe9", "\ud800"):
        assert auth.tenant_of_key(both, wrong) is None


def test_a_tenant_may_have_two_keys_while_one_is_replaced() -> None:
    """So that a key can be changed without an outage."""
    pairs = ",".join(f"alice:{hashlib.sha256(key).hexdigest().upper()}" for key in (b"old", b"new"))
    both = Settings(_env_file=None, secret="s", api_keys=pairs)
    assert auth.tenant_of_key(both, "old") == auth.tenant_of_key(both, "new") == "alice"


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER  abc ", "abc"),
        ("Bearer a b", "a b"),
        ("", None),
        ("abc", None),
        ("Bearer", None),
        ("Bearer  ", None),
        ("Basic abc", None),
        ("Bearerabc", None),
    ],
)
def test_the_bearer_scheme(header: str, key: str | None) -> None:
    """The scheme's case does not count (RFC 9110), another scheme or none is no key."""
    assert auth.bearer(header) == key


# --- ids of idempotency keys


def test_an_idempotency_key_is_one_id_of_one_tenant() -> None:
    """The same key is the same id on every api, another tenant's or secret's is another, and it looks like any id."""
    first = auth.idempotent_id(deployment(), "alice", "key")
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert auth.idempotent_id(deployment(), "alice", "key") == first
    others = {
        auth.idempotent_id(deployment(), "bob", "key"),
        auth.idempotent_id(deployment(), "alice", "Key"),
        auth.idempotent_id(deployment("another"), "alice", "key"),
        auth.idempotent_id(deployment(), "alic", "ekey"),
    }
    assert len(others | {first}) == 5


def test_keys_without_a_secret_have_no_ids() -> None:
    """There is no default secret for a deployment that others can reach."""
    with pytest.raises(SettingsError, match="REJOIN_SECRET"):
        auth.idempotent_id(deployment(None, alice="key"), "alice", "key")


# --- tokens


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 10**6))
def test_a_token_speaks_for_its_tenant_until_it_expires(tenant: str, seconds: int) -> None:
    """Whatever the tenant is called, dots and colons included."""
    token = auth.stream_token(deployment(), tenant, ID, int(time.time()) + 60 + seconds)
    assert auth.tenant_of_token(deployment(), token, ID) == tenant
    assert re.fullmatch(r"[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]{43}", token)


@pytest.mark.parametrize(("seconds", "is_valid"), [(2, True), (-1, False), (-(10**9), False)])
def test_a_token_expires(seconds: int, is_valid: bool) -> None:
    """From its second on it is worth nothing."""
    token = auth.stream_token(deployment(), "alice", ID, int(time.time()) + seconds)
    assert (auth.tenant_of_token(deployment(), token, ID) == "alice") is is_valid


def test_a_token_is_of_one_generation_and_one_secret() -> None:
    """For any other generation, and to any other deployment, it is forged."""
    token = auth.stream_token(deployment(), "alice", ID, in_a_minute())
    assert auth.tenant_of_token(deployment(), token, OTHER_ID) is None
    assert auth.tenant_of_token(deployment("another"), token, ID) is None


def test_two_tokens_cannot_be_made_a_third() -> None:
    """Claims of one with the signature of another: none."""
    tokens = [
        auth.stream_token(deployment(), tenant, generation_id, in_a_minute() + more).split(".")
        for tenant in ("alice", "bob")
        for generation_id in (ID, OTHER_ID)
        for more in (0, 60)
    ]
    for claims, _ in tokens:
        for _, signature in tokens:
            found = auth.tenant_of_token(deployment(), f"{claims}.{signature}", ID)
            assert found is None or [claims, signature] in tokens


@settings(deadline=None)
@given(st.data())
def test_a_token_with_any_other_character_is_forged(data: st.DataObject) -> None:
    """Also where base64 would read the same bytes: a token has one spelling."""
    token = auth.stream_token(deployment(), "alice", ID, in_a_minute())
    at = data.draw(st.integers(0, len(token)))
    width = data.draw(st.integers(0, 2))
    touched = token[:at] + data.draw(st.text(max_size=3)) + token[at + width :]
    assume(touched != token)
    assert auth.tenant_of_token(deployment(), touched, ID) is None


@settings(deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"\A[A-Za-z0-9_=\-]*\.[A-Za-z0-9_=\-]*\Z")))
def test_what_is_no_token_is_nobody(text: str) -> None:
    """Any text at all: no tenant, and no exception."""
    assert auth.tenant_of_token(deployment(), text, ID) is None


# --- the loopback rule


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LocalHost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("128.0.0.1", False),
        ("127.1", False),
        ("2130706433", False),
        ("0x7f.0.0.1", False),
        ("0177.0.0.1", False),
        ("localhost.", False),
        ("localhost.evil.test", False),
        ("127.0.0.1.evil.test", False),
        ("ⓛocalhost", False),
    ],
)
def test_what_is_loopback(host: str, ours: bool) -> None:
    """Addresses of this machine in their plain spelling, and `localhost`; no name that merely resolves to it."""
    assert auth.is_loopback(host) is ours


def refusal(client: str | None = "127.0.0.1", allowed: tuple[str, ...] = (), **headers: str) -> str | None:
    """Headers by name with `_` for `-`; Host is `localhost:8000` unless told."""
    raw = {"host": "localhost:8000", **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in raw.items()]
    return auth.foreign_to_loopback(client, pairs, list(allowed))


@pytest.mark.parametrize("client", [None, "", "10.0.0.1", "testclient", "unix:"])
def test_only_this_machines_sockets(client: str | None) -> None:
    """An address that is not known to be loopback is foreign: a Unix socket has a proxy behind it."""
    assert refusal(client) == "it does not come from this machine"


@pytest.mark.parametrize("header", [name.decode() for name in auth.FORWARDING_HEADERS])
def test_nothing_that_was_forwarded(header: str) -> None:
    """A proxy on this machine makes every socket a loopback one: its headers give it away, empty ones too."""
    for value in ("127.0.0.1", "", "for=127.0.0.1"):
        assert refusal(**{header.replace("-", "_"): value}) == "it was forwarded by a proxy"


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost", True),
        ("localhost:1", True),
        ("127.0.0.1:8000", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("", False),
        ("evil.test", False),
        ("evil.test:8000", False),
        ("::1", False),
        ("[::1", False),
        ("[", False),
        ("a]b", False),
        ("localhost:port", False),
        ("localhost:99999", False),
        ("localhost@evil.test", False),
        ("evil.test/localhost", False),
        ("\xbd", False),
    ],
)
def test_the_host_names_this_machine(host: str, served: bool) -> None:
    """A name rebound to 127.0.0.1 arrives with its own Host; one that cannot be read is foreign."""
    assert (refusal(host=host) is None) is served


@pytest.mark.parametrize(
    ("origin", "served"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:5173", True),
        ("", True),
        ("null", False),
        ("https://evil.test", False),
        ("http://localhost.evil.test", False),
        ("http://localhost@evil.test", False),
        ("http://127.0.0.1:1.evil.test", False),
        ("http://[", False),
        ("file://", False),
        ("localhost", False),
        ("moz-extension://abc", False),
        ("https://app.example.org", True),
        ("https://app.example.org.evil.test", False),
    ],
)
def test_the_origin_is_a_page_of_this_machine(origin: str, served: bool) -> None:
    """A page of another site is refused, unless its origin is among the allowed ones, exactly."""
    assert (refusal(origin=origin, allowed=("https://app.example.org",)) is None) is served


def test_the_null_origin_cannot_be_allowed_by_accident() -> None:
    """`null` is what a sandboxed frame of any site sends."""
    assert refusal(origin="null", allowed=("https://app.example.org", "")) is not None


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255)), st.text(st.characters(max_codepoint=255)))
def test_no_header_breaks_the_rule(host: str, origin: str) -> None:
    """Any bytes at all are an answer, not an exception."""
    assert refusal(host=host, origin=origin) is None or isinstance(refusal(host=host, origin=origin), str)
