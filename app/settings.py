"""Every setting, from the environment, `.env`, or files; `.env.example` says what each is for."""

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

from app.mail.message import address

SECRETS = Path("/run/secrets")  # where containers get settings as files, named in lower case
LARGEST_PORT = 65535
S3_COPIES_AT_MOST = 5 << 30  # bytes, in the one request that publishes an upload

Environment = Literal["development", "production"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# Not urlsplit: it takes several hosts for one, and refuses an IPv6 address among them.
_POSTGRES_URL = re.compile(r"postgres(?:ql)?://(?:[^/?#]*@)?(?P<hosts>[^/?#@]*)/[^?#]+(?:\?.*)?")
# One host of several, with its port if it has one: a name, an address, or none for the socket.
_DATABASE_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:,@/]*)(?::([1-9]\d{0,4}))?", re.ASCII)


def _queue_url(url: str) -> str:
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


_STARRED = re.compile(r"[a-z0-9-]*\*[a-z0-9*-]*")
_RATE = re.compile(r"[1-9]\d{0,8}/(second|minute|hour|day)", re.ASCII)
_FILE_URL = re.compile(r"file:(?!//[^/]).+")
# S3's rules for the name of a bucket, and a prefix of names that no system takes amiss.
_S3_URL = re.compile(
    r"s3://(?!.*\.\.|\d+(\.\d+){3}(/|$))[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w-][\w.-]*)*/?",
    re.ASCII,
)


def _upload_url(url: str) -> str:
    if not _FILE_URL.fullmatch(url) and not _S3_URL.fullmatch(url):
        raise ValueError(
            "must be file:PATH (file:/PATH for an absolute path), s3://BUCKET or s3://BUCKET/PREFIX"
        )
    return url


# A name as getaddrinfo takes it, after IDNA. Container networks have names with underscores.
_HOST = re.compile(
    r"([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.?", re.IGNORECASE
)
_EHLO_NAME = re.compile(
    r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE
)
_NAME_LENGTH = 253  # RFC 1035, 2.3.4


def _smtp_host(host: str) -> str:
    if not _is_address(host):
        try:
            name = host.encode("idna").decode("ascii")
        except UnicodeError:  # an empty label, or one that is too long
            name = ""
        if len(name) > _NAME_LENGTH or not _HOST.fullmatch(name):
            raise ValueError(
                "must be the name or the address of a host, without brackets and without a port"
            )
    return host


def _ehlo_name(name: str) -> str:
    """A host name, or an address literal (RFC 5321, 4.1.3)."""
    literal = re.fullmatch(r"\[(?:IPv6:)?(.*)\]", name, re.ASCII)
    if literal and _is_address(literal[1]) and (":" in literal[1]) == ("IPv6:" in name):
        return name
    if len(name) > _NAME_LENGTH or not _EHLO_NAME.fullmatch(name):
        raise ValueError("must be a host name, or an address in brackets such as [192.0.2.1]")
    return name


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _patterns(text: object) -> object:
    """`*@example.com, ada@example.org` as a tuple, the domains in lower case and after IDNA."""
    return tuple(map(_pattern, text.split(","))) if isinstance(text, str) else text


def _pattern(text: str) -> str:
    local, at, domain = text.strip().lower().rpartition("@")
    try:
        labels = [
            label if _STARRED.fullmatch(label) else idna.encode(label, uts46=True).decode()
            for label in domain.split(".")
        ]
    except idna.IDNAError:
        labels = []
    if not (local and at and labels) or "@" in local or not local.isprintable():
        raise ValueError("must be patterns separated by commas, such as *@example.com")
    return f"{local}@{'.'.join(labels)}"


def _rate(text: str) -> str:
    if not _RATE.fullmatch(text):
        raise ValueError("must be a number of requests and a time, such as 600/minute")
    return text


# Without a percent sign: the prefix is compared with paths that are decoded.
_ROOT_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")


def _root_path(path: str) -> str:
    if not _ROOT_PATH.fullmatch(path):
        raise ValueError(
            "must be a path such as /afterward: it begins with / and does not end with it, "
            "and has letters, digits and -._~ between"
        )
    return path


_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def _origins(text: object) -> object:
    """Parse `https://app.example.com, http://localhost:3000` into a tuple of origins."""
    return tuple(map(_origin, text.split(","))) if isinstance(text, str) else text


def _origin(text: str) -> str:
    """Write an origin as browsers do (RFC 6454, 6.2): in lower case, without a default port."""
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


def _log_format() -> Literal["console", "json"]:
    return "console" if sys.stderr.isatty() else "json"


