"""Build the website: `python docs/build.py [FOLDER]`, by default _docs.

Quarto renders it where it is installed, smalldocs otherwise. This script hands both the same staged pages: figures
as data for one shared plotly.js, the reference made by smalldocs, sources with a line number each. Afterwards it
puts the local KaTeX where a renderer asked for one from elsewhere, and checks every link."""

import json, os, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import plotly, yaml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
NBS, PKG = ROOT/"nbs", ROOT/"pkg"/"paretolab"
FIGURE = "application/vnd.plotly.v1+json"

def figure_html(fig):
    data = json.dumps({k: fig[k] for k in ("data", "layout", "frames") if k in fig}, separators=(",", ":")).replace("</", "<\\/")
    return f'<div class="plotly-figure"><script type="application/json">{data}</script><div></div></div>'

def front_matter(text):
    "A page's `# Title` and `> subtitle` as front matter, and the rest of the cell."
    m = re.match(r"# (.+)\n+(?:> (.+)\n?)?", text)
    if not m: return None, text
    front = {"title": m[1].strip(), **({"subtitle": m[2].strip()} if m[2] else {})}
    return f"---\n{yaml.safe_dump(front, allow_unicode=True)}---", text[m.end():]

def stage_page(src, dest, reference):
    "Copy a notebook as the renderers should see it."
    nb, cells, figures = json.loads(src.read_text()), [], 0
    up = "../" * (len(dest.relative_to(reference["stage"]).parts) - 1)
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and not cells:
            front, text = front_matter(text)
            if front: cells.append(dict(cell_type="raw", metadata={}, source=front))
            module = ".".join(src.relative_to(NBS).with_suffix("").parts)
            if module in reference["pages"]:
                text = f"`import paretolab.{module}` · [reference](/{reference['pages'][module]}) · [source](/source/{module.replace('.', '/')}.py)\n\n{text}"
            cell = {**cell, "source": text}
        if cell["cell_type"] == "code":
            directives = re.findall(r"^#\|\s*(\w+)", text, re.M)
            if {"default_exp", "hide"} & set(directives): continue
            cell = {**cell, "source": re.sub(r"^#\|.*\n", "", text, flags=re.M)}
            for out in cell["outputs"]:
                if FIGURE in out.get("data", {}):
                    figures += 1
                    out["data"] = {"text/html": figure_html(out["data"][FIGURE])}
        cells.append(cell)
    if figures:
        cells.append(dict(cell_type="markdown", metadata={}, source=f'```{{=html}}\n<link rel="preload" as="script" href="{up}lib/plotly.min.js">\n<script src="{up}lib/figures.js"></script>\n```'))
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(json.dumps({**nb, "cells": cells}))

def stage_reference(stage):
    "Write a reference page for each module, and the index of names that links in backticks use."
    from smalldocs.api import Settings, build
    (stage/"source").mkdir()
    written = build(Settings(stage, ["paretolab", "paretolab.kernels"], "api", PKG, "/source"))
    found = json.loads((stage/"_symbols.json").read_text())
    pages = {}
    for name, target in found.items():
        if name.startswith("paretolab."): pages.setdefault(name.removeprefix("paretolab.").rpartition(".")[0], target.split("#")[0].lstrip("/"))
    names = {m: f"/{m.replace('.', '/')}.ipynb" for m in pages if (NBS/f"{m.replace('.', '/')}.ipynb").exists()}
    for name, target in found.items():
        if name.startswith("paretolab."): names.update({name: target, name.removeprefix("paretolab."): target})
    (stage/"_symbols.json").write_text(json.dumps(names))
    for file in PKG.rglob("*.py"):
        if file.name.startswith("_"): continue
        to = stage/"source"/file.relative_to(PKG)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(file.read_text())
    return dict(stage=stage, pages=pages, written=written)

