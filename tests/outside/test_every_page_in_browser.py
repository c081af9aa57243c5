"""Every page in a real browser: light and dark, wide and on a phone, with full and empty data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.outside.conftest import NewPage
from tests.support.axe import barriers
from tests.support.every_page import KEY, PAGES, Address, full_service
from tests.support.keyboard import faults
from tests.support.service import Service

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
SCREENS = pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
# A page of this service sends a form with these fields.
SEND_FORM = """([path, fields]) => {
    const form = Object.assign(document.createElement("form"), {method: "post", action: path});
    for (const [name, value] of Object.entries(fields))
        form.append(Object.assign(document.createElement("input"), {name, value}));
    document.body.append(form);
    form.submit();
}"""
ADD_BARRIERS = """() => {
    const main = document.querySelector("main");
    const [button, text] = ["button", "p"].map((tag) => document.createElement(tag));
    text.textContent = "Faint";
    text.style.color = "rgb(85, 96, 109)";
    main.append(button, text);
}"""
WIDER = "document.documentElement.scrollWidth - innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(245, 246, 248)", "rgb(16, 19, 23)"


@dataclass(frozen=True)
class Site:
    """A service, the addresses of its pages by their names, and options for a new page."""

    service: Service
    pages: dict[str, Address]
    options: dict[str, Any] = field(default_factory=dict)

    def visit(self, new_page: NewPage, **options: Any) -> Iterator[tuple[str, Page]]:
        """Open one page after another, in one tab. Yields each with its name."""
        url = self.service.url
        page = new_page(base_url=url, **self.options, **options)
        for name, address in self.pages.items():
            go(page, address)
            yield name, page


def go(page: Page, address: Address) -> None:
    """Open a page, also one that answers to a form."""
    if address.fields is None:
        page.goto(address.path)
        return
    page.goto("/board/send")
    with page.expect_navigation():
        page.evaluate(SEND_FORM, [address.path, address.fields])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service with data on every page, and a client whose name is long."""
    with full_service(tmp_path_factory.mktemp("full")) as full:
        yield Site(full.service, full.pages, {"extra_http_headers": {"X-API-Key": KEY}})


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service without keys, data and workers."""
    with Service(tmp_path_factory.mktemp("empty"), worker_concurrency=0) as service:
        yield Site(service, PAGES)


@pytest.fixture(params=["full", "empty"])
def site(request: pytest.FixtureRequest) -> Site:
    """Each of both services."""
    site: Site = request.getfixturevalue(request.param)
    return site


@SCREENS
def test_no_page_has_a_barrier(new_page: NewPage, site: Site, screen: dict[str, int]) -> None:
    """axe-core finds nothing that is serious or critical, in the light and in the dark."""
    found = {
        name: lines
        for name, page in site.visit(new_page, viewport=screen)
        if (lines := barriers(page))
    }
    assert found == {}


def test_no_page_is_wider_than_a_phone(new_page: NewPage, site: Site) -> None:
    wider = {
        name: pixels
        for name, page in site.visit(new_page, viewport=PHONE)
        if (pixels := page.evaluate(WIDER)) > 0
    }
    assert wider == {}


@SCREENS
def test_the_keyboard_reaches_every_part_of_every_page(
    new_page: NewPage, full: Site, screen: dict[str, int]
) -> None:
    """Tab also leaves each page again, and each element shows that it has the focus."""
    found = {
        name: lines
        for name, page in full.visit(new_page, viewport=screen)
        if (lines := faults(page))
    }
    assert found == {}


def test_the_colours_of_an_open_page_follow_the_system(new_page: NewPage, empty: Site) -> None:
    for name, page in empty.visit(new_page):
        for colours, background in (("light", LIGHT), ("dark", DARK), ("light", LIGHT)):
            page.emulate_media(color_scheme=colours)  # type: ignore[arg-type]
            assert page.evaluate(BACKGROUND) == background, name


def test_a_barrier_is_noticed(new_page: NewPage, empty: Site) -> None:
    """The negative control: a button without a name, and a text that is too faint in the dark."""
    page = new_page()
    page.goto(empty.service.url)
    page.evaluate(ADD_BARRIERS)
    found = barriers(page)
    assert [line.partition(":")[0] for line in found] == [
        "critical button-name",
        "serious color-contrast",
    ]
    assert found[1].endswith("(dark)")
