"""File names with paths, reserved names and misleading names, and links planted in the store.

The service refuses a name (422, or 400 if it is far too long), shows it, or replaces it by
"upload" and its suffix. It never uses the name as a path: it stores the file under the upload's
id, changes no other file, and a browser can only save the download.
"""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi import FastAPI, UploadFile
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.main import create_app
from tests.api.requests import problem_of, upload_of
from tests.support.forms import FORM, file_part, form_of
from tests.support.pictures import picture
from tests.support.service import files_below, settings_in, wait_for
from tests.support.target import MARK, Target
from tests.support.torture import Tried, form

SHOWN = {
    b"../../etc/passwd": "passwd",
    b"../../../../../../../../etc/cron.d/eve": "eve",
    b"/etc/passwd": "passwd",
    b"//etc/passwd": "passwd",
    b"./a.txt": "a.txt",
    b"a/../../b.txt": "b.txt",
    rb"..\\..\\windows\\system.ini": "system.ini",
    rb"C:\\Windows\\a.txt": "a.txt",
    rb"\\\\server\\share\\a.txt": "a.txt",
    b"C:a.txt": "C:a.txt",
    b"a.txt:stream": "a.txt:stream",
    b"..%2f..%2fetc%2fpasswd": "..%2f..%2fetc%2fpasswd",
    b"%2e%2e/a": "a",
    b"a%22b.txt": 'a"b.txt',
    b"..%22/a": "a",
    "..\uff0f..\uff0fa".encode(): "..\uff0f..\uff0fa",
    b"CON": "CON",
    b"nul.txt": "nul.txt",
    b".bashrc": ".bashrc",
    b".htaccess": ".htaccess",
    b"queue.db": "queue.db",
    b"~": "~",
    b"~root/.ssh/authorized_keys": "authorized_keys",
    b"-rf": "-rf",
    b"*": "*",
    b"$(id)": "$(id)",
    b"| id": "| id",
    b"a;b=c.txt": "a;b=c.txt",
    b'a \\"b\\".txt': 'a "b".txt',
    b"a'b.txt": "a'b.txt",
    b"a,b.txt": "a,b.txt",
    b".": "upload",
    b"..": "upload",
    b"...": "upload",
    b" ": "upload",
    b"/": "upload",
    b"folder/": "upload",
    b"x" * 255: "x" * 255,
    "😀".encode() * 255: "😀" * 255,
    "naïve café 😀.txt".encode(): "naïve café 😀.txt",
    "a\u202egpj.exe".encode(): "upload.exe",
    "a\u2066b".encode(): "upload",
    b"a\xff": "upload",
    b"a\xff.txt": "upload.txt",
    b"..\xc0\xaf..\xc0\xafa": "upload",
    b"x" * 256: "upload",
    b"x" * 256 + b".txt": "upload.txt",
    b"=?utf-8?q?a?=": "upload",
}
REFUSED = {
    "empty": b"",
    "NUL": b"a\0.txt",
    "NUL, then a suffix": b"a.php\0.png",
    "ESC": b"a\x1b[2Jb",
    "U+2028": "a\u2028b".encode(),
    "half a surrogate pair": b"a\xed\xa0\x80",
    "5,000 characters": b"x" * 5_000,
    "5,000 folders": b"../" * 5_000 + b"a",
}
DISPOSITION = re.compile(
    r"""attachment; filename="([ !#-.0-\[\]-~]+)"; filename\*=UTF-8''([A-Za-z0-9._~%-]+)"""
)


