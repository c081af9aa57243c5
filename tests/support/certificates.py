"""Short-lived TLS certificates for test servers, made by openssl."""

import ssl
import subprocess
from pathlib import Path


def make_certificate(directory: Path, *, name: str = "IP:127.0.0.1", days: int = 1) -> Path:
    """Make a self-signed certificate and return the file with it and its key.

    It is valid for `days`; with a negative number it has expired already.
    """
    path, key = directory / "certificate.pem", str(directory / "key.pem")
    asking = ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    asking += ["-nodes", "-subj", "/CN=test", "-addext", f"subjectAltName={name}", "-keyout", key]
    signing = ["openssl", "x509", "-req", "-signkey", key, "-days", str(days)]
    signing += ["-copy_extensions", "copy"]
    request = subprocess.run(asking, check=True, capture_output=True).stdout
    signed = subprocess.run(signing, check=True, capture_output=True, input=request).stdout
    path.write_bytes(signed + Path(key).read_bytes())
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    """Return the TLS settings of a server with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
