"""Settings: frozen, from the environment or `.env`, read once, passed by argument from there on.

The one place that knows the environment. Every field has its unit in its name and its reason in `.env.example`.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import SettingsError, Unprocessable

MAX_GENERATION_BYTES = 8 * 1024 * 1024  # one attempt's events: kept in the worker's memory until its end is durable
REDIS_URL = r"^(redis|rediss|unix|rediss?\+(sentinel|cluster))://"
QUEUE_URL = r"^(redis|rediss|unix|rediss?\+sentinel)://"
MAX_EVENT_TEXT_CHARS = 4096  # longer deltas are split: at most 16 KiB of UTF-8 in one event
DOCUMENTS = "documents"  # the name of the model over the folder of REJOIN_DOCUMENTS, and of its provider


class Settings(BaseSettings):
    """All of Rejoin's settings. `load()` turns what is wrong with them into one line."""

    model_config = SettingsConfigDict(
        env_prefix="REJOIN_",
        env_file=".env",
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # Where things are
    redis_url: str = Field("redis://127.0.0.1:6379/0", validation_alias="REDIS_URL", pattern=REDIS_URL)
    queue_url: str | None = Field(None, pattern=QUEUE_URL)
    key_prefix: str = Field("rejoin", pattern=r"^[A-Za-z0-9_.:-]{1,64}$")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)

    # Who asks: the commands in the terminal
    url: str = "http://127.0.0.1:8000"
    api_key: SecretStr | None = None

    # Models
    openai_api_key: SecretStr | None = Field(None, validation_alias="OPENAI_API_KEY")
    openai_base_url: str | None = Field(None, validation_alias="OPENAI_BASE_URL")
    models: Path | None = None
    default_model: str | None = None
    demo_words_per_second: float = Field(20.0, gt=0, le=100_000)
    first_token_seconds: float = Field(60.0, gt=0)
    inter_token_seconds: float = Field(30.0, gt=0)
    upstream_retry_seconds: float = Field(30.0, ge=0)

    # Documents
    documents: Path | None = None
    documents_model: str | None = None
    documents_embedding: str | None = None
    documents_retrieval: Literal["bm25", "vectors", "fused"] | None = None
    documents_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    documents_index: Path = Path(".rejoin/documents")

    # Who may ask
    api_keys: str = ""
    secret: SecretStr | None = None
    cors_origins: str = ""

    # The log protocol
    lease_seconds: float = Field(3.0, ge=0.2, le=300)
    claim_grace_seconds: float = Field(10.0, gt=0, le=600)
    wait_replicas: int = Field(0, ge=0, le=100)
    wait_milliseconds: int = Field(1000, ge=1, le=60_000)
    max_attempts: int = Field(3, ge=1, le=100)
    max_generation_seconds: float = Field(3600, gt=0)
    max_queue_seconds: float = Field(3600, gt=0)
    disconnect_grace_seconds: float = Field(10.0, ge=0.5)
    log_retention_seconds: int = Field(86_400, ge=1)
    order_retention_seconds: int = Field(604_800, ge=1)

    # The worker
    drain_seconds: int = Field(30, ge=0)
    worker_concurrency: int = Field(500, ge=1, le=100_000)
    poll_seconds: float = Field(0.5, gt=0, le=60)

    # The api
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    max_queued: int = Field(10_000, ge=1)
    max_streams: int = Field(20_000, ge=1)
    ping_seconds: float = Field(15.0, gt=0)
    send_timeout_seconds: float = Field(20.0, gt=0)
    retry_milliseconds: int = Field(1000, ge=10)

    # What is told
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"

    @field_validator(
        *("openai_api_key", "secret", "queue_url", "openai_base_url", "models", "default_model", "api_key"),
        *("documents", "documents_model", "documents_embedding", "documents_retrieval", "documents_url"),
        mode="before",
    )
    @classmethod
    def _empty_means_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("api_keys")
    @classmethod
    def _api_keys_parse(cls, value: str) -> str:
        for pair in filter(None, (part.strip() for part in value.split(","))):
            tenant, _, digest = pair.partition(":")
            if not tenant or len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest.lower()):
                raise ValueError("expected tenant:sha256-of-the-key pairs, separated by commas")
        return value

    @model_validator(mode="after")
    def _orders_outlive_logs(self) -> Settings:
        if self.order_retention_seconds < self.log_retention_seconds:
            raise ValueError("REJOIN_ORDER_RETENTION_SECONDS must not be less than REJOIN_LOG_RETENTION_SECONDS")
        return self

    @model_validator(mode="after")
    def _a_cluster_needs_another_queue(self) -> Settings:
        if "+cluster:" in self.redis_url and self.queue_url is None:
            raise ValueError("REJOIN_QUEUE_URL: the queue cannot live on a Redis Cluster; name a server that is none")
        return self

    @model_validator(mode="after")
    def _vectors_need_an_embedding(self) -> Settings:
        if self.documents_retrieval in ("vectors", "fused") and self.documents_embedding is None:
            raise ValueError("REJOIN_DOCUMENTS_RETRIEVAL: name a model in REJOIN_DOCUMENTS_EMBEDDING, or take bm25")
        return self

    @property
    def tenants_by_key_hash(self) -> dict[str, str]:
        """SHA-256 (hex) of an API key -> tenant."""
        pairs = (part.strip().partition(":") for part in self.api_keys.split(",") if part.strip())
        return {digest.lower(): tenant for tenant, _, digest in pairs}

    @property
    def secret_bytes(self) -> bytes:
        """The HMAC key of ids and stream tokens. Without API keys there is one tenant on loopback: a fixed word does.

        Raises SettingsError where there are keys and no secret."""
        if self.secret is not None:
            return self.secret.get_secret_value().encode()
        if self.tenants_by_key_hash:
            raise SettingsError("REJOIN_SECRET: required once REJOIN_API_KEYS is set; it signs the stream tokens")
        return b"rejoin-local"

    @property
    def allowed_origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


