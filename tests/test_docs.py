"""The website: it builds without a network, its links hold, and in a browser it draws, searches and asks no other host."""
import json, re, shutil, subprocess, sys, threading, time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"docs"))
import build
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

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

# The pages and README.md as they lie in a checkout, for JupyterLab and for who reads the repository

def lost(text, folder):
    "Relative links of a Markdown text that lead to no file, seen from `folder`."
    links = [a or b for a,b in re.findall(r"""\]\(([^)\s]+)|(?:href|src)=["']([^"']+)""", text)]
    return [u for u in links if not re.match(r"[a-z]+:|#", u) and not (folder/u.split("#")[0]).exists()]

NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_links_of_a_page_lead_somewhere_in_a_checkout(page):
    assert lost("\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown"), page.parent) == []

def test_links_of_the_readme_lead_somewhere(): assert lost((ROOT/"README.md").read_text(), ROOT) == []

@pytest.mark.parametrize("text, bad", [("[a](b.html)", ["b.html"]), ("[a](b.html#c)", ["b.html#c"]), ('<img src="b.svg">', ["b.svg"]), ("[a](../nbs/index.ipynb#c) [b](https://x.org/y.html) [c](#d)", [])])
def test_a_lost_link_is_seen(text, bad): assert lost(text, ROOT/"nbs") == bad

def test_code_in_the_readme_is_run_by_getting_started():
    ran = {line.split("  #")[0].strip() for c in json.loads((ROOT/"nbs"/"getting_started.ipynb").read_text())["cells"] if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()}
    shown = [line.split("  #")[0].strip() for block in re.findall(r"```python\n(.*?)```", (ROOT/"README.md").read_text(), re.S) for line in block.splitlines() if line.strip()]
    assert shown and [line for line in shown if line not in ran] == []

@pytest.mark.parametrize("page, word", [('<a href="b.html">', "b.html is not there"), ('<a href="a.html#x">', "no #x"), ('<a href="#y">', "no #y"), ('<img src="https://x.org/a.png">', "would be loaded"),
    ('<a href="https://x.org"><a id="x" href="#x">', None)])
def test_link_check_finds(page, word, tmp_path):
    (tmp_path/"a.html").write_text(page)
    found = "".join(build.check(tmp_path))
    assert word in found if word else found == ""

def test_link_check_reads_style_sheets(tmp_path):
    (tmp_path/"a.css").write_text('@import url("https://x.org/f.css");')
    assert "would be loaded" in "".join(build.check(tmp_path))

@pytest.fixture(scope="module")
def browser(site):
    if not CHROMIUM: pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright
    with served(site) as base, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser, base
        browser.close()

@contextmanager
def served(site, answers=None):
    "A folder at an address of this machine; what is posted there goes to a list."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204); self.end_headers()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()

def listen(page, base):
    "A list that fills with what a page complains of, and what it asks of another host."
    bad = []
    page.on("console", lambda m: m.type in ("error", "warning") and bad.append(m.text))
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on("request", lambda r: r.url.startswith((base, "data:", "blob:")) or bad.append(f"asks for {r.url}"))
    return bad

@pytest.fixture
def visit(browser):
    "Open a page; afterwards nobody may have complained, and nothing may have been asked of another host."
    opened, base = browser
    contexts, bad = [], []
    def visit(path, **options):
        contexts.append(opened.new_context(**options))
        page = contexts[-1].new_page()
        bad.append(listen(page, base))
        page.goto(base + path)
        return page
    yield visit
    for c in contexts: c.close()
    assert not sum(bad, [])

# Every page: it fits a phone, its figures are drawn in ink that is seen in both themes, and their controls move them

