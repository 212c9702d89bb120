"""The repository as a whole: what notebooks hold, what the package must not do, settings, and the built wheel."""
import ast, configparser, importlib.metadata, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).parent.parent
PKG = ROOT/"pkg"/"paretolab"
PAGES = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in PKG.rglob("*.py") if p.name != "_modidx.py")
name = lambda p: p.relative_to(ROOT).as_posix()

def outputs(page): return [o for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", [])]

# Notebooks

@pytest.mark.parametrize("page", PAGES, ids=name)
def test_notebook_is_small_and_inert(page):
    nb = json.loads(page.read_text())
    assert page.stat().st_size <= 150*1024, f"{page.stat().st_size/1024:.0f} KB"
    assert "widgets" not in nb["metadata"], "holds widget state"
    for o in outputs(page):
        data = o.get("data", {})
        assert not [m for m in data if "javascript" in m or "widget" in m], f"holds {list(data)}"
        assert "<script" not in "".join(data.get("text/html", "")), "holds JavaScript in HTML"
        assert o["output_type"] != "error", f"holds the error {o.get('evalue')}"

@pytest.mark.parametrize("page", PAGES, ids=name)
def test_stored_outputs_show_figures_and_no_path_of_this_machine(page):
    for o in outputs(page):
        text = "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", ""))
        if text.startswith(("Figure(", "FigureWidget(")): assert "application/vnd.plotly.v1+json" in o["data"], "a figure was not drawn"
        assert not re.search(r"/(?:home|root|tmp|work)/\w", text), text

def listed(contents):
    for entry in contents: yield from [entry] if isinstance(entry, str) else listed(entry["contents"])

def test_sidebar_lists_every_page_once():
    order = list(listed(yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]))
    assert len(order) == len(set(order))
    assert set(order) == {p.relative_to(ROOT/"nbs").as_posix() for p in PAGES}
    assert (ROOT/"nbs"/"_quarto.yml").is_symlink() and (ROOT/"nbs"/"_quarto.yml").resolve() == ROOT/"_quarto.yml"

# The package's code

FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads", "os.system", "yaml.load", "yaml.unsafe_load"}

def unsafe(tree):
    "Calls that would run what a file says."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in FORBIDDEN: yield called
        if called.endswith("torch.load") and keywords.get("weights_only") != "True": yield "torch.load without weights_only=True"
        if keywords.get("trust_remote_code") not in (None, "False"): yield "trust_remote_code"
        if keywords.get("allow_pickle") not in (None, "False"): yield "allow_pickle"
        if keywords.get("shell") not in (None, "False"): yield "shell"

@pytest.mark.parametrize("module", MODULES, ids=name)
def test_package_runs_nothing_a_file_says(module): assert not list(unsafe(ast.parse(module.read_text())))

@pytest.mark.parametrize("line", ["eval(x)", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "m(trust_remote_code=True)", "np.load(f, allow_pickle=True)", "run(c, shell=True)"])
def test_unsafe_calls_are_seen(line): assert list(unsafe(ast.parse(line)))

def imported(tree, module):
    "Package modules that a module imports when it is itself imported."
    here = module.relative_to(PKG).with_suffix("").parts[:-1]
    top = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    inside = {id(m) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for m in ast.walk(n)}
    for node in (n for n in top if id(n) not in inside):
        if isinstance(node, ast.Import): names = [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "paretolab"]
        else:
            base = here[:len(here) - node.level + 1] if node.level else ()
            stem = tuple((node.module or "").split(".")) if node.module else ()
            if not node.level and stem[:1] != ("paretolab",): continue
            names = [base + (stem if node.level else stem[1:]) + extra for a in node.names for extra in [(), (a.name,)]]
        yield from (PKG.joinpath(*n).with_suffix(".py") for n in names if n and PKG.joinpath(*n).with_suffix(".py").exists())

@pytest.mark.parametrize("module", [m for m in MODULES if not m.name.startswith("_")], ids=name)
def test_modules_stay_small_and_reach_few_others(module):
    text = module.read_text()
    public = re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S)
    most = dict(grids=9, requests=6, low_bit_states=13).get(module.stem, 5)     # nine grids, a class for each request, five methods in two formats and two in a third
    assert len(ast.literal_eval(public[1])) <= most and len(text.splitlines()) <= 300
    seen, new = set(), {module}
    while new:
        seen |= new
        new = {i for m in new for i in imported(ast.parse(m.read_text()), m)} - seen
    assert len(seen) - 1 <= {"low_bit_states": 12}.get(module.stem, 6), sorted(map(name, seen))

