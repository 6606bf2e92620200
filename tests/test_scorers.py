"""Scores of files: equal to the release's where it works, robust by default, one clear error for what is malformed.

    FERRET_GOLDEN_METRICS=/path/to/golden/metrics pytest tests/test_scorers.py
"""
import json
import os
import shutil
from pathlib import Path

import pytest

from ferret_lite.captioning import score_caption, score_detect
from ferret_lite.grounding import format_phrase
from ferret_lite.predictions import released_boxes
from ferret_lite.records import Where
from ferret_lite.scorers import PROTOCOLS, score_files

SMALL = Path(__file__).parent / "golden" / "metrics_small"  # the release's form, numbers by its rules
LARGE = Path(os.environ.get("FERRET_GOLDEN_METRICS", "no golden folder"))
FOLDERS = [SMALL, pytest.param(LARGE, marks=pytest.mark.skipif(not LARGE.is_dir(), reason="set FERRET_GOLDEN_METRICS"))]
POPE = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "F1",
        "Yes ratio": "yes ratio"}
BOX = "[100, 100, 500, 500]"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(*args, **options):
    return {key: score.value for key, score in score_files(*args, **options).items()}


# The golden numbers, to the last digit, by both protocols -----------------------------------------------------------

@pytest.fixture(params=FOLDERS)
def golden(request):
    return request.param, json.loads((request.param / "expected.json").read_text())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_rec(golden, protocol):
    folder, expected = golden
    found = values("rec", folder / "rec_annotations.json", folder / "rec_predictions.jsonl", protocol)
    for name, numbers in expected["rec"].items():
        assert sorted(found[f"{name}/{key}"] for key in ("precision@1", "mean box", "best box")) == numbers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_flickr(golden, protocol):
    folder, expected = golden
    truth = folder / "final_flickr_mergedGT_test.json"
    found = values("flickr", truth, folder / "flickr_predictions.jsonl", protocol, entities=folder / "flickr30k")
    for rank, numbers in expected["flickr_merged_boxes_recall"].items():
        rank = "recall@" + rank.replace("-1", "all")
        assert numbers == {key.split("/")[2]: v for key, v in found.items() if key.startswith(f"merged/{rank}/")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_lvis(golden, protocol):
    folder, expected = golden
    assert 100 * values("lvis", None, folder / "lvis_predictions.jsonl",
                        protocol)["accuracy"] == expected["lvis_acc_percent"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_pope(golden, protocol):
    folder, expected = golden
    found = values("pope", folder / "pope_annotations.json", folder / "pope_predictions.jsonl", protocol)
    assert found == {POPE[key]: value for key, value in expected["pope"].items()}


# REC -----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def rec(tmp_path):
    """(score answers by a protocol, the annotations' path): four expressions whose box is BOX."""
    images = [dict(id=i, width=1000, height=1000, caption="a dog", dataset_name="refcoco") for i in range(4)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(dict(images=images, annotations=[dict(image_id=i, bbox=[100, 100, 400,
                                                                                        400]) for i in range(4)])))

    def score(texts, protocol="default", **options):
        rows = texts if isinstance(texts[0], dict) else [dict(image_id=i, text=t) for i, t in enumerate(texts)]
        found = values("rec", truth, write_lines(tmp_path / "said.jsonl", rows), protocol, **options)
        return [found[f"refcoco/{key}"] for key in ("precision@1", "mean box", "best box")]
    return score, truth


def test_a_point_is_left_out_by_default_and_named_by_the_release(rec):
    score, _ = rec
    texts = [f"a dog [300, 300] {BOX}.", BOX, "a dog.", "[1, 2, 3]"]
    assert score(texts) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="said.jsonl, line 1: the released scorer stops here: a bracket of 2"):
        score(texts, "released")


def test_one_bad_bracket_costs_the_release_the_whole_answer(rec):
    texts = [f"{BOX} and [0.1, 0.2, 0.3, 0.4].", f"[see] {BOX}", BOX, "LEFT DOG " + BOX]
    assert rec[0](texts) == [1, 1, 1] and rec[0](texts, "released") == [0.5, 0.5, 0.5]


def test_a_missing_answer_is_a_miss_by_default_and_shifts_the_release(rec):
    rows = [dict(image_id=i, text=BOX if i != 1 else "none") for i in (3, 2, 1)]
    assert rec[0](rows)[0] == 0.5 and rec[0](rows, "released")[0] == pytest.approx(2 / 3)


def test_order_of_answers_does_not_matter(rec):
    rows = [dict(image_id=i, text=BOX if i % 2 else "none") for i in (2, 0, 3, 1)]
    assert rec[0](rows) == rec[0](rows[::-1]) == rec[0](rows, "released") == [0.5] * 3


@pytest.mark.parametrize("dialect, box", [("shikra", (.1, .1, .5, .5)), ("kosmos2", (3, 3, 15, 15)),
                                          ("qwen", (100, 100, 500, 500)), ("ferret", (100, 100, 500, 500))])
def test_answers_of_other_models(rec, dialect, box):
    texts = [format_phrase("a dog", [box], dialect)] * 3 + ["nothing"]
    assert rec[0](texts, dialect=dialect) == [0.75] * 3


@pytest.mark.parametrize("rows, message", [
    ([dict(image_id=0)], "said.jsonl, line 1, field 'text': is missing"),
    ([dict(image_id=0, text=None)], "line 1, field 'text': is None; give str"),
    ([dict(image_id=0, text="")] * 2, "line 2: a second answer for 0"),
    ([dict(image_id=77, text="")], "field 'image_id': is 77, which the annotations do not have"),
    ([dict(image_id=[1], text="")], "field 'image_id'"),
])
def test_malformed_rows_are_named(rec, rows, message):
    with pytest.raises(ValueError) as e: rec[0](rows)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_malformed_lines_and_files_are_named(rec, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"image_id": 0, "text": ""}\n{"image_id": 1, ')
    with pytest.raises(ValueError, match="bad.jsonl, line 2: is no JSON"): values("rec", rec[1], tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: is .*give one JSON object"): values("rec", rec[1],
                                                                                      tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError): values("rec", rec[1], tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="field 'annotations': is missing"):
        (tmp_path / "half.json").write_text('{"images": []}')
        values("rec", tmp_path / "half.json", tmp_path / "bad.jsonl")


def test_a_folder_of_parts_in_any_order(rec, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(4): write_lines(parts / f"{i}_of_4.jsonl", [dict(image_id=i, text=BOX)])
    (parts / "metric.json").write_text("{}")  # the release writes its scores there
    assert values("rec", rec[1], parts)["refcoco/precision@1"] == 1


def test_the_split_comes_from_the_name_of_the_file(rec, tmp_path):
    for split in ("testA", "testB"):
        shutil.copy(rec[1], tmp_path / f"finetune_refcoco_{split}.json")
        said = write_lines(tmp_path / "said.jsonl", [dict(image_id=i, text=BOX) for i in range(4)])
        assert values("rec", tmp_path / f"finetune_refcoco_{split}.json", said)[f"refcoco {split}/precision@1"] == 1


@pytest.mark.parametrize("text, read", [
    ("a dog [1, 2, 3, 4] near a cat [5, 6, 7, 8].", [("a dog", [1, 2, 3, 4]), ("", [5, 6, 7, 8])]),
    ("a dog [1, 2, 3, 4] on grass. a cat [5, 6, 7, 8]", [("a dog", [1, 2, 3, 4]), ("a cat", [5, 6, 7, 8])]),
    ("two dogs. a cat [1, 2, 3, 4, 5]", [("two dogs. a cat", [1, 2, 3, 4])]),
    ("[[1, 2, 3, 4]]", []), ("a dog [1, 2, 3, 4] ]", []), ("[-1, +2, 3, 1_0]", [("", [-1, 2, 3, 10])]), ("no box", []),
])
def test_the_release_reads_answers_in_its_own_way(text, read):
    assert [(words, box.tolist()) for words, box in released_boxes(text, 1000, 1000, Where("a"))] == read


# Phrases, names, yes and no ------------------------------------------------------------------------------------------

@pytest.fixture
def flickr(tmp_path):
    """Score an answer about one caption: two men with two boxes, a dog, and again a dog."""
    folder = tmp_path / "flickr30k"
    for name in ("Sentences", "Annotations"): (folder / name).mkdir(parents=True)
    (folder / "Sentences" / "7.txt").write_text(
        "[/EN#1/people Two men] near [/EN#2/animals a dog] and [/EN#3/animals/other a dog] .\n")
    boxes = [(1, 0, 0, 400, 1000), (1, 600, 0, 1000, 1000), (2, 0, 0, 100, 100), (3, 500, 500, 900, 900)]
    tags = ("name", "xmin", "ymin", "xmax", "ymax")
    objects = [[f"<{t}>{v}</{t}>" for t, v in zip(tags, row)] for row in boxes]
    objects = "".join(f"<object>{o[0]}<bndbox>{''.join(o[1:])}</bndbox></object>" for o in objects)
    (folder / "Annotations" / "7.xml").write_text(f"<annotation><size/>{objects}</annotation>")
    item = dict(id=0, width=1000, height=1000, caption="Two men near a dog and a dog .", original_img_id=7,
                sentence_id=0,
                tokens_positive_eval=[[[0, 7]], [[13, 18]], [[23, 28]]])
    (tmp_path / "x_test.json").write_text(json.dumps(dict(images=[item])))

    def score(text, protocol="default", key=dict(image_id=0), **options):
        said = write_lines(tmp_path / "said.jsonl", [dict(key, text=text)])
        return values("flickr", tmp_path / "x_test.json", said, protocol, **options)
    return score


def test_merged_and_any_box(flickr):
    found = flickr("two men [0, 0, 999, 999].")
    assert found["merged/recall@1/people"] == 1 and found["any/recall@1/people"] == 0
    found = flickr("two men [0, 0, 400, 999].")
    assert found["merged/recall@1/people"] == 0 and found["any/recall@1/people"] == 1


def test_several_boxes_and_ranks(flickr):
    text = "A DOG [1, 1, 2, 2] and [500, 500, 900, 900]."
    found = flickr(text)
    assert [found[f"merged/recall@{k}/other"] for k in (1, 5, "all")] == [0, 1, 1]
    assert "merged/recall@5/other" not in flickr(text,
                                                 "released")  # of equal phrases the first one is meant, both times


def test_answers_by_image_and_sentence_as_the_release_writes_them(flickr):
    assert flickr("two men [0, 0, 999, 999].", key=dict(image_id=7, sentence_id=0))["merged/recall@1/people"] == 1
    with pytest.raises(ValueError, match="no caption"): flickr("", key=dict(image_id=7, sentence_id=3))


def test_phrases_of_other_models(flickr):
    text = format_phrase("Two men", [(0, 0, 999, 999)], "qwen")
    assert flickr(text, dialect="qwen")["merged/recall@1/people"] == 1


@pytest.mark.parametrize("text, name, synonyms, default, released", [
    ("A cup.", "cup", ["cup"], 1, 1), ("A CUP.", "cup", ["cup"], 1, 0), ("A cupboard.", "cup", ["cup"], 0, 1),
    ("It is not a cup, it is a sofa.", "cup", ["cup"], 0, 0), ("no cup. it is a bow.", "cup", ["cup"], 1, 1),
    ("a couch", "sofa", ["sofa", "couch"], 1, 1), ("a weapon", "bow_(weapon)", ["bow_(weapon)"], 1, 1), ("", "cup", [],
                                                                                                         0, 0),
])
def test_names(tmp_path, text, name, synonyms, default, released):
    said = write_lines(tmp_path / "said.jsonl", [dict(id=0, text=text, name=name, synonyms=synonyms)])
    assert [values("lvis", None, said, p)["accuracy"] for p in PROTOCOLS] == [default, released]


def test_names_by_kind_of_region_and_with_the_other_name(tmp_path):
    asked = [dict(id=i, name="cup", synonyms=["cup"], neg_class="bowl", region_format=k) for i,
             k in enumerate(["point", "box"])]
    said = write_lines(tmp_path / "said.jsonl", [dict(id=1, text="a cup or a bowl"), dict(id=0, text="a bowl")])
    assert values("lvis", write_lines(tmp_path / "asked.jsonl", asked), said) == {
        "accuracy": 0.5, "accuracy point": 0, "accuracy box": 1, "the true name and not the other": 0}
    assert score_files("lvis", None, write_lines(said, [dict(r, id=i, text="") for i,
                                                        r in enumerate(asked)]))["accuracy"].chance == 0.5


@pytest.fixture
def pope(tmp_path):
    asked = [dict(question_id=i, text=f"Is there a {t}?", label=l) for i, (t, l) in enumerate([("dog", "yes"), ("cat",
                                                                                                                "no")])]
    truth = write_lines(tmp_path / "coco_pope_random.json", asked)
    return lambda rows, protocol="default": values("pope", truth, write_lines(tmp_path / "said.jsonl", rows), protocol)


def test_upper_case_no(pope):
    rows = [dict(answer="Yes, there is."), dict(answer="NO!")]
    assert pope(rows)["accuracy"] == 1 and pope(rows, "released")["accuracy"] == 0.5


def test_answers_by_question_id_or_by_order_and_text(pope):
    assert pope([dict(question_id=1, answer="no"), dict(question_id=0, answer="yes")])["accuracy"] == 1
    assert pope([dict(question_id=0, answer="yes")])["accuracy"] == 0.5  # the other has no answer
    with pytest.raises(ValueError, match="give each a question_id"): pope([dict(answer="yes")])
    with pytest.raises(ValueError, match="field 'question': is 'Is there a cat"):
        pope([dict(question=f"Is there a {t}?", answer="yes") for t in ("cat", "dog")])
    with pytest.raises(ValueError, match="the released scorer stops here"): pope([dict(answer="no")] * 2, "released")


def test_folders_are_scored_pair_by_pair(tmp_path):
    for name in ("truth", "said"): (tmp_path / name).mkdir()
    for name in ("random", "popular", "adversarial"):
        shutil.copy(SMALL / "pope_annotations.json", tmp_path / "truth" / f"coco_pope_{name}.json")
        shutil.copy(SMALL / "pope_predictions.jsonl", tmp_path / "said" / f"coco_pope_{name}.jsonl")
    found = values("pope", tmp_path / "truth", tmp_path / "said")
    assert {key.split("/")[0] for key in found} == {"random", "popular", "adversarial"} and len(found) == 15


# Captions and lists --------------------------------------------------------------------------------------------------

def test_captions(tmp_path):
    truth = [dict(image_id=1, width=1000, height=1000, captions=["a man and a dog"],
                  objects=[dict(name="man", box=[100, 100, 500, 500]), dict(name="dog", box=[600, 600, 800, 800])])]
    path = write_lines(tmp_path / "truth.jsonl", truth)
    text = "A tall man [100, 100, 500, 500] and a cat [600, 600, 800, 800]."
    said = write_lines(tmp_path / "said.jsonl", [dict(image_id=1, text=text)])
    found = {k: s.value for k, s in score_caption(path, said, words=False).items()}
    assert (found["F1_all"], found["F1_loc"], found["phrase F1"], found["box F1"]) == (0.5, 1, 0.5, 1)
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("nltk")
    assert 0 < score_caption(path, said)["METEOR without synonyms"].value < 1


def test_without_the_extra_the_words_are_one_clear_error(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    path = write_lines(tmp_path / "truth.jsonl", [dict(image_id=1, width=9, height=9, captions=["a"], objects=[])])
    with pytest.raises(ValueError, match=r"pip install 'ferret_lite\[captions\]'"):
        score_caption(path, write_lines(tmp_path / "said.jsonl", [dict(image_id=1, text="a")]))


def test_lists(tmp_path):
    truth = dict(images=[dict(id=1, width=1000, height=1000)], categories=[dict(id=3, name="dog")],
                 annotations=[dict(image_id=1, category_id=3, bbox=[100, 100, 400, 400])])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    said = write_lines(tmp_path / "said.jsonl", [dict(image_id=1, text=f"dog {BOX}, cat {BOX}")])
    assert score_detect(tmp_path / "truth.json", said)["AP"].value == pytest.approx(1)
    nothing = write_lines(tmp_path / "said.jsonl", [dict(image_id=1, text="nothing")])
    assert score_detect(tmp_path / "truth.json", nothing)["AP"].value == 0
