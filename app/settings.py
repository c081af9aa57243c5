"""The settings, from environment variables, `.env`, or files; `.env.example` describes each."""

import contextlib
import os
import re
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

import idna
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from app.listening import is_loopback
from app.mail.message import address

SECRETS = Path("/run/secrets")  # containers get settings as files here, named in lower case
LARGEST_PORT = 65535
MOST_S3_COPY_BYTES = 5 << 30  # in one request; S3 publishes an upload with one copy

Environment = Literal["development", "production"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# 0 would not mean that there is no limit: the reply to each mail would come too late, so the mail
# would be sent again and again.
Timeout = Annotated[float, Field(ge=0.1, allow_inf_nan=False)]


# Each function below checks the text of one kind of setting. It returns the text, normalised where
# there are several ways to write the same, or raises ValueError with the end of a sentence that
# begins with the name of the setting.


# Not urlsplit: it takes several hosts for one, and refuses an IPv6 address among them.
_POSTGRES_URL = re.compile(r"postgres(?:ql)?://(?:[^/?#]*@)?(?P<hosts>[^/?#@]*)/[^?#]+(?:\?.*)?")
# One of the hosts: a name, an IP address, or nothing for the Unix socket; and optionally a port.
_DATABASE_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:,@/]*)(?::([1-9]\d{0,4}))?", re.ASCII)