class Settings(BaseSettings):
    """Field names are the variables' names, in lower case."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)

    # It may hold a password, so it is not shown.
    queue_url: Annotated[str, AfterValidator(_queue_url)] = Field(
        "sqlite:///var/queue.db", repr=False
    )
    upload_url: Annotated[str, AfterValidator(_upload_url)] = "file:var/uploads"
    log_file: Path = Path("var/log.txt")

    smtp_host: Annotated[str, AfterValidator(_smtp_host)] = "127.0.0.1"
    smtp_port: int = Field(1025, ge=1, le=65535)
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    smtp_security: Literal["none", "starttls", "tls"] = "none"
    smtp_timeout: Seconds = 30
    smtp_data_timeout: Seconds = 600
    smtp_connections: int = Field(10, ge=1, le=1000)
    smtp_local_hostname: Annotated[str, AfterValidator(_ehlo_name)] | None = None
    mail_from: Annotated[str, AfterValidator(address)] = "notifications@example.com"

    environment: Environment = "development"
    api_keys: SecretStr | None = None
    api_keys_file: Path | None = None
    allowed_recipients: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_patterns)] = ()
    rate_limit: Annotated[str, AfterValidator(_rate)] | None = None
    client_timeout_seconds: float = Field(10, ge=0.1, allow_inf_nan=False)
    keep_alive_seconds: int = Field(75, ge=1)

    root_path: Annotated[str, AfterValidator(_root_path)] | None = None
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)] = ()

    catcher: bool = False
    catcher_directory: Path = Path("var/inbox")

    task_timeout_seconds: Seconds = 900
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

    access_log: bool = True
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = Field(default_factory=_log_format)

    @property
    def is_open(self) -> bool:
        """Whether there are no API keys."""
        return self.api_keys is None and self.api_keys_file is None

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the API."""
        return _loopback(self.host)

    @model_validator(mode="after")
    def _login_can_work(self) -> Self:
        if self.smtp_username and self.catcher:
            raise ValueError("SMTP_USERNAME: the embedded catcher takes no login; unset one")
        if self.smtp_username and self.smtp_security == "none" and not _loopback(self.smtp_host):
            raise ValueError("SMTP_SECURITY: must be starttls or tls, or the login goes in clear")
        return self

    @model_validator(mode="after")
    def _not_every_page_may_use_an_open_service(self) -> Self:
        if "*" in self.cors_origins and self.is_open:
            raise ValueError(
                "CORS_ORIGINS: * needs API_KEYS, or every page that a browser on this machine "
                "visits could use the service"
            )
        return self

    @model_validator(mode="after")
    def _is_safe_in_production(self) -> Self:
        if self.environment == "production":
            if self.is_open:
                raise ValueError("API_KEYS: must be set in production, or API_KEYS_FILE")
            if self.catcher:
                raise ValueError("CATCHER: must be false in production, where mail is to be sent")
        return self

    @model_validator(mode="after")
    def _uploads_can_be_published(self) -> Self:
        if self.upload_url.startswith("s3:") and self.max_upload_bytes > S3_COPIES_AT_MOST:
            raise ValueError("MAX_UPLOAD_BYTES: S3 copies at most 5 GiB at once")
        return self


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class BadSettings(SystemExit):
    """The settings cannot be used: the process ends with exit code 2, the complaint printed."""

    def __init__(self, complaint: str) -> None:
        super().__init__(2)
        print(f"bad settings: {complaint}", file=sys.stderr)  # noqa: T201


def load_settings() -> Settings:
    """Read the settings. If one is bad, print a line that names it, and never its value; exit 2."""
    # Elsewhere there is no such directory, or it is another program's, and closed.
    secrets = SECRETS if os.access(SECRETS, os.R_OK | os.X_OK) else None
    try:
        return Settings(_secrets_dir=secrets)
    except ValidationError as error:
        raise BadSettings("; ".join(_complaints(error))) from None
    except SettingsError as error:  # a file that cannot be read
        raise BadSettings(f"{error} ({error.__cause__})") from error
    except OSError as error:
        raise BadSettings(str(error)) from error
    except UnicodeDecodeError:  # which holds all that was read
        raise BadSettings(".env, or another file with a setting, is not UTF-8") from None


def _complaints(error: ValidationError) -> list[str]:
    return [
        ": ".join([*(str(name).upper() for name in problem["loc"][:1]), _reason(problem["msg"])])
        for problem in error.errors(include_input=False, include_url=False)
    ]


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")
