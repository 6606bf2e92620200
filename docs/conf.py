"""Sphinx's configuration; docs/build.py runs it over docs/_src."""
import re
from configparser import ConfigParser
from pathlib import Path

from fastcore.docments import docments

import ferret_lite

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE.parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project, author, copyright = cfg["lib_name"], cfg["author"], cfg["copyright"]
version = release = ferret_lite.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.napoleon", "sphinx.ext.mathjax",
              "sphinx_copybutton"]

# Notebooks: outputs are the committed ones, nothing runs here.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_ipywidgets_js = {}  # else a page with a widget would load scripts from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# API pages
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 88
default_role = "literal"
smartquotes_action = "D"  # dashes only: quotation marks here are code

# Pages: one local MathJax, no request to anywhere.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"svg": {"fontCache": "global"}}
html_theme = "sphinx_book_theme"
html_title = cfg["lib_name"]
html_static_path = [str(HERE / "_static"), str(HERE / "_build" / "vendor")]
html_css_files = ["custom.css"]
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is, until the button is pressed
html_theme_options = {
    "repository_url": cfg["git_url"],
    "repository_branch": cfg["branch"],
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {  # plain links; each notebook's first cell, hidden here, installs the package in Colab
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navbar_persistent": [],
}


def to_rst(text):
    """The markdown of our docstrings and comments -> reStructuredText: `code` doubled, markup characters escaped."""
    plain, *rest = re.split(r"(`[^`\n]+`)", text)
    escape = re.compile(r"[*|]|(?<=\w)_(?!\w)")
    parts = [escape.sub(r"\\\g<0>", plain)]
    for code, plain in zip(rest[::2], rest[1::2]):
        glue = "\\" if plain[:1].isalnum() else ""  # "`Phrase`s" needs a mark between the two
        parts += [f"`{code}`", glue, escape.sub(r"\\\g<0>", plain)]
    return "".join(parts)


def add_comments(app, what, name, obj, options, lines):
    """Turn the comments beside parameters (docments) into a parameter list."""
    google = any(re.match(r"\s*(Args|Attributes|Returns):", line) for line in lines)
    lines[:] = [to_rst(line) for line in lines]
    if what not in ("function", "class", "method") or google:
        return
    try:
        comments = docments(obj)
    except Exception:  # no source: an alias, a generated method
        return
    fields = [f":{'returns' if param == 'return' else f'param {param}'}: {to_rst(' '.join(text.split()))}"
              for param, text in comments.items() if text]
    lines += ["", *fields, ""] if fields else []


def add_figures(app, pagename, templatename, context, doctree):
    """The script of a figure to play with, on the pages that have one."""
    if 'class="sampler-figure"' in context.get("body", ""):
        app.add_js_file("sampler.js", loading_method="defer")


def setup(app):
    app.connect("html-page-context", add_figures)
    app.connect("autodoc-process-docstring", add_comments, priority=400)  # before napoleon
