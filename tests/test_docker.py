"""What runs in containers is locked in, and `.env.example` tells the truth about every setting."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from app.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()

Service = dict[str, Any]


@pytest.fixture(params=COMPOSE["services"])
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = COMPOSE["services"][request.param]
    return found


@pytest.fixture
def api() -> Service:
    found: Service = COMPOSE["services"]["api"]
    return found


def test_a_service_is_not_root(service: Service) -> None:
    user, group = service["user"].split(":")

    assert int(user) > 0
    assert int(group) > 0


def test_a_service_can_change_nothing_but_its_volumes_and_tmp(service: Service) -> None:
    assert service["read_only"] is True
    assert all(mount.partition(":")[0] == "/tmp" for mount in service.get("tmpfs", []))
    for volume in service["volumes"]:
        name, _, target = volume.partition(":")
        assert name in COMPOSE["volumes"]  # a named one: nothing of the host is mounted
        assert target in {"/srv/var", "/tmp"}


def test_a_service_has_no_privileges_and_gets_none(service: Service) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc"} & service.keys()


def test_a_service_is_published_on_this_machine_only(service: Service) -> None:
    assert service["ports"]
    for port in service["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def test_a_service_comes_back_after_a_crash_and_tells_how_it_is(service: Service) -> None:
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"


def test_a_service_cannot_starve_the_machine(service: Service) -> None:
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()


def test_a_service_names_the_version_of_its_image(service: Service) -> None:
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_the_image_is_built_on_one_version_of_python_and_bears_our_own(api: Service) -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    assert api["image"] == f"afterward:{version}"


def test_the_image_alone_is_not_root_either(api: Service) -> None:
    """`docker run` without the compose file is the same user, whom /srv/var belongs to."""
    assert re.findall(r"^USER (.+)", DOCKERFILE, re.MULTILINE) == [api["user"]]
    assert f"useradd --uid {api['user'].partition(':')[0]} " in DOCKERFILE


def test_docker_waits_longer_for_the_end_than_the_service_does(api: Service) -> None:
    grace = float(api["stop_grace_period"].removesuffix("s"))

    assert grace > Settings.model_fields["shutdown_grace_seconds"].default


def test_the_api_hands_its_mail_to_mailpit_once_it_is_there(api: Service) -> None:
    assert api["environment"] == {"SMTP_HOST": "mailpit", "SMTP_PORT": 1025}
    assert api["depends_on"] == {"mailpit": {"condition": "service_healthy"}}


def test_env_example_names_every_setting_and_no_other() -> None:
    assert list(example()) == [name.upper() for name in Settings.model_fields]


def test_env_example_has_a_comment_of_one_line_above_every_setting() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if line and not line.startswith("#"):
            assert above.startswith("# "), line


def test_env_example_as_it_is_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in example():
        monkeypatch.delenv(name, raising=False)

    assert Settings(_env_file=ROOT / ".env.example") == Settings(_env_file=None)


def test_env_example_leaves_empty_only_what_has_no_fixed_default() -> None:
    """An empty value is ignored: without this, one could stand for a default unseen."""
    empty = {name.lower() for name, value in example().items() if not value}

    assert empty == {
        name
        for name, field in Settings.model_fields.items()
        if field.default is None or field.default_factory is not None
    }


def example() -> dict[str, str | None]:
    """The settings in `.env.example`, in its order, as pydantic-settings reads them."""
    return dotenv_values(ROOT / ".env.example")
