"""The command `ferret-lite` as its users run it: in a process of its own, on shrunk configs."""
import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ferret_lite.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "\ntrainer:" in path.read_text()]
SMALL = [path for path in CONFIGS if "pretrained" not in path.read_text()]  # the others: see test_configs.py
TINY, VOC = ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "voc.yaml"


def shrink(path, folder, root=None):
    """A shipped config, small enough for a test: six steps, one layer, one validation question. Its path."""
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"val_check_interval": 3, "log_every_n_steps": 1, "enable_progress_bar": False}
    config["trainer"]["default_root_dir"] = str(folder)
    config["checkpoint"] |= {"every_n_train_steps": 2, "save_top_k": -1}
    config["data"] |= {"num_workers": 1, "val_questions": 1, "root": root and str(root)}
    config["data"]["stages"] = [{"loss": "dense", "steps": 2, "batch_size": 2},
                                {"loss": "answers", "steps": 4, "batch_size": 2}]
    config["model"]["vision"]["num_hidden_layers"] = config["model"]["text"]["num_hidden_layers"] = 1
    config["model"]["compile"] = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shrunk.yaml").write_text(yaml.safe_dump(config))
    return folder / "shrunk.yaml"


def ferret(*words, cwd=ROOT, code=0):
    """Run the command and return (stdout, stderr); its exit code must be `code`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", "ferret_lite.cli", *map(str, words)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.fixture
def error(capsys):
    """Run a command that must fail, in this process to save the imports, and return its one line of error."""
    from ferret_lite.cli import main
    def run(*words, code=1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop: main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert stop.value.code == code and out == "", (out, err)
        assert err.startswith("ferret-lite: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        return err
    return run


def fit(config, folder, *words, root=None):
    """Train a shrunk config into `folder`; what was printed."""
    return ferret("fit", "--config", shrink(config, folder, root), "--report.num", "2", *words)


def losses(run, version=0):
    """Step -> the losses that the CSV log has for it."""
    with open(run / "logs" / f"version_{version}" / "metrics.csv") as f: rows = list(csv.DictReader(f))
    return {int(r["step"]): [float(r[k]) for k in sorted(r) if k.startswith("train/") and r[k]]
            for r in rows if any(r[k] for k in r if k.startswith("train/"))}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One shrunk run of configs/tiny.yaml: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "runs" / "tiny"
    return folder, *fit(TINY, folder)


@pytest.fixture
def picture(tmp_path):
    """A 60 x 40 photograph, a mask of its size, and a place to work in."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = 220, 40, 40
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[12:20, 22:30] = 1  # a mask of 0 and 1 is one too
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


# Help and typing errors ----------------------------------------------------------------------------------------------

def test_help_lists_all_commands_without_loading_torch():
    code = "import sys; from ferret_lite.cli import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert out.endswith("False\n")


@pytest.mark.parametrize("words, part", [
    (["fti"], "unknown command 'fti'"),
    (["ask"], "the following arguments are required: image, question"),
    (["ask", "a.png", "What?", "--circle", "1,2"], "unrecognized arguments: --circle"),
    (["fit", "--config", TINY, "--model.colour", "red"], "colour"),
    (["evaluate"], "the following arguments are required: task (see ferret-lite evaluate --help)"),
    (["evaluate", "report", "--out", "scores", "--num_questions", "many"], "num_questions"),
    (["evaluate", "report", "--out", "scores", "--circle", "1,2"], "unrecognized arguments: --circle 1,2"),
])
def test_typing_errors_are_one_line(words, part, error):
    assert part in error(*words, code=2)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_function(name, capsys):
    from ferret_lite.cli import main
    room, function, _ = COMMANDS[name]
    for one in function.values() if isinstance(function, dict) else [function]:
        assert "config" not in signature(getattr(import_module(f"ferret_lite.{room}"), one)).parameters, "auto_cli takes it"
    with pytest.raises(SystemExit) as stop: main([name, "--help"])
    assert stop.value.code == 0 and f"ferret-lite {name}" in capsys.readouterr().out.replace("[options] ", "")


