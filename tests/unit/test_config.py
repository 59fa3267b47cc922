"""Settings: what is wrong is said in one line that names the variable; which models there are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import Settings, load, model_table, setting_name, upstream_key
from shared.errors import SettingsError, Unprocessable

DIGEST = hashlib.sha256(b"a key").hexdigest()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the test's own: none in the environment, no `.env` in the working directory."""
    for name in os.environ:
        if name.startswith(("REJOIN_", "OPENAI_", "REDIS_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_nothing_needs_to_be_set() -> None:
    """Without any setting there is a demo model on loopback."""
    settings = load()
    assert settings.host == "127.0.0.1"
    assert settings.tenants_by_key_hash == {}
    assert model_table(settings).default == "demo"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours begin with REJOIN_; those everybody knows have the names everybody knows."""
    monkeypatch.setenv("REJOIN_LEASE_SECONDS", "1.5")
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:1/2")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    settings = load()
    assert (settings.lease_seconds, settings.redis_url) == (1.5, "redis://elsewhere:1/2")
    assert settings.openai_api_key is not None and settings.openai_api_key.get_secret_value() == "sk-1"


def test_settings_come_from_a_file_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`.env` in the working directory is read too."""
    (tmp_path / ".env").write_text("REJOIN_PORT=1234\nREJOIN_MAX_ATTEMPTS=7\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("REJOIN_PORT", "4321")
    settings = load()
    assert (settings.port, settings.max_attempts) == (4321, 7)


UNSET = [
    "openai_api_key",
    "secret",
    "queue_url",
    "openai_base_url",
    "models",
    "default_model",
    "api_key",
    "documents",
    "documents_model",
    "documents_embedding",
    "documents_retrieval",
    "documents_url",
]


@pytest.mark.parametrize("field", UNSET)
def test_an_empty_setting_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """Compose files pass on what is not set as an empty word."""
    monkeypatch.setenv(setting_name(field), "")
    assert getattr(load(), field) is None


NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]


@pytest.mark.parametrize("field", [*NUMBERS, "log_format", "log_level"])
def test_a_wrong_setting_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """Whoever starts it reads which variable to change, not a stack of frames."""
    monkeypatch.setenv(setting_name(field), "nonsense")
    with pytest.raises(SettingsError) as caught:
        load()
    assert caught.value.message.startswith(f"{setting_name(field)}: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REJOIN_PORT", "65536"),
        ("REJOIN_LEASE_SECONDS", "0.1"),
        ("REJOIN_MAX_ATTEMPTS", "0"),
        ("REJOIN_KEY_PREFIX", "a{b}"),
        ("REJOIN_KEY_PREFIX", ""),
        ("REJOIN_LOG_RETENTION_SECONDS", "0"),
        ("REJOIN_API_KEYS", "tenant"),
        ("REJOIN_API_KEYS", f":{DIGEST}"),
        ("REJOIN_API_KEYS", "tenant:the-key-itself"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A deployment that cannot work does not start."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name}: "):
        load()


def test_a_wrong_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that names the variable does not quote its value."""
    monkeypatch.setenv("REJOIN_API_KEYS", "tenant:the-key-itself")
    with pytest.raises(SettingsError) as caught:
        load()
    assert "the-key-itself" not in str(caught.value)
    monkeypatch.delenv("REJOIN_API_KEYS")
    assert "sk-1" not in repr(load(openai_api_key="sk-1"))


def test_keys_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream tokens are signed; with tenants to keep apart, by nothing that is written in the source."""
    monkeypatch.setenv("REJOIN_API_KEYS", f"anna:{DIGEST}")
    with pytest.raises(SettingsError, match=r"^REJOIN_SECRET: required"):
        _ = load().secret_bytes
    monkeypatch.setenv("REJOIN_SECRET", "s3cret")
    assert load().secret_bytes == b"s3cret"


def test_keys_are_known_by_their_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tenants, several keys for one of them, any case, any space."""
    other = hashlib.sha256(b"another").hexdigest()
    monkeypatch.setenv("REJOIN_API_KEYS", f" anna:{DIGEST.upper()} ,bert:{other}, ")
    monkeypatch.setenv("REJOIN_SECRET", "s3cret")
    assert load().tenants_by_key_hash == {DIGEST: "anna", other: "bert"}


def test_an_order_outlives_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a reader of an expired log could not be told how it ended."""
    monkeypatch.setenv("REJOIN_ORDER_RETENTION_SECONDS", "10")
    with pytest.raises(SettingsError, match="REJOIN_ORDER_RETENTION_SECONDS must not be less"):
        load()


def test_settings_are_frozen() -> None:
    """They are read once."""
    with pytest.raises(ValidationError):
        load().port = 1


# --- models


def test_the_demo_model_is_always_there() -> None:
    """And says what to set when another is asked for."""
    table = model_table(load())
    assert table.resolve("demo").provider == "demo"
    with pytest.raises(Unprocessable, match="OPENAI_API_KEY") as caught:
        table.resolve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("override", [{"openai_api_key": "sk-1"}, {"openai_base_url": "http://127.0.0.1:9/v1"}])
def test_with_a_key_or_a_base_url_every_name_goes_upstream(override: dict[str, str]) -> None:
    """The upstream knows its models better than we do."""
    settings = load(**override, first_token_seconds=5, inter_token_seconds=6, upstream_retry_seconds=7)
    route = model_table(settings).resolve("gpt-9")
    assert route.provider == "openai_compatible"
    assert route.base_url == settings.openai_base_url
    assert (route.first_token_seconds, route.inter_token_seconds, route.retry_seconds) == (5, 6, 7)
    assert model_table(settings).resolve("demo").provider == "demo"


def test_a_file_names_the_models(tmp_path: Path) -> None:
    """Then only those are served, and what is not said has the settings' values."""
    path = tmp_path / "models.toml"
    path.write_text(
        """
        [fast]
        upstream_model = "llama-3-8b"
        base_url = "http://127.0.0.1:9/v1"
        api_key_env = "FAST_KEY"
        concurrency = 4

        ["gpt-9"]
        first_token_seconds = 90
        """
    )
    settings = load(models=path, openai_api_key="sk-1", default_model="fast", inter_token_seconds=6)
    table = model_table(settings)
    fast, gpt = table.resolve("fast"), table.resolve("gpt-9")
    assert (fast.upstream_model, fast.concurrency, fast.inter_token_seconds) == ("llama-3-8b", 4, 6)
    assert (gpt.upstream_model, gpt.first_token_seconds) == ("gpt-9", 90)
    assert table.default == "fast"
    with pytest.raises(Unprocessable, match="demo, fast, gpt-9"):
        table.resolve("other")


def test_an_upstream_gets_its_own_key_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key never goes to another's host."""
    path = tmp_path / "models.toml"
    path.write_text('[fast]\napi_key_env = "FAST_KEY"\n[plain]\n')
    settings = load(models=path, openai_api_key="sk-1")
    table = model_table(settings)
    assert upstream_key(settings, table.resolve("fast")) is None
    monkeypatch.setenv("FAST_KEY", "sk-2")
    assert upstream_key(settings, table.resolve("fast")) == "sk-2"
    assert upstream_key(settings, table.resolve("plain")) == "sk-1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read"),
        ("[fast\n", "cannot read"),
        ("[fast]\ncolour = 'red'\n", r"\[fast\].*colour"),
        ("fast = 1\n", r"\[fast\]"),
    ],
)
def test_a_wrong_models_file_is_named_in_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    """Missing, no TOML, or a word nobody knows."""
    path = tmp_path / "models.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=f"^REJOIN_MODELS: .*{says}") as caught:
        model_table(load(models=path))
    assert "\n" not in caught.value.message


def test_the_default_model_must_be_there() -> None:
    """A typo is found at the start, not at the first question."""
    with pytest.raises(SettingsError, match=r"^REJOIN_DEFAULT_MODEL: 'fast'"):
        model_table(load(default_model="fast"))
    assert model_table(load(default_model="gpt-9", openai_api_key="sk-1")).default == "gpt-9"
