"""The virtual environment of the other queues, .venv-bench, which the first use creates."""

import subprocess
import sys
from pathlib import Path

from benchmarks.load import ROOT

ENVIRONMENT = ROOT / ".venv-bench"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def python() -> str:
    """Return the interpreter of the environment. Install the pinned packages if necessary."""
    interpreter = ENVIRONMENT / "bin" / "python"
    installed = ENVIRONMENT / "installed.txt"
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        print(f"installing the peers into {ENVIRONMENT.name} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [str(interpreter), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        complete = ["--no-deps", "--require-hashes"]  # the lock file names all packages
        subprocess.run([*pip, "install", *complete, "-r", REQUIREMENTS], check=True)
        installed.write_text(REQUIREMENTS.read_text())
    return str(interpreter)


def versions(*names: str) -> str:
    """Return the pinned versions of these packages, for the report."""
    pins = [line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return ", ".join(pin.replace("==", " ") for pin in pins if pin.split("==")[0] in names)