def test_plain_commands_are_typed_functions(monkeypatch, capsys, error):
    """One line in the table makes a command of a function; a dict of functions has subcommands."""
    from ferret_lite import cli
    def build(source: str, *, out: str, num: int = 3):
        """Build it.

        Args:
            source: what from.
            out: where to.
            num: how many.
        """
        if num < 0: raise ValueError(f"--num {num}: cannot be negative;\n give more")
        print(source, out, num)
    monkeypatch.setattr(cli, "build", build, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "build", ("cli", "build", "build it"))
    monkeypatch.setitem(cli.COMMANDS, "tools", ("cli", {"build": "build"}, "build and more"))
    cli.main(["build", "a", "--out", "b"])
    cli.main(["tools", "build", "a", "--out", "b", "--num", "4"])
    assert capsys.readouterr().out == "a b 3\na b 4\n"
    assert "cannot be negative; give more" in error("build", "a", "--out", "b", "--num", "-1")
    assert "unrecognized arguments: --size 3" in error("tools", "build", "a", "--out", "b", "--size", "3", code=2)
    assert "'bulid'" in error("tools", "bulid", code=2)


def test_shipped_configs_have_names(error):
    from ferret_lite.cli import find_config
    assert [Path(find_config(path.stem)).read_text() for path in CONFIGS] == [path.read_text() for path in CONFIGS]
    assert f"no such config; give a file, or one of {', '.join(path.stem for path in CONFIGS)}" in error("fit", "--config", "tinny")
    assert "no such config" in error("fit", "--config=tinny")


def test_errors_are_one_line_in_a_process_of_its_own(tmp_path):
    out, err = ferret("fit", "--config", VOC, "--data.root", tmp_path, code=1)
    assert out == "" and err.count("\n") == 1 and err.startswith(f"ferret-lite: error: {tmp_path}"), err


def test_unknown_config_key_is_named(tmp_path, error):
    config = yaml.safe_load((TINY).read_text())
    config["data"]["imagesize"] = 64
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    assert "imagesize" in error("fit", "--config", tmp_path / "typo.yaml", code=2)


# Training ------------------------------------------------------------------------------------------------------------

