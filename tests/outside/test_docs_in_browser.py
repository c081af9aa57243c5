"""The documentation of the API in a real browser."""

import pytest
from playwright.sync_api import expect

from tests.outside.conftest import NewPage, Serve


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_is_shown_without_the_internet(
    new_page: NewPage, serve: Serve, path: str
) -> None:
    """Each file comes from the service, and its Content-Security-Policy allows each file."""
    service = serve()
    page = new_page()
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(service.url + path)
    expect(page.get_by_text("/send-notification/{email}").first).to_be_visible()
    assert loaded
    assert all(url.startswith((service.url, f"blob:{service.url}", "data:")) for url in loaded)


def test_try_it_out_in_the_documentation_sends_a_request(new_page: NewPage, serve: Serve) -> None:
    service = serve(root_path="/afterward")
    page = new_page()
    page.goto(f"{service.url}/afterward/docs")
    page.locator("#operations-health-livez").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text("200")
    expect(page.locator(".request-url")).to_contain_text(f"{service.url}/afterward/livez")
