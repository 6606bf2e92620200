"""The released scorers' rules in small numbers; and, where the golden files are at hand, their numbers.

    FERRET_GOLDEN_METRICS=/path/to/golden/metrics pytest tests/test_metrics.py
"""
import json
import os
from pathlib import Path

import pytest

from ferret_lite.grounding import parse_answer, phrase_boxes_px
from ferret_lite.metrics import existence_score, mentions_name, pope_rule, rec_score

GOLDEN = Path(os.environ.get("FERRET_GOLDEN_METRICS", "no golden folder"))
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="set FERRET_GOLDEN_METRICS to the golden folder")
REC_KEYS = ("REC/acc@0.5", "REC/mean box acc@0.5", "REC/best box acc@0.5")


def lines(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


def released_boxes(text, width, height):
    return [box for _, box in phrase_boxes_px(parse_answer(text), width, height, rule="released", rejected=True)]


def rec(answers, truth):
    scores = rec_score([released_boxes(text, 1000, 1000) for text in answers], truth)
    return [scores[key].value for key in REC_KEYS]


def test_rec_first_mean_and_best_box():
    truth = [[100, 100, 300, 300]]
    assert rec(["the dog [100, 100, 300, 300]."], truth) == [1, 1, 1]
    assert rec(["the dog [600, 600, 800, 800] and a cat [100, 100, 300, 300]."], truth) == [0, 0, 1]
    assert rec(["it is at [80, 100, 280, 300] or [120, 100, 320, 300]."], truth) == [1, 1, 1]
    assert rec(["the dog [0.1, 0.1, 0.3, 0.3]."], truth) == [0, 0, 0]  # fractions are no bins
    assert rec(["There is no such object."], truth) == [0, 0, 0]


def test_a_backwards_first_box_keeps_its_place_and_counts_in_the_mean():
    truth = [[100, 100, 300, 300]]
    assert rec(["the dog [300, 100, 100, 300] and a cat [100, 100, 300, 300]."], truth) == [0, 0, 1]
    dropped = [box for _, box in phrase_boxes_px(parse_answer("[300, 1, 100, 3] and [100, 100, 300, 300]"), 1000, 1000)]
    assert len(dropped) == 1


def test_pope():
    answers = ["Yes.", "There is one.", "No.", "There is not one. Yes it is odd.", "I cannot see it, no"]
    scores = existence_score(answers, [True, False, False, True, False], pope_rule)
    assert [s.value for s in scores.values()] == pytest.approx([3 / 5, 1 / 2, 1 / 2, 1 / 2, 2 / 5])


@needs_golden
def test_golden_rec():
    expected = json.loads((GOLDEN / "expected.json").read_text())["rec"]
    annotations = json.loads((GOLDEN / "rec_annotations.json").read_text())
    said = {row["image_id"]: row["text"] for row in lines("rec_predictions.jsonl")}
    true = {row["image_id"]: row["bbox"] for row in annotations["annotations"]}
    for dataset, numbers in expected.items():
        images = [i for i in annotations["images"] if i["dataset_name"] == dataset]
        answers = [released_boxes(said[i["id"]], i["width"], i["height"]) for i in images]
        scores = rec_score(answers, [(x, y, x + w, y + h) for x, y, w, h in (true[i["id"]] for i in images)])
        assert sorted(scores[key].value for key in REC_KEYS) == pytest.approx(numbers, abs=1e-12)


@needs_golden
def test_golden_pope():
    expected = json.loads((GOLDEN / "expected.json").read_text())["pope"]
    truth = [row["label"] == "yes" for row in lines("pope_annotations.json")]
    scores = existence_score([row["answer"] for row in lines("pope_predictions.jsonl")], truth, pope_rule)
    assert [s.value for s in scores.values()] == pytest.approx(list(expected.values()), abs=1e-12)


@needs_golden
def test_golden_lvis():
    def names(row):
        for name in {row["name"], *row["synonyms"]}:
            yield name.replace("_", " ")
            yield from (part.strip("_)").replace("_", " ") for part in name.split("(") if "_(" in name)
    rows = lines("lvis_predictions.jsonl")
    right = sum(any(mentions_name(row["text"], name) for name in names(row)) for row in rows)
    assert 100 * right / len(rows) == json.loads((GOLDEN / "expected.json").read_text())["lvis_acc_percent"]