def test_fit_leaves_all_it_promises(trained):
    folder, out, _ = trained
    for name in ("model/config.json", "model/model.safetensors", "answers.jsonl", "answers.png", "scores.json",
                 "scores.md", "checkpoints/last.ckpt", "logs/version_0/metrics.csv", "logs/version_0/config.yaml"):
        assert (folder / name).is_file(), name
    assert list((folder / "logs" / "version_0").glob("events.out.tfevents.*"))
    assert not [p for p in folder.rglob("*") if p.name.endswith((".part", ".old"))]
    scores = json.loads((folder / "scores.json").read_text())
    assert {"REC/acc@0.5", "refer point/accuracy", "existence/accuracy", "same-box/accuracy"} <= scores.keys()
    assert "REC/acc@0.5" in out and "answers.png" in out and "ferret-lite ask" in out
    assert sorted(losses(folder)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_losses_are_those_of_an_unbroken_run(trained, tmp_path, step):
    """The run is broken off after a step: `last` is the checkpoint of that step."""
    folder, *_ = trained
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(folder / "checkpoints" / f"step={step}.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    out, _ = fit(TINY, tmp_path, "--ckpt_path", "last", "--report.num", "0", "--trainer.enable_progress_bar", "true")
    assert "6/6" in out  # the bar counts the whole run's steps
    whole, rest = losses(folder), losses(tmp_path)
    assert sorted(rest) == list(range(step, 6))
    for i in rest: np.testing.assert_allclose(rest[i], whole[i], atol=1e-6, rtol=0, err_msg=f"step {i}")
    ends = [torch.load(run / "checkpoints" / "step=6.ckpt", weights_only=True)["state_dict"] for run in (folder, tmp_path)]
    for name in ends[0]: torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-6, rtol=0)


def test_config_saved_with_a_run_repeats_it(trained, tmp_path):
    """test and validate read the run's own config."""
    folder, *_ = trained
    config = folder / "logs" / "version_0" / "config.yaml"
    out, _ = ferret("test", "--config", config)
    assert "REC/acc@0.5" in out and (folder / "test" / "answers.png").is_file()
    first, again = (json.loads((at / "scores.json").read_text()) for at in (folder, folder / "test"))
    assert first == again


def test_evaluate_scores_a_saved_model(trained, tmp_path):
    folder, *_ = trained
    ferret("evaluate", "report", "--model", folder / "model", "--out", tmp_path, "--num_questions", "2")
    assert "Ferret-Bench" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((folder / "scores.json").read_text())


class Code:
    def __reduce__(self): return os.system, ("touch /tmp/ferret-lite-was-here",)


@pytest.mark.parametrize("kind, part", [
    ("code", "no code"), ("broken", "broken"), ("shape", "config"), ("missing", "no such")])
def test_bad_checkpoints_are_refused(trained, tmp_path, kind, part, error):
    path, marker = tmp_path / "bad.ckpt", Path("/tmp/ferret-lite-was-here")
    if kind == "code": path.write_bytes(pickle.dumps({"state_dict": Code()}))
    if kind == "broken": path.write_bytes((trained[0] / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    if kind == "shape":
        checkpoint = torch.load(trained[0] / "checkpoints" / "last.ckpt", weights_only=True)
        name = "model.mm_projector.weight"
        torch.save({**checkpoint, "state_dict": {**checkpoint["state_dict"], name: torch.zeros(3, 3)}}, path)
    line = error("fit", "--config", shrink(TINY, tmp_path / "run"), "--ckpt_path", path)
    assert str(path) in line and part in line
    assert not marker.exists() and not (tmp_path / "run" / "model").exists()


def test_last_without_a_checkpoint_is_an_error(tmp_path, error):
    line = error("fit", "--config", shrink(TINY, tmp_path), "--ckpt_path", "last")
    assert "last.ckpt: no such checkpoint" in line


# Asking --------------------------------------------------------------------------------------------------------------

def test_ask_takes_every_kind_of_region_in_flag_order(trained, picture):
    out, _ = ferret("ask", picture / "photo.png", "What is [region0], [region1], [region2] and [region3]?",
                    "--point", "30,20", "--box", "-5,10,40,30", "--mask", picture / "mask.png",
                    "--scribble", "21,11 35,25", "--pen-width", "3", "--model", trained[0] / "model", "--json", "--out", picture / "out.png")
    said = json.loads(out)
    assert [next(iter(r)) for r in said["regions"]] == ["point", "box", "mask_rle", "scribble"]
    assert said["regions"][0] == {"point": [30, 20]} and isinstance(said["answer"], str)
    assert all(0 <= v <= 60 for b in said["boxes"] for v in b["box"])
    with Image.open(picture / "out.png") as drawn: assert min(drawn.size) > 100


def test_ask_uses_the_shipped_model_and_draws(picture, tmp_path):
    out, _ = ferret("ask", picture / "photo.png", "Where is the red square? Write <image> and <region_fea>.", cwd=tmp_path)
    assert "drawn in answer.png" in out and (tmp_path / "answer.png").is_file()


ASK = [
    (["nothing.png", "What?"], "nothing.png: no such image"),
    (["broken.png", "What?"], "broken.png: cannot be read as an image"),
    (["photo.png", " "], "question"),
    (["photo.png", "What is [region0]?"], "mentions [region0], but there are 0 region flags"),
    (["photo.png", "What is this?", "--box", "1,2,3,4"], "does not mention [region0]"),
    (["photo.png", "What is [region0]?", "--box", "30,2,3,4"], "--box 30,2,3,4"),
    (["photo.png", "What is [region0]?", "--box", "nan,2,3,4"], "--box nan,2,3,4"),
    (["photo.png", "What is [region0]?", "--box", "1,2,3"], "give x1,y1,x2,y2"),
    (["photo.png", "What is [region0]?", "--box", "70,2,80,9"], "--box 70,2,80,9"),
    (["photo.png", "What is [region0]?", "--point", "10,41"], "--point 10,41"),
    (["photo.png", "What is [region0]?", "--scribble", "100,100 120,90"], "--scribble 100,100 120,90"),
    (["photo.png", "What is [region0]?", "--mask", "empty.png"], "mask is empty"),
    (["photo.png", "What is [region0]?", "--mask", "small.png"], "the mask is 10 x 10"),
    (["photo.png", "What is [region0]?", "--mask", "none.png"], "none.png"),
    (["photo.png", "What?", "--out", "photo.png"], "is the image itself"),
    (["photo.png", "What?", "--model", "none"], "none is no folder"),
    (["photo.png", "What?", "--device", "cuda:99"], "--device cuda:99: this machine has none"),
]


def test_bad_questions_are_one_line_each(picture, error, monkeypatch):
    monkeypatch.chdir(picture)
    (picture / "broken.png").write_bytes((picture / "photo.png").read_bytes()[:60])
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(picture / "empty.png")
    Image.fromarray(np.full((10, 10), 255, np.uint8)).save(picture / "small.png")
    before = sorted(picture.rglob("*"))
    for words, part in ASK: assert part in error("ask", *words)
    assert sorted(picture.rglob("*")) == before


def test_debug_shows_the_traceback(picture):
    _, err = ferret("ask", picture / "none.png", "What?", "--debug", code=1)
    assert "Traceback" in err and "none.png: no such image" in err


def test_a_folder_without_sound_weights_is_refused(trained, picture, error):
    folder = shutil.copytree(trained[0] / "model", picture / "model")
    question = "ask", picture / "photo.png", "What?", "--model", folder
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    assert f"{folder}: cannot be loaded" in error(*question)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle is never opened
    assert f"{folder} is no folder with config.json and model.safetensors" in error(*question)


# Folders of photographs ----------------------------------------------------------------------------------------------

def scenes(num):
    from ferret_lite.scenes import make_scene
    return [make_scene(0, i) for i in range(num)]


def write_voc(root):
    """Twelve scenes as a Pascal VOC folder."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"): (root / name).mkdir(parents=True)
    for i, scene in enumerate(scenes(12)):
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{i}.jpg")
        boxes = "".join(f"<object><name>{o.shape}</name><bndbox><xmin>{o.box[0] + 1}</xmin><ymin>{o.box[1] + 1}</ymin>"
                        f"<xmax>{o.box[2]}</xmax><ymax>{o.box[3]}</ymax></bndbox></object>" for o in scene.objects)
        (root / "Annotations" / f"{i}.xml").write_text(f"<annotation><filename>{i}.jpg</filename>{boxes}</annotation>")
    for split, names in {"train": range(8), "val": range(8, 10), "test": range(10, 12)}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in names))


def write_coco(root):
    """The same as COCO json, with masks."""
    from ferret_lite.regions import mask_to_rle
    from ferret_lite.scenes import SHAPES, scene_mask
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for split, numbers in {"train": range(8), "val": range(8, 10), "test": range(10, 12)}.items():
        images, rows = [], []
        for i, scene in enumerate(scenes(12)):
            if i not in numbers: continue
            Image.fromarray(scene.image).save(root / "images" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
            for j, o in enumerate(scene.objects):
                x1, y1, x2, y2 = map(int, o.box)
                rows.append({"id": 100 * i + j, "image_id": i, "category_id": SHAPES.index(o.shape), "iscrowd": 0,
                             "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": mask_to_rle(scene_mask(scene, j))})
        classes = [{"id": i, "name": s} for i, s in enumerate(SHAPES)]
        table = {"images": images, "annotations": rows, "categories": classes}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))


@pytest.mark.parametrize("format", ["voc", "coco"])
def test_fit_on_a_folder(tmp_path, format):
    {"voc": write_voc, "coco": write_coco}[format](tmp_path / "data")
    out, _ = fit(VOC, tmp_path / "run", "--data.format", format, root=tmp_path / "data")
    assert "refer box/macro accuracy" in out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "same-box/accuracy" not in scores and scores["refer box/accuracy"]["baseline"] is not None


# Shipped configs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.name)
def test_every_shipped_config_fits(path, tmp_path):
    """Its own shapes, two steps; all keys are read, or the parser would complain."""
    config = yaml.safe_load(path.read_text())
    assert config["trainer"]["default_root_dir"].startswith("runs/")
    words = []
    if config["data"]["format"] != "scenes":
        write_voc(tmp_path / "data")
        words = ["--data.root", tmp_path / "data"]
    stages = [{**stage, "steps": 1, "batch_size": 2} for stage in config["data"]["stages"]]
    ferret("fit", "--config", path, "--trainer.default_root_dir", tmp_path / "run", "--data.stages", json.dumps(stages),
           "--data.num_workers", "0", "--data.val_questions", "1", "--report.num", "0", "--model.compile", "false",
           "--trainer.val_check_interval", "1", *words)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
