"""Checks of a page by axe-core, which finds barriers to people with disabilities (WCAG 2.2)."""

from playwright.sync_api import Page

from tests.support.tools import script_from_npm

# Only the page itself: the frame with the HTML of a mail holds what its sender wrote.
_RUN = """async (runOnly) => {
    const options = {iframes: false, preload: false, resultTypes: ["violations"], ...runOnly};
    const {violations} = await axe.run(document, options);
    return violations.flatMap(({id, impact, nodes}) =>
        nodes.map((node) => `${impact} ${id}: ${node.html}: ${node.failureSummary}`));
}"""
# The rules that depend on the colours.
_ONLY_COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}


def barriers(page: Page) -> list[str]:
    """Return the serious and critical violations of axe-core's rules, a line for each element.

    In the dark, only the rules that depend on the colours are checked again.
    """
    page.evaluate(script_from_npm("axe-core/axe.min.js"))
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    in_the_light = page.evaluate(_RUN, {})
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    in_the_dark = page.evaluate(_RUN, _ONLY_COLOURS)
    found = [*in_the_light, *(f"{line} (dark)" for line in in_the_dark)]
    return [line for line in found if line.startswith(("serious", "critical"))]