@pytest.mark.parametrize("module", ["paretolab", "paretolab.kernels"])
def test_import_is_light(module):
    run = f"import sys, {module}; print(*({{'torch', 'datasets', 'numpy', 'plotly'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout.strip() == ""

def test_kernels_hides_no_other_package():
    assert (ROOT/"kernels").resolve() == PKG/"kernels" and not (PKG/"kernels"/"__init__.py").exists()

# Settings, versions, commands

@pytest.mark.parametrize("key", ["lib_name", "version", "lib_path", "nbs_path", "doc_path"])
def test_settings_say_what_nbdev_reads(key):
    from nbdev.config import get_config
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    said, cfg = ini["DEFAULT"][key], get_config(ROOT)
    assert (ROOT/said == cfg.path(key)) if key.endswith("_path") else said == getattr(cfg, key)

def test_settings_hold_no_other_key_of_nbdev():
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    assert set(ini.defaults()) == {"lib_name", "version", "lib_path", "nbs_path", "doc_path"}

def test_names_of_extras_are_found_by_every_pip():
    "One of Python 3.11 looks for a name as it is written among names with hyphens, warns, and goes on without."
    extras = set(tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = {e for f in (ROOT/"Makefile", ROOT/"README.md", *sorted((ROOT/"nbs").rglob("*.ipynb"))) for x in re.findall(r"(?:paretolab|'\.)\[([a-z0-9_,-]+)\]'", f.read_text()) for e in x.split(",")}
    assert asked <= extras and len(asked) > 8 and not [e for e in extras if e != re.sub(r"[-_.]+", "-", e).lower()]

def test_constraints_name_a_version_of_everything_asked_for():
    from packaging.requirements import Requirement
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    asked = {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in project["dependencies"] + sum(project["optional-dependencies"].values(), [])}
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    fixed = dict(line.split("==") for line in lines)
    assert asked <= {re.sub(r"[-_.]+", "-", n).lower() for n in fixed}
    for package, version in fixed.items():
        try: assert importlib.metadata.version(package).split("+")[0] == version, "the installed version is not the one in constraints.txt"
        except importlib.metadata.PackageNotFoundError: pass             # needed on another platform only

def test_ci_runs_exactly_make_test(): assert (ROOT/".ci"/"run").read_text().splitlines()[-1] == "exec make test"

# The wheel

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy, installed in an environment that sees the other packages but not the checkout."
    tmp = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PKG, tmp/"src"/"pkg"/"paretolab", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"): shutil.copy(ROOT/file, tmp/"src")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp, tmp/"src"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp/"venv"], check=True)
    python = tmp/"venv"/"bin"/"python"
    site, = (tmp/"venv"/"lib").glob("python*/site-packages")
    file, = tmp.glob("*.whl")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", file], check=True, capture_output=True, env=env)
    (site/"others.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    return python, site

def says(wheel, code, cwd): return subprocess.run([wheel[0], "-I", "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()

def test_wheel_is_used_and_compiles_its_kernels(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PARETOLAB_CACHE", str(tmp_path/"cache"))
    code = "import torch, paretolab.kernels.unpack as u; print(u.__file__); print(u.fast(torch.tensor([[177]], dtype=torch.uint8), 2, 4).tolist())"
    where, codes = says(wheel, code, tmp_path).splitlines()
    assert Path(where).is_relative_to(wheel[1]) and codes == "[[1, 0, 3, 2]]"

def test_wheel_holds_every_file_of_the_package(wheel):
    files = lambda root: {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert files(PKG) <= files(wheel[1]/"paretolab")

def test_wheel_loads_the_corpus(wheel, tmp_path):
    assert "fiction" in says(wheel, "from paretolab.data import corpus; print(*corpus.load('tiny'))", tmp_path)

def test_wheel_names_the_licences_of_what_it_ships(wheel):
    about, = wheel[1].glob("paretolab-*.dist-info")
    meta = (about/"METADATA").read_text()
    expression = re.search(r"^License-Expression: (.*)$", meta, re.M)[1]
    assert set(expression.split(" AND ")) == {"Apache-2.0", "PSF-2.0", "0BSD", "CC0-1.0", "MIT"}
    shipped = re.findall(r"^License-File: (.*)$", meta, re.M)
    assert {"LICENSE", "NOTICE"} <= set(shipped) and len([f for f in shipped if "tiny" in f]) >= 2
    for file in shipped: assert (about/"licenses"/file).read_text() == (ROOT/file).read_text()
    for licence in ("PSF-2.0", "0BSD", "CC0-1.0", "MIT"): assert licence in (ROOT/"NOTICE").read_text()

def test_wheel_has_the_command(wheel, tmp_path):
    done = subprocess.run([wheel[1].parents[2]/"bin"/"paretolab", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "frontier" in done.stdout, done.stderr
