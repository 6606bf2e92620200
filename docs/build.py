"""Build the book: nbs/*.ipynb -> docs/_src (MyST notebooks and API pages) -> Sphinx -> docs/_build/html.

Needs npm once, to fetch MathJax; the pages themselves ask nothing of the network."""
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import import_module
from pathlib import Path

from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, clean_magics, filter_stream_, hide_, hide_line, strip_ansi

import ferret_lite
from ferret_lite._modidx import d as index

DOCS = Path(__file__).resolve().parent
NBS, SRC, BUILD = DOCS.parent / "nbs", DOCS / "_src", DOCS / "_build"
MATHJAX = "mathjax@3.2.2"
PARTS = {  # the sidebar; a chapter that no part names comes last
    "Regions": "coords regions points sampler",
    "Files and pictures": "files captions plotting records",
    "Words": "dialects grounding templates prompt",
    "The model": "processor vision splice config model build",
    "Apple's checkpoints": "weights clip official conversion",
    "The embedded world": "scenes textures tasks world relations talks world_tasks",
    "Annotations": "annotated sources corpora genome released",
    "Instruction data": "phrasings instructions neighbours negatives chats shards mix cards grit grit_commands grit_examples",
    "Batches": "targets stages examples recorded rows data",
    "Scores": "metrics predictions flickr world_scores captioning scorers answering questions evaluate bench world_bench report",
    "Training": "optim losses lora checkpoints training shipped",
    "Using it": "ask evaluate_cli demo cli",
    "Guides": "paper_or_code backbones seven_billion",
}


def public_symbols():
    """Name -> full name, of every function and class; of names that two modules share, the first."""
    symbols = {}
    for full_name in [name for names in index["syms"].values() for name in names]:
        module, name = full_name.rsplit(".", 1)
        if module in index["syms"] and not name.startswith("_"):
            symbols.setdefault(name, full_name)
    return symbols


SYMBOLS = public_symbols()
CODE = re.compile(r"(?P<fence>^(`{3,}|~{3,}).*?^\2\s*$)|(?<![\[`\w}])`(?P<name>\w+)(?:\(\))?`(?!`)", re.M | re.S)


def link_symbols(text):
    """`quantize` -> a link to its API entry. Plain words (`kind`, `data`) only where the package hands them on."""
    def link(match):
        name = match["name"]
        telling = name in ferret_lite.__all__ or name and (re.search(r"[a-z]_[a-z]|[A-Z][a-z]", name))
        return f"{{py:obj}}`{name} <{SYMBOLS[name]}>`" if telling and name in SYMBOLS else match[0]
    return CODE.sub(link, text)


class ToMyst:
    """The last processor: front matter -> title, Quarto's options -> cell tags, names -> links."""
    options = re.compile(r"^\s*#\|\s*([\w-]+)\s*:\s*(.*?)\s*$\n?", re.M)

    def __init__(self, nb):
        self.nb = nb

    def begin(self):
        cells = [new for cell in self.nb.cells for new in self.convert(cell)]
        self.nb.cells[:] = cells

    def convert(self, cell):
        """One cell -> the cells that stand for it in the book."""
        if cell.cell_type == "raw":
            front = self.nb.frontmatter_
            return [mk_cell(f"# {front['title']}\n\n*{link_symbols(front['description'])}*", "markdown")]
        if cell.cell_type == "markdown":
            cell.source = link_symbols(cell.source)
            return [cell]
        options = dict(self.options.findall(cell.source))
        cell.source = self.options.sub("", cell.source).strip()
        if not cell.source:
            return []
        exported = {"export", "exporti", "exports"} & cell.directives_.keys()
        cell.metadata = {"tags": cell_tags(options, exported)}
        if "code-summary" in options:
            cell.metadata["mystnb"] = {"code_prompt_show": options["code-summary"].strip("\"'")}
        return [cell, *(api_links(cell.source) if exported else [])]


