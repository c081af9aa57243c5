"""API keys: kept as hashes, several for each client, and read again when their file changes."""

import hashlib
import hmac
import re
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

RACY_SECONDS = 1.0  # a file changed twice within this may look as if it was changed once

# Visible ASCII, but for the comma that separates them. Neither a name without a key nor a comment
# behind one is taken for a key.
_KEY = r"(?!#)[!-+\--~]*[!-+\--9;-~]"
_ENTRY = re.compile(
    rf"(?P<name>[A-Za-z0-9._-]{{1,64}}): +(?P<keys>{_KEY}(?: +{_KEY})*)|(?P<key>{_KEY})"
)

Clients = dict[bytes, str]

log = structlog.get_logger(__name__)


class BadKeys(ValueError):
    """The keys cannot be used; the message names the variable, and never a key."""


class Keys:
    """Tells which client a key stands for.

    `text` is API_KEYS, `file` is API_KEYS_FILE; either may be None. An entry is `KEY`, or
    `NAME: KEY` with one key or more: a client with a name keeps its tasks when its keys change.
    Raises BadKeys.
    """

    def __init__(self, text: str | None, file: Path | None) -> None:
        self._fixed = _clients(text, "API_KEYS") if text is not None else {}
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._racy_until = 0.0
        self._complaint: str | None = None  # about the file, when it was looked at last
        self._clients = self._fixed
        if file is not None:
            try:
                self._read(file)
            except OSError as error:
                raise BadKeys(f"API_KEYS_FILE: cannot be read: {error.strerror}") from error
        if not self._clients:
            variable = "API_KEYS" if file is None else "API_KEYS_FILE"
            raise BadKeys(f"{variable}: there is no key in it")

    def client_of(self, key: bytes) -> str | None:
        """The client that this key stands for; None if it stands for nobody."""
        self._read_again_if_changed()
        presented = hashlib.sha256(key).digest()
        client = None
        for digest, known in self._clients.items():  # all of them: time must not tell which
            if hmac.compare_digest(digest, presented):
                client = known
        return client

    def _read_again_if_changed(self) -> None:
        """Take over what stands in the file now; a file that is bad or gone changes nothing."""
        if self._file is None:
            return
        complaint = None
        try:
            self._read(self._file)
        except (OSError, BadKeys) as error:
            complaint = error.strerror if isinstance(error, OSError) else str(error)
            if complaint != self._complaint:  # one line, and not one for each request
                log.error("the API keys stay as they were", file=str(self._file), reason=complaint)  # noqa: TRY400 - a traceback may hold keys
        self._complaint = complaint

    def _read(self, file: Path) -> None:
        facts = file.stat()
        seen = (facts.st_ctime_ns, facts.st_size, facts.st_ino)
        if seen != self._seen:
            self._racy_until = time.monotonic() + RACY_SECONDS
        elif time.monotonic() > self._racy_until:
            return
        text = file.read_bytes().decode("ascii", "replace")
        self._seen = seen
        self._clients = self._fixed | _clients(text, "API_KEYS_FILE")


def _clients(text: str, variable: str) -> Clients:
    """Who each key's hash stands for."""
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