def files_outside_the_uploads(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of each file, outside the uploads, that a name could lead to."""
    places = [directory.parent, Path("/etc/cron.d"), Path("/etc/passwd")]
    paths = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    ours = re.compile(r"/(uploads|queue\.db[^/]*|service\.log|log\.txt)(/|$)")
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in paths
        if not path.is_dir() and not ours.search(str(path))
    }


def test_a_file_name_is_shown_and_never_used_as_a_path(target: Target, tried: Tried) -> None:
    uploads = target.service.directory / "uploads"
    stored, others = files_below(uploads), files_outside_the_uploads(target.service.directory)
    answers = {name: target.upload(form_of(file_part(name))).json() for name in SHOWN}
    for name, queued in answers.items():
        target.service.wait_for(queued["id"])
        upload = queued["upload"]
        assert upload["filename"] == SHOWN[name]
        download = target.service.get(f"/uploads/{upload['id']}/content")
        disposition = DISPOSITION.fullmatch(download.headers["content-disposition"])
        assert disposition
        assert unquote(disposition[2]) == SHOWN[name]
        assert disposition[1] == SHOWN[name] or not re.fullmatch(r"[ !#$&-~]+", SHOWN[name])
    ours = {f"published/{queued['upload']['id']}" for queued in answers.values()}
    assert set(files_below(uploads)) - set(stored) == ours
    assert files_outside_the_uploads(target.service.directory) == others
    tried(f"{len(SHOWN)} names", "each shown, 0 used as a path, 0 other files changed")


@pytest.mark.usefixtures("leaves_no_traces")
def test_a_file_name_with_control_characters_or_of_5000_characters_is_refused(
    target: Target, tried: Tried
) -> None:
    before = files_outside_the_uploads(target.service.directory)
    for name in REFUSED.values():
        marked = name and MARK.encode() + name
        target.refused(target.upload(form_of(file_part(marked))), 422, 400)
    assert files_outside_the_uploads(target.service.directory) == before
    tried(
        f"{len(REFUSED)} names that are too long or have control characters", "all refused, 0 files"
    )


NAMES = st.text(st.sampled_from("./\\:~%\0\r\n\"';\u202e\ud800a") | st.characters(), max_size=60)


@settings(max_examples=form(30, 5_000), deadline=None)
@given(name=NAMES)
def test_any_text_as_file_name_is_shown_without_a_path(target: Target, name: str) -> None:
    raw = name.encode("utf-8", "surrogatepass").replace(b'"', b'\\"')
    response = target.upload(form_of(file_part(raw)))
    if response.status_code == 202:
        target.service.wait_for(response.json()["id"])
        upload = response.json()["upload"]
        assert not set(upload["filename"]) & set("/\\\r\n\0\u202e")
        assert upload["filename"].strip(".")
    else:
        target.refused(response, 422, 400)


def plant_links(upload_id: str, uploads: Path, secret: Path) -> None:
    """Plant links to the secret in the places of the upload's file and thumbnail."""
    for folder in ("published", "thumbnails"):
        (uploads / folder / upload_id).symlink_to(secret)


def test_a_link_planted_before_the_upload_is_published_is_never_followed(
    tmp_path: Path, tried: Tried
) -> None:
    secret, uploads = tmp_path / "secret", tmp_path / "uploads"
    secret.write_text(MARK)
    content = picture()
    with TestClient(create_app(settings_in(tmp_path, worker_concurrency=0))) as client:
        queued = upload_of(content, "a.png", "image/png").send(client).json()
    upload_id = queued["upload"]["id"]
    plant_links(upload_id, uploads, secret)
    with TestClient(create_app(settings_in(tmp_path))) as client:
        wait_for(client, queued["id"])
        (thumbnail,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
        wait_for(client, thumbnail["id"])
        assert client.get(f"/uploads/{upload_id}/content").content == content
        assert client.get(f"/uploads/{upload_id}/thumbnail").content.startswith(b"\x89PNG")
    assert secret.read_text() == MARK
    tried("2 links planted before the upload", "replaced, their target unchanged")


def test_a_link_planted_in_the_place_of_an_upload_is_not_found(
    tmp_path: Path, tried: Tried
) -> None:
    secret, uploads = tmp_path / "secret", tmp_path / "uploads"
    secret.write_text(MARK)
    with TestClient(create_app(settings_in(tmp_path))) as client:
        queued = upload_of(b"Hello").send(client).json()
        upload_id = queued["upload"]["id"]
        wait_for(client, queued["id"])
        (uploads / "published" / upload_id).unlink()
        plant_links(upload_id, uploads, secret)
        for part in ("content", "thumbnail"):
            response = client.get(f"/uploads/{upload_id}/{part}")
            assert MARK not in str(problem_of(response, 404))
        assert client.delete(f"/uploads/{upload_id}").status_code == 204
    assert secret.read_text() == MARK
    assert files_below(uploads) == []
    tried("2 links planted in the place of an upload", "404, and the deletion removes the link")


# The negative control


def test_control_a_file_name_used_as_a_path_overwrites_other_files(
    tmp_path: Path, tried: Tried
) -> None:
    """Tutorials save an upload into a folder under its own file name."""
    uploads = tmp_path / "service" / "uploads"
    uploads.mkdir(parents=True)
    (tmp_path / "secret").write_text(MARK)
    (uploads / "link").symlink_to(tmp_path / "secret")
    app = FastAPI()

    @app.post("/upload", status_code=202)
    async def upload(file: UploadFile) -> None:
        (uploads / (file.filename or "")).write_bytes(await file.read())

    client = TestClient(app, raise_server_exceptions=False)
    before = files_outside_the_uploads(tmp_path / "service")
    names = ["../../eve", f"{tmp_path}/eve", "link"]
    for name in names:
        body = form_of(file_part(name.encode()))
        client.post("/upload", content=body, headers=FORM)
    after = files_outside_the_uploads(tmp_path / "service")
    changed = after.items() - before.items()
    tried(
        f"{len(names)} names used as paths, as in tutorials", f"{len(changed)} other files written"
    )
    assert {path for path, _ in changed} == {f"{tmp_path}/eve", f"{tmp_path}/secret"}
    assert (tmp_path / "secret").read_text() == "Hello"
