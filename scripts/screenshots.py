"""`make screenshots`: takes the pictures of the dashboard in `docs/images` from a running service.

It needs Debian's Chromium. The service runs in a new directory, on a free port, with the hour of
`scripts/showcase.py` in its files.
"""

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from scripts.showcase import write_hour
from tests.support.service import ROOT, Service

IMAGES = ROOT / "docs" / "images"
NAMES = ("overview", "task", "inbox")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTH, SHARPNESS = 1100, 1.5  # of the window in CSS pixels; pixels of a picture for each of them
LARGEST = 500_000  # bytes of all pictures together, because every clone has them
COLOURS = 96  # of a picture; the pages have a few dozen, and the edges of letters the others

Colour = tuple[int, int, int]  # red, green and blue


def main() -> None:
    """Start the service, take the pictures, and print the size of each."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        asyncio.run(write_hour(directory, time.time()))
        with Service(directory, retry_base_seconds=1) as service:
            _send_what_runs(service)
            _take(service)
    for path in sorted(IMAGES.glob("*.png")):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


def _send_what_runs(service: Service) -> None:
    """Send two mails that the catcher takes 30 seconds to accept."""
    for recipient in ("slow+30@example.com", "slow+29@example.com"):
        service.post(f"/send-notification/{recipient}")


def _take(service: Service) -> None:
    """Open each page in Chromium, in both colour schemes, and write its picture."""
    from playwright.sync_api import sync_playwright

    paths = {"overview": "/", "task": _deferred_task(service), "inbox": "/inbox"}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in SCHEMES:
            page = browser.new_page(
                color_scheme=scheme,
                viewport={"width": WIDTH, "height": 600},
                device_scale_factor=SHARPNESS,
            )
            for name in NAMES:
                page.goto(service.url + paths[name])
                page.locator(".live-state[data-state=live]").wait_for()
                taken = page.screenshot(full_page=True, animations="disabled")
                (IMAGES / f"{name}-{scheme}.png").write_bytes(_small(taken))
        browser.close()


def _deferred_task(service: Service) -> str:
    """Return the path of the task of a mail that was deferred three times, and waits."""
    tasks = service.get("/tasks?about=ada@example.com").json()["data"]
    return f"/board/tasks/{tasks[0]['id']}"


def _small(png: bytes) -> bytes:
    """Return the picture with COLOURS colours, which makes it a third as large."""
    picture = Image.open(BytesIO(png)).convert("RGB")
    data = picture.tobytes()
    pixels: list[Colour] = [*zip(data[::3], data[1::3], data[2::3], strict=True)]
    count = Counter(pixels)
    palette = _palette(count)
    nearest = {
        colour: min(range(len(palette)), key=lambda n: _distance(colour, palette[n]))
        for colour in count
    }
    few = Image.new("P", picture.size)
    few.putpalette([part for colour in palette for part in colour])
    few.putdata([nearest[colour] for colour in pixels])
    small = BytesIO()
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def _palette(count: Counter[Colour]) -> list[Colour]:
    """Choose the colours one by one: each time the colour with the largest error in all its pixels.

    Pillow's own methods lose the green dot of "Live", or change the colour of the background.
    """
    chosen = [count.most_common(1)[0][0]]
    error = {colour: _distance(colour, chosen[0]) for colour in count}
    while len(chosen) < min(COLOURS, len(count)):
        chosen.append(max(count, key=lambda colour: count[colour] * error[colour]))
        error = {colour: min(error[colour], _distance(colour, chosen[-1])) for colour in count}
    return chosen


def _distance(one: Colour, other: Colour) -> int:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
