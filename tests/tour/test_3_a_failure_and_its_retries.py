"""Third stop: a failure. What may pass is tried again; what cannot pass fails, and says why."""

from pathlib import Path

from anyio.from_thread import start_blocking_portal

from tests.support.service import Service
from tests.support.smtp_server import SmtpServer


def test_mail_waits_for_an_smtp_server_that_is_down(tmp_path: Path) -> None:
    """202 while it is down, `retrying` with the error meanwhile, `succeeded` once it is back."""
    server = SmtpServer()
    with start_blocking_portal() as portal:
        portal.call(server.start)
        portal.call(server.stop)  # it keeps its port
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


def test_a_refusal_for_good_fails_at_once(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """550: there is no such mailbox, and there will be none in a minute."""
    smtp_server.always["rcpt"] = "550 5.1.1 No such user"
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        answer = service.post("/send-notification/nobody@example.com")
        failed = service.wait_for(answer.json()["id"], "failed")

        assert failed["attempts"] == 1
        assert failed["error"]["type"] == "PermanentError"
        assert failed["error"]["smtp_code"] == 550

        smtp_server.always.clear()  # the mailbox is made after all
        again = service.post(f"/tasks/{failed['id']}/retry")
        assert again.status_code == 202
        service.wait_for(failed["id"], "succeeded")


def test_an_attempt_that_is_made_again_sends_the_same_mail(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """The connection drops after the final dot: the mail may have been taken, or not.

    So it is sent again, and its Message-ID tells the receiver that the two are one.
    """
    smtp_server.once["dot"].append("drop")
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        answer = service.post("/send-notification/ada@example.com")
        done = service.wait_for(answer.json()["id"], "succeeded")

    assert done["attempts"] == 2
    first, second = smtp_server.received
    assert first.content == second.content
    assert f"Message-ID: <{done['id']}@example.com>".encode() in first.content