def cell_tags(options, exported):
    """Quarto's cell options as MyST-NB's tags."""
    tags = {"echo: false": "remove-input", "output: false": "remove-output", "code-fold: true": "hide-input"}
    found = [tags[line] for line in (f"{option}: {value}" for option, value in options.items()) if line in tags]
    return sorted(found + ["exported"] * bool(exported))


def api_links(source):
    """A line of links to the API entries of what an exported cell defines."""
    names = [node.name for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    links = [f"{{py:obj}}`{name} <{SYMBOLS[name]}>`" for name in names if name in SYMBOLS]
    return [mk_cell(f"{{.api-links}}\nReference: {', '.join(links)}", "markdown")] if links else []


class Processors(FilterDefaults):
    """nbdev's processors, less those that replace exported code by tables: this book is about the code."""

    def base_procs(self):
        return [FrontmatterProc, strip_ansi, hide_line, filter_stream_, clean_magics, hide_, ToMyst]


def toctree(caption, pages):
    """A hidden table of contents, which the theme shows as one part of the sidebar."""
    return "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"


def contents(chapters, modules):
    """The tables of contents of the whole book, as one cell."""
    room = {chapter.split("_", 1)[1]: chapter for chapter in chapters}
    parts = {caption: [room.pop(name) for name in names.split() if name in room] for caption, names in PARTS.items()}
    parts["More"] = list(room.values())
    parts["Reference"] = [f"api/{module}" for module in modules]
    return mk_cell("".join(toctree(caption, pages) for caption, pages in parts.items() if pages), "markdown")


def write_api(module, chapter):
    """One API page, filled by autodoc; conf.py adds the parameters' comments."""
    name = f"ferret_lite.{module}"
    import_module(name)  # a clearer error than autodoc's warning
    text = f"# {name}\n\nChapter: [{module}](../{chapter}.ipynb)\n\n"
    text += f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
    (SRC / "api" / f"{module}.md").write_text(text, encoding="utf-8")


def stage():
    """Write docs/_src anew."""
    shutil.rmtree(SRC, ignore_errors=True)
    (SRC / "api").mkdir(parents=True)
    os.chdir(NBS)  # nbdev looks for its options from here upwards
    chapters = sorted(path.stem for path in NBS.glob("[0-9]*.ipynb"))
    rooms = {chapter.split("_", 1)[1]: chapter for chapter in chapters}
    modules = {room: chapter for room, chapter in rooms.items() if f"ferret_lite.{room}" in index["syms"]}
    for module, chapter in modules.items():
        write_api(module, chapter)
    for name in ["index", *chapters]:
        nb = read_nb(NBS / f"{name}.ipynb")
        Processors()(nb)
        if name == "index":
            nb.cells.append(contents(chapters, modules))
        write_nb(nb, SRC / f"{name}.ipynb")


def fetch_mathjax():
    """MathJax as one local folder, so that the pages' formulas need no network."""
    target = BUILD / "vendor" / "mathjax"
    if (target / "tex-svg.js").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", "--silent", MATHJAX], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            sys.exit(f"docs: cannot fetch {MATHJAX} ({error}). Install npm and let it reach its registry, or put "
                     f"tex-svg.js and input/ of that package's es5/ folder into {target}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            package.extractall(folder, filter="data")
        source = Path(folder) / "package" / "es5"
        shutil.copytree(source / "input" / "tex" / "extensions", target / "input" / "tex" / "extensions")
        shutil.copy(source / "tex-svg.js", target)  # last: its presence means that all is there


def main():
    from sphinx.cmd.build import main as sphinx_build
    fetch_mathjax()
    stage()
    html = BUILD / "html"
    status = sphinx_build(["-q", "-W", "--keep-going", "-E", "-c", str(DOCS), "-d", str(BUILD / "doctrees"),
                           *sys.argv[1:], str(SRC), str(html)])
    print(f"docs: {'failed' if status else f'see {html}/index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
