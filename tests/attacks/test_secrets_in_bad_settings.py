"""Bad settings in a variable, in `.env`, or in a file; most of the values contain a secret.

The process ends with exit code 2 and one line that names the variable, and never its value.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import PostgresDsn, ValidationError
from pydantic_settings import BaseSettings

from app import settings as settings_module
from app.main import create_app
from app.settings import BadSettings, Settings, load_settings
from tests.support.service import PATIENCE, Process, environment, free_port, until
from tests.support.torture import Tried

SECRET = "do-not-repeat-me"

BAD = [
    ("HOST", "0.0.0.0", {"ENVIRONMENT": "production"}, "API_KEYS"),
    ("API_KEYS", f"ada: {SECRET}", {"ENVIRONMENT": "production", "CATCHER": "true"}, "CATCHER"),
    ("API_KEYS", f"ada: {SECRET}é", {}, "API_KEYS"),
    ("API_KEYS", f"ada: {SECRET} # {SECRET}", {}, "API_KEYS"),
    ("API_KEYS", f"{SECRET}:", {}, "API_KEYS"),
    ("API_KEYS", f"ada: {SECRET}, eve: {SECRET}", {}, "API_KEYS"),
    ("API_KEYS", ",", {}, "API_KEYS"),
    ("API_KEYS_FILE", f"/nowhere/{SECRET}", {}, "API_KEYS_FILE"),
    ("ENVIRONMENT", SECRET, {}, "ENVIRONMENT"),
    ("ENVIRONMENT", "production", {}, "API_KEYS"),
    ("SMTP_PASSWORD", SECRET, {"SMTP_USERNAME": "ada", "SMTP_HOST": "192.0.2.1"}, "SMTP_SECURITY"),
    ("SMTP_PASSWORD", SECRET, {"SMTP_USERNAME": "ada", "CATCHER": "true"}, "SMTP_USERNAME"),
    *(
        (name, value, {}, name)
        for name, value in [
            ("PORT", SECRET),
            ("PORT", "65536"),
            ("KEEP_ALIVE_SECONDS", "0"),
            ("ACCESS_LOG", SECRET),
            ("QUEUE_URL", f"mysql://root:{SECRET}@db/queue"),
            ("QUEUE_URL", "sqlite:///"),
            ("QUEUE_URL", f"postgresql://ada:{SECRET}@db"),
            ("QUEUE_URL", f"postgresql://ada:{SECRET}@db:70000/queue"),
            ("QUEUE_URL", f"postgresql://ada:{SECRET}@[db/queue"),
            ("QUEUE_URL", f"postgresql://ada:{SECRET}\N{ACCOUNT OF}@db/queue"),
            ("UPLOAD_URL", f"ftp://{SECRET}@host/"),
            ("UPLOAD_URL", f"file://{SECRET}/uploads"),
            ("UPLOAD_URL", "s3://"),
            ("UPLOAD_URL", "s3:///prefix"),
            ("UPLOAD_URL", f"s3://{SECRET.upper()}"),
            ("UPLOAD_URL", "s3://ab"),
            ("UPLOAD_URL", f"s3://{'a' * 64}"),
            ("UPLOAD_URL", "s3://-ab"),
            ("UPLOAD_URL", "s3://a..b"),
            ("UPLOAD_URL", "s3://192.0.2.1/prefix"),
            ("UPLOAD_URL", f"s3://user:{SECRET}@bucket"),
            ("UPLOAD_URL", "s3://bucket//prefix"),
            ("UPLOAD_URL", "s3://bucket/../prefix"),
            ("UPLOAD_URL", "s3://bucket/./prefix"),
            ("UPLOAD_URL", "s3://bucket/pre fix"),
            ("UPLOAD_URL", "s3://bucket/prefix?region=x"),
            ("SMTP_PORT", "0"),
            ("SMTP_SECURITY", SECRET),
            ("SMTP_TIMEOUT", "nan"),
            ("SMTP_TIMEOUT", "0"),
            ("SMTP_DATA_TIMEOUT", "0"),
            ("TASK_TIMEOUT_SECONDS", "0.09"),
            ("SMTP_CONNECTIONS", "0"),
            ("MAIL_FROM", SECRET),
            ("MAIL_FROM", "jörg@example.com"),
            ("MAIL_FROM", "=?utf-8?q?ada?=@example.com"),
            ("SMTP_HOST", "smtp..example.com"),
            ("SMTP_HOST", ".example.com"),
            ("SMTP_HOST", "smtp.example.com:25"),
            ("SMTP_HOST", "smtp://smtp.example.com"),
            ("SMTP_HOST", "smtp example.com"),
            ("SMTP_HOST", "[::1]"),
            ("SMTP_HOST", f"{'x' * 64}.example.com"),
            ("SMTP_HOST", ".".join(["x" * 60] * 5)),
            ("SMTP_LOCAL_HOSTNAME", "web_1.example.com"),
            ("SMTP_LOCAL_HOSTNAME", "web1\r\nRSET"),
            ("SMTP_LOCAL_HOSTNAME", "[web1]"),
            ("SMTP_LOCAL_HOSTNAME", "[2001:db8::1]"),
            ("SMTP_LOCAL_HOSTNAME", "[IPv6:192.0.2.1]"),
            ("ALLOWED_RECIPIENTS", SECRET),
            ("ALLOWED_RECIPIENTS", f"*@example.com,{SECRET}"),
            ("ALLOWED_RECIPIENTS", "*@example.com,"),
            ("ALLOWED_RECIPIENTS", "*@"),
            ("ALLOWED_RECIPIENTS", "@example.com"),
            ("ALLOWED_RECIPIENTS", "a@b@example.com"),
            ("ALLOWED_RECIPIENTS", "*@exa_mple.com"),
            ("ALLOWED_RECIPIENTS", "*@example..com"),
            ("ALLOWED_RECIPIENTS", "*@example.com;*@example.org"),
            ("RATE_LIMIT", SECRET),
            ("RATE_LIMIT", "0/minute"),
            ("RATE_LIMIT", "-1/minute"),
            ("RATE_LIMIT", "1/week"),
            ("RATE_LIMIT", "1 per minute"),
            ("RATE_LIMIT", "1/minute,2/hour"),
            ("RATE_LIMIT", "9999999999/minute"),
            ("CLIENT_TIMEOUT_SECONDS", SECRET),
            ("CLIENT_TIMEOUT_SECONDS", "0"),
            ("CLIENT_TIMEOUT_SECONDS", "inf"),
            ("ROOT_PATH", SECRET),
            ("ROOT_PATH", "/"),
            ("ROOT_PATH", "/a/"),
            ("ROOT_PATH", "//a"),
            ("ROOT_PATH", "/a//b"),
            ("ROOT_PATH", "/a/../b"),
            ("ROOT_PATH", "/a?b"),
            ("ROOT_PATH", "/a#b"),
            ("ROOT_PATH", "/a b"),
            ("ROOT_PATH", "/a%20b"),
            ("ROOT_PATH", "/é"),
            ("ROOT_PATH", "https://example.com/a"),
            ("CORS_ORIGINS", SECRET),
            ("CORS_ORIGINS", "app.example.com"),
            ("CORS_ORIGINS", "https://app.example.com/"),
            ("CORS_ORIGINS", "https://app.example.com/app"),
            ("CORS_ORIGINS", "https://*.example.com"),
            ("CORS_ORIGINS", "https://ada@example.com"),
            ("CORS_ORIGINS", "https://app.example.com:port"),
            ("CORS_ORIGINS", "https://a https://b"),
            ("CORS_ORIGINS", "https://a,"),
            ("CORS_ORIGINS", "null"),
            ("CORS_ORIGINS", "*"),
            ("MAX_BACKLOG", "0"),
            ("CATCHER", SECRET),
            ("LEASE_SECONDS", "0"),
            ("WORKER_CONCURRENCY", "-1"),
            ("RETRY_ATTEMPTS", "0"),
            ("RETRY_MAX_SECONDS", "inf"),
            ("MAIL_RETRY_SECONDS", "inf"),
            ("MAIL_RETRY_SECONDS", "-1"),
            ("MAIL_RETRY_SECONDS", "four days"),
            ("MAX_BODY_BYTES", "1e999"),
            ("LOG_LEVEL", SECRET),
            ("LOG_FORMAT", "xml"),
        ]
    ),
]


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the environment variables of this machine, and change to an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings_module, "SECRETS", tmp_path / "secrets")
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def in_a_variable(name: str, value: str) -> None:
    os.environ[name] = value  # the caller's monkeypatch restores it


def in_dot_env(name: str, value: str) -> None:
    with Path(".env").open("a") as file:
        file.write(f"{name}='{value}'\n")


def in_a_file(name: str, value: str) -> None:
    settings_module.SECRETS.mkdir(exist_ok=True)
    (settings_module.SECRETS / name.lower()).write_text(value + "\n")


@pytest.mark.parametrize("put", [in_a_variable, in_dot_env, in_a_file])
def test_a_bad_setting_is_named_in_one_line_and_never_repeated(
    put: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tried: Tried,
) -> None:
    for name, value, others, blamed in BAD:
        with monkeypatch.context() as patch:
            for other in Settings.model_fields:  # so that monkeypatch restores them all
                patch.setenv(other.upper(), "")
            for other, text in (others | {name: value}).items():
                put(other, text)
            with pytest.raises(BadSettings) as end:
                create_app(load_settings())
        for file in (Path(".env"), *settings_module.SECRETS.glob("*")):
            file.unlink(missing_ok=True)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert line.startswith(f"bad settings: {blamed}: "), (name, value, line)
        assert SECRET.lower() not in line.lower()
    tried(f"{len(BAD)} bad settings {put.__name__.replace('_', ' ')}", "0 values shown")


def test_a_line_break_in_a_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line break at the end of a file is allowed."""
    monkeypatch.setenv("UPLOAD_URL", "s3://bucket\n")
    with pytest.raises(BadSettings):
        load_settings()
    assert capsys.readouterr().err.startswith("bad settings: UPLOAD_URL: ")


