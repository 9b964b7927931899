"The website as people see it: ten pages in light, in dark and on a narrow screen; about half a minute"
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest

from test_docs import site  # noqa: F401, the fixture

pytestmark = pytest.mark.slow
TEN = ["index", "core", "recipe", "memory", "monitor", "pipelines/finetune", "tutorials/should_i_finetune", "explanations/how_a_run_works", "explanations/decide", "source/recipe"]
VIEWS = [("light", 1300), ("dark", 1300), ("dark", 400)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def server(site):  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def page(browser, server):
    "A tab that reaches this server and nothing else; what failed is in `page.failed`"
    tab = browser.new_page()
    tab.failed = []
    tab.route(lambda url: urlparse(url).hostname not in ("127.0.0.1", None), lambda route: route.abort())
    tab.on("response", lambda r: r.status >= 400 and tab.failed.append(f"{r.status} {r.url}"))
    tab.on("requestfailed", lambda r: r.url.startswith(server) and tab.failed.append(r.url))
    tab.on("pageerror", lambda e: tab.failed.append(str(e)))
    yield tab
    tab.close()


WIDER = "() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position !== 'fixed').slice(0, 5).map(e => e.tagName + '.' + e.className)"


@pytest.mark.parametrize("name", TEN)
def test_a_page(page, server, shot, name):
    for scheme, width in VIEWS:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(dict(width=width, height=1000))
        page.goto(f"{server}/{name}.html", wait_until="load")
        assert page.locator("main h1").count() == 1 and len(page.locator("main").inner_text()) > 200
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), f"{name} at {width}: the page scrolls sideways: {page.evaluate(WIDER)}"
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
        assert max(ground) < 80 if scheme == "dark" else min(ground) > 200, (scheme, ground)
        shot(page, f"docs-{name.replace('/', '-')}-{scheme}-{width}")
    assert not page.failed, page.failed


def test_search_in_the_browser(page, server, shot):
    page.set_viewport_size(dict(width=1300, height=1000))
    page.goto(f"{server}/explanations/design.html")
    page.locator("#quarto-search input").fill("checkpoint")
    found = page.locator(".smalldocs-search-results a")
    found.first.wait_for()
    assert "checkpoint" in " ".join(found.all_inner_texts()).lower()
    shot(page, "docs-search")
    found.first.click()
    page.wait_for_load_state()
    assert "checkpoint" in page.locator("main").inner_text().lower() and "/explanations/design" not in page.url
    assert not page.failed, page.failed
