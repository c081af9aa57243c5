"""Settings: their defaults and valid values. For bad settings, see tests/attacks."""

import sys
from pathlib import Path

import pytest

from app.settings import BadSettings, Settings, load_settings

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
    "SMTP_LOCAL_HOSTNAME": None,
    "MAIL_FROM": "notifications@example.com",
    "ENVIRONMENT": "development",
    "API_KEYS": None,
    "API_KEYS_FILE": None,
    "ALLOWED_RECIPIENTS": (),
    "RATE_LIMIT": None,
    "CLIENT_TIMEOUT_SECONDS": 10,
    "ROOT_PATH": None,
    "CORS_ORIGINS": (),
    "KEEP_ALIVE_SECONDS": 75,
    "CATCHER": False,
    "TASK_TIMEOUT_SECONDS": 900,
    "LEASE_SECONDS": 30,
    "MAX_UPLOAD_BYTES": 1073741824,
    "MAX_BODY_BYTES": 1048576,
    "MAX_BACKLOG": 1_000_000,
    "WORKER_CONCURRENCY": 10,
    "RETRY_ATTEMPTS": 8,
    "RETRY_BASE_SECONDS": 1,
    "RETRY_MAX_SECONDS": 900,
    "MAIL_RETRY_SECONDS": 345_600,
    "SHUTDOWN_GRACE_SECONDS": 8,
    "RETENTION_DAYS": 7,
    "RETENTION_FAILED_DAYS": 30,
    "ACCESS_LOG": True,
    "HIDE_ARGUMENTS": False,
    "LOG_LEVEL": "INFO",
}


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the environment variables of this machine, and change to a directory without .env."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items(), ids=DEFAULTS)
def test_the_default_of_a_setting(name: str, default: object) -> None:
    assert getattr(Settings(), name.lower()) == default


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("PORT=8001\nSMTP_PORT=2525\nNOT_OURS=1\n")
    monkeypatch.setenv("PORT", "8002")
    settings = Settings()
    assert (settings.port, settings.smtp_port, settings.host) == (8002, 2525, "127.0.0.1")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PORT", "")
    assert Settings().smtp_port == 1025


@pytest.mark.parametrize(("is_terminal", "log_format"), [(True, "console"), (False, "json")])
def test_the_log_is_readable_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, log_format: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert Settings().log_format == log_format


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
def test_a_valid_upload_url_is_accepted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("UPLOAD_URL", url)
    assert load_settings().upload_url == url


@pytest.mark.parametrize(("size", "is_bad"), [(5 * 1024**3, False), (5 * 1024**3 + 1, True)])
def test_the_limit_of_an_upload_in_s3_is_the_size_that_s3_can_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int, *, is_bad: bool
) -> None:
    monkeypatch.setenv("MAX_UPLOAD_BYTES", str(size))
    assert load_settings().max_upload_bytes == size
    monkeypatch.setenv("UPLOAD_URL", "s3://bucket")
    if is_bad:
        with pytest.raises(BadSettings):
            load_settings()
        assert "MAX_UPLOAD_BYTES: must be at most 5368709120 with S3" in capsys.readouterr().err
    else:
        assert load_settings().max_upload_bytes == size


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("*@example.com", ("*@example.com",)),
        (" *@Example.COM , Ada@example.org", ("*@example.com", "ada@example.org")),
        ("*@*.example.com", ("*@*.example.com",)),
        ("*@mail-*.example.com", ("*@mail-*.example.com",)),
        ("*@bücher.example", ("*@xn--bcher-kva.example",)),
        ("*@XN--BCHER-KVA.example", ("*@xn--bcher-kva.example",)),
        ("*@*.bücher.example", ("*@*.xn--bcher-kva.example",)),
        ("*@*", ("*@*",)),
    ],
)
def test_allowed_recipients_are_normalised(
    monkeypatch: pytest.MonkeyPatch, text: str, patterns: tuple[str, ...]
) -> None:
    monkeypatch.setenv("ALLOWED_RECIPIENTS", text)
    assert load_settings().allowed_recipients == patterns


@pytest.mark.parametrize("rate", ["1/second", "600/minute", "999999999/hour", "10/day"])
def test_a_valid_rate_limit_is_accepted(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("RATE_LIMIT", rate)
    assert load_settings().rate_limit == rate


@pytest.mark.parametrize("path", ["/afterward", "/a/b", "/v1.0", "/~ada/mail_1-2"])
def test_a_valid_root_path_is_accepted(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("ROOT_PATH", path)
    assert load_settings().root_path == path


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://app.example.com", ("https://app.example.com",)),
        ("https://App.example.com:443 ,http://a:80", ("https://app.example.com", "http://a")),
        ("http://localhost:3000,http://[::1]:3000", ("http://localhost:3000", "http://[::1]:3000")),
        ("https://a:80,http://a:443", ("https://a:80", "http://a:443")),
        ("https://bücher.example", ("https://xn--bcher-kva.example",)),
        ("capacitor://localhost", ("capacitor://localhost",)),
    ],
)
def test_origins_are_normalised_as_a_browser_writes_them(
    monkeypatch: pytest.MonkeyPatch, text: str, origins: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", text)
    assert load_settings().cors_origins == origins


def test_all_origins_can_be_allowed_only_with_api_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", "*")
    with pytest.raises(BadSettings):
        load_settings()
    assert "CORS_ORIGINS: * needs API_KEYS" in capsys.readouterr().err
    monkeypatch.setenv("API_KEYS", "x")
    assert load_settings().cors_origins == ("*",)


def test_the_client_timeout_may_be_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_TIMEOUT_SECONDS", "0.5")
    assert load_settings().client_timeout_seconds == 0.5


@pytest.mark.parametrize(
    ("host", "on_loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("localhost.example.com", False),
    ],
)
def test_a_loopback_host_is_recognised(host: str, *, on_loopback: bool) -> None:
    assert Settings(host=host).on_loopback is on_loopback


@pytest.mark.parametrize(
    "host",
    [
        "smtp.example.com",
        "smtp.example.com.",
        "smtp",
        "my_mail",
        "bücher.example",
        "192.0.2.1",
        "::1",
        "fe80::1%eth0",
    ],
)
def test_a_valid_smtp_host_is_accepted(host: str) -> None:
    assert Settings(smtp_host=host).smtp_host == host


@pytest.mark.parametrize("name", ["web1", "web1.example.com", "[192.0.2.1]", "[IPv6:2001:db8::1]"])
def test_a_valid_name_for_ehlo_is_accepted(name: str) -> None:
    assert Settings(smtp_local_hostname=name).smtp_local_hostname == name


@pytest.mark.parametrize(
    ("text", "sender"),
    [
        ("Ada@Example.COM", "Ada@example.com"),
        ("notifications@bücher.example", "notifications@xn--bcher-kva.example"),
        ("ada@corp.local", "ada@corp.local"),
        ("ada@site.test", "ada@site.test"),
    ],
)
def test_the_sender_is_normalised_like_a_recipient(text: str, sender: str) -> None:
    assert Settings(mail_from=text).mail_from == sender


def test_the_service_is_open_until_it_has_api_keys() -> None:
    assert Settings().is_open
    assert not Settings(api_keys="x").is_open
    assert not Settings(api_keys_file="keys.txt").is_open
