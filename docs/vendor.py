"""The two scripts that the book takes from npm: MathJax for its pages, axe-core for its tests. Fetched once each."""
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

BUILD = Path(__file__).resolve().parent / "_build"
MATHJAX = "mathjax@3.2.2"
AXE = "axe-core@4.14.1"


def fetch(package, target, files):
    """Copy `files` (path in the package -> path in `target`) of an npm package; the last file marks all as there."""
    if (target / list(files.values())[-1]).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"docs: cannot fetch {package} ({error}). Install npm and let it reach its registry, or "
                             f"put {' and '.join(files)} of that package into {target}") from None
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        for inside, name in files.items():
            source, goal = Path(folder) / "package" / inside, target / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, goal, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, goal)


def fetch_mathjax():
    """MathJax as one local folder, so that the pages' formulas need no network."""
    fetch(MATHJAX, BUILD / "vendor" / "mathjax",
          {"es5/input/tex/extensions": "input/tex/extensions", "es5/tex-svg.js": "tex-svg.js"})


def fetch_axe():
    """The path of axe-core's script, which looks for barriers in a page; not part of the book."""
    fetch(AXE, BUILD / "axe", {"axe.min.js": "axe.min.js"})
    return BUILD / "axe" / "axe.min.js"
