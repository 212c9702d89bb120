"""Every page runs from top to bottom, offline and in a copy, and draws its figures. A second process runs pages, the last one first, while this one is at other tests and then at the first pages."""
import contextlib, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FIGURE = "application/vnd.plotly.v1+json"

def skipped(page): return any(re.search(r"^skip_exec: *true", "".join(c["source"]), re.M) for c in json.loads(page.read_text())["cells"][:2])

PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts and not skipped(p))

# A figure makes a kernel import nbformat, and that, through an optional check of jsonschema that no page needs, compile the grammar of internet addresses: 2 CPU seconds a page.
LINES = "--IPKernelApp.exec_lines=import sys; sys.modules['rfc3987_syntax'] = None; del sys"

def execute(page, seconds=300):
    "Run one page where it lies; give the notebook as it came out."
    nb = nbformat.read(page, 4)
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^#\| *eval: *false", cell.source, re.M): cell.cell_type = "raw"; del cell["outputs"], cell["execution_count"]
    NotebookClient(nb, timeout=seconds, kernel_name="python3", allow_errors=True, extra_arguments=[LINES], resources=dict(metadata=dict(path=page.parent))).execute()
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

def taken(page, folder):
    "Whether another process has this page; from now on this one has."
    try: os.close(os.open(folder/page.replace("/", "+"), os.O_CREAT | os.O_EXCL)); return False
    except FileExistsError: return True

def result(page, folder): return (folder/page.replace("/", "+")).with_suffix(".out")

def run(page, folder):
    nbformat.write(execute(folder/"copy"/page), scratch := result(page, folder).with_suffix(".part"))
    scratch.rename(result(page, folder))

@contextlib.contextmanager
def ahead(asked, folder):
    "A second process at the pages of a session, in a copy; gives the folder where they come out."
    copy = folder/"copy"
    copy.mkdir()
    for name in ("nbs", "bench", "settings.ini", "pyproject.toml"):
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        elif (ROOT/name).exists(): shutil.copy(ROOT/name, copy)
    (copy/"nbs"/"_quarto.yml").unlink(missing_ok=True)
    files = lambda: {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    before, offline = files(), dict(PLOTLY_RENDERER="plotly_mimetype", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    with subprocess.Popen([sys.executable, __file__, folder, *asked], env=os.environ | offline) as other:
        yield folder, other, offline
        other.kill()
    assert files() == before, f"pages left files behind: {sorted(files() - before)}"

@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, pages, monkeypatch):
    folder, other, offline = pages
    if not taken(page, folder):
        for name, value in offline.items(): monkeypatch.setenv(name, value)
        run(page, folder)
    while not (out := result(page, folder)).exists():
        if other.poll() is not None and not out.exists(): pytest.fail(f"the process that ran this page ended with {other.poll()}", pytrace=False)
        time.sleep(.05)
    nb = nbformat.read(out, 4)
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

if __name__ == "__main__":
    for page in reversed(sys.argv[2:]):
        if not taken(page, Path(sys.argv[1])): run(page, Path(sys.argv[1]))
