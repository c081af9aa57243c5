"""A person who uses a page in a real browser with the keyboard only."""

from dataclasses import dataclass

from playwright.sync_api import Locator, Page

MOST_TABS = 400
# An element shows its focus if it has an outline and is on the screen. The browser itself outlines
# a part of an element, such as the button that opens a calendar; then the element has no :focus.
_FOCUS = """() => {
    const element = document.activeElement;
    if (element === document.body) return null;
    const {outlineStyle, outlineWidth} = getComputedStyle(element);
    const {top, bottom, left, right} = element.getBoundingClientRect();
    const isOnScreen = top < innerHeight && bottom > 0 && left < innerWidth && right > 0;
    const isOutlined = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
    const isPart = !element.matches(":focus");
    (window.reached ??= new Set()).add(element);
    return [
        element.outerHTML.slice(0, 200),
        isOnScreen && (isOutlined || isPart),
        element.matches(".skip"),
    ];
}"""
_NOT_REACHED = """() => {
    const usable = "a[href], button:enabled, input, select, textarea, summary";
    return [...document.querySelectorAll(usable)]
        .filter((element) => element.checkVisibility() && !window.reached.has(element))
        .map((element) => element.outerHTML.slice(0, 200));
}"""


@dataclass(frozen=True)
class Focus:
    """The element that has the focus, as HTML."""

    element: str
    is_visible: bool
    is_first: bool  # of the page: the link that skips the navigation


def press_tab(page: Page) -> Focus | None:
    """Move the focus to the next element. None after the last element of the page."""
    page.keyboard.press("Tab")
    found = page.evaluate(_FOCUS)
    return Focus(*found) if found else None


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until an element has the focus. All elements on the way must show theirs.

    The element may be on a page that is still being loaded.
    """
    target.wait_for()
    for _ in range(MOST_TABS):
        focus = press_tab(page)
        assert focus is None or focus.is_visible, focus
        if target.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not reach {target}")


def faults(page: Page) -> list[str]:
    """Press Tab from the top of the page to its end. Return what keeps a person from using it."""
    page.locator(".skip").focus()
    page.evaluate(_FOCUS)
    found: list[str] = []
    for _ in range(MOST_TABS):
        focus = press_tab(page)
        if focus is None or focus.is_first:
            return found + [f"not reached: {element}" for element in page.evaluate(_NOT_REACHED)]
        if not focus.is_visible:
            found.append(f"shows no focus: {focus.element}")
    return [*found, f"does not let go of the focus: {focus}"]