def _check_queue_url(url: str) -> str:
    if url.isascii() and (postgres := _POSTGRES_URL.fullmatch(url)):
        hosts = [_DATABASE_HOST.fullmatch(host) for host in postgres["hosts"].split(",")]
        if all(host and int(host[2] or 1) <= LARGEST_PORT for host in hosts):
            return url
    if not url.startswith("sqlite:///") or url == "sqlite:///":
        raise ValueError(
            "must be sqlite:///PATH (four slashes for an absolute path) "
            "or postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return url


_FILE_URL = re.compile(r"file:(?!//[^/]).+")
# A bucket name by the rules of S3, and optionally a prefix. The parts of the prefix may not begin
# with a dot, so that no system takes them for a relative path.
_S3_URL = re.compile(
    r"s3://(?!.*\.\.|\d+(\.\d+){3}(/|$))[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w-][\w.-]*)*/?",
    re.ASCII,
)


def _check_upload_url(url: str) -> str:
    if not _FILE_URL.fullmatch(url) and not _S3_URL.fullmatch(url):
        raise ValueError(
            "must be file:PATH (file:/PATH for an absolute path), s3://BUCKET or s3://BUCKET/PREFIX"
        )
    return url


# A name that getaddrinfo accepts, after IDNA. Names in container networks may have underscores.
_HOST = re.compile(
    r"([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.?", re.IGNORECASE
)
_EHLO_NAME = re.compile(
    r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE
)
_MOST_NAME_LENGTH = 253  # RFC 1035, 2.3.4


def _check_smtp_host(host: str) -> str:
    if not _is_ip_address(host):
        try:
            name = host.encode("idna").decode("ascii")
        except UnicodeError:  # a label that is empty or too long
            name = ""
        if len(name) > _MOST_NAME_LENGTH or not _HOST.fullmatch(name):
            raise ValueError("must be a host name or an IP address, without brackets and port")
    return host


def _check_ehlo_name(name: str) -> str:
    """Check a host name or an address literal (RFC 5321, 4.1.3)."""
    literal = re.fullmatch(r"\[(?:IPv6:)?(.*)\]", name, re.ASCII)
    if literal and _is_ip_address(literal[1]) and (":" in literal[1]) == ("IPv6:" in name):
        return name
    if len(name) > _MOST_NAME_LENGTH or not _EHLO_NAME.fullmatch(name):
        raise ValueError("must be a host name, or an IP address in brackets such as [192.0.2.1]")
    return name


def _is_ip_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


_LABEL_WITH_STARS = re.compile(r"[a-z0-9-]*\*[a-z0-9*-]*")


def _split_patterns(text: object) -> object:
    """Parse `*@example.com, ada@example.org` into a tuple of normalised patterns."""
    return tuple(map(_normalise_pattern, text.split(","))) if isinstance(text, str) else text


def _normalise_pattern(text: str) -> str:
    """Return a pattern for addresses in lower case, with its domain after IDNA."""
    local, at, domain = text.strip().lower().rpartition("@")
    try:
        labels = [
            label if _LABEL_WITH_STARS.fullmatch(label) else idna.encode(label, uts46=True).decode()
            for label in domain.split(".")
        ]
    except idna.IDNAError:
        labels = []
    if not (local and at and labels) or "@" in local or not local.isprintable():
        raise ValueError("must be patterns separated by commas, such as *@example.com")
    return f"{local}@{'.'.join(labels)}"


_RATE_LIMIT = re.compile(r"[1-9]\d{0,8}/(second|minute|hour|day)", re.ASCII)


def _check_rate_limit(text: str) -> str:
    if not _RATE_LIMIT.fullmatch(text):
        raise ValueError(
            "must be a number of requests and a unit (second, minute, hour or day), "
            "such as 600/minute"
        )
    return text


# Percent signs are not allowed, because the prefix is compared with decoded paths.
_ROOT_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")


def _check_root_path(path: str) -> str:
    if not _ROOT_PATH.fullmatch(path):
        raise ValueError(
            "must be a path such as /afterward: it begins with / and does not end with it, "
            "and has only letters, digits and -._~ between slashes"
        )
    return path


_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def _split_origins(text: object) -> object:
    """Parse `https://app.example.com, http://localhost:3000` into a tuple of origins."""
    return tuple(map(_normalise_origin, text.split(","))) if isinstance(text, str) else text


def _normalise_origin(text: str) -> str:
    """Return an origin as browsers write it (RFC 6454, 6.2): lower case, without a default port."""
    origin = text.strip().lower()
    if origin == "*":
        return origin
    if match := _ORIGIN.fullmatch(origin):
        scheme, host, port = match.groups()
        with contextlib.suppress(idna.IDNAError):
            host = host if host.isascii() else idna.encode(host, uts46=True).decode()
            is_default = port is None or port == _DEFAULT_PORTS.get(scheme)
            return f"{scheme}://{host}" if is_default else f"{scheme}://{host}:{port}"
    raise ValueError("must be origins separated by commas, such as https://app.example.com")


def _default_log_format() -> Literal["console", "json"]:
    return "console" if sys.stderr.isatty() else "json"


class Settings(BaseSettings):
    """The settings. A field has the name of its environment variable, in lower case."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=LARGEST_PORT)

    # The URL may contain a password, so repr() leaves it out.
    queue_url: Annotated[str, AfterValidator(_check_queue_url)] = Field(
        "sqlite:///var/queue.db", repr=False
    )
    upload_url: Annotated[str, AfterValidator(_check_upload_url)] = "file:var/uploads"
    log_file: Path = Path("var/log.txt")

    smtp_host: Annotated[str, AfterValidator(_check_smtp_host)] = "127.0.0.1"
    smtp_port: int = Field(1025, ge=1, le=LARGEST_PORT)
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    smtp_security: Literal["none", "starttls", "tls"] = "none"
    smtp_timeout: Timeout = 30
    smtp_data_timeout: Timeout = 600
    smtp_connections: int = Field(10, ge=1, le=1000)
    smtp_local_hostname: Annotated[str, AfterValidator(_check_ehlo_name)] | None = None
    mail_from: Annotated[str, AfterValidator(address)] = "notifications@example.com"

    environment: Environment = "development"
    api_keys: SecretStr | None = None
    api_keys_file: Path | None = None
    allowed_recipients: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_patterns)] = ()
    rate_limit: Annotated[str, AfterValidator(_check_rate_limit)] | None = None
    client_timeout_seconds: Timeout = 10
    keep_alive_seconds: int = Field(75, ge=1)

    root_path: Annotated[str, AfterValidator(_check_root_path)] | None = None
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_origins)] = ()

    catcher: bool = False
    catcher_directory: Path = Path("var/inbox")

    task_timeout_seconds: Timeout = 900
    lease_seconds: float = Field(30, ge=1, allow_inf_nan=False)
    max_upload_bytes: int = Field(1 << 30, ge=0)
    max_body_bytes: int = Field(1 << 20, ge=0)
    max_backlog: int = Field(1_000_000, ge=1)
    worker_concurrency: int = Field(10, ge=0, le=1000)
    retry_attempts: int = Field(8, ge=1)
    retry_base_seconds: Seconds = 1
    retry_max_seconds: Seconds = 900
    mail_retry_seconds: Seconds = 4 * 24 * 3600
    shutdown_grace_seconds: Seconds = 8
    retention_days: Seconds = 7
    retention_failed_days: Seconds = 30

    access_log: bool = True
    hide_arguments: bool = False
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = Field(default_factory=_default_log_format)

    @property
    def is_open(self) -> bool:
        """Whether the service has no API keys."""
        return self.api_keys is None and self.api_keys_file is None

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the API."""
        return is_loopback(self.host)

    @model_validator(mode="after")
    def _check_smtp_login(self) -> Self:
        if self.smtp_username and self.catcher:
            raise ValueError(
                "SMTP_USERNAME: must be empty with CATCHER=true, whose server knows no login"
            )
        if self.smtp_username and self.smtp_security == "none" and not is_loopback(self.smtp_host):
            raise ValueError(
                "SMTP_SECURITY: must be starttls or tls, or the password is sent unencrypted"
            )
        return self

    @model_validator(mode="after")
    def _check_origins(self) -> Self:
        if "*" in self.cors_origins and self.is_open:
            raise ValueError(
                "CORS_ORIGINS: * needs API_KEYS, because otherwise every web page in a browser on "
                "this machine could use the service"
            )
        return self

    @model_validator(mode="after")
    def _check_production(self) -> Self:
        if self.environment == "production":
            if self.is_open:
                raise ValueError("API_KEYS: this or API_KEYS_FILE must be set in production")
            if self.catcher:
                raise ValueError(
                    "CATCHER: must be false in production, because the catcher delivers no mail"
                )
        return self

    @model_validator(mode="after")
    def _check_s3_limit(self) -> Self:
        if self.upload_url.startswith("s3:") and self.max_upload_bytes > MOST_S3_COPY_BYTES:
            raise ValueError(
                "MAX_UPLOAD_BYTES: must be at most 5368709120 with S3, because S3 copies at most "
                "5 GiB at once"
            )
        return self


class BadSettings(SystemExit):
    """Unusable settings. The process prints the message and ends with exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        print(f"bad settings: {message}", file=sys.stderr)  # noqa: T201


def load_settings() -> Settings:
    """Read the settings.

    Raises BadSettings if one is invalid. The message names the setting, but never its value.
    """
    # Outside of containers the directory is missing, or it belongs to another program.
    secrets = SECRETS if os.access(SECRETS, os.R_OK | os.X_OK) else None
    try:
        return Settings(_secrets_dir=secrets)
    except ValidationError as error:
        raise BadSettings("; ".join(_messages(error))) from None
    except SettingsError as error:  # a file could not be read
        raise BadSettings(f"{error} ({error.__cause__})") from error
    except OSError as error:
        raise BadSettings(str(error)) from error
    except UnicodeDecodeError:  # not passed on, because it contains the whole file
        raise BadSettings(".env, or a file with a secret, is not encoded in UTF-8") from None


def _messages(error: ValidationError) -> list[str]:
    """Return "NAME: reason" for each invalid setting."""
    messages = []
    for details in error.errors(include_input=False, include_url=False):
        names = [str(name).upper() for name in details["loc"][:1]]  # empty if it concerns several
        reason = details["msg"].removeprefix("Value error, ")
        messages.append(": ".join([*names, reason]))
    return messages
