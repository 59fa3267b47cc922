"""The files that deploy Rejoin say what the documentation and the settings say. Runs no container."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from shared.config import Settings, setting_name

ROOT = Path(__file__).parents[2]
COMPOSE_ALONE = {"PUBLISH"}  # read by docker-compose.yml, not by the processes
SETTING_LINE = re.compile(r"#?([A-Z][A-Z0-9_]*)=(.*)")

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: apt-get install nginx-light")


def render_nginx(folder: Path, *, port: int, api_port: int) -> list[str]:
    """Write deploy/nginx.conf for a plain process on loopback into `folder`; the command that runs it.

    Only lines marked `here` are changed. Logs: `access.log` and `error.log` in the folder."""
    changes = {
        "/tmp/": f"{folder}/",
        "/dev/stdout": f"{folder}/access.log",
        "/dev/stderr": f"{folder}/error.log",
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "api:8000;": f"127.0.0.1:{api_port};",
    }
    lines = (ROOT / "deploy/nginx.conf").read_text().splitlines()
    for number, line in enumerate(lines):
        if "# here" in line:
            for old, new in changes.items():
                line = line.replace(old, new)
            lines[number] = line
    conf = folder / "nginx.conf"
    conf.write_text("\n".join(lines) + "\n")
    # Started by root, nginx would give its workers to `nobody`, who may not enter the folder.
    user = " user root;" if os.geteuid() == 0 else ""
    return ["nginx", "-e", str(folder / "error.log"), "-c", str(conf), "-g", f"daemon off;{user}"]


def directives(conf: str) -> list[str]:
    """The directives of an nginx configuration, without comments, each with its white space folded."""
    code = re.sub(r"(?m)(^|\s)#.*$", "", conf)
    return [" ".join(part.split()) for part in re.split(r"[;{}](?=\s|$)", code) if part.strip()]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile as (name, rest), continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", dockerfile))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def settings_in_env_example() -> Iterator[tuple[str, str, str]]:
    """(name, value, the comment above it) of every setting in .env.example."""
    comment = ""
    for line in (ROOT / ".env.example").read_text().splitlines():
        if found := SETTING_LINE.fullmatch(line):
            yield found[1], found[2], comment
            comment = ""
        elif not line or line.startswith("# ----"):
            comment = ""
        else:
            assert line == "#" or line.startswith("# "), f"neither a setting nor a comment: {line}"
            comment += line.removeprefix("#") + "\n"


def duration_seconds(text: str) -> int:
    """`45s` or `1m30s` in seconds."""
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    assert found is not None and text, f"not a duration: {text!r}"
    return int(found[1] or 0) * 60 + int(found[2] or 0)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return parsed


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    return instructions((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def nginx() -> list[str]:
    return directives((ROOT / "deploy/nginx.conf").read_text())


# ---- Compose ----


def test_compose_file_obeys_the_compose_specification(compose: dict[str, Any]) -> None:
    """The file is valid by the JSON schema of the Compose Specification."""
    schema = json.loads((ROOT / "tests/data/compose-spec.json").read_text())
    plain = {name: value for name, value in compose.items() if not name.startswith("x-")}
    jsonschema.Draft7Validator(schema).validate(plain)


def test_compose_schema_is_not_asleep(compose: dict[str, Any]) -> None:
    """The schema refuses a misspelt option, so its silence means something."""
    schema = json.loads((ROOT / "tests/data/compose-spec.json").read_text())
    wrong = {"services": {"api": {**compose["services"]["api"], "stop_grace_time": "45s"}}}
    assert list(jsonschema.Draft7Validator(schema).iter_errors(wrong))


def test_compose_has_its_services_and_commands(compose: dict[str, Any]) -> None:
    """Valkey, api, worker and nginx; api and worker run the documented commands."""
    services = compose["services"]
    assert set(services) == {"valkey", "api", "worker", "nginx"}
    assert services["api"]["command"] == ["python", "-m", "api"]
    assert services["worker"]["command"] == ["python", "-m", "worker"]
    documented = (ROOT / "docs/deployment.md").read_text()
    for role in ("api", "worker"):
        assert " ".join(services[role]["command"]) in documented


def test_compose_roles_can_be_scaled_and_only_nginx_is_published(compose: dict[str, Any]) -> None:
    """Nothing stands in the way of --scale, and nothing but nginx is reachable, on loopback by default."""
    services = compose["services"]
    for name, service in services.items():
        assert "container_name" not in service, name
        assert ("ports" in service) == (name == "nginx"), name
    assert services["nginx"]["ports"] == ["${PUBLISH:-127.0.0.1:8080}:8080"]


def test_compose_gives_the_drain_its_time(compose: dict[str, Any]) -> None:
    """A supervisor that kills before the drain ends would cost readers an attempt."""
    drain_seconds = Settings.model_fields["drain_seconds"].default
    for role in ("api", "worker"):
        assert duration_seconds(compose["services"][role]["stop_grace_period"]) > drain_seconds, role


def test_compose_checks_the_health_of_every_service(compose: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    """Each service has a health check of its own; the api has the image's."""
    services = compose["services"]
    assert "healthcheck" not in services["api"]
    assert any(name == "HEALTHCHECK" for name, _ in dockerfile)
    assert services["worker"]["healthcheck"]["test"] == ["CMD", "python", "-m", "worker", "--health"]
    assert "valkey-cli ping" in services["valkey"]["healthcheck"]["test"][1]
    assert "/healthz" in services["nginx"]["healthcheck"]["test"][-1]
    for role in ("api", "worker"):
        assert services[role]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert services["nginx"]["depends_on"] == {"api": {"condition": "service_healthy"}}


