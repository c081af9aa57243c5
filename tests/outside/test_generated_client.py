"""A client that openapi-python-client generates from the OpenAPI document of a running service."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.service import PATIENCE, Service

# The program of a user: it sends a mail, reads its task, and meets two errors.
PROGRAM = """
import sys

from afterward_client import AuthenticatedClient
from afterward_client.api.notifications import send_notification
from afterward_client.api.tasks import list_tasks, read_task
from afterward_client.models import Notification, Problem, Queued, Status, TaskDetail

with AuthenticatedClient(base_url=sys.argv[1], token="the-key") as client:
    mail = Notification(subject="Hello", message="From a generated client.")
    queued = send_notification.sync(
        "ada@example.com", client=client, body=mail, idempotency_key="key-1"
    )
    assert isinstance(queued, Queued), queued
    task = read_task.sync(queued.id, client=client)
    assert isinstance(task, TaskDetail), task
    assert (task.kind, task.about) == ("send_email", "ada@example.com")
    page = list_tasks.sync(client=client, about="ada@example.com", limit=1)
    assert [task.id for task in page.data] == [queued.id]

    refused = send_notification.sync_detailed("nobody", client=client)
    assert refused.status_code == 422, refused
    assert isinstance(refused.parsed, Problem), refused
    assert refused.parsed.errors[0].pointer == "/email"
    unknown = read_task.sync("unknown", client=client)
    assert isinstance(unknown, Problem), unknown
print(queued.id, Status.SUCCEEDED)
"""

# The generator knows few media types, and leaves out a response of another type, such as a picture.
# Here it learns that these are bytes.
BYTES = dict.fromkeys(("image/png", "message/rfc822", "*/*"), "application/octet-stream")
CONFIGURATION = {"post_hooks": [], "content_type_overrides": BYTES}


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A service with an API key and a prefix."""
    return Service(tmp_path / "data", api_keys="the-key", root_path="/mail")


def generate(url: str, directory: Path) -> str:
    """Generate the client, and return what the generator says. A warning of it is an error."""
    (directory / "configuration.json").write_text(json.dumps(CONFIGURATION))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"),
            *("--url", url, "--config", "configuration.json", "--fail-on-warning"),
        ],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_a_generated_client_sends_a_mail(service: Service, tmp_path: Path) -> None:
    with service:
        service.client.headers["Authorization"] = "Bearer the-key"
        generate(f"{service.url}/mail/openapi.json", tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"{service.url}/mail"],
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert not done.returncode, done.stderr
        task_id, succeeded = done.stdout.split()
        service.wait_for(task_id, succeeded)
        (mail,) = service.mails

    assert mail.subject == "Hello"
