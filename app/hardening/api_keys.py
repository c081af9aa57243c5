"""API keys: several for each client, stored as hashes, and read again when their file changes."""

import hashlib
import hmac
import re
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

# Seconds. A file system may give two changes within this time the same timestamp. So each request
# reads the file again until this time has passed since a change.
RACY_SECONDS = 1.0

# A key consists of visible ASCII characters except the comma, which separates keys. It does not end
# with a colon, so that a name without a key is an error. It does not begin with #, so that a
# comment after a key is an error.
_KEY = r"(?!#)[!-+\--~]*[!-+\--9;-~]"
_ENTRY = re.compile(
    rf"(?P<name>[A-Za-z0-9._-]{{1,64}}): +(?P<keys>{_KEY}(?: +{_KEY})*)|(?P<key>{_KEY})"
)

Clients = dict[bytes, str]

log = structlog.get_logger(__name__)


class BadKeys(ValueError):
    """Unusable API keys. The message names the setting, and never contains a key."""


class ApiKeys:
    """Finds the client that owns an API key.

    `text` is API_KEYS, and `file` is API_KEYS_FILE; either may be None. An entry is `KEY`, or
    `NAME: KEY KEY`, with one or more keys. A client with a name keeps its tasks when its keys
    change. Raises BadKeys.
    """

    def __init__(self, text: str | None, file: Path | None) -> None:
        self._from_text = _clients(text, "API_KEYS") if text is not None else {}
        self._file = file
        self._version: tuple[int, int, int] | None = None  # of the file, when it was last read
        self._racy_until = 0.0
        self._error: str | None = None  # of the last attempt to read the file
        self._clients = self._from_text
        if file is not None:
            try:
                self._read_if_changed(file)
            except OSError as error:
                raise BadKeys(f"API_KEYS_FILE: cannot be read: {error.strerror}") from error
        if not self._clients:
            variable = "API_KEYS" if file is None else "API_KEYS_FILE"
            raise BadKeys(f"{variable}: there is no key in it")

    def client_of(self, key: bytes) -> str | None:
        """Return the client that owns this key, or None if the key is unknown."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        client = None
        # Compare with every key, so that the time of the comparison reveals nothing about them.
        for known_digest, owner in self._clients.items():
            if hmac.compare_digest(known_digest, digest):
                client = owner
        return client

    def _refresh(self) -> None:
        """Read the file again if it has changed. If it is bad or missing, keep the old keys."""
        if self._file is None:
            return
        error_text = None
        try:
            self._read_if_changed(self._file)
        except (OSError, BadKeys) as error:
            error_text = error.strerror if isinstance(error, OSError) else str(error)
            if error_text != self._error:  # log it once, not for each request
                log.error(  # noqa: TRY400 - a traceback may contain keys
                    "API_KEYS_FILE cannot be used, so the old keys stay valid",
                    file=str(self._file),
                    reason=error_text,
                )
        self._error = error_text

    def _read_if_changed(self, file: Path) -> None:
        facts = file.stat()
        version = (facts.st_ctime_ns, facts.st_size, facts.st_ino)
        if version != self._version:
            self._racy_until = time.monotonic() + RACY_SECONDS
        elif time.monotonic() > self._racy_until:
            return
        text = file.read_bytes().decode("ascii", "replace")
        self._version = version
        self._clients = self._from_text | _clients(text, "API_KEYS_FILE")


def _clients(text: str, variable: str) -> Clients:
    """Return the client of each key, by the SHA-256 of the key."""
    clients: Clients = {}
    for entry in _entries(text):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise BadKeys(f"{variable}: must be KEY, or NAME: KEY KEY, in visible ASCII characters")
        for key in (match["key"] or match["keys"]).split():
            digest = hashlib.sha256(key.encode()).digest()
            client = match["name"] or f"key-{digest.hex()[:16]}"
            if clients.setdefault(digest, client) != client:
                raise BadKeys(f"{variable}: two clients have the same key")
    return clients


def _entries(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            yield from filter(None, map(str.strip, line.split(",")))
