"""A built GRIT is trained on as it lies there: `ferret-lite fit --data.format grit --data.root DIR`."""
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ferret_lite import data
from ferret_lite.data import FerretDataModule, Stage
from ferret_lite.grit import build
from ferret_lite.mix import GritConfig, Part, read_config

pytest.importorskip("webdataset")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif("GritExamples" not in inspect.getsource(data), reason="the data module reads no GRIT")
TASKS = {"object": 2.0, "expression": 2.0, "negative_image": 1.0, "negative_word": 1.0, "related": 1.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grit") / "world"
    part = Part("w", "world", {"num": 60, "seed": 3}, tasks=TASKS, dialogues=8)
    build(GritConfig(str(folder), [part], shard_size=20, objects=True))
    return folder


def batches(folder, **more):
    stages = [Stage(2, 4, loss="dense"), Stage(3, 4)]
    module = FerretDataModule(stages, format="grit", root=str(folder), **{"num_workers": 0, **more})
    return list(module.train_dataloader())


def test_batches_are_the_same_whoever_makes_them(built):
    one, other = batches(built), batches(built, num_workers=2)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "input_ids" not in one[0] and one[0]["dense_words"].sum() > 0
    assert one[2]["dialogue_ids"].amax() >= 4 and one[2]["dense_region_words"].sum() > 0


def test_a_split_without_a_build_is_named(built, tmp_path):
    files = {"path": str(_coco(tmp_path)), "images": str(tmp_path)}
    config = GritConfig(str(tmp_path / "b"), [Part("v", "coco", files, tasks={"object": 1.0})], objects=True)
    build(config)
    module = FerretDataModule([Stage(1, 1)], format="grit", root=config.out)
    missing = "val: no finished build; run `ferret-lite grit build"
    with pytest.raises(FileNotFoundError, match=missing): module.examples("val")
    with pytest.raises(ValueError, match="augment"):
        FerretDataModule([], format="grit", root=config.out, augment="mirror")


def _coco(folder):
    from PIL import Image
    Image.new("RGB", (40, 30)).save(folder / "0.jpg")
    row = dict(id=1, image_id=0, category_id=1, bbox=[1, 1, 9, 9], iscrowd=0)
    (folder / "c.json").write_text(json.dumps(dict(images=[dict(id=0, file_name="0.jpg", width=40, height=30)],
                                                   annotations=[row], categories=[dict(id=1, name="dog")])))
    return folder / "c.json"


def test_two_steps_of_each_stage_and_the_test_behind_them(built, tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    out = str(tmp_path / "run")
    config["trainer"] |= {"log_every_n_steps": 1, "enable_progress_bar": False, "default_root_dir": out}
    stages = [dict(loss="dense", steps=2, batch_size=2), dict(loss="answers", steps=2, batch_size=2)]
    config["data"] |= {"stages": stages, "val_questions": 1, "num_scenes": 100}
    config["model"]["vision"]["num_hidden_layers"] = config["model"]["text"]["num_hidden_layers"] = 1
    config["model"]["compile"] = False
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "ferret_lite.cli", "fit", "--config", str(tmp_path / "small.yaml"),
             "--data.format", "grit", "--data.root", str(built), "--report.num", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "existence" in done.stdout and (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_pair_differs_in_its_negatives_only():
    one, other = (read_config(f"{name}_negatives") for name in ("with", "without"))
    a, b = one.parts[0], other.parts[0]
    assert (one.seed, a.files, a.dialogues) == (other.seed, b.files, b.dialogues) and one.out != other.out
    assert {k.replace("negative", "positive"): n for k, n in a.tasks.items()} == b.tasks != a.tasks
