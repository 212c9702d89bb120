import json, math, re, shutil
import xml.etree.ElementTree as ET
import pytest
from hypothesis import given, settings, strategies as st
from plotly.offline import get_plotlyjs
from paretolab.frontier.points import Point, frontier
from paretolab.frontier.report import _Frame, _bytes, _data, _spread, _ticks, figure, picture, write

evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & <a href='https://example.com/x'>"


def point(name, size, code, law, **more):
    return Point(name=name, parameters=1000, model_bytes=size, bits=4, bpb={"code": code, "law": law}, bpb_macro=(code + law)/2, shape=more.pop("shape", "s"), **more)


points = [point("small", 1_000_000, 2., 3.), point("middle", 2_000_000, 1.9, 1.5, tokens=7), point("large", 4_000_000, 1.5, 1.8), point("worse", 5_000_000, 9., 9.),
          Point(name="lost", failed="out of memory")]
references = {"xz": {"code": 2., "law": 2.4}, "5-gram": {"code": 1.95, "law": 1.7}}


@given(st.integers(1, 10**14))
def test_sizes_name_their_unit(n):
    number, unit = _bytes(n).split()
    assert abs(float(number)*1000**("B", "kB", "MB", "GB", "TB").index(unit) - n) <= .006*n


@given(st.floats(1, 1e12), st.floats(2.56, 1e4))
def test_an_axis_has_ticks(lo, ratio):
    ticks = _ticks(lo, lo*ratio)
    assert ticks and ticks == sorted(set(ticks)) and all(lo <= t <= lo*ratio for t in ticks)


@given(st.lists(st.floats(0, 5), max_size=8), st.floats(.01, 1))
def test_labels_keep_their_order_and_distance(y, gap):
    out = _spread(y, gap)
    order = sorted(range(len(y)), key=lambda i: y[i])
    assert all(out[b] - out[a] >= gap - 1e-9 for a,b in zip(order, order[1:]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(.5, 9), st.floats(.5, 9)), max_size=8), st.booleans(), st.sampled_from([None, "code"]))
def test_every_point_is_inside_the_drawing(rows, with_lines, domain):
    ps = [point(str(i), *r) for i,r in enumerate(rows)] + [points[-1]]
    if not rows and domain: return
    fig = figure(ps, references if with_lines else {}, domain)
    lo, hi = fig.layout.yaxis.range
    assert fig.layout.xaxis.tickvals
    drawn = [(x, y) for t in fig.data[1:] for x,y in zip(t.x, t.y)]
    assert len(drawn) == len(rows) and all(lo < y <= hi and fig.layout.xaxis.range[0] < math.log10(x) < fig.layout.xaxis.range[1] for x,y in drawn)


def test_a_figure_of_one_domain_has_its_own_frontier():
    assert figure(points, references, "law").data[0].x[1:-1] == tuple(p.model_bytes for p in frontier(points, "law")) == (1_000_000, 2_000_000)
    assert figure(points, references, "code").data[0].x[1:-1] == (1_000_000, 2_000_000, 4_000_000)


def test_points_and_references_on_other_domains_are_refused():
    odd = Point(name="odd", parameters=1, model_bytes=1, bpb={"code": 1.}, bpb_macro=1.)
    with pytest.raises(ValueError, match=r"point 'odd' was measured on \['code'\] and 'small' on \['code', 'law'\]"): _Frame([*points, odd], references)
    with pytest.raises(ValueError, match="no point was measured on domain 'x'"): figure(points, references, "x")


