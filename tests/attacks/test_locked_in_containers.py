"""What runs in containers was broken into, or runs away.

It is not root, changes nothing but its volumes and /tmp, has no privileges and gets none, cannot
starve the machine, and is reached from this machine only.
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


def can_change_nothing_but_its_volumes_and_tmp(service: Service) -> None:
    assert service["read_only"] is True
    assert {mount.partition(":")[0] for mount in service.get("tmpfs", [])} <= {
        "/tmp",
        "/var/run/postgresql",
    }
    for volume in service.get("volumes", []):
        name, target, *_ = volume.split(":")
        assert name in COMPOSE["volumes"]  # a named one: nothing of the host is mounted
        assert target in {"/srv/var", "/tmp", "/var/lib/postgresql"}


def has_no_privileges_and_gets_none(service: Service) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    others = {"cap_add", "devices", "group_add", "ipc", "network_mode", "pid", "privileged"}
    assert not others & service.keys()


def is_published_on_this_machine_only(service: Service) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def cannot_starve_the_machine(service: Service) -> None:
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()


CHECKS: list[Check] = [
    is_not_root,
    can_change_nothing_but_its_volumes_and_tmp,
    has_no_privileges_and_gets_none,
    is_published_on_this_machine_only,
    cannot_starve_the_machine,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service(name: str, check: Check) -> None:
    check(COMPOSE["services"][name])


def test_how_much_was_checked(tried: Tried) -> None:
    tried(f"{len(COMPOSE['services'])} services, {len(CHECKS)} checks of each", "all hold")


def test_only_what_people_look_at_is_published() -> None:
    published = {name for name, service in COMPOSE["services"].items() if "ports" in service}
    assert published == {"api", "mailpit"}


def test_the_image_alone_is_not_root_either() -> None:
    """`docker run` without the compose file is the same user, whom /srv/var belongs to."""
    user = COMPOSE["services"]["api"]["user"]
    assert re.findall(r"^USER (.+)", DOCKERFILE, re.MULTILINE) == [user]
    assert f"useradd --uid {user.partition(':')[0]} " in DOCKERFILE


def test_only_containers_of_its_own_network_reach_the_database() -> None:
    """Its password may be the one that stands in the file, because no port leads to it."""
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert COMPOSE["services"]["postgres"]["networks"] == ["database"]
    inside = {
        name for name, one in COMPOSE["services"].items() if "database" in one.get("networks", [])
    }
    assert inside == {"api", "worker", "migrate", "postgres"}


def test_compose_lint_finds_nothing_in_both_files_together(tmp_path: Path) -> None:
    """It merges a file with the override beside it, as Compose does."""
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
    (can_change_nothing_but_its_volumes_and_tmp, {"read_only": False}),
    (can_change_nothing_but_its_volumes_and_tmp, {"volumes": ["/:/srv/var"]}),
    (
        can_change_nothing_but_its_volumes_and_tmp,
        {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]},
    ),
    (can_change_nothing_but_its_volumes_and_tmp, {"volumes": ["data:/etc"]}),
    (can_change_nothing_but_its_volumes_and_tmp, {"tmpfs": ["/usr:size=1g"]}),
    (has_no_privileges_and_gets_none, {"cap_drop": ["NET_RAW"]}),
    (has_no_privileges_and_gets_none, {"cap_add": ["SYS_ADMIN"]}),
    (has_no_privileges_and_gets_none, {"privileged": True}),
    (has_no_privileges_and_gets_none, {"security_opt": []}),
    (has_no_privileges_and_gets_none, {"pid": "host"}),
    (is_published_on_this_machine_only, {"ports": ["8000:8000"]}),
    (is_published_on_this_machine_only, {"ports": ["0.0.0.0:8000:8000"]}),
    (is_published_on_this_machine_only, {"ports": ["127.0.0.1:22:8000"]}),
]


def test_control_a_weakened_file_does_not_pass(tried: Tried) -> None:
    for check, weakness in WEAKENED:
        with pytest.raises(AssertionError):
            check(copy.deepcopy(COMPOSE["services"]["api"]) | weakness)
    for limit in ("mem_limit", "cpus", "pids_limit"):
        service = copy.deepcopy(COMPOSE["services"]["api"])
        del service[limit]
        with pytest.raises(AssertionError):
            cannot_starve_the_machine(service)
    tried(f"the api's service, weakened in {len(WEAKENED) + 3} ways", "each noticed")