def test_compose_keeps_what_valkey_was_told(compose: dict[str, Any]) -> None:
    """Valkey appends to a file on a volume and never evicts."""
    valkey = compose["services"]["valkey"]
    command = valkey["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}
    assert all(isinstance(word, str) for word in command)
    assert valkey["volumes"] == ["valkey-data:/data"]
    assert "valkey-data" in compose["volumes"]


def test_compose_stops_early_without_keys_and_holds_no_secret(compose: dict[str, Any]) -> None:
    """Keys and secret come from .env, are required with a message, and the upstream's key stays out of the api."""
    environment = compose["services"]["api"]["environment"]
    for name in ("REJOIN_API_KEYS", "REJOIN_SECRET"):
        assert re.fullmatch(rf"\$\{{{name}:\?[^}}]*\.env[^}}]*\}}", environment[name])
    assert environment["OPENAI_API_KEY"] == "${OPENAI_API_KEY:+held-by-the-worker}"
    assert "OPENAI_API_KEY" not in compose["services"]["worker"]["environment"]
    for role in ("api", "worker"):
        assert compose["services"][role]["env_file"] == ".env"
        assert compose["services"][role]["environment"]["REDIS_URL"] == "redis://valkey:6379/0"


def test_compose_shows_the_documents_to_all_who_look_for_them(compose: dict[str, Any]) -> None:
    """Neither api nor worker starts without the folder of REJOIN_DOCUMENTS, and neither may write into it."""
    for role in ("api", "worker"):
        service = compose["services"][role]
        assert service["environment"]["REJOIN_DOCUMENTS"] == "${REJOIN_DOCUMENTS:+/documents}"
        assert "${REJOIN_DOCUMENTS:-./examples/harbour}:/documents:ro" in service["volumes"]


def test_compose_names_only_settings_that_exist(compose: dict[str, Any]) -> None:
    """Every variable that compose sets or reads is in .env.example."""
    documented = {name for name, _, _ in settings_in_env_example()}
    read = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    written = {name for service in compose["services"].values() for name in service.get("environment", {})}
    assert read | written <= documented


def test_compose_takes_rights_away(compose: dict[str, Any]) -> None:
    """What can do without a writable file system and capabilities has neither."""
    for name in ("api", "worker", "nginx"):
        service = compose["services"][name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


# ---- The image ----


def test_image_runs_the_api_as_nobody_special(dockerfile: list[tuple[str, str]]) -> None:
    """The default command is the api, in exec form so that SIGTERM reaches it, and the user is not root."""
    last_stage = dockerfile[max(i for i, (name, _) in enumerate(dockerfile) if name == "FROM") :]
    of = dict(last_stage)
    assert json.loads(of["CMD"]) == ["python", "-m", "api"]
    assert int(of["USER"].split(":")[0]) > 0
    assert of["STOPSIGNAL"] == "SIGTERM"
    assert "PYTHONUNBUFFERED=1" in of["ENV"]
    assert all(re.match(r"python:3\.1[1-9]-slim\b", rest) for name, rest in dockerfile if name == "FROM")


def test_image_installs_the_locked_files_alone(dockerfile: list[tuple[str, str]]) -> None:
    """Dependencies come from requirements.lock with their hashes, code from the four packages, and nothing else."""
    installs = [rest for name, rest in dockerfile if name == "RUN" and "pip install" in rest]
    assert len(installs) == 1 and "--require-hashes -r /tmp/requirements.lock" in installs[0]
    copied = {rest.split()[0] for name, rest in dockerfile if name == "COPY" and not rest.startswith("--from")}
    assert copied == {"requirements.lock", "api", "worker", "shared", "cli"}
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


def test_image_holds_no_secret(dockerfile: list[tuple[str, str]]) -> None:
    """No instruction sets a key, a secret or a password."""
    told = " ".join(rest for name, rest in dockerfile if name in ("ENV", "ARG", "LABEL"))
    assert not re.search(r"KEY|SECRET|TOKEN|PASSWORD", told)


def test_image_health_check_is_python_that_compiles(dockerfile: list[tuple[str, str]]) -> None:
    """The check asks /healthz with nothing but the standard library."""
    check = dict(dockerfile)["HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    assert "/healthz" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


# ---- nginx ----


def test_nginx_passes_words_on_at_once(nginx: list[str]) -> None:
    """Neither buffering nor compression holds a word back, and silence does not end a stream before the api's ping."""
    assert "proxy_buffering off" in nginx
    assert "gzip off" in nginx
    assert "proxy_http_version 1.1" in nginx
    (read_timeout,) = (d.split()[1] for d in nginx if d.startswith("proxy_read_timeout "))
    assert duration_seconds(read_timeout) > 100 * Settings.model_fields["ping_seconds"].default


def test_nginx_lets_the_api_refuse_large_bodies(nginx: list[str]) -> None:
    """nginx's limit is above the api's, so that the caller gets the api's problem details."""
    (limit,) = (d.split()[1] for d in nginx if d.startswith("client_max_body_size "))
    assert limit.endswith("m")
    assert int(limit[:-1]) * 1024 * 1024 > Settings.model_fields["max_body_bytes"].default


def test_nginx_logs_no_query_strings(nginx: list[str]) -> None:
    """Stream tokens are in query strings: no log format has one, and the error log, which quotes them, is closed."""
    (log_format,) = (d for d in nginx if d.startswith("log_format "))
    assert "$uri" in log_format
    assert not re.search(r"\$(request_uri|args|arg_\w+|query_string|is_args|http_\w+|request)\b", log_format)
    assert all(d.endswith(" rejoin") for d in nginx if d.startswith("access_log "))
    assert [d.split()[-1] for d in nginx if d.startswith("error_log ")] == ["notice", "emerg"]


def test_nginx_does_nothing_twice(nginx: list[str]) -> None:
    """A request that may have started a generation is never sent to a second api."""
    assert not any("non_idempotent" in d for d in nginx)
    conf = (ROOT / "deploy/nginx.conf").read_text()
    assert re.search(r"location /stream-question/ \{[^}]*proxy_next_upstream off;", conf)


def test_nginx_finds_scaled_apis(nginx: list[str]) -> None:
    """The api's name is looked up again and again with Docker's DNS, since it stands in a variable."""
    assert any(d.startswith("resolver 127.0.0.11 ") for d in nginx)
    assert "set $api api:8000" in nginx
    assert {d for d in nginx if d.startswith("proxy_pass ")} == {"proxy_pass http://$api"}


@needs_nginx
def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    """`nginx -t` is content with the rendered file."""
    done = subprocess.run(
        [*render_nginx(tmp_path, port=8080, api_port=8000), "-t"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "/tmp/nginx.pid" not in (tmp_path / "nginx.conf").read_text()


# ---- .env.example ----


def test_env_example_names_every_setting_once() -> None:
    """Nothing is missing, nothing is there that nobody reads."""
    names = [name for name, _, _ in settings_in_env_example()]
    assert len(names) == len(set(names))
    assert set(names) == {setting_name(field) for field in Settings.model_fields} | COMPOSE_ALONE


def test_env_example_shows_the_settings_in_the_order_of_the_class() -> None:
    """The file reads like the class it documents."""
    names = [name for name, _, _ in settings_in_env_example() if name not in COMPOSE_ALONE]
    assert names == [setting_name(field) for field in Settings.model_fields]


def test_env_example_shows_the_true_defaults() -> None:
    """The values shown, read as settings, are the defaults, and all are commented out."""
    shown = {name: value for name, value, _ in settings_in_env_example()}
    given = {field: shown[setting_name(field)] for field in Settings.model_fields}
    settings = Settings(_env_file=None, **given)
    for field, about in Settings.model_fields.items():
        assert getattr(settings, field) == about.default, setting_name(field)
    assert not re.search(r"(?m)^[A-Z]", (ROOT / ".env.example").read_text())


def test_env_example_gives_unit_and_reason() -> None:
    """Every setting has a comment, and one with a unit in its name says it in words."""
    for name, _, comment in settings_in_env_example():
        assert len(comment.split()) >= 5, name
        for unit in ("seconds", "milliseconds", "bytes", "words per second"):
            if name.lower().endswith("_" + unit.replace(" ", "_")):
                assert re.search(rf"\b{unit}\b", comment, re.IGNORECASE), name


def test_env_example_recipes_make_keys_that_settings_accept() -> None:
    """The commands shown for a key and a secret print lines that start an api."""
    recipes = re.findall(r"(?m)^#   python3 -c '([^']+)'$", (ROOT / ".env.example").read_text())
    printed = "".join(
        subprocess.run([sys.executable, "-c", recipe], capture_output=True, text=True, timeout=30, check=True).stdout
        for recipe in recipes
    )
    lines = dict(line.split("=", 1) for line in printed.splitlines() if line.startswith("REJOIN_"))
    settings = Settings(_env_file=None, api_keys=lines["REJOIN_API_KEYS"], secret=lines["REJOIN_SECRET"])
    assert list(settings.tenants_by_key_hash.values()) == ["main"]
    assert len(settings.secret_bytes) == 64


# ---- The lock files, the Makefile ----


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_files_have_hashes_and_no_addresses(name: str) -> None:
    """Every entry is pinned and hashed, and nothing says where to download from."""
    text = (ROOT / name).read_text()
    assert "://" not in text
    entries = re.sub(r"\\\n\s*", "", text).strip().splitlines()
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==[^\s;]+ ?(;[^\\]+?)?--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


def test_dev_lock_contains_the_runtime_lock() -> None:
    """The tests run with the versions that are deployed, and with no extra that the other file lacks."""
    pins = [
        dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)", (ROOT / name).read_text()))
        for name in ("requirements.lock", "requirements-dev.lock")
    ]
    assert pins[0].items() <= pins[1].items()


def test_make_lists_every_target() -> None:
    """`make` alone is the list of everything there is to run."""
    if shutil.which("make") is None:
        pytest.skip("no make: apt-get install make")
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    phony = re.search(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text())
    assert phony is not None
    assert set(re.findall(r"(?m)^  make (\S+)", listed)) == set(phony[1].split())
