"""Every page runs from top to bottom, offline and in a copy, and draws its figures. Two pages run at a time."""
import functools, json, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat, pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FIGURE = "application/vnd.plotly.v1+json"

def skipped(page): return any(re.search(r"^skip_exec: *true", "".join(c["source"]), re.M) for c in json.loads(page.read_text())["cells"][:2])

PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts and not skipped(p))

# A figure makes a kernel import nbformat, and that, through an optional check of jsonschema that no page needs, compile the grammar of internet addresses: 2 CPU seconds a page.
LINES = "--IPKernelApp.exec_lines=import sys; sys.modules['rfc3987_syntax'] = None; del sys"

@functools.cache
def forked():
    "The start of a command that gives a kernel which has torch already."
    path, script = tempfile.mkdtemp() + "/kernels", str(Path(__file__).with_name("forked_kernel.py"))
    server = subprocess.Popen([sys.executable, script, "serve", path], stdin=subprocess.PIPE)
    while not os.path.exists(path) and server.poll() is None: time.sleep(.05)
    assert server.poll() is None, "the process that kernels are forked from has ended"
    return server, [sys.executable, "-S", "-E", script, path, "-f", "{connection_file}"]

def kernel():
    "A kernel of its own; on Linux, forked from one that has torch."
    km = AsyncKernelManager(kernel_name="python3")
    if sys.platform == "linux": km.kernel_spec.argv = forked()[1]
    return km

def execute(page, seconds=300):
    "Run one page where it lies; give the notebook as it came out."
    nb = nbformat.read(page, 4)
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^#\| *eval: *false", cell.source, re.M): cell.cell_type = "raw"; del cell["outputs"], cell["execution_count"]
    NotebookClient(nb, km=kernel(), timeout=seconds, allow_errors=True, extra_arguments=[LINES], resources=dict(metadata=dict(path=page.parent))).execute()
    return nb

def problems(nb):
    "What a run that reports success may still hide."
    for cell in nb.cells:
        for o in cell.get("outputs", []):
            if o.output_type == "error": yield f"{o.ename}: {o.evalue}\n  in the cell\n{cell.source}"
            data = o.get("data", {})
            drawn = str(data.get("text/plain", "")).startswith(("Figure(", "FigureWidget(")) or "plotly" in str(data.get("text/html", ""))
            if drawn and FIGURE not in data: yield f"a figure was not drawn by the cell\n{cell.source}"
            if o.output_type == "stream" and o.name == "stderr" and "Traceback (most recent call last)" in o.text: yield o.text

@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    "Start the pages that this session asked for."
    copy = tmp_path_factory.mktemp("pages")/"copy"
    copy.mkdir()
    for name in ("nbs", "bench", "settings.ini", "pyproject.toml"):
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        elif (ROOT/name).exists(): shutil.copy(ROOT/name, copy)
    (copy/"nbs"/"_quarto.yml").unlink(missing_ok=True)
    os.environ.update(PLOTLY_RENDERER="plotly_mimetype", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    files = lambda: {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    before = files()
    with ThreadPoolExecutor(2) as pool:
        asked = [i.callspec.params["page"] for i in request.session.items if i.function is test_page_runs]
        yield {p: pool.submit(execute, copy/p) for p in asked}
    assert files() == before, f"pages left files behind: {sorted(files() - before)}"

@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, runs):
    nb = runs[page].result()
    found = list(problems(nb))
    if found: pytest.fail("\n".join(found), pytrace=False)
    stored = nbformat.read(ROOT/page, 4)
    figures = lambda nb: sum(FIGURE in o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
    assert figures(nb) == figures(stored), "the stored page shows other figures: run it and save it"

CASES = {"1/0": "ZeroDivisionError", "import plotly.graph_objects as go, plotly.io\nplotly.io.renderers.default = 'notebook'\ngo.Figure()": "not drawn",
    "import plotly.graph_objects as go, plotly.io\nplotly.io.renderers.default = 'plotly_mimetype'\ngo.Figure()": None}

@pytest.mark.parametrize("source, word", CASES.items(), ids=["error", "no figure", "figure"])
def test_a_broken_page_is_seen(source, word, tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("#| eval: false\n1/0")])
    nbformat.write(nb, tmp_path/"a.ipynb")
    found = "".join(problems(execute(tmp_path/"a.ipynb")))
    assert word in found if word else not found
