"""Build the book: nbs/*.ipynb -> docs/_src (MyST notebooks and API pages) -> Sphinx -> docs/_build/html, then check it.

`python docs/build.py 04_sampler 03_points` builds a draft of these pages alone, unchecked, in docs/_build/draft.
Needs npm once, to fetch MathJax; the pages themselves ask nothing of the network."""
import ast
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, clean_magics, filter_stream_, hide_, hide_line, strip_ansi

import ferret_lite
from check import check_site
from ferret_lite._modidx import d as index
from figures import alt_text, has_picture, last_heading
from repair import repair_site
from vendor import fetch_mathjax

DOCS = Path(__file__).resolve().parent
NBS, SRC, BUILD = DOCS.parent / "nbs", DOCS / "_src", DOCS / "_build"
PAGES = sorted(path.stem for path in (DOCS / "pages").glob("*.md"))  # no code; they link to chapters without numbers
PARTS = {  # the sidebar; a chapter that no part names comes last
    "First look": "ten_minutes path figures reading_the_code glossary",
    "Regions": "coords regions points sampler",
    "Files and pictures": "files captions plotting records",
    "Words": "dialects grounding templates prompt",
    "The model": "processor vision splice config model build",
    "Apple's checkpoints": "weights clip official conversion",
    "The embedded world": "scenes textures tasks annotated world relations talks world_tasks",
    "Annotations": "sources corpora genome released",
    "Instruction data": "phrasings instructions neighbours negatives chats shards mix cards grit grit_commands "
                        "grit_examples",
    "Batches": "targets stages examples recorded rows data",
    "Scores": "metrics predictions flickr world_scores captioning scorers answering questions evaluate bench "
              "world_bench report",
    "Training": "optim losses lora checkpoints training shipped",
    "Using it": "ask evaluate_cli demo cli",
    "Guides": "paper_or_code attention own_boxes backbones seven_billion cluster bibliography",
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
        self.nb, self.heading, self.prose = nb, "", ""

    def begin(self):
        cells = [new for cell in self.nb.cells for new in self.convert(cell)]
        self.nb.cells[:] = cells

    def convert(self, cell):
        """One cell -> the cells that stand for it in the book."""
        if cell.cell_type == "raw":
            front = self.nb.frontmatter_
            self.heading, self.prose = front["title"], front["description"]
            return [mk_cell(f"# {front['title']}\n\n*{link_symbols(front['description'])}*", "markdown")]
        if cell.cell_type == "markdown":
            self.heading, self.prose = last_heading(cell.source) or self.heading, cell.source
            cell.source = link_symbols(cell.source)
            return [cell]
        options = dict(self.options.findall(cell.source))
        cell.source = self.options.sub("", cell.source).strip()
        if not cell.source:
            return []
        exported = {"export", "exporti", "exports"} & cell.directives_.keys()
        cell.metadata = {"tags": cell_tags(options, exported), "mystnb": {}}
        if "code-summary" in options:
            cell.metadata["mystnb"]["code_prompt_show"] = options["code-summary"].strip("\"'")
        if has_picture(cell):
            alt = options.get("fig-alt", "").strip("\"'") or alt_text(cell.source, self.heading, self.prose)
            cell.metadata["mystnb"]["image"] = {"alt": alt}
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
    room = {chapter.split("_", 1)[1]: chapter for chapter in chapters} | {page: page for page in PAGES}
    parts = {caption: [room.pop(name) for name in names.split() if name in room] for caption, names in PARTS.items()}
    parts["More"] = list(room.values())
    parts["Reference"] = [f"api/{module}" for module in modules]
    return mk_cell("".join(toctree(caption, pages) for caption, pages in parts.items() if pages), "markdown")


def write_api(module, chapter):
    """One API page, filled by autodoc; conf.py adds the parameters' comments."""
    name = f"ferret_lite.{module}"
    names = vars(import_module(name))  # a clearer error than autodoc's warning
    elsewhere = [n for n in names.get("__all__", []) if getattr(names.get(n), "__module__", name) != name]
    text = f"# {name}\n\nChapter: [{module}](../{chapter}.ipynb)\n\n"
    text += f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n"
    text += f"   :exclude-members: {', '.join(elsewhere)}\n```\n" if elsewhere else "```\n"
    (SRC / "api" / f"{module}.md").write_text(text, encoding="utf-8")


def inline_drawings(cell):
    """`![](images/path.svg)` -> the drawing itself: only then can its buttons be pressed."""
    if cell.cell_type == "markdown":
        cell.source = re.sub(r"^!\[[^\]]*\]\((images/\w+\.svg)\)$", lambda link: "<div>\n" + (NBS / link[1]).read_text(
            encoding="utf-8").strip() + "\n</div>", cell.source, flags=re.M)
    return cell


def stage(only=()):
    """Write docs/_src anew: the whole book, or `only` some notebooks, then without the reference."""
    shutil.rmtree(SRC, ignore_errors=True)
    (SRC / "api").mkdir(parents=True)
    shutil.copytree(NBS / "images", SRC / "images")
    os.chdir(NBS)  # nbdev looks for its options from here upwards
    chapters = sorted(path.stem for path in NBS.glob("[0-9]*.ipynb") if not only or path.stem in only)
    rooms = {chapter.split("_", 1)[1]: chapter for chapter in chapters}
    modules = {room: chapter for room, chapter in rooms.items() if f"ferret_lite.{room}" in index["syms"] and not only}
    for module, chapter in modules.items():
        write_api(module, chapter)
    for name in PAGES:
        text = (DOCS / "pages" / f"{name}.md").read_text(encoding="utf-8")
        numbered = re.sub(r"\]\((\w+)\.ipynb", lambda link: f"]({rooms.get(link[1], link[1])}.ipynb", text)
        (SRC / f"{name}.md").write_text(numbered, encoding="utf-8")
    for name in ["index", *chapters]:
        nb = read_nb(NBS / f"{name}.ipynb")
        Processors()(nb)
        if name == "index":
            nb.cells[:] = [inline_drawings(cell) for cell in nb.cells] + [contents(chapters, modules)]
        write_nb(nb, SRC / f"{name}.ipynb")


def build(html, options):
    """Run Sphinx over docs/_src and mend its pages; the notebooks that they offer for download are those of nbs/."""
    from sphinx.cmd.build import main as sphinx_build
    shutil.rmtree(html, ignore_errors=True)  # else pages of chapters that are gone stay
    status = sphinx_build(["-q", "--keep-going", "-E", "-c", str(DOCS), "-d", str(BUILD / "doctrees"),
                           *options, str(SRC), str(html)])
    for path in (html / "_sources").glob("*.ipynb"):
        shutil.copy(NBS / path.name, path)
    repair_site(html)
    return status


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    only = [Path(arg).stem for arg in sys.argv[1:] if not arg.startswith("-")]
    if missing := [name for name in only if not (NBS / f"{name}.ipynb").exists()]:
        sys.exit(f"docs: no notebook nbs/{missing[0]}.ipynb; give names such as 04_sampler, or none for the whole book")
    fetch_mathjax()
    stage(only)
    html = BUILD / ("draft" if only else "html")
    draft = ["-D", "suppress_warnings=myst.header,myst.xref_missing"]  # links to the pages that are left out
    status = build(html, [*(draft if only else ["-W"]), *options])
    faults = [] if only else check_site(html)
    print(*faults, f"docs: {'failed' if status or faults else f'see {html}/index.html'}", sep="\n")
    return bool(status or faults)


if __name__ == "__main__":
    sys.exit(main())