def stage_all(stage):
    reference = stage_reference(stage)
    for src in NBS.rglob("*.ipynb"):
        if not any(p.startswith((".", "_")) for p in src.relative_to(NBS).parts): stage_page(src, stage/src.relative_to(NBS), reference)
    for src in NBS.rglob("*"):
        if src.suffix in (".png", ".svg", ".jpg"):
            (stage/src.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(src, stage/src.relative_to(NBS))
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    config["project"]["output-dir"] = "_site"
    config["format"]["html"]["css"] = "site.css"
    config["website"]["favicon"] = "favicon.svg"
    config["smalldocs"] = dict(linkify=True)
    config["website"]["sidebar"]["contents"].append(dict(section="Reference", contents=[f"api/{p.name}" for p in reference["written"]]))
    (stage/"_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name in ("site.css", "favicon.svg"): shutil.copy(ROOT/"docs"/name, stage)

def render(stage):
    "Let Quarto or smalldocs write stage/_site; return what smalldocs warned about."
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", str(stage), "--no-execute", "-M", "html-math-method:katex"], check=True)
        return []
    from smalldocs.site import build
    return [w for w in build(stage, quiet=True).warnings if ": broken link " not in w]  # `check` finds them in the result

def bare(script):
    "plotly.js without the function it comes wrapped in for other module systems: a browser parses a function within a function once more, here 5 MB for a quarter of a page's time."
    return re.sub(r'\(\n function\(root, factory\).*?\n(?="use strict";var Plotly=)(.*)\nreturn Plotly;\n\}\)\);\s*$', lambda m: m[1], script, flags=re.S)

def finish(site, stage):
    "Add the shared libraries and sources, and let every page use the local ones."
    lib = site/"lib"
    shutil.copytree(ROOT/"docs"/"katex", lib/"katex")
    (lib/"plotly.min.js").write_text(bare((Path(plotly.__file__).parent/"package_data"/"plotly.min.js").read_text()))
    shutil.copy(ROOT/"docs"/"figures.js", lib)
    for src in NBS.rglob("*.svg"):                          # pictures that a page names in HTML, which smalldocs leaves out
        (to := site/src.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(src, to)
    for src in (stage/"source").rglob("*.py"):
        to = site/src.relative_to(stage).with_suffix(".py.html")
        to.parent.mkdir(parents=True, exist_ok=True)
        icon = f'<link rel="icon" href="{os.path.relpath(site, to.parent)}/favicon.svg"><meta name="viewport" content="width=device-width, initial-scale=1">'
        text = highlight(src.read_text(), PythonLexer(), HtmlFormatter(full=True, title=src.name, linespans="L", prestyles="white-space: break-spaces; overflow-wrap: anywhere"))
        to.write_text(text.replace("<head>", "<head>" + icon, 1))
        (site/src.relative_to(stage)).unlink(missing_ok=True)
    for css in site.rglob("*.css"): css.write_text(re.sub(r"@import url\(['\"]?https?:[^)]*\);?", "", css.read_text()))  # the themes' fonts
    for page in site.rglob("*.html"):
        up = os.path.relpath(site, page.parent)
        text = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist", f"{up}/lib/katex", page.read_text())
        text = re.sub(r'(href="[^":]*source/[^":]*\.py)(?:#L(\d+))?"', lambda m: f'{m[1]}.html{"#L-" + m[2] if m[2] else ""}"', text)
        page.write_text(text)

class Links(HTMLParser):
    "What a page links to, what it loads, and the ids it has."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag in ("a", "area") and a.get("href"): self.links.append(a["href"])
        if a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href"): self.loads.append(a["href"])

def check(site):
    "List every broken link of a built site, and everything that a page would load from elsewhere."
    site = site.resolve()
    pages = {p: Links(p.read_text()) for p in site.rglob("*.html")}
    bad = {f"{url} would be loaded": [str(css.relative_to(site))] for css in site.rglob("*.css") for url in re.findall(r"(?:@import\s+|url\()['\"]?(https?:[^'\")]*)", css.read_text())}
    for page, found in pages.items():
        for url in found.loads + found.links:
            parts, said = urlsplit(url), None
            to = (page.parent/unquote(parts.path)).resolve() if parts.path else page
            if to.is_dir(): to = to/"index.html"
            if parts.scheme or parts.netloc:
                if url in found.loads and parts.scheme != "data": said = f"{url} would be loaded"
            elif not to.exists(): said = f"{os.path.relpath(to, site)} is not there"
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids: said = f"{to.relative_to(site)} has no #{parts.fragment}"
            if said: bad.setdefault(said, []).append(str(page.relative_to(site)))
    return [f"{said}: on {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") for said, names in bad.items()]

def main(out):
    with tempfile.TemporaryDirectory() as tmp:
        stage = Path(tmp)/"stage"
        stage.mkdir()
        stage_all(stage)
        warned = render(stage)
        finish(stage/"_site", stage)
        bad = sorted({*warned, *check(stage/"_site")})
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(stage/"_site", out)
    print(*bad, sep="\n")
    print(f"{sum(1 for _ in out.rglob('*.html'))} pages in {out}, {len(bad)} problems")
    return bad

if __name__ == "__main__": sys.exit(1 if main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"_docs") else 0)
