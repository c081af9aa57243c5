"""A process in a container that an attacker controls, or that runs out of control.

It is not root, can write only to its volumes and /tmp, has no privileges and cannot get any, has
limits on memory, processors and processes, and its ports are open on loopback only.
"""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.compose import BASE_FILE, ROOT, SCALE, SCALE_FILE
from tests.support.torture import Tried

COMPOSE = SCALE
DOCKERFILE = (ROOT / "Dockerfile").read_text()

Service = dict[str, Any]
Check = Callable[[Service], None]


def is_not_root(service: Service) -> None:
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0


def can_write_only_to_its_volumes_and_tmp(service: Service) -> None:
    assert service["read_only"] is True
    assert {mount.partition(":")[0] for mount in service.get("tmpfs", [])} <= {
        "/tmp",
        "/var/run/postgresql",
    }
    for volume in service.get("volumes", []):
        name, target, *_ = volume.split(":")
        assert name in COMPOSE["volumes"]  # a named volume, and no directory of the host
        assert target in {"/srv/var", "/tmp", "/var/lib/postgresql"}


def has_no_privileges_and_cannot_get_any(service: Service) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    others = {"cap_add", "devices", "group_add", "ipc", "network_mode", "pid", "privileged"}
    assert not others & service.keys()


def has_ports_on_loopback_only(service: Service) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def has_limits_on_memory_processors_and_processes(service: Service) -> None:
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()


CHECKS: list[Check] = [
    is_not_root,
    can_write_only_to_its_volumes_and_tmp,
    has_no_privileges_and_cannot_get_any,
    has_ports_on_loopback_only,
    has_limits_on_memory_processors_and_processes,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", COMPOSE["services"])
def test_each_service_passes_each_check(name: str, check: Check) -> None:
    check(COMPOSE["services"][name])


def test_report_the_number_of_checks(tried: Tried) -> None:
    tried(f"{len(COMPOSE['services'])} services, {len(CHECKS)} checks of each", "all hold")


def test_only_the_api_and_the_mail_catcher_have_published_ports() -> None:
    published = {name for name, service in COMPOSE["services"].items() if "ports" in service}
    assert published == {"api", "mailpit"}


def test_the_image_by_itself_is_not_root_either() -> None:
    """With plain `docker run`, the user is the same as in the Compose file, and owns /srv/var."""
    user = COMPOSE["services"]["api"]["user"]
    assert re.findall(r"^USER (.+)", DOCKERFILE, re.MULTILINE) == [user]
    assert f"useradd --uid {user.partition(':')[0]} " in DOCKERFILE


def test_only_containers_of_the_database_network_reach_the_database() -> None:
    """Its password may stand in the Compose file, because no port leads to the database."""
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert COMPOSE["services"]["postgres"]["networks"] == ["database"]
    inside = {
        name for name, one in COMPOSE["services"].items() if "database" in one.get("networks", [])
    }
    assert inside == {"api", "worker", "migrate", "postgres"}


def test_compose_lint_finds_no_fault_in_the_merged_files(tmp_path: Path) -> None:
    """It merges a file with the override file in the same directory, as Compose does."""
    shutil.copy(BASE_FILE, tmp_path / "docker-compose.yml")
    shutil.copy(SCALE_FILE, tmp_path / "docker-compose.override.yml")
    shutil.copy(ROOT / ".compose-lint.yml", tmp_path)
    lint = Path(sys.executable).with_name("compose-lint")
    found = subprocess.run(
        [lint, "--fail-on", "low"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


# Negative control: the same file, weakened


WEAKENED: list[tuple[Check, dict[str, Any]]] = [
    (is_not_root, {"user": "0:0"}),
    (is_not_root, {"user": "10001:0"}),
    (can_write_only_to_its_volumes_and_tmp, {"read_only": False}),
    (can_write_only_to_its_volumes_and_tmp, {"volumes": ["/:/srv/var"]}),
    (
        can_write_only_to_its_volumes_and_tmp,
        {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]},
    ),
    (can_write_only_to_its_volumes_and_tmp, {"volumes": ["data:/etc"]}),
    (can_write_only_to_its_volumes_and_tmp, {"tmpfs": ["/usr:size=1g"]}),
    (has_no_privileges_and_cannot_get_any, {"cap_drop": ["NET_RAW"]}),
    (has_no_privileges_and_cannot_get_any, {"cap_add": ["SYS_ADMIN"]}),
    (has_no_privileges_and_cannot_get_any, {"privileged": True}),
    (has_no_privileges_and_cannot_get_any, {"security_opt": []}),
    (has_no_privileges_and_cannot_get_any, {"pid": "host"}),
    (has_ports_on_loopback_only, {"ports": ["8000:8000"]}),
    (has_ports_on_loopback_only, {"ports": ["0.0.0.0:8000:8000"]}),
    (has_ports_on_loopback_only, {"ports": ["127.0.0.1:22:8000"]}),
]


def test_control_a_weakened_compose_file_fails_the_checks(tried: Tried) -> None:
    for check, weakness in WEAKENED:
        with pytest.raises(AssertionError):
            check(copy.deepcopy(COMPOSE["services"]["api"]) | weakness)
    for limit in ("mem_limit", "cpus", "pids_limit"):
        service = copy.deepcopy(COMPOSE["services"]["api"])
        del service[limit]
        with pytest.raises(AssertionError):
            has_limits_on_memory_processors_and_processes(service)
    tried(f"the api's service, weakened in {len(WEAKENED) + 3} ways", "each noticed")
