"""The lab in a real browser: JupyterLab opens every explorer, runs all its cells, and the figure follows a control."""
import json, os, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPLORERS = sorted(p.stem for p in (ROOT/"nbs"/"explorers").glob("*.ipynb") if p.stem != "start")
SETTINGS = {"notebook-extension/tracker": dict(autoStartDefaultKernel=True, windowingMode="none"), "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True)}

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the pages: its address, with the token."
    home = tmp_path_factory.mktemp("lab")
    for part in ("nbs", "bench/results"): shutil.copytree(ROOT/part, home/part, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, value in SETTINGS.items():
        file = home/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token, log = secrets.token_hex(8), open(home/"log", "w")
    env = os.environ | dict(JUPYTERLAB_SETTINGS_DIR=str(home/"settings"), JUPYTERLAB_WORKSPACES_DIR=str(home/"workspaces"), JUPYTER_DATA_DIR=str(home/"data"), PLOTLY_RENDERER="plotly_mimetype", OMP_NUM_THREADS="1")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", f"--notebook-dir={home/'nbs'}", "--expose-app-in-browser"], env=env, stdout=log, stderr=log)
    base = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try: urllib.request.urlopen(f"{base}/api?token={token}", timeout=2).read(); break
        except OSError: time.sleep(.5)
        assert server.poll() is None, (home/"log").read_text()[-2000:]
    yield lambda path: f"{base}/lab/workspaces/{Path(path).stem}/tree/{path}?token={token}"       # a workspace each, or the tabs of the test before come back
    server.terminate()
    server.wait(30)

@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path: pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()

RUN = """async () => {
    const app = window.jupyterapp;
    const panel = app.shell.currentWidget;
    await panel.sessionContext.ready;
    await app.commands.execute('notebook:run-all-cells');
    return [...panel.content.widgets].filter(c => c.model.type === 'code').flatMap(c => c.model.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.evalue);
}"""
LIVE = ".jp-OutputArea-output .widget-vbox .js-plotly-plot"
DATA = f"JSON.stringify([...document.querySelectorAll('{LIVE}')].map(g => (g.data || []).map(t => [t.x, t.y, t.a, t.b, t.c, t.z, t.marker && t.marker.color])))"

EMPTY = f"[...document.querySelectorAll('{LIVE}')].flatMap(g => g.data.filter(t => ![t.x, t.y, t.a, t.z, t.values].some(v => v && Object.keys(v).length)).map(t => t.name || '?'))"

@pytest.mark.parametrize("name", EXPLORERS)
def test_browser_explorer_follows_its_control(name, lab, chromium):
    page, bad = chromium.new_page(viewport=dict(width=1400, height=1000)), []
    page.on("console", lambda m: m.type == "error" and bad.append(m.text))
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.goto(lab(f"explorers/{name}.ipynb"))
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=120_000)
    assert page.evaluate(RUN) == []
    page.wait_for_selector(LIVE, timeout=60_000, state="attached")
    page.locator('.jp-OutputArea-output .widget-vbox').first.scroll_into_view_if_needed()
    page.wait_for_function(f"() => {DATA}.length > 100")
    before = page.evaluate(DATA)
    sliders, lists = (page.locator(f".jp-OutputArea-output .widget-vbox {c}") for c in (".noUi-target:not([disabled]) .noUi-handle", "select:enabled"))
    if sliders.count():
        sliders.first.scroll_into_view_if_needed()
        sliders.first.focus()
        for _ in range(4): page.keyboard.press("ArrowLeft")
    else: lists.first.select_option(index=0)
    page.wait_for_function(f"was => {DATA} !== was", arg=before, timeout=60_000)
    page.wait_for_timeout(500)
    empty = page.evaluate(EMPTY)
    assert not empty, f"traces without points after the control moved: {empty}"
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.close()
    assert not bad

def test_browser_start_page_leads_to_every_explorer(lab, chromium):
    page = chromium.new_page()
    page.goto(lab("explorers/start.ipynb"))
    page.wait_for_selector(".jp-RenderedMarkdown a[href*='.ipynb']", timeout=120_000)
    found = {a.get_attribute("href").split("?")[0].split("/")[-1].removesuffix(".ipynb") for a in page.locator(".jp-RenderedMarkdown a[href*='.ipynb']").all()}
    assert found >= set(EXPLORERS), f"the start page does not lead to {sorted(set(EXPLORERS) - found)}"
    page.close()
