"""Third stop: a failure. A temporary error is retried. A permanent error fails the task at once."""

from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from tests.support.service import Service
from tests.support.smtp_server import SmtpServer


def test_mail_waits_for_an_smtp_server_that_is_down(tmp_path: Path) -> None:
    """The request gets a 202, the task is `retrying` with the error, and finally `succeeded`."""
    server = SmtpServer()
    with start_blocking_portal() as portal:
        portal.call(server.start)
        portal.call(server.stop)  # the server keeps its port for the next start
        with Service(tmp_path, catcher=False, smtp_port=server.port) as service:
            answer = service.post("/send-notification/ada@example.com")
            assert answer.status_code == 202
            waiting = service.wait_for(answer.json()["id"], "retrying")
            assert waiting["error"]["type"] == "ServiceUnavailable"
            assert waiting["next_attempt_at"] > waiting["created_at"]
            assert service.get("/readyz").json()["status"] == "degraded"

            portal.call(server.start)
            done = service.wait_for(answer.json()["id"], "succeeded")
            assert done["attempts"] > 1
            assert done["error"] is None
        portal.call(server.stop)

    [mail] = server.received
    assert mail.recipients == ("ada@example.com",)


@pytest.mark.thorough
def test_the_catcher_fails_on_purpose(tmp_path: Path) -> None:
    """It defers two attempts, and refuses a mail for good, because the addresses ask for it."""
    with Service(tmp_path) as service:
        deferred = service.post("/send-notification/defer+451@example.com").json()
        refused = service.post("/send-notification/refuse+550@example.com").json()

        done = service.wait_for(deferred["id"], "succeeded")
        assert [attempt["error"]["smtp_code"] for attempt in done["history"]] == [451, 451]
        failed = service.wait_for(refused["id"], "failed")
        assert (failed["attempts"], failed["error"]["smtp_code"]) == (1, 550)

    [mail] = service.mails
    assert mail.recipients == ("defer+451@example.com",)


def test_a_mail_that_is_refused_for_good_fails_at_once(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """A 550 means that the mailbox does not exist, so another attempt would fail as well."""
    smtp_server.always["rcpt"] = "550 5.1.1 No such user"
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        answer = service.post("/send-notification/nobody@example.com")
        failed = service.wait_for(answer.json()["id"], "failed")

        assert failed["attempts"] == 1
        assert failed["error"]["type"] == "PermanentError"
        assert failed["error"]["smtp_code"] == 550

        smtp_server.always.clear()  # an operator creates the mailbox
        again = service.post(f"/tasks/{failed['id']}/retry")
        assert again.status_code == 202
        service.wait_for(failed["id"], "succeeded")


def test_a_second_attempt_sends_exactly_the_same_mail(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """The connection drops after the final dot, so the server may have accepted the mail or not.

    The service sends it again. The same Message-ID tells the receiver that both are the same mail.
    """
    smtp_server.once["dot"].append("drop")
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        answer = service.post("/send-notification/ada@example.com")
        done = service.wait_for(answer.json()["id"], "succeeded")

    assert done["attempts"] == 2
    first, second = smtp_server.received
    assert first.content == second.content
    assert f"Message-ID: <{done['id']}@example.com>".encode() in first.content