def test_an_empty_file_is_a_bad_setting_and_does_not_mean_the_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("queue_url", "allowed_recipients", "api_keys"):
        in_a_file(name, "")
        with pytest.raises(BadSettings):
            create_app(load_settings())
        assert capsys.readouterr().err.startswith(f"bad settings: {name.upper()}: ")
        (settings_module.SECRETS / name).unlink()


def test_a_file_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    in_a_file("queue_url", "x")
    monkeypatch.setattr(Path, "read_text", refuse)  # because root can read every file
    with pytest.raises(BadSettings):
        load_settings()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Permission denied: '{settings_module.SECRETS / 'queue_url'}'" in line


@pytest.mark.parametrize("name", [".env", "secrets/smtp_password"])
def test_a_file_that_is_not_utf_8_is_reported_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / name).write_bytes(b"SMTP_PASSWORD=\xff" + SECRET.encode())
    with pytest.raises(BadSettings):
        load_settings()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bad settings: ")
    assert "utf-8" in line.lower()
    assert SECRET not in line


@pytest.mark.parametrize(
    "command",
    [["app"], ["app", "serve"], ["app", "worker"], ["app", "catcher"], ["uvicorn", "app.main:app"]],
    ids=" ".join,
)
def test_no_command_starts_with_a_bad_setting(command: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment(queue_url=f"mysql://root:{SECRET}@db/queue"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert line.startswith("bad settings: QUEUE_URL: ")
    assert SECRET not in line


# Valid settings of a database or a store that cannot be reached


NOWHERE = {
    "a database": ({"queue_url": f"postgresql://ada:{SECRET}@127.0.0.1:1/queue"}, "127.0.0.1:1"),
    "a database, badly asked": (
        {"queue_url": f"postgresql://ada:{SECRET}@127.0.0.1:1/queue?sslmode=x"},
        "QUEUE_URL",
    ),
    "a key of S3 alone": (
        {"upload_url": "s3://bucket", "aws_access_key_id": SECRET},
        "SecretAccessKey",
    ),
    "an endpoint that is none": (
        {
            "upload_url": "s3://bucket",
            "aws_access_key_id": "x",
            "aws_secret_access_key": SECRET,
            "aws_endpoint_url": f"http://ada:{SECRET}@127.0.0.1:1",
        },
        "AWS_ENDPOINT_URL",
    ),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_no_secret_is_logged_when_a_database_or_a_store_cannot_be_reached(
    name: str, tmp_path: Path
) -> None:
    settings, said = NOWHERE[name]
    command = (sys.executable, "-m", "app")
    with Process(tmp_path, command=command, port=free_port(), **settings) as process:
        until(lambda: said in process.log or process.ended, within=PATIENCE)
        assert said in process.log
        assert SECRET not in process.log
        assert "Traceback" not in process.log


def test_the_repr_of_the_settings_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PASSWORD", SECRET)
    monkeypatch.setenv("API_KEYS", SECRET)
    monkeypatch.setenv("QUEUE_URL", url := f"postgresql://ada:{SECRET}@db:5433/queue")
    settings = Settings()
    assert settings.smtp_password is not None
    assert settings.smtp_password.get_secret_value() == SECRET
    assert settings.queue_url == url
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert SECRET not in str(settings.model_dump(exclude={"queue_url"}))


# Negative control: plain pydantic-settings


def test_control_plain_settings_show_a_refused_value(
    monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    class Naive(BaseSettings):
        queue_url: PostgresDsn

    monkeypatch.setenv("QUEUE_URL", f"mysql://root:{SECRET}@db/queue")
    with pytest.raises(ValidationError) as error:
        Naive()
    assert SECRET in str(error.value)
    tried("plain pydantic-settings, a bad URL", "the password is in the error")
