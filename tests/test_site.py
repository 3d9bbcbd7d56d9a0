"""The site: it builds without a warning, every link in it leads somewhere, and a browser shows it, in the light and in the dark, wide and narrow."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

for name in ("furo", "myst_nb", "sphinx-mathjax-offline"):
    pytest.importorskip(name, reason="the site needs its tools: pip install -e '.[site]'")

ROOT = Path(__file__).parents[1]
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PAGES = ["README", "notebooks/README", "docs/api/minunclip.diffusion"]
PAGES += [f"{folder}/{path.stem}" for folder, names in (("docs", "*.md"), ("notebooks", "[0-9]*.ipynb")) for path in sorted((ROOT / folder).glob(names))]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]  # as in the Makefile; a warning is an error
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    return folder


class Page(HTMLParser):
    """What a page points at, and the places in it that can be pointed at."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.places |= {found[name] for name in ("id", "name") if found.get(name)}


def test_every_link_leads_somewhere(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert {site.joinpath(page + ".html").resolve() for page in PAGES} <= set(pages)
    broken, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            address = urlparse(link)
            if address.scheme or address.netloc:
                continue
            followed += 1
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file() or (target in pages and unquote(address.fragment) not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken and followed > 1000


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield started
        started.close()


def brightness(colour):
    """Relative luminance of the WCAG, from 0 to 1, of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(site, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844})
    page, wrong, asked = context.new_page(), [], set()
    page.set_default_timeout(120_000)  # ms: a slow machine is no broken page
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))

    def elsewhere(route):
        asked.add(urlparse(route.request.url).hostname)
        route.fulfill(content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>')

    page.route(lambda url: url.startswith("http"), elsewhere)
    for name in PAGES:
        page.goto(f"file://{site}/{name}.html")
        page.wait_for_function("!window.MathJax?.startup || MathJax.startup.promise.then(() => true)")
        assert page.title().endswith("minunclip") and page.locator("h1").count() == 1, name
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)"), name
        assert page.evaluate("document.querySelectorAll('.math:not(:has(mjx-container))').length") == 0, name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        ink, paper = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        dark, light = sorted((brightness(ink), brightness(paper)))
        assert (light + 0.05) / (dark + 0.05) > 7 and (brightness(paper) < 0.5) == (scheme == "dark"), name
        assert not wrong, (name, wrong)
    context.close()
    assert asked <= {"colab.research.google.com"}  # the badge: all else is part of the site
