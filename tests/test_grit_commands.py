"""`ferret-lite grit build` and `inspect` as their users run them: in processes of their own, one of them killed."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ferret_lite.shards import GritShards

pytest.importorskip("webdataset")
ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
MIX = """
out: {out}
shard_size: 25
piece_size: 20
parts:
  - {{name: referring, format: world, files: {{num: {num}, seed: 1}}, tasks: {{object: 2, relation: 1}}, turns: 2}}
  - {{name: yes_no, format: world, files: {{num: {num}, seed: 2}}, tasks: {{negative_image: 1, negative_word: 1}},
      repeat: 1.5}}
"""


def command(*words): return [sys.executable, "-m", "ferret_lite.cli", "grit", *map(str, words)]


def grit(*words, code=0):
    """Run the command; its output, or its error where `code` is not 0."""
    done = subprocess.run(command(*words), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert (done.stderr == "") == (code == 0) and done.stderr.count("\n") <= 1, done.stderr
    return done.stderr if code else done.stdout


def digest(folder):
    return {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An unbroken build, its config and what was printed."""
    folder = tmp_path_factory.mktemp("grit")
    (folder / "mix.yaml").write_text(MIX.format(out=folder / "calm", num=240))
    return folder, grit("build", folder / "mix.yaml")


def test_build_says_what_it_made(calm):
    folder, said = calm
    index = json.loads((folder / "calm" / "index.json").read_text())
    assert f"{index['records']} records in {len(index['shards'])} shards, 0 faults skipped" in said
    files = {"build.json", "card.md", "histograms.png", "index.json", "samples.png"}
    assert {p.name for p in (folder / "calm").iterdir()} == files | {s["name"] for s in index["shards"]}
    assert "card.md" in said
    ids = [r.id for r, _ in GritShards(folder / "calm")]
    assert len(set(ids)) == len(ids) == index["records"]
    card = (folder / "calm" / "card.md").read_text()
    assert "| negative_image |" in card and "| referring | world | 1 |" in card and "asked point" in card


def test_a_finished_build_is_left_alone(calm):
    folder, said = calm
    before = {p: p.stat().st_mtime_ns for p in (folder / "calm").glob("*.tar")}
    assert grit("build", folder / "mix.yaml") == said
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "calm").glob("*.tar")}


def until(process, happened):
    while process.poll() is None and not happened(): time.sleep(0.001)


def test_a_killed_build_goes_on_to_the_same_bytes(calm):
    """Killed in the first part, in the second, and while the shards are written."""
    folder, _ = calm
    torn, kills = folder / "torn", 0
    count = lambda pattern: len(list(torn.glob(pattern)))
    words = command("build", folder / "mix.yaml", "--out", torn)
    for pattern, least in (("pieces/000-*.piece", 2), ("pieces/001-*.piece", 1), ("*.tar", 3)):
        process = subprocess.Popen(words, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
        until(process, lambda: count(pattern) >= least)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    grit("build", folder / "mix.yaml", "--out", torn)
    assert digest(torn) == digest(folder / "calm")


def test_inspect_prints_and_draws(calm, tmp_path):
    folder, _ = calm
    said = grit("inspect", folder / "calm", "--num", 3, "--out", tmp_path / "seen.png")
    assert said.count("picture in the shard  64 x 64") == 3 and " user " in said
    assert f"drawn in {tmp_path}/seen.png" in said
    with Image.open(tmp_path / "seen.png") as image:
        assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    others = grit("inspect", folder / "calm", "--num", 3, "--seed", 1, "--out", tmp_path / "others.png")
    assert others.split("drawn")[0] != said.split("drawn")[0]


@pytest.mark.parametrize("words, code, part", [
    (["build", "grit_wrld"], 1, "grit_wrld: no such mix; give a YAML file, or one of grit, grit_"),
    (["build"], 2, "required"),
    (["bild", "grit_world"], 2, "bild"),
    (["inspect", "{tmp}"], 1, "no finished build; run `ferret-lite grit build"),
    (["chat", "grit_world", "--part", "nothing", "--base_url", "http://x/v1", "--model", "m", "--out", "{tmp}/c"], 1,
     "no part 'nothing'; there are"),
])
def test_errors_are_one_line(words, code, part, tmp_path, capsys):
    from ferret_lite.cli import main
    with pytest.raises(SystemExit) as stop: main(["grit", *(word.replace("{tmp}", str(tmp_path)) for word in words)])
    err = capsys.readouterr().err
    assert stop.value.code == code and err.count("\n") == 1 and part in err, err


def test_help_explains_each_option():
    parts = {"build": "replaces the `out` of the mix", "inspect": "how many", "chat": "only the cost is printed"}
    for name, part in parts.items():
        assert part in grit(name, "--help")
    assert all(name in grit("--help") for name in ("build", "inspect", "chat"))
