"""The book's tools without a browser: the checker of built pages, text alternatives, the cell for Colab.

The built book itself is tried in a real browser by docs/tests (`make docs browse`)."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def load(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


check, figures, colab, repair = (load(name) for name in ("check", "figures", "colab", "repair"))


# The checker ---------------------------------------------------------------------------------------------------------

def faults(folder, body, **files):
    """What the checker finds in a site of one page (and other files, name_ext="text")."""
    (folder / "index.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    for name, text in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return check.check_site(folder)


GOOD = """<a href="https://example.org/a#b">out</a> <a href="#here">down</a>
<a href="other.html#there">on</a> <a href="other.html?q=1">on</a>
<a href="mailto:a@example.org">write</a> <a href="#">top</a> <a href="index.html">home</a>
<h2 id="here">Here</h2> <img src="dot.png" alt="A dot"> <img src="data:image/gif;base64,AAAA" alt="A dot">
<link rel="canonical" href="https://example.org/"> <link rel="stylesheet" href="look.css?v=1">
<script>const docs = "https://example.org/not-fetched";</script>"""


def test_a_good_site_has_no_faults(tmp_path):
    files = dict(other_html='<p id="there">There</p>', dot_png="", look_css="p { background: url('dot.png') }")
    assert faults(tmp_path, GOOD, **files) == []


@pytest.mark.parametrize("body, words", [
    ('<a href="gone.html">x</a>', "gone.html leads to no file"),
    ('<a href="#gone">x</a>', "#gone leads to no such id in index.html"),
    ('<p><a href="other.html#gone">x</a>', "other.html#gone leads to no such id in other.html"),
    ('<a href="../outside.html">x</a>', "leads out of the site"),
    ('<script src="gone.js"></script>', "gone.js leads to no file"),
    ('<img src="gone.png" alt="A dot">', "gone.png leads to no file"),
    ('<img srcset="other.html 1x, gone.png 2x" alt="A dot">', "gone.png leads to no file"),
    ('<script src="https://cdn.example.org/a.js"></script>', "is fetched from elsewhere"),
    ('<link rel="stylesheet" href="//cdn.example.org/a.css">', "is fetched from elsewhere"),
    ('<link rel="preload" as="font" href="https://fonts.example.org/a.woff2">', "is fetched from elsewhere"),
    ('<img src="https://example.org/a.png" alt="A dot">', "is fetched from elsewhere"),
    ('<iframe src="https://example.org/"></iframe>', "is fetched from elsewhere"),
    ('<style>@import "https://example.org/a.css";</style>', "is fetched from elsewhere"),
    ('<style>p { background: url(https://example.org/a.png) }</style>', "is fetched from elsewhere"),
    ('<p style="background: url(\'http://example.org/a.png\')">x</p>', "is fetched from elsewhere"),
    ('<script>fetch("https://example.org/count")</script>', "is fetched from elsewhere"),
    ('<script type="module">import x from "https://example.org/x.js"</script>', "is fetched from elsewhere"),
    ('<img src="other.html">', "has no alt text"),
    ('<img src="other.html" alt="  ">', "has no alt text"),
    ('<img src="other.html" alt="other.html">', "is its file name"),
])
def test_a_fault_is_found_and_named(tmp_path, body, words):
    found = faults(tmp_path, body, other_html="<p>no ids</p>")
    assert len(found) == 1 and words in found[0] and found[0].startswith("index.html:1: "), found


@pytest.mark.parametrize("sheet", ["p { background: url(https://example.org/a.png) }", "@import '//example.org/a.css';",
                                   "@font-face { src: url(gone.woff2) }"])
def test_a_fault_in_a_style_sheet_is_found(tmp_path, sheet):
    found, = faults(tmp_path, "<p>text</p>", look_css=sheet)
    assert found.startswith("look.css: ")


def test_a_folder_without_pages_is_a_fault(tmp_path):
    assert "no pages" in check.check_site(tmp_path)[0]


def test_the_command_fails_on_a_fault(tmp_path):
    faults(tmp_path, '<a href="gone.html">x</a>')
    run = subprocess.run([sys.executable, DOCS / "check.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and "index.html:1: gone.html leads to no file" in run.stdout


# Text alternatives ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, prose, text", [
    ('show_image(image, title="the mask")', "", "Figure in the section “Masks”: the mask (drawn by show_image)"),
    ('ax.plot(x, y); ax.set(xlabel="step", ylabel="loss")', "",
     "Figure in the section “Masks”: loss against step (line plot)"),
    ("ax.imshow(m)", "First this. Then, in the picture, the `mask`:",
     "Figure in the section “Masks”: Then, in the picture, the mask (image)"),
    ('ax.set(title=f"{n} points of {m}")', "", "Figure in the section “Masks”: … points of …"),
    ("%timeit f()", "", "Figure in the section “Masks”"),
])
def test_alt_text_says_where_what_and_how(source, prose, text):
    assert figures.alt_text(source, "`Masks`", prose) == text


def test_headings_in_code_are_none():
    assert figures.last_heading("## One\n```\n# no\n```\ntext\n### `Two` #\n") == "`Two`"


# Pages mended --------------------------------------------------------------------------------------------------------

def test_parameters_become_lines_and_other_lists_stay():
    lines = "".join(f'<dd><em class="sig-param">{name}</em>,</dd>\n' for name in "ab")
    signature = f"<dt>f(\n<dl>\n{lines}</dl>\n)</dt>"
    other = '<dl class="field-list"><dt>a</dt><dd><em class="sig-param">b</em></dd></dl>'
    mended = repair.repair(signature + other)
    assert mended.count('<span class="sig-line">') == 2 and mended.count("<dl") == 1 and mended.endswith(other)


def test_labels_that_hide_the_words_go():
    button = '<button class="btn search-button-field x" title="Search" aria-label="Search">Search Ctrl+K</button>'
    assert "aria-label" not in repair.repair(button + '<summary aria-label="Toggle hidden content">Solution 1</summary>')
    assert "aria-label" in repair.repair('<button class="btn search-button__button" aria-label="Search"></button>')


# Colab ---------------------------------------------------------------------------------------------------------------

def test_every_notebook_has_the_cell_for_colab():
    run = subprocess.run([sys.executable, DOCS / "colab.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_cell_is_added_once():
    nb = '{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# title"]}], "nbformat": 4}'
    first = colab.with_cell(nb, colab.source())
    assert colab.with_cell(first, colab.source()) == first and first.count("google.colab") == 1
    moved = colab.with_cell(first, colab.source().replace("--branch main", "--branch other"))
    assert moved.count("google.colab") == 1 and "--branch other" in moved
