"""Fifth stop: an upload. Its file is on disk before the 202, and a task publishes it afterwards."""

import hashlib
import os
from pathlib import Path

from PIL import Image

from tests.support.service import Service


def test_an_upload_survives_a_kill_between_the_answer_and_its_task(tmp_path: Path) -> None:
    """The client can download exactly the bytes that it sent."""
    content = os.urandom(300_000)
    with Service(tmp_path, worker_concurrency=0) as service:
        answer = service.post("/upload", files={"file": ("notes.bin", content)})
        service.kill()

    assert answer.status_code == 202
    upload = answer.json()["upload"]
    assert upload["sha256"] == hashlib.sha256(content).hexdigest()

    with Service(tmp_path) as service:
        service.wait_for(answer.json()["id"], "succeeded")
        assert service.get(f"/uploads/{upload['id']}").json()["status"] == "published"
        assert service.get(f"/uploads/{upload['id']}/content").content == content


def test_a_picture_gets_a_thumbnail_in_another_process(tmp_path: Path) -> None:
    """The task that publishes the picture adds a task that makes the thumbnail."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (1600, 1200), "teal").save(picture)
    with Service(tmp_path) as service:
        answer = service.post("/upload", files={"file": ("picture.png", picture.read_bytes())})
        service.wait_for(answer.json()["id"], "succeeded")
        [task] = service.get("/tasks", params={"kind": "make_thumbnail"}).json()["data"]
        service.wait_for(task["id"], "succeeded")

        thumbnail = service.get(f"/uploads/{answer.json()['upload']['id']}/thumbnail")
        assert thumbnail.headers["Content-Type"] == "image/png"
        (tmp_path / "thumbnail.png").write_bytes(thumbnail.content)
        with Image.open(tmp_path / "thumbnail.png") as small:
            assert max(small.size) == 256