def load(**overrides: Any) -> Settings:
    """Read the settings from the environment and `.env`.

    Raises SettingsError with one line that names the first wrong setting."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{setting_name(name)}: {message}" if name else message) from None


def setting_name(field_name: str) -> str:
    """The environment variable of a field: `lease_seconds` -> `REJOIN_LEASE_SECONDS`."""
    field = Settings.model_fields.get(field_name)
    alias = field.validation_alias if field else None
    return alias if isinstance(alias, str) else field_name if field is None else f"REJOIN_{field_name.upper()}"


class ModelRoute(BaseModel):
    """Where the prompts for one model name go. Times in seconds; `concurrency` is per worker process.

    `upstream_model` is the name the upstream knows; `*` passes the caller's own on. `continuation`: how this upstream
    is asked to go on with an answer that a lost worker began; `repeats_prefix`: it then says the beginning again.
    Of the provider `documents`, `upstream_model` is the model here that answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    provider: str = Field("openai_compatible", pattern=r"^[a-z][a-z0-9_]*$")
    upstream_model: str
    base_url: str | None = None
    api_key_env: str | None = None
    first_token_seconds: float = Field(60.0, gt=0)
    inter_token_seconds: float = Field(30.0, gt=0)
    retry_seconds: float = Field(30.0, ge=0)
    concurrency: int | None = Field(None, ge=1)
    continuation: Literal["none", "continue_final_message", "prefix"] = "none"
    repeats_prefix: bool = False


