"""The website: it builds without a network, its links hold, and in a browser it draws, searches and asks no other host."""
import json, re, shutil, subprocess, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"docs"))
import build

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")/"site"
    done = subprocess.run([sys.executable, ROOT/"docs"/"build.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out

def test_every_page_is_there_and_in_the_search(site):
    found = {e["href"].split("#")[0] for e in json.loads((site/"search.json").read_text())}
    for page in (ROOT/"nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in page.parts: continue
        html = page.relative_to(ROOT/"nbs").with_suffix(".html")
        assert (site/html).exists() and html.as_posix() in found

def test_nothing_is_loaded_from_elsewhere(site):
    "Another way to look than the build's own check: every attribute that makes a browser fetch."
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = re.findall(r"""<(?:script|img|link|iframe|source|video|audio|embed)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^"'> ]+|@import[^;]*//[^;]*|url\(["']?(?:https?:)?//[^)]*""", file.read_text())
        assert not found, f"{file.relative_to(site)}: {found[:3]}"

def test_one_plotly_for_all_pages(site):
    assert [f.relative_to(site).as_posix() for f in site.rglob("*plotly*.js")] == ["lib/plotly.min.js"]
    page = (site/"kernels"/"unpack.html").read_text()
    assert page.count("plotly.min.js") == 1 and 'class="plotly-figure"' in page and "katex.min.js" in page

def test_source_links_reach_their_line(site):
    link = re.search(r'href="\.\./(source/kernels/unpack\.py\.html)#L-(\d+)"', (site/"api"/"unpack.html").read_text())
    line = (ROOT/"pkg"/"paretolab"/"kernels"/"unpack.py").read_text().splitlines()[int(link[2]) - 1]
    assert line.startswith(("def ", "@", "class ")) and f'id="L-{link[2]}"' in (site/link[1]).read_text()

@pytest.mark.parametrize("page, word", [('<a href="b.html">', "b.html is not there"), ('<a href="a.html#x">', "no #x"), ('<a href="#y">', "no #y"), ('<img src="https://x.org/a.png">', "would be loaded"),
    ('<a href="https://x.org"><a id="x" href="#x">', None)])
def test_link_check_finds(page, word, tmp_path):
    (tmp_path/"a.html").write_text(page)
    found = "".join(build.check(tmp_path))
    assert word in found if word else not found

def test_link_check_reads_style_sheets(tmp_path):
    (tmp_path/"a.css").write_text('@import url("https://x.org/f.css");')
    assert "would be loaded" in "".join(build.check(tmp_path))

@pytest.fixture(scope="module")
def browser(site):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser, f"http://127.0.0.1:{server.server_port}/"
        browser.close()
    server.shutdown()

@pytest.fixture
def visit(browser):
    "Open a page; afterwards nobody may have complained, and nothing may have been asked of another host."
    opened, base = browser
    contexts, bad = [], []
    def visit(path, **options):
        contexts.append(opened.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and bad.append(m.text))
        page.on("pageerror", lambda e: bad.append(str(e)))
        page.on("request", lambda r: r.url.startswith((base, "data:", "blob:")) or bad.append(r.url))
        page.goto(base + path)
        return page
    yield visit
    for c in contexts: c.close()
    assert not bad

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_figures_and_mathematics(visit, scheme):
    page = visit("kernels/unpack.html", color_scheme=scheme)
    page.wait_for_selector(".plotly-figure .scatterlayer .trace path.js-line")
    assert page.locator(".plotly-figure .scatterlayer .trace").count() == 14           # seven widths and seven bounds
    assert page.locator(".katex-display .katex").count() >= 2 and page.locator(".katex-error").count() == 0
    ink, paper = (page.evaluate("([s, p]) => getComputedStyle(document.querySelector(s))[p]", pair) for pair in [(".plotly-figure .xtitle", "fill"), ("body", "backgroundColor")])
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert abs(light[0] - light[1]) > 300, f"axis titles {ink} on {paper}"

def test_browser_search_finds_a_word(visit):
    page = visit("index.html")
    page.keyboard.press("/")
    page.keyboard.type("unpack")
    page.wait_for_selector(".search-result")
    assert any("kernels/unpack.html" in a.get_attribute("href") for a in page.locator("a.search-result").all())

def test_browser_fits_a_phone(visit):
    page = visit("kernels/unpack.html", viewport=dict(width=390, height=844))
    page.wait_for_selector(".plotly-figure .scatterlayer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
