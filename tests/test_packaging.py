"""The package as a whole: what is written twice agrees, what is generated is fresh, what is built is complete."""
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import ferret_lite

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "nbs").glob("[0-9]*.ipynb"))
HEAVY = {"torch", "transformers", "lightning", "matplotlib", "PIL", "numpy", "pycocotools", "tensorboard"}


def run(*command, cwd=ROOT):
    """Run a command outside of any test settings and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path):
    """What a build or an export reads, in a folder of its own."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "ferret_lite"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def modules(folder):
    """File name -> text, of a folder's modules."""
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).glob("*.py")}


# Duplicates ----------------------------------------------------------------------------------------------------------

def test_name_and_url_are_the_same_in_both_files(settings, pyproject):
    assert pyproject["project"]["name"] == settings["lib_name"] == settings["lib_path"]
    assert pyproject["project"]["urls"]["Repository"] == settings["git_url"]


def test_citation_and_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ferret_lite.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == ferret_lite.__version__


def test_constraints_allow_the_pinned_requirements(settings):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    for extra in ("dev_requirements", "docs_requirements"):
        for requirement in settings[extra].lower().split():
            name, _, version = requirement.partition("==")
            assert name in pins and version in ("", pins[name]), requirement


def test_no_machine_or_registry_is_named():
    for name in ("constraints.txt", "settings.ini", "pyproject.toml", "Makefile", ".ci/run", ".ci/find-python"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"--(extra-)?index-url|--find-links|file://|/work/|/opt/|/root/", text), name


# The front door ------------------------------------------------------------------------------------------------------

def test_import_loads_nothing_heavy():
    code = f"import sys; import ferret_lite; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).strip() == "[]"


@pytest.mark.parametrize("name", ferret_lite.__all__)
def test_public_name_is_its_rooms(name):
    home = import_module(f"ferret_lite.{ferret_lite._HOME[name]}")
    assert getattr(ferret_lite, name) is getattr(home, name)
    assert name in home.__all__ and name in dir(ferret_lite)


def test_every_room_is_an_attribute():
    from ferret_lite._modidx import d as index
    rooms = [name.split(".")[1] for name in index["syms"]]
    assert set(rooms) <= set(ferret_lite._ROOMS), "name the new room in ferret_lite/__init__.py"
    for room in rooms:
        assert getattr(ferret_lite, room).__name__ == f"ferret_lite.{room}"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonesuch"):
        ferret_lite.nonesuch


# Generated files -----------------------------------------------------------------------------------------------------

def test_export_changes_nothing(copy):
    before = modules(copy / "ferret_lite")
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    after = modules(copy / "ferret_lite")
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not stale, f"run `make export`: {stale}"


def test_every_module_has_a_notebook():
    rooms = {name.split("_", 1)[1].removesuffix(".ipynb") for name in NOTEBOOKS}
    for name, text in modules(ROOT / "ferret_lite").items():
        if not name.startswith("_"):
            assert name.removesuffix(".py") in rooms and "AUTOGENERATED" in text, name


def test_readme_is_fresh():
    run(sys.executable, "docs/readme.py", "--check")


def test_readme_maps_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[\w+\]\(nbs/(\w+\.ipynb)\) \|", readme, flags=re.M)  # what to read first is numbered last
    assert sorted(rows) == NOTEBOOKS


def test_notebooks_are_clean(copy):
    before = {path.name: path.read_text(encoding="utf-8") for path in (copy / "nbs").glob("*.ipynb")}
    run(sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    dirty = sorted(name for name, text in before.items() if (copy / "nbs" / name).read_text(encoding="utf-8") != text)
    assert not dirty, f"run `make export`: {dirty}"


# The wheel -----------------------------------------------------------------------------------------------------------

def test_wheel_holds_the_package(copy, settings):
    pip_wheel = "pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist".split()
    run(sys.executable, "-m", *pip_wheel, ".", cwd=copy)
    wheel, = (copy / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"ferret_lite-{ferret_lite.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {f"ferret_lite/{name}" for name in modules(ROOT / "ferret_lite")} <= set(names)
    assert {f"ferret_lite/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= set(names)
    assert not [name for name in names if not name.startswith(("ferret_lite/", info))], "something else is packed"
    assert f"Version: {ferret_lite.__version__}" in metadata
    assert f"Requires-Python: >={settings['min_python']}" in metadata
    assert "Apache-2.0" in metadata and f"{info}/licenses/LICENSE" in names
    assert "ferret-lite = ferret_lite.cli:main" in entry_points
