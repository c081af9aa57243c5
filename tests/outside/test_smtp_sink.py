"""Postfix's test server, smtp-sink, accepts the service's mail."""

import subprocess
import time
from pathlib import Path

from tests.support.service import Service, free_port


def test_smtp_sink_accepts_and_stores_a_mail(smtp_sink: str, tmp_path: Path) -> None:
    port = free_port()
    mails = tmp_path / "mails"
    mails.mkdir(mode=0o777)
    mails.chmod(0o777)
    command = [smtp_sink, "-u", "root", "-c", "-D", f"{mails}/%M.", f"127.0.0.1:{port}", "10"]
    sink = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with Service(tmp_path, catcher=False, smtp_port=port) as service:
            answer = service.post("/send-notification/ada@example.com", json={"subject": "Grüße"})
            done = service.wait_for(answer.json()["id"])
            assert done["result"]["reply"].startswith("250")
        deadline = time.monotonic() + 5
        while not (stored := list(mails.iterdir())):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        sink.terminate()
        sink.wait()
    content = stored[0].read_text()
    assert f"Message-ID: <{done['id']}@example.com>" in content
    assert "X-Rcpt-Args: <ada@example.com>" in content