DRAWN = "() => [...document.querySelectorAll('.plotly-figure')].every(f => f.querySelector('.main-svg .plot, .main-svg .ternary, .main-svg .pielayer, .main-svg .infolayer'))"
CUT = """() => [...document.querySelectorAll('body *')].filter(e => {
    const r = e.getBoundingClientRect()
    if (!r.width || !r.height || r.right + scrollX <= innerWidth + 1 && r.left + scrollX >= -1) return false
    if (r.right + scrollX <= 0) return false                                                    // wholly out of sight on purpose, as where plotly.js measures text
    for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return false      // it can be scrolled to
    return getComputedStyle(e).position !== 'fixed' && getComputedStyle(e).visibility !== 'hidden'
}).slice(0, 3).map(e => `${e.tagName} "${e.textContent.trim().slice(0, 40)}" is cut off by a window of ${innerWidth} pixels`)"""
PALE = """() => {
    const rgb = c => { const m = c.match(/[\\d.]+/g); return m && (m[3] === undefined || +m[3] > 0) ? m.slice(0, 3).map(Number) : null }
    const light = c => c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + [.2126, .7152, .0722][i]*v, 0)
    const apart = (c, d) => (Math.max(light(c), light(d)) + .05)/(Math.min(light(c), light(d)) + .05)                        // contrast as WCAG defines it
    const paper = rgb(getComputedStyle(document.body).backgroundColor), bad = new Set
    const look = (what, css, least, e, k) => { const s = getComputedStyle(e), c = rgb(s[css]); if (c && s[css + 'Opacity'] > 0 && apart(c, paper) < least) bad.add(`${what} of figure ${k} in ${s[css]} on ${paper}`) }
    document.querySelectorAll('.plotly-figure').forEach((f, k) => {
        f.querySelectorAll('.main-svg text').forEach(e => e.textContent.trim() && !e.closest('.trace, .barlayer, .heatmaplayer, .hovertext') && look(`text "${e.textContent.slice(0, 20)}"`, 'fill', 3, e, k))
        f.querySelectorAll('.trace path.js-line, .shapelayer path').forEach(e => parseFloat(getComputedStyle(e).strokeWidth) > 0 && look('line', 'stroke', 1.2, e, k))
        f.querySelectorAll('.trace path.point').forEach(e => look('mark', 'fill', 1.2, e, k))
    })
    return [...bad]
}"""
INK = "k => { const f = document.querySelectorAll('.plotly-figure .js-plotly-plot')[k].cloneNode(true); f.querySelectorAll('.slider-container, .updatemenu-container, .menulayer').forEach(e => e.remove()); return f.innerHTML }"

def move(page, k, figure):
    "Move the control of a figure: did it have one, and did the figure change?"
    rail, menu = (figure.locator(c).first for c in (".slider-rail-touch-rect", ".updatemenu-header"))
    if not (slides := rail.count()) and not menu.count(): return None
    before = page.evaluate(INK, k)
    for place in (.02, .98):                                            # one of the two is another than where it stands
        if slides: rail.click(position=dict(x=place*rail.bounding_box()["width"], y=3), force=True)
        else: menu.click(force=True); items = figure.locator(".updatemenu-dropdown-button"); (items.first if place < .5 else items.last).click(force=True)
        try: page.wait_for_function(f"([k, was]) => ({INK})(k) !== was", arg=[k, before], timeout=5000)
        except Exception as e:
            if "Timeout" not in str(e): raise
        else: return True
    return False

def faults(context, url, base, pictures=None):
    "What is wrong with a page on a narrow phone in dark, and in a wide window in light; how many figures and controls it has."
    page = context.new_page(); bad = listen(page, base); page.set_default_timeout(300_000)                       # a machine may be busy with other things
    page.set_viewport_size(dict(width=360, height=740)); page.goto(url); page.wait_for_function(DRAWN)
    bad += page.evaluate(CUT) + page.evaluate(PALE) + ["a formula is not understood"]*page.locator(".katex-error").count()
    figures, controls = page.locator(".plotly-figure"), 0
    def shoot(theme):
        for k in range(figures.count()): figures.nth(k).screenshot(path=pictures/f"{url.removeprefix(base).replace('/', '-')}-{k}-{theme}.png")
    if pictures: shoot("dark")
    for k in range(figures.count()):
        moved = move(page, k, figures.nth(k)); controls += moved is not None
        if moved is False: bad.append(f"the control of figure {k} moves nothing")
    page.set_viewport_size(dict(width=1200, height=800))
    if page.locator(".quarto-color-scheme-toggle").count():
        assert page.evaluate("document.documentElement.classList.contains('quarto-dark')")
        page.evaluate("document.querySelector('.quarto-color-scheme-toggle').click()")
        page.wait_for_function("() => !document.documentElement.classList.contains('quarto-dark')"); page.wait_for_timeout(50)
        bad += page.evaluate(CUT) + page.evaluate(PALE)
        if pictures: shoot("light")
    count, size = figures.count(), page.evaluate("performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation')).reduce((s, r) => s + r.decodedBodySize, 0)")
    page.evaluate("localStorage.clear()"); page.close()
    return bad, count, controls, size

