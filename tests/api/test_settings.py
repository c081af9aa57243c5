"""Settings: their defaults, and how a bad one stops the start."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import BadSettings, Settings, load_settings
from tests.support.service import PATIENCE, environment

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": 8000,
    "QUEUE_URL": "sqlite:///var/queue.db",
    "UPLOAD_URL": "file:var/uploads",
    "LOG_FILE": Path("var/log.txt"),
    "SMTP_HOST": "127.0.0.1",
    "SMTP_PORT": 1025,
    "SMTP_USERNAME": None,
    "SMTP_PASSWORD": None,
    "SMTP_SECURITY": "none",
    "SMTP_TIMEOUT": 30,
    "SMTP_DATA_TIMEOUT": 600,
    "SMTP_CONNECTIONS": 10,
    "MAIL_FROM": "notifications@example.com",
    "CATCHER": False,
    "TASK_TIMEOUT_SECONDS": 900,
    "LEASE_SECONDS": 30,
    "MAX_UPLOAD_BYTES": 1073741824,
    "MAX_BODY_BYTES": 1048576,
    "WORKER_CONCURRENCY": 10,
    "RETRY_ATTEMPTS": 8,
    "RETRY_BASE_SECONDS": 1,
    "RETRY_MAX_SECONDS": 3600,
    "SHUTDOWN_GRACE_SECONDS": 8,
    "RETENTION_DAYS": 7,
    "LOG_LEVEL": "INFO",
}
SECRET = "do-not-repeat-me"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine, and no `.env` of the working directory, counts here."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items(), ids=DEFAULTS)
def test_the_default_of(name: str, default: object) -> None:
    assert getattr(Settings(), name.lower()) == default


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("PORT=8001\nSMTP_PORT=2525\nNOT_OURS=1\n")
    monkeypatch.setenv("PORT", "8002")
    settings = Settings()
    assert (settings.port, settings.smtp_port, settings.host) == (8002, 2525, "127.0.0.1")


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PORT", "")
    assert Settings().smtp_port == 1025


@pytest.mark.parametrize(("is_terminal", "log_format"), [(True, "console"), (False, "json")])
def test_the_log_is_for_people_on_a_terminal_and_for_programs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, log_format: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert Settings().log_format == log_format


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PASSWORD", SECRET)
    settings = Settings()
    assert settings.smtp_password is not None
    assert settings.smtp_password.get_secret_value() == SECRET
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())


def test_nor_is_the_password_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_URL", url := f"postgresql://ada:{SECRET}@db:5433/queue")
    settings = Settings()
    assert settings.queue_url == url
    assert SECRET not in repr(settings)


BAD = [
    ("PORT", SECRET),
    ("PORT", "65536"),
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
    ("UPLOAD_URL", "s3://user:password@bucket"),
    ("UPLOAD_URL", "s3://bucket//prefix"),
    ("UPLOAD_URL", "s3://bucket/../prefix"),
    ("UPLOAD_URL", "s3://bucket/./prefix"),
    ("UPLOAD_URL", "s3://bucket/pre fix"),
    ("UPLOAD_URL", "s3://bucket/prefix?region=x"),
    ("UPLOAD_URL", "s3://bucket\n"),
    ("SMTP_PORT", "0"),
    ("SMTP_SECURITY", SECRET),
    ("SMTP_TIMEOUT", "nan"),
    ("SMTP_CONNECTIONS", "0"),
    ("MAIL_FROM", "nobody"),
    ("CATCHER", SECRET),
    ("LEASE_SECONDS", "0"),
    ("WORKER_CONCURRENCY", "-1"),
    ("RETRY_ATTEMPTS", "0"),
    ("RETRY_MAX_SECONDS", "inf"),
    ("MAX_BODY_BYTES", "1e999"),
    ("LOG_LEVEL", "LOUD"),
    ("LOG_FORMAT", "xml"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_named_in_one_line_and_never_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as end:
        load_settings()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"bad settings: {name}: ")
    assert SECRET not in line


@pytest.mark.parametrize(
    "url",
    [
        "file:uploads",
        "file:/uploads",
        "file:///uploads",
        "s3://bucket",
        "s3://bucket/",
        "s3://my.bucket-1/prefix",
        "s3://123/Some_prefix/v1.0/",
    ],
)
def test_a_store_may_be_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("UPLOAD_URL", url)
    assert load_settings().upload_url == url


@pytest.mark.parametrize(("size", "is_bad"), [(5 * 1024**3, False), (5 * 1024**3 + 1, True)])
def test_s3_takes_no_upload_that_it_could_not_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int, *, is_bad: bool
) -> None:
    monkeypatch.setenv("MAX_UPLOAD_BYTES", str(size))
    assert load_settings().max_upload_bytes == size
    monkeypatch.setenv("UPLOAD_URL", "s3://bucket")
    if is_bad:
        with pytest.raises(BadSettings):
            load_settings()
        assert "MAX_UPLOAD_BYTES: S3 copies at most 5 GiB" in capsys.readouterr().err
    else:
        assert load_settings().max_upload_bytes == size


def test_a_password_that_would_travel_in_clear_is_a_bad_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMTP_HOST", "192.0.2.1")
    monkeypatch.setenv("SMTP_USERNAME", "ada")
    monkeypatch.setenv("SMTP_PASSWORD", SECRET)
    with pytest.raises(BadSettings):
        load_settings()
    (line,) = capsys.readouterr().err.splitlines()
    assert "SMTP_SECURITY" in line
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
