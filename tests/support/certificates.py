"""Certificates for servers that live for a second, made by openssl."""

import ssl
import subprocess
from pathlib import Path


def make_certificate(directory: Path, *, name: str = "IP:127.0.0.1", days: int = 1) -> Path:
    """A certificate and its key in one file; it is its own authority. Negative days: expired."""
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
    """What a server with that certificate needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
