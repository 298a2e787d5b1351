"""The site, built and read in a browser: it needs no network, and nothing on it is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from diffoc.experiments import ledger

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

for package in ("sphinx", "myst_nb", "furo", "mathjax", "playwright"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[site]'")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# One page of each kind, and every notebook.
PAGES = [
    "index.html",
    "docs/ledger.html",
    "docs/notation.html",
    "docs/watch.html",
    "docs/api.html",
    "docs/records.html",
    "data/README.html",
    "data/mnist.html",
    "search.html",
    *(f"notebooks/{name}.html" for name in NOTEBOOKS),
]
PATIENCE = 180_000  # milliseconds: the machine may be busy

# The rendered formulas stay in the page, where a reader of the screen finds them, as MathML.
TEX = re.compile(r"\\(frac|begin|mathrm|nabla|tag|alpha|sigma|text)\b|\$\$")

# Contrast of WCAG between the text and what it stands on, for every element with text of its own.
CONTRAST = """() => {
  const rgba = c => [...c.match(/[\\d.]+/g).map(Number), 1];
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92
      : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 0.5) return c }
      return [255, 255, 255] };
  const worst = [];
  for (const e of document.querySelectorAll('article *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    if (!e.checkVisibility() || e.closest('mjx-container, .headerlink, button')) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4) worst.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className}: `
        + e.textContent.trim().slice(0, 40));
  }
  return worst;
}"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "."]
    built = subprocess.run([*command, out], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


class Visit:
    """A page that was read: the tab, what its console complained of, and who was asked for what."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", lambda request: self.complaints.append(request.url))
        page.route(re.compile(r"^(?!file:|data:|blob:)"), self._refuse)

    def _refuse(self, route: Route) -> None:
        self.elsewhere.append(route.request.url)
        route.abort()

    def read(self, path: Path) -> None:
        self.page.goto(path.as_uri())
        self.page.evaluate("window.MathJax?.startup?.promise")


@pytest.fixture(scope="module", params=PAGES)
def visit(request: pytest.FixtureRequest, site: Path, browser: Browser) -> Iterator[Visit]:
    """Each page once, on a phone in the dark; the tests of it share the visit."""
    tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    visit = Visit(tab)
    visit.read(site / request.param)
    yield visit
    tab.close()


def test_page_needs_nobody_else_and_does_not_complain(visit: Visit) -> None:
    assert visit.elsewhere == []
    assert visit.complaints == []


def test_formulas_are_rendered(visit: Visit) -> None:
    page = visit.page
    formulas = page.locator(".math").count()
    assert page.locator(".math mjx-container").count() >= formulas
    assert page.locator("mjx-merror, [data-mml-node=merror]").count() == 0
    prose = page.evaluate(
        """() => { const article = document.querySelector('article').cloneNode(true);
        article.querySelectorAll('pre, code, .math').forEach(e => e.remove());
        return article.textContent }"""
    )
    assert not TEX.search(prose)


def test_pictures_are_there_and_described(visit: Visit) -> None:
    for picture in visit.page.locator("article img").all():
        assert len(picture.get_attribute("alt") or "") > 10
        assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 0
        ground = picture.evaluate("img => getComputedStyle(img).backgroundColor")
        assert ground == "rgb(255, 255, 255)" or not picture.evaluate(
            "i => i.closest('.cell_output')"
        )


def test_page_fits_a_phone(visit: Visit) -> None:
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_page_is_dark_and_legible(visit: Visit) -> None:
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60
    assert visit.page.evaluate(CONTRAST) == []


def test_page_is_light_and_legible(visit: Visit) -> None:
    visit.page.emulate_media(color_scheme="light")
    try:
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert min(map(int, re.findall(r"\d+", ground)[:3])) > 200
        assert visit.page.evaluate(CONTRAST) == []
    finally:
        visit.page.emulate_media(color_scheme="dark")


def test_search_finds_a_theorem(site: Path, browser: Browser) -> None:
    visit = Visit(browser.new_page())
    visit.page.goto((site / "search.html").as_uri() + "?q=corrector")
    hits = visit.page.locator("#search-results li a")
    hits.first.wait_for()
    assert any("04_theorem_4_3" in hit.get_attribute("href") for hit in hits.all())
    assert visit.elsewhere == []
    visit.page.close()


def test_notebooks_are_chapters_in_order(site: Path) -> None:
    soup = BeautifulSoup((site / "index.html").read_text(encoding="utf-8"), "html.parser")
    links = [a["href"] for a in soup.select(".sidebar-tree a[href^=notebooks]")]
    assert links == [f"notebooks/{name}.html" for name in NOTEBOOKS]


def test_the_papers_equation_numbers_are_kept(site: Path) -> None:
    pages = [(site / f"notebooks/{name}.html").read_text(encoding="utf-8") for name in NOTEBOOKS]
    tags = (r"\tag{Theorem 4.1, corrected}", r"\tag{Theorem 4.3, Eq. 32}")
    for tag in (*tags, r"\tag{26}"):
        assert any(tag in page for page in pages)


def test_the_ledger_has_every_claim_and_links_to_its_sources(site: Path) -> None:
    soup = BeautifulSoup((site / "docs/ledger.html").read_text(encoding="utf-8"), "html.parser")
    claims = ledger.read()
    places = [heading.get_text().removesuffix("¶") for heading in soup.select("article h3")]
    by_verdict = [claim for name in ledger.VERDICTS for claim in claims if claim.verdict == name]
    assert places == [claim.place for claim in by_verdict]
    text = " ".join(soup.select_one("article").get_text().split()).replace("’", "'")
    for claim in claims:
        assert f"{claim.verdict.capitalize()} (" in text
        for number in claim.numbers:
            assert f"{ledger.told(number)}: {' '.join(number.what.split())} (" in text
        assert " ".join((claim.planned or "").split()) in text  # commands as they are typed
    sources = [number.source for claim in claims for number in claim.numbers]
    printed = [source for source in sources if isinstance(source, ledger.Printed)]
    links = [a["href"] for a in soup.select("article li a[href*=notebooks]")]
    assert len(printed) == len(links) > 50


def test_the_ledger_can_be_searched_and_filtered(site: Path, browser: Browser) -> None:
    claims = ledger.read()
    visit = Visit(browser.new_page())
    visit.read(site / "docs/ledger.html")
    shown = visit.page.locator("section#ledger > section:visible > section:visible")
    assert shown.count() == len(claims)
    visit.page.get_by_label("Verdict").select_option(f"Exact ({ledger.counts(claims)['exact']})")
    assert shown.count() == ledger.counts(claims)["exact"]
    visit.page.get_by_label("Verdict").select_option(index=0)
    visit.page.get_by_label("Search the claims").fill("Lemma 4.2")
    assert 0 < shown.count() < len(claims)
    assert all("lemma" in text.lower() for text in shown.all_text_contents())
    visit.page.get_by_label("Search the claims").fill("no claim says this")
    assert shown.count() == 0
    assert visit.complaints == []
    visit.page.close()


def test_the_slider_moves_through_its_frames(site: Path, browser: Browser) -> None:
    visit = Visit(browser.new_page())
    visit.read(site / "docs/watch.html")
    slider = visit.page.locator(".frames input[type=range]")
    picture = visit.page.locator(".frames .picture")
    places, labels = [], []
    for place in range(int(slider.get_attribute("max") or 0) + 1):
        slider.fill(str(place))
        places.append(picture.evaluate("e => e.style.backgroundPositionY"))
        labels.append(visit.page.locator(".frames label").inner_text())
    assert len(set(places)) == len(set(labels)) == len(places) > 5
    source = picture.evaluate("e => getComputedStyle(e).backgroundImage.slice(5, -2)")
    size = visit.page.evaluate(
        "async s => { const i = new Image(); i.src = s; await i.decode(); "
        "return [i.naturalWidth, i.naturalHeight] }",
        source,
    )
    width, height = map(int, picture.evaluate("e => e.style.aspectRatio").split("/"))
    assert size == [width, height * len(places)]
    assert visit.complaints == []
    visit.page.close()


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    soups = {
        path.resolve(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in site.rglob("*.html")
    }
    anchors = {
        path: {e["id"] for e in soup.select("[id]")} | {e["name"] for e in soup.select("a[name]")}
        for path, soup in soups.items()
    }
    broken = []
    for path, soup in soups.items():
        for element in soup.select("[href], [src]"):
            address = element.get("href") or element.get("src")
            if re.match(r"https?:|mailto:|data:", address):
                continue
            parts = urlsplit(address)
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            wanted = unquote(parts.fragment)
            if not goal.is_file() or (wanted and wanted not in anchors.get(goal, {wanted})):
                broken.append(f"{path.name}: {address}")
    assert sorted(set(broken)) == []


def test_no_script_style_or_font_comes_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        loaded = soup.select("script[src], link[rel=stylesheet], link[rel=preload], img, iframe")
        addresses = [element.get("src") or element.get("href") for element in loaded]
        assert not [address for address in addresses if re.match(r"(https?:)?//", address)]
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(.?(https?:)?//", style.read_text(encoding="utf-8"))