@dataclass(frozen=True, slots=True)
class ModelTable:
    """The models this deployment answers with."""

    routes: dict[str, ModelRoute]
    fallback: ModelRoute | None  # every other name goes there, under its own name
    default: str

    def resolve(self, name: str) -> ModelRoute:
        """The route of a model. Raises Unprocessable(`model_not_found`), which says what to set."""
        if route := self.routes.get(name):
            return route
        if name == DOCUMENTS:
            raise Unprocessable(
                f"model {DOCUMENTS!r} is not configured here: set REJOIN_DOCUMENTS to a folder of documents",
                code="model_not_found",
                param="model",
            )
        if self.fallback is None:
            raise Unprocessable(
                f"model {name[:80]!r} is not configured here: set OPENAI_API_KEY (or OPENAI_BASE_URL) or list it in "
                f"REJOIN_MODELS; available now: {', '.join(sorted(self.routes))}",
                code="model_not_found",
                param="model",
            )
        return self.fallback


def model_table(settings: Settings) -> ModelTable:
    """`demo` always; what the file of REJOIN_MODELS names; with an OpenAI key or base URL, every other name; with
    REJOIN_DOCUMENTS, `documents`.

    Raises SettingsError where the file is missing or wrong."""
    times: dict[str, Any] = {
        "first_token_seconds": settings.first_token_seconds,
        "inter_token_seconds": settings.inter_token_seconds,
        "retry_seconds": settings.upstream_retry_seconds,
    }
    routes = {"demo": ModelRoute(name="demo", provider="demo", upstream_model="demo")}
    fallback = None
    if settings.models is not None:
        routes |= _read_models(settings.models, times)
    elif settings.openai_api_key or settings.openai_base_url:
        fallback = ModelRoute(
            name="*", upstream_model="*", base_url=settings.openai_base_url, api_key_env="OPENAI_API_KEY", **times
        )
    if settings.documents is not None:
        routes[DOCUMENTS] = _documents(settings, routes, fallback)
    default = settings.default_model or "demo"
    table = ModelTable(routes, fallback, default)
    if default not in routes and fallback is None:
        raise SettingsError(f"REJOIN_DEFAULT_MODEL: {default!r} is not among the models: {', '.join(sorted(routes))}")
    return table


def _documents(settings: Settings, routes: dict[str, ModelRoute], fallback: ModelRoute | None) -> ModelRoute:
    """The route of `documents`. Raises SettingsError where the folder or the models it needs are not there."""
    if settings.documents is not None and not settings.documents.is_dir():
        raise SettingsError(f"REJOIN_DOCUMENTS: {settings.documents} is not a folder")
    if DOCUMENTS in routes:
        raise SettingsError(f"REJOIN_MODELS: [{DOCUMENTS}] is the model over REJOIN_DOCUMENTS; choose another name")
    default = settings.default_model if settings.default_model != DOCUMENTS else None
    answering = settings.documents_model or default or "demo"
    needed = {"REJOIN_DOCUMENTS_MODEL": answering, "REJOIN_DOCUMENTS_EMBEDDING": settings.documents_embedding}
    for setting, name in needed.items():
        if name is not None and (name == DOCUMENTS or (name not in routes and fallback is None)):
            raise SettingsError(f"{setting}: {name!r} is not among the models: {', '.join(sorted(routes))}")
    found = routes.get(answering) or fallback
    concurrency = found.concurrency if found else None
    return ModelRoute(name=DOCUMENTS, provider=DOCUMENTS, upstream_model=answering, concurrency=concurrency)


def _read_models(path: Path, times: dict[str, Any]) -> dict[str, ModelRoute]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"REJOIN_MODELS: cannot read {path}: {error}") from None
    routes = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"REJOIN_MODELS: {name}: write a table, [{name}], for each model")
        try:
            routes[name] = ModelRoute(**{**times, "upstream_model": name, **table, "name": name})
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"REJOIN_MODELS: [{name}] {first['loc'][0]}: {first['msg']}") from None
    return routes


def upstream_key(settings: Settings, route: ModelRoute) -> str | None:
    """The key for this route's upstream, read when the provider is built; None when the variable is unset."""
    if route.api_key_env in (None, "OPENAI_API_KEY"):
        return settings.openai_api_key.get_secret_value() if settings.openai_api_key else None
    return os.environ.get(route.api_key_env or "")
