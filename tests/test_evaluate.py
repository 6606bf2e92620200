"""Answering and scoring by the command: whole after a kill, the same for any number of processes, files alone."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ferret_lite.evaluate_cli import evaluate_command

SMALL = Path(__file__).parent / "golden" / "metrics_small"
RUN = "import sys; from ferret_lite.cli import main; main(sys.argv[1:])"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
SETTINGS = ["--num_questions", "4", "--batch_size", "5", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Ferret of random weights, as `save_model` writes it."""
    from transformers import LlamaConfig

    from ferret_lite.data import FerretDataModule
    from ferret_lite.model import FerretConfig, FerretForConditionalGeneration, save_model
    from ferret_lite.vision import ConvStemVisionConfig
    torch.manual_seed(0)
    processor = FerretDataModule([], num_points=16).processor
    tokenizer = processor.tokenizer
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = LlamaConfig(**small, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = FerretConfig(vision_config=ConvStemVisionConfig(**small, stem_channels=16), text_config=text,
                          image_token_id=processor.image_token_id, region_token_id=processor.region_token_id,
                          vision_feature_layer=-1, vision_feature_select_strategy="full", sampler_num_points=[16, 8, 4])
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(FerretForConditionalGeneration(config), processor, folder)
    return folder


# A run in processes of its own ----------------------------------------------------------------------------------------

def call(model, out):
    """`ferret-lite evaluate bench`: 3 x 4 questions of the embedded world."""
    return ["-c", RUN, "evaluate", "bench", "--model", str(model), "--out", str(out), *SETTINGS]


def run(model, out, processes=1):
    """Its answers and scores, as bytes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
             "--no-python",
             sys.executable] if processes > 1 else [sys.executable]
    done = subprocess.run([*start, *call(model, out)], env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {name: (out / name).read_bytes() for name in ("answers.jsonl", "scores.json")}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return run(model, tmp_path_factory.mktemp("runs") / "one")


def test_each_line_says_what_was_asked_and_of_whom(whole):
    rows = [json.loads(line) for line in whole["answers.jsonl"].splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 12
    assert all({"key", "prompt", "answer", "boxes", "seed", "model", "run"} <= row.keys() for row in rows)
    assert all(row["prompt"].count("<image>") == 1 and row["prompt"].endswith("ASSISTANT:") for row in rows)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_files(model, whole, tmp_path, processes):
    assert run(model, tmp_path / "out", processes) == whole


def test_kill_9_loses_and_repeats_nothing(model, whole, tmp_path):
    out = tmp_path / "out"
    parts = out / "answers.jsonl.parts" / "0.jsonl"
    process = subprocess.Popen([sys.executable, *call(model, out)], env=ENV, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (parts.exists() and parts.read_bytes().count(b"\n") >= 5): time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts.read_bytes() if parts.exists() else pytest.skip("the run was faster than the kill")
    assert 5 <= before.count(b"\n") <= 12 and all(line in whole["answers.jsonl"] for line in before.splitlines())
    stamp = parts.with_name("9.jsonl")  # another process' part: half a line, as a power cut leaves it
    stamp.write_bytes(b'{"key": "half a li')
    assert run(model, out) == whole and not parts.parent.exists()


# The report card ------------------------------------------------------------------------------------------------------

def test_the_report_is_one_page_with_pictures(model, tmp_path, capsys):
    evaluate_command("report", model=str(model), out=str(tmp_path), num_questions=2, max_new_tokens=4)
    page = (tmp_path / "report.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"answers.jsonl", "answers.png", "worst.png", "scores.json",
                                                    "scores.md",
                                                     "report.md", "bench"}
    for part in ("chance", "baseline", "REC/acc@0.5", "Ferret-Bench",
                 "![the worst answers](worst.png)"): assert part in page
    assert "report.md" in capsys.readouterr().out


# Files alone ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, truth, said, key", [
    ("rec", "rec_annotations.json", "rec_predictions.jsonl", "refcoco/precision@1"),
    ("pope", "pope_annotations.json", "pope_predictions.jsonl", "F1"),
    ("flickr", "final_flickr_mergedGT_test.json", "flickr_predictions.jsonl", "merged/recall@1/all"),
    ("lvis", None, "lvis_predictions.jsonl", "accuracy")])
def test_files_alone(task, truth, said, key, tmp_path, capsys):
    evaluate_command(task, annotations=truth and str(SMALL / truth), predictions=str(SMALL / said),
                     json=str(tmp_path / "scores.json"), protocol="released")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["protocol"] == "released" and 0 < found["scores"][key]["value"] < 1
    assert key in capsys.readouterr().out


# Benchmarks that are asked ------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    """One image and the truth of every benchmark about it."""
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.jpg")
    image = dict(file_name="a.jpg", width=60, height=40)
    for name in ("Sentences", "Annotations"): (tmp_path / "flickr30k" / name).mkdir(parents=True)
    (tmp_path / "flickr30k" / "Sentences" / "7.txt").write_text("[/EN#1/people Two men] run .\n")
    (tmp_path / "flickr30k" / "Annotations" / "7.xml").write_text(
        "<annotation><object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        "</object></annotation>")
    rec = dict(images=[dict(image, id=1, caption="a dog, left", dataset_name="refcoco")],
               annotations=[dict(image_id=1, bbox=[0, 0, 20, 20], category_id=1)], categories=[dict(id=1, name="dog")])
    rows = {"rec.json": [rec], "detect.json": [rec],
            "flickr_test.json": [dict(images=[dict(image, id=1, caption="Two men run .", original_img_id=7,
                                                   sentence_id=0,
                                                   tokens_positive_eval=[[[0, 7]]])])],
            "lvis.jsonl": [dict(image, id=i, image_path="val/a.jpg", name="cup", neg_class="bowl", synonyms=["cup"],
                                sample_point=[3, 4], bbox_norm=[.1, .1, .5, .6]) for i in range(2)],
            "caption.jsonl": [dict(image, image_id=1, captions=["a dog"], objects=[dict(name="dog", box=[0, 0, 9,
                                                                                                         9])])],
            "pope/coco_pope_random.json": [dict(question_id=i, image="a.jpg", text=f"Is there a {t}?", label="no")
                                           for i, t in enumerate("ab")]}
    rows["pope/coco_pope_popular.json"] = rows["pope/coco_pope_random.json"]
    (tmp_path / "pope").mkdir()
    for name, some in rows.items(): (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    return tmp_path


@pytest.mark.parametrize("task, data, key", [
    ("rec", "rec.json", "refcoco/precision@1"), ("flickr", "flickr_test.json", "merged/recall@1/all"),
    ("lvis", "lvis.jsonl", "accuracy box"), ("pope", "pope", "random/accuracy"), ("caption", "caption.jsonl", "F1_all"),
    ("detect", "detect.json", "AP")])
def test_every_benchmark_is_asked_and_its_file_scored(model, files, task, data, key, capsys):
    out = files / "out"
    evaluate_command(task, data=str(files / data), images=str(files), model=str(model), out=str(out), max_new_tokens=4,
                     words=False)
    found = json.loads((out / "scores.json").read_text())["scores"]
    assert key in found and key in capsys.readouterr().out
    said = sorted((out / "predictions").glob("*.jsonl")) if task == "pope" else [out / "predictions.jsonl"]
    rows = [json.loads(line) for path in said for line in open(path)]
    assert len(rows) == {"lvis": 2, "pope": 4}.get(task, 1) and all(row["prompt"] and "width" in row for row in rows)


@pytest.mark.parametrize("options, message", [
    (dict(task="rec"), "give --predictions, files to score, or --out"),
    (dict(task="report", predictions="a"), "report: has no files"), (dict(task="rec", out="a"),
                                                                     "give the questions, --data"),
    (dict(task="rec", out="a", predictions="b"), "give either"), (dict(task="caption", predictions="a"),
                                                                  "give the annotations"),
    (dict(task="bench", predictions="a"), "folder of Ferret-Bench")])
def test_calls_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message): evaluate_command(**options)