def has_control(page): return any({"sliders", "updatemenus"} & set(o["data"][build.FIGURE]["layout"]) for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", []) if build.FIGURE in o.get("data", {}))

MOVING = sorted(p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and has_control(p))

@pytest.fixture(scope="module")
def dark(browser):
    opened, base = browser
    with opened.new_context(color_scheme="dark") as c: yield lambda url, pictures=None: faults(c, base + url, base, pictures)

@pytest.mark.parametrize("page", [*MOVING, "index.html", "methods.html", "api/distributed_lion.html", "studies/scoreboard.html", "source/engine/fit.py.html", "source/data/split.py.html"])
def test_browser_page_is_whole(page, dark):
    bad, figures, controls, size = dark(page)
    assert not bad
    assert controls > 0 if page in MOVING else controls == 0
    assert size < (1_400_000 if not figures else 6_600_000)                # what a visit loads; plotly.js is 4.8 MB of it

FIGURE = '{"data":[{"y":[1,2],"mode":"lines","line":{"color":"%s"}}],"layout":{"sliders":[{"steps":[{"method":"restyle","args":["%s",[[5,9]]]},{"method":"restyle","args":["%s",[[5,9]]]}]}]}}'
def drawn(color="#1f77b4", changes="y"): return f'<div class="plotly-figure"><script type="application/json">{FIGURE % (color, changes, changes)}</script><div></div></div><script src="lib/figures.js"></script>'

@pytest.mark.parametrize("body, word", [('<script>console.error("broken")</script>', "broken"), ('<script>nothing()</script>', "nothing is not defined"), ('<img src="http://127.0.0.1:9/a.png">', "asks for http://127.0.0.1:9"), ('<div style="width:500px">wide</div>', "cut off"),
    ('<p style="overflow:auto"><span style="display:block;width:500px">wide</span></p>', None), (drawn(), None), (drawn("#222", "y"), None), (drawn("#fefefe"), "line of figure 0"), (drawn(changes="name"), "moves nothing")])
def test_browser_a_fault_of_a_page_is_seen(body, word, site, dark):
    page = site/f"broken{abs(hash(body))}.html"                            # a name of its own: browsers keep pages
    page.write_text(f'<!doctype html><link rel="icon" href="favicon.svg"><link rel="stylesheet" href="site.css"><body style="background:#fff;color:#333">{body}')
    try: found = "".join(dark(page.name)[0])
    finally: page.unlink()
    assert word in found if word else found == ""

@pytest.mark.soak
def test_browser_every_page_is_whole(site, dark, record_property, tmp_path):
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html")); found = {p: dark(p, tmp_path) for p in pages}
    for k,v in dict(pages=len(pages), figures=sum(f[1] for f in found.values()), controls=sum(f[2] for f in found.values()), heaviest=max((f[3], p) for p,f in found.items())).items(): record_property(k, v)
    assert {p: f[0] for p,f in found.items() if f[0]} == {}

MEASURE = """<!doctype html><body style="margin:0"><iframe style="width:1200px;height:800px;border:0"></iframe><script>
const page = decodeURIComponent(location.hash.slice(1)), frame = document.querySelector("iframe"), start = performance.now()
frame.src = page
const done = () => frame.contentDocument && frame.contentDocument.readyState === "complete" && frame.contentWindow.performance.getEntriesByType("navigation").length && [...frame.contentDocument.querySelectorAll(".plotly-figure")].every(f => f.querySelector(".main-svg"))
const ask = () => { if (frame.contentWindow.location.href === "about:blank" || !done()) return setTimeout(ask, 5)
    const n = frame.contentWindow.performance.getEntriesByType("navigation")[0]
    fetch("/", {method: "POST", body: JSON.stringify({page, loaded: Math.round(n.loadEventEnd), drawn: Math.round(performance.now() - start)})}) }
ask()
</script>"""

@pytest.mark.soak
def test_how_soon_pages_are_there(site, browser, record_property, tmp_path):
    "In a browser that nobody looks into, since a debugger costs half a second: milliseconds of the start page and the heaviest ones, the best of three, each with empty caches."
    heavy = sorted((p for p in site.rglob("*.html") if "lib/figures.js" in p.read_text()), key=lambda p: -p.stat().st_size)[:5]
    (site/"measure.html").write_text(MEASURE); took, answers = {}, []
    with served(site, answers) as base:
        for page in ["index.html", *(p.relative_to(site).as_posix() for p in heavy)]:
            for i in range(3):
                with subprocess.Popen([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path/page.replace('/', '-')}{i}", "--remote-debugging-port=0", f"{base}measure.html#{page}"], stderr=subprocess.DEVNULL) as p:
                    n = len(answers)
                    for _ in range(600):
                        if len(answers) > n: break
                        time.sleep(.1)
                    p.terminate()
                assert len(answers) > n, f"{page} did not come up"
            mine = [a for a in answers if a["page"] == page]; took[page] = [min(a[k] for a in mine) for k in ("loaded", "drawn")]
    (site/"measure.html").unlink()
    record_property("milliseconds", took); assert len(took) == 6

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
