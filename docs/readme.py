"""Write README.md from nbs/index.ipynb. `--check` writes nothing and fails if README.md is not up to date."""
import re
import sys
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import hide_

ROOT = Path(__file__).resolve().parent.parent


def readme():
    """The text of README.md."""
    nb = read_nb(ROOT / "nbs" / "index.ipynb")
    NBProcessor(nb=nb, procs=[FrontmatterProc, hide_]).process()
    title = nb.frontmatter_
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "raw"]
    nb.metadata["language_info"] = {"name": "python"}  # else the code fences carry no language
    body, _ = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(nb), 4))
    body = re.sub(r"\]\((\w+\.ipynb|images/)", r"](nbs/\1", body)
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    note = "<!-- Written from nbs/index.ipynb by docs/readme.py: edit the notebook. -->"
    return f"{note}\n\n# {title['title']}\n\n> {title['description']}\n\n{body}\n"


def main():
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv:
        sys.exit(None if path.read_text(encoding="utf-8") == text else "README.md is stale: run `make export`")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
