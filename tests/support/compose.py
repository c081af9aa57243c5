"""The compose file, and its merge with docker-compose.scale.yml."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BASE_FILE = ROOT / "docker-compose.yml"
SCALE_FILE = ROOT / "docker-compose.scale.yml"


def merged(base: Any, over: Any) -> Any:
    """Merge `over` into `base` as Compose does: mappings by key, lists by appending.

    See "Merge Compose files" in Docker's documentation.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {
            key: merged(base[key], value) if key in base else value for key, value in over.items()
        }
    if isinstance(base, list) and isinstance(over, list):
        return base + over
    return over


BASE: dict[str, Any] = yaml.safe_load(BASE_FILE.read_text())
SCALE: dict[str, Any] = merged(BASE, yaml.safe_load(SCALE_FILE.read_text()))
