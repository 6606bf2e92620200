"""Give every notebook the cell that makes it run in Colab. `--check` writes nothing and fails if one lacks it.

Colab opens a single file of the repository; the cell fetches the rest and installs it. Elsewhere it does nothing."""
import hashlib
import json
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL = """#| hide
#| eval: false
import os, sys
if "google.colab" in sys.modules and not os.path.exists("../settings.ini"):  # opened in Colab: fetch and install
    !git clone --quiet --depth 1 --branch {branch} {git_url}
    %pip install --quiet "./{lib_name}[dev]"
    %cd {lib_name}/nbs"""


def source():
    """The cell's text, for the repository and branch of settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return CELL.format_map(parser["DEFAULT"])


def with_cell(text, wanted):
    """A notebook's text with the cell as its first; the same text if it is there already."""
    nb = json.loads(text)
    if "".join(nb["cells"][0]["source"]) == wanted:
        return text
    old = [cell for cell in nb["cells"] if "google.colab" in "".join(cell["source"]) and cell["cell_type"] == "code"]
    new = {"cell_type": "code", "execution_count": None, "id": hashlib.sha1(wanted.encode()).hexdigest()[:8],
           "metadata": {}, "outputs": [], "source": wanted.splitlines(keepends=True)}
    nb["cells"] = [new, *(cell for cell in nb["cells"] if cell not in old)]
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main():
    wanted, stale = source(), []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if (new := with_cell(text, wanted)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"these lack Colab's cell, run `make export`: {' '.join(stale)}")


if __name__ == "__main__":
    main()
