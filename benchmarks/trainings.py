"""Trainings of the tiny Ferret for the ablations: commands that can be printed, run, interrupted and run again."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"


def stage(loss, **changes):
    "The recipe's stage of a loss with some fields changed, as `--data.stages` takes it."
    stages = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]["stages"]
    return json.dumps([{**s, **changes} for s in stages if s["loss"] == loss])


def fit(run, seed, stages, more=()):
    "The words of one training without a test. What an interrupted run has reached is taken up."
    words = ["fit", "--config", str(RECIPE), "--seed_everything", str(seed), "--data.seed", str(seed), "--report.num",
             "0", "--trainer.default_root_dir", str(run), "--data.stages", stages, *more]
    return words + (["--ckpt_path", "last"] if (run / "checkpoints" / "last.ckpt").is_file() else [])


def trained_model(run):
    "The file that a finished training leaves."
    return run / "model" / "model.safetensors"


def do(words, result, really):
    "Run `ferret-lite`, or say what would be run; whether its result is there."
    if result.is_file(): return True
    print("ferret-lite", shlex.join(words), flush=True)
    if really: subprocess.run([sys.executable, "-c", "from ferret_lite.cli import main; main()", *words], check=True)
    return really