def test_hostile_names_stay_text(tmp_path):
    ps, refs = [*points, point(evil, 3_000_000, 1., 1., shape=evil), Point(name=evil + "2", failed=evil)], {evil: references["xz"]}
    data = _data(ps, refs, evil)
    assert "<" not in data and json.loads(data)["note"] == evil
    for text in figure(ps, refs).to_plotly_json()["data"]: assert "<img" not in str(text) and "<a " not in str(text)
    picture(ps, refs, tmp_path/"p.svg")
    assert {e.tag.split("}")[1] for e in ET.parse(tmp_path/"p.svg").iter()} == {"svg", "style", "rect", "text", "path", "circle"}
    write(ps, refs, tmp_path/"p.html", title=evil, note=evil)
    page = (tmp_path/"p.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 3 and "<img" not in page and "<a " not in page


@pytest.mark.parametrize("ps,refs", [([], {}), ([points[-1]], references), (points[:1], {})])
def test_few_points_are_drawn_too(tmp_path, ps, refs):
    picture(ps, refs, tmp_path/"p.svg"); ET.parse(tmp_path/"p.svg")
    write(ps, refs, tmp_path/"p.html"); assert f"{len(ps)} points" in (tmp_path/"p.html").read_text(encoding="utf-8")


chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def browse(browser, tmp_path):
    "Open a report; what it asks for or complains about is collected in `page.seen`, and must be nothing in the end."
    pages = []
    def browse(points, references, width=1200, scheme="light", **words):
        write(points, references, tmp_path/"index.html", **words)
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        page.seen = seen = []; pages.append(page)
        page.on("console", lambda m: seen.append(m.text)); page.on("pageerror", lambda e: seen.append(str(e))); page.on("request", lambda r: seen.append(r.url))
        page.goto((tmp_path/"index.html").as_uri()); page.wait_for_selector("#chart .main-svg", state="attached")
        assert seen == [(tmp_path/"index.html").as_uri()]
        seen.clear()
        return page
    yield browse
    for page in pages: page.close()
    assert [page.seen for page in pages] == [[]]


needs_browser = pytest.mark.skipif(not chromium, reason="no chromium on PATH")


@needs_browser
def test_report_in_a_browser(browse):
    page = browse(points, references, note="a note")
    names = lambda: page.locator("#points td:first-child").all_inner_texts()
    assert names() == ["small", "middle", "large", "worse", "lost"]                  # by size, empty cells last
    page.get_by_role("button", name="bpb macro").click(); assert names() == ["large", "middle", "small", "worse", "lost"]
    page.get_by_role("button", name="bpb macro").click(); assert names() == ["worse", "small", "middle", "large", "lost"]
    assert page.locator("tr.best td:first-child").all_inner_texts() == ["small", "middle", "large"]
    assert page.locator("#fits").inner_text() == "5.00 MB: large, 1.650 bits per byte"
    page.locator("#view").select_option("law")
    assert page.locator("#fits").inner_text() == "5.00 MB: middle, 1.500 bits per byte"
    page.locator("#budget").evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')) }")
    assert page.locator("#fits").inner_text() == "1.00 MB: small, 3.000 bits per byte"
    assert page.locator("tr.chosen td:first-child").all_inner_texts() == ["small"]
    assert "law" in page.locator("#chart .ytitle").text_content()
    assert page.locator("#failed").inner_text().split("\n")[-1] == "lost: out of memory"
    assert page.locator("#domains tr").count() == 1 + 4 + 2


@needs_browser
@pytest.mark.parametrize("width,scheme", [(1200, "dark"), (390, "light"), (390, "dark")])
def test_report_fits_narrow_and_dark_screens(browse, width, scheme):
    page = browse(points, references, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width            # only tables scroll, in their own boxes
    light = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))[:3]))/3
    assert (light > 200) == (scheme == "dark") and (light < 60) == (scheme == "light")
    assert page.locator("#lines").is_visible() == (width < 640)


@needs_browser
def test_hostile_report_in_a_browser(browse):
    page = browse([*points, point(evil, 3_000_000, 1., 1., shape=evil), Point(name=evil + "2", failed=evil)], {evil: references["xz"]}, title=evil, note=evil)
    assert page.title() == evil and page.locator("h1").inner_text() == evil == page.locator("#note").inner_text()
    assert page.locator("img").count() == 0 and page.locator("main a").count() == 0
    page.locator("#points tr").nth(3).locator("td").first.hover()


@needs_browser
@pytest.mark.parametrize("ps,refs", [([points[-1]], {}), (points[:1], {}), ([points[-1]], references)])
def test_reports_of_few_points_open(browse, ps, refs): assert browse(ps, refs).locator("#points tr").count() == 1 + len(ps)


@needs_browser
def test_policy_stops_what_is_not_ours(browse):
    page = browse(points, references)
    page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s) }")
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('https://example.com').then(() => 'sent', () => 'stopped')") == "stopped"
    assert len(page.seen) == 3 and all("Content Security Policy" in line for line in page.seen[:2]) and "example.com" in page.seen[-1]
    page.seen.clear()
