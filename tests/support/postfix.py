"""A private Postfix on loopback. It refuses bare newlines, greylists one mailbox, and delivers."""

import os
import shutil
import socketserver
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.support.service import PATIENCE, free_port, until

DOMAIN = "example.org"
MAILBOXES = ("ada", "greta")
GREYLISTED = f"greta@{DOMAIN}"
MAX_MESSAGE_BYTES = 100_000

_MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.{domain}
mydestination =
mynetworks =
local_header_rewrite_clients =
alias_maps =
alias_database =
virtual_mailbox_domains = {domain}
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = inline:{{ {mailboxes} }}
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
message_size_limit = {max_message_bytes}
smtpd_forbid_bare_newline = reject
smtpd_forbid_bare_newline_exclusions =
smtpd_relay_restrictions = reject_unauth_destination
smtpd_recipient_restrictions = reject_unlisted_recipient, check_policy_service inet:{greylist}
"""
_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
postlog unix-dgram n - n - 1 postlogd
"""


class Postfix:
    """Runs inside its `with` block, and needs root. It leaves the system's own Postfix alone.

    It accepts mail for MAILBOXES at DOMAIN. Mail for GREYLISTED is accepted at the second attempt.
    """

    def __init__(self, program: str) -> None:
        self.port = free_port()
        self._program = program
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start Postfix, and wait until it runs."""
        # Not below pytest's directories, because Postfix's own users could not read there.
        temporary = tempfile.TemporaryDirectory(prefix="postfix-", ignore_cleanup_errors=True)
        self._directory = Path(self._stack.enter_context(temporary))
        self._directory.chmod(0o755)
        greylist = self._stack.enter_context(_Greylist(("127.0.0.1", 0), _Policy))
        threading.Thread(target=greylist.serve_forever, daemon=True).start()
        self._stack.callback(greylist.shutdown)
        self._write_settings("{}:{}".format(*greylist.server_address))
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop Postfix, and remove its files."""
        self._stack.close()

    def _write_settings(self, greylist: str) -> None:
        for name in ("etc", "queue", "data", "mail"):
            (self._directory / name).mkdir()
        shutil.chown(self._directory / "data", "postfix")
        os.chown(self._directory / "mail", 65534, 65534)
        main = _MAIN.format(
            directory=self._directory,
            domain=DOMAIN,
            mailboxes=", ".join(f"{name}@{DOMAIN}={name}/" for name in MAILBOXES),
            max_message_bytes=MAX_MESSAGE_BYTES,
            greylist=greylist,
        )
        (self._directory / "etc" / "main.cf").write_text(main)
        (self._directory / "etc" / "master.cf").write_text(_MASTER.format(port=self.port))

    def _start(self) -> None:
        command = [self._program, "-c", str(self._directory / "etc")]
        postfix = subprocess.Popen([*command, "start-fg"], stdin=subprocess.DEVNULL)
        self._stack.callback(postfix.wait, PATIENCE)
        self._stack.callback(lambda: subprocess.run([*command, "stop"], check=True))
        until(lambda: "daemon started" in self.log, within=PATIENCE, what=self._directory)

    @property
    def log(self) -> str:
        """Postfix's log so far."""
        log = self._directory / "log"
        return log.read_text() if log.exists() else ""

    def delivered(self, mailbox: str, message_id: str) -> list[bytes]:
        """Return the mails with this Message-ID from a mailbox. Their lines end in LF."""
        files = (self._directory / "mail" / mailbox / "new").glob("*")
        mails = [path.read_bytes() for path in files]
        return [mail for mail in mails if f"\nMessage-ID: {message_id}\n".encode() in mail]

    def wait_for(self, mailbox: str, message_id: str) -> bytes:
        """Wait until the mail with this Message-ID is delivered, and return its bytes."""
        until(lambda: self.delivered(mailbox, message_id), within=PATIENCE, what=message_id)
        return self.delivered(mailbox, message_id)[0]


class _Greylist(socketserver.ThreadingTCPServer):
    """A policy server for Postfix. It defers the first mail of each sender to GREYLISTED."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type["_Policy"]) -> None:
        super().__init__(address, handler)
        self.seen: set[str] = set()


class _Policy(socketserver.StreamRequestHandler):
    """Answers the policy requests of one connection in turn (SMTPD_POLICY_README)."""

    server: _Greylist

    def handle(self) -> None:
        facts: dict[str, str] = {}
        for line in self.rfile:
            name, _, value = line.decode().strip().partition("=")
            facts[name] = value
            if not name:  # an empty line ends a request
                self.wfile.write(f"action={self._action(facts)}\n\n".encode())

    def _action(self, facts: dict[str, str]) -> str:
        sender = f"{facts['client_address']} {facts['sender']} {facts['recipient']}"
        if facts["recipient"] != GREYLISTED or sender in self.server.seen:
            return "DUNNO"
        self.server.seen.add(sender)
        return "450 4.2.0 Greylisted, come back later"
