"""One `pytest` runs tests/ and every notebook of nbs/, each notebook in a process of its own."""
import os
import subprocess
import sys

import pytest

# Nothing here may reach the network, open a window, start a crowd of threads, or draw bars among checked messages.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RUN = """
import sys
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
passed, _ = test_nb(sys.argv[1], skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
sys.exit(not passed)
"""


def pytest_collect_file(parent, file_path):
    """Take every notebook directly under nbs/ that is not hidden."""
    if file_path.suffix == ".ipynb" and file_path.parent.name == "nbs" and file_path.name[0] not in "_.":
        return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    def collect(self):
        yield NotebookRun.from_parent(self, name="run")


class NotebookError(Exception):
    """A cell failed; the text is what the notebook's process printed."""


class NotebookRun(pytest.Item):
    def runtest(self):
        run = subprocess.run([sys.executable, "-c", RUN, str(self.path)], cwd=self.path.parent,
                             capture_output=True, text=True)
        if run.returncode:
            raise NotebookError(f"{run.stderr}{run.stdout}\nexit status {run.returncode}")

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, NotebookError) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, self.path.name
