"""The Compose files, the settings of a container, and `.env.example`."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from app import settings
from app.settings import Settings, load_settings
from tests.support.compose import BASE, BASE_FILE, SCALE, SCALE_FILE

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

STEPS = {"migrate"}  # containers that end when their work is done

Service = dict[str, Any]


def the(name: str) -> Service:
    """Return a service as both Compose files define it together."""
    found: Service = SCALE["services"][name]
    return found


@pytest.fixture(params=SCALE["services"])
def service(request: pytest.FixtureRequest) -> Service:
    return the(request.param)


@pytest.fixture(params=sorted(SCALE["services"].keys() - STEPS))
def server(request: pytest.FixtureRequest) -> Service:
    """A service that runs until it is stopped."""
    return the(request.param)


@pytest.fixture
def api() -> Service:
    return the("api")


def test_the_first_compose_file_has_the_api_and_a_mail_catcher() -> None:
    assert BASE["services"].keys() == {"api", "mailpit"}


def test_the_second_compose_file_adds_postgresql_its_migration_and_workers() -> None:
    assert SCALE["services"].keys() - BASE["services"].keys() == {"postgres", "migrate", "worker"}


@pytest.mark.parametrize("file", [BASE_FILE, SCALE_FILE], ids=lambda file: file.name)
def test_the_compose_files_use_no_profiles_anchors_or_extensions(file: Path) -> None:
    """Not every implementation of Compose understands profiles, anchors and extensions."""
    text = file.read_text()
    assert not re.search(
        r"^\s*(x-\w+|profiles|extends|include|secrets|configs):", text, re.MULTILINE
    )
    assert not re.search(r"(: |- )[&*]\w|<<:", text)


def test_no_health_check_kills_its_container() -> None:
    for service in SCALE["services"].values():
        assert "kill" not in str(service.get("healthcheck"))


def test_a_service_is_restarted_after_a_crash(server: Service) -> None:
    assert server["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["api", "mailpit", "postgres"])
def test_a_service_that_takes_connections_has_a_health_check(name: str) -> None:
    assert the(name)["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


@pytest.mark.parametrize("name", ["worker", "migrate"])
def test_workers_and_the_migration_disable_the_health_check_of_the_image(name: str) -> None:
    assert the(name)["image"] == the("api")["image"]
    assert the(name)["healthcheck"] == {"disable": True}


def test_each_image_has_a_fixed_version(service: Service) -> None:
    assert re.search(r":(v?\d+\.\d+\.\d+|1\d\.\d+-trixie)$", service["image"])


def test_the_image_has_one_version_of_python_and_the_version_of_the_project(api: Service) -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    assert api["image"] == f"afterward:{version}"


@pytest.mark.parametrize("name", ["api", "worker"])
def test_docker_waits_longer_for_a_stop_than_the_grace_period(name: str) -> None:
    grace = float(the(name)["stop_grace_period"].removesuffix("s"))

    assert grace > Settings.model_fields["shutdown_grace_seconds"].default


@pytest.mark.parametrize("name", ["api", "worker"])
def test_mail_goes_to_mailpit_and_waits_until_mailpit_is_healthy(name: str) -> None:
    environment = the(name)["environment"]
    assert (environment["SMTP_HOST"], environment["SMTP_PORT"]) == ("mailpit", 1025)
    assert the(name)["depends_on"]["mailpit"] == {"condition": "service_healthy"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "api",
            {
                "ENVIRONMENT",
                "API_KEYS",
                "ALLOWED_RECIPIENTS",
                "RATE_LIMIT",
                "ROOT_PATH",
                "CORS_ORIGINS",
                "MAX_BACKLOG",
            },
        ),
        ("worker", {"ENVIRONMENT", "API_KEYS", "ALLOWED_RECIPIENTS"}),
    ],
)
def test_these_settings_come_from_the_shell(name: str, settings: set[str]) -> None:
    assert {key for key, value in the(name)["environment"].items() if value is None} == settings


@pytest.mark.parametrize("name", ["api", "worker", "migrate"])
def test_every_setting_that_a_container_gets_exists(name: str) -> None:
    assert {key.lower() for key in the(name)["environment"]} <= Settings.model_fields.keys()


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_api_and_the_workers_start_after_the_migration(name: str) -> None:
    assert the(name)["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert the(name)["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_the_migration_depends_on_no_service() -> None:
    """Podman 4.3 starts no service after it otherwise. It waits for PostgreSQL by itself."""
    assert "depends_on" not in the("migrate")


def test_without_the_second_file_the_api_waits_for_no_migration() -> None:
    assert BASE["services"]["api"]["depends_on"].keys() == {"mailpit"}


def test_the_workers_read_the_uploads_that_the_api_received(api: Service) -> None:
    assert the("worker")["volumes"] == api["volumes"]
    assert the("worker")["user"] == api["user"]


def test_the_api_the_worker_and_the_migration_have_the_same_queue() -> None:
    urls = {the(name)["environment"]["QUEUE_URL"] for name in ("api", "worker", "migrate")}
    assert len(urls) == 1
    assert "QUEUE_URL" not in BASE["services"]["api"]["environment"]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory for settings that are files; no environment variable sets anything."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "secrets"
    monkeypatch.setattr(settings, "SECRETS", directory)
    return directory


def test_a_setting_can_come_from_a_file(secrets: Path) -> None:
    secrets.mkdir()
    (secrets / "queue_url").write_text("postgresql://ada:lovelace@db/queue\n")
    (secrets / "of_somebody_else").write_text("?")

    assert load_settings().queue_url == "postgresql://ada:lovelace@db/queue"


def test_a_variable_wins_over_a_file_unless_it_is_empty(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets.mkdir()
    (secrets / "smtp_host").write_text("from-the-file")
    monkeypatch.setenv("SMTP_HOST", "from-the-environment")
    assert load_settings().smtp_host == "from-the-environment"

    monkeypatch.setenv("SMTP_HOST", "")
    assert load_settings().smtp_host == "from-the-file"


@pytest.mark.filterwarnings("error")
def test_a_missing_directory_of_settings_gives_no_warning(secrets: Path) -> None:
    assert not secrets.exists()
    assert load_settings() == Settings()


@pytest.mark.filterwarnings("error")
def test_a_directory_of_settings_that_cannot_be_read_is_ignored(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets.mkdir()
    (secrets / "queue_url").write_text("postgresql://ada:lovelace@db/queue")
    monkeypatch.setattr("os.access", lambda *_: False)  # because root can read every directory

    assert load_settings() == Settings()


def test_env_example_names_all_settings_and_only_settings() -> None:
    assert list(example()) == [name.upper() for name in Settings.model_fields]


def test_env_example_has_a_comment_of_one_line_above_every_setting() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if line and not line.startswith("#"):
            assert above.startswith("# "), line


def test_env_example_unchanged_equals_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in example():
        monkeypatch.delenv(name, raising=False)

    assert Settings(_env_file=ROOT / ".env.example") == Settings(_env_file=None)


def test_env_example_leaves_a_setting_empty_only_if_it_has_no_fixed_default() -> None:
    """An empty value is ignored, so the test above cannot see that a default is missing."""
    empty = {name.lower() for name, value in example().items() if not value}

    assert empty == {
        name
        for name, field in Settings.model_fields.items()
        if field.default in (None, ()) or field.default_factory is not None
    }


def example() -> dict[str, str | None]:
    """Return the settings in `.env.example`, in its order, as pydantic-settings reads them."""
    return dotenv_values(ROOT / ".env.example")
