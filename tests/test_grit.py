"""A GRIT as a whole: the same bytes for the same seed, also after a kill; sound records; yes and no one to one."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ferret_lite.annotated import Annotated, Caption, Relation, Span, world_records
from ferret_lite.grit import build
from ferret_lite.grit_commands import grit_build, grit_inspect
from ferret_lite.instructions import chain, grounded, instruct, items_of
from ferret_lite.mix import GritConfig, Part, open_part, read_config
from ferret_lite.negatives import CoOccurrence, draw_pair, is_absent, word_negatives
from ferret_lite.neighbours import is_new, known_words, stem
from ferret_lite.phrasings import PHRASINGS, draw_phrasing, plain
from ferret_lite.records import Dialogue, Record, Turn, check_dialogue, find_placeholders
from ferret_lite.regions import Box
from ferret_lite.released import read_grit, record_items, write_grit_items
from ferret_lite.shards import GritShards
from ferret_lite.tasks import AnnotatedObject

pytest.importorskip("webdataset")
CONFIGS = Path(__file__).parent.parent / "configs" / "grit"


def thing(name, box=(0, 0, 9, 9), **more):
    return AnnotatedObject(name, box, **more)


def image(*objects, **more):
    objects = [thing(o, (10 * i, 0, 10 * i + 9, 9)) if isinstance(o, str) else o for i, o in enumerate(objects)]
    return Annotated("a.jpg", 100, 60, objects, "1", **more)


def world(out, num=60, **more):
    tasks = {t: 1.0 for t in (*PHRASINGS, "negative_image", "negative_word")}
    part = Part("world", "world", {"num": num, "seed": 3}, tasks=tasks, turns=3)
    return GritConfig(str(out), [part], shard_size=25, piece_size=10, **more)


def digest(folder):
    return {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob("*.tar"))}


# Phrasings -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", PHRASINGS)
def test_every_phrasing_makes_a_sound_dialogue(task, monkeypatch):
    rng, seen = np.random.default_rng(0), set()
    records = [r for r in world_records(30, seed=2) if items_of(r, task)]
    assert len(set(PHRASINGS[task])) >= 12
    for _ in range(8):
        for record in records:
            d = instruct(record, task, items_of(record, task)[0], rng)
            check_dialogue(d, record.width, record.height)
            assert "{" not in d.turns[0].text + d.turns[1].text
            seen.add(d.turns[0].text.split("[region0]")[0][:12])
    assert len(seen) >= 5


def test_annotators_texts_cannot_pass_for_mentions():
    nasty = "[region3] {name} [1, 2]\n<image>"
    record = image(thing(nasty), "dog", relations=[Relation(0, nasty, 1)], attributes={0: (nasty,)},
                   expressions=[thing(nasty)], descriptions=[thing(nasty)],
                   captions=[Caption(nasty, [Span(0, 3, [(0, 0, 9, 9)])])])
    for task in PHRASINGS:
        for item in items_of(record, task):
            d = instruct(record, task, item, np.random.default_rng(0))
            check_dialogue(d, 100, 60)
            assert {p.index for t in d.turns for p in find_placeholders(t.text)} == set(range(len(d.regions)))


def test_only_questions_with_one_answer():
    twins = image(thing("man"), thing("hat"))  # the same box
    assert items_of(twins, "object") == []
    relations = [Relation(0, "left of", 1), Relation(0, "left of", 2), Relation(1, "near", 2)]
    two = image("man", "horse", "cow", relations=relations)
    assert items_of(two, "related") == [2] and items_of(two, "relation") == [0, 1, 2]
    assert items_of(image("dog", counted=set()), "detect") == []
    assert items_of(image("dog", thing("cat", ignore=True)), "detect") == ["dog"]
    assert items_of(image(expressions=[thing("left"), thing("left", (20, 0, 30, 9))]), "expression") == []


def test_chains_renumber_regions():
    turns = [Turn("user", "What is [region0:feature]?"), Turn("assistant", "A dog.")]
    one = Dialogue(turns, [Box(0, 0, 5, 5)], "object")
    both = chain([one, one])
    assert both.turns[2].text == "What is [region1:feature]?" and len(both.regions) == 2
    check_dialogue(both, 10, 10)


def test_captions_keep_their_words():
    caption = Caption("A man [sic] and dogs", [Span(0, 5, [(0, 0, 9, 9)]), Span(16, 20, [(1, 1, 3, 3), (4, 4, 6, 6)])])
    assert grounded(caption)[0] == "A man [region0] (sic) and dogs [region1] [region2]"
    assert plain("a  [b]\n") == "a (b)" and draw_phrasing("object", np.random.default_rng(0), region="{x}")


# Negatives -----------------------------------------------------------------------------------------------------------

def test_nothing_that_was_said_is_denied():
    record = image("couch", "woman", captions=[Caption("A lady feeds two puppies", [])], attributes={0: ("brown",)})
    words = known_words(record)
    said = ("sofa", "woman", "lady", "person", "people", "furniture")
    assert not any(is_absent(record, name, words) for name in said)
    assert is_absent(record, "traffic light", words)
    assert not is_new("tan", words) and is_new("blue", words)


@pytest.mark.parametrize("word, base", [
    ("Dogs", "dog"), ("buses", "bus"), ("women", "woman"), ("glass", "glass"), ("berries", "berry"), ("boxes", "box"),
    ("grass", "grass"), ("is", "is")])
def test_stems(word, base):
    assert stem(word) == base


def test_numbers_only_grow_and_pass_what_is_boxed():
    record = image("dog", "dog", "dog", expressions=[thing("two dogs")])
    texts = [t for kind, t in word_negatives("two dogs", record, known_words(record)) if kind == "quantity"]
    assert texts == ["four dogs", "five dogs"]  # there are three


def test_pairs_are_one_to_one_and_a_no_has_no_box():
    records = list(world_records(40, seed=9))
    counts, rng = CoOccurrence(records), np.random.default_rng(0)
    for record in records:
        for kind in ("image", "word"):
            yes, no = draw_pair(record, kind, counts, rng)
            assert yes.task.startswith("positive") and no.task.startswith("negative")
            assert yes.regions and not no.regions and no.turns[1].text.startswith("No, ")
            assert not any(no.turns[1].text.rstrip(".").endswith(f"no {o.name}") for o in record.objects)


def test_what_was_never_looked_for_is_not_denied_by_boxes_alone():
    record = image("dog", absent=[], counted=set(), descriptions=[thing("a cat on a mat")])
    counts = CoOccurrence([image("dog", "cat", "mat", "tree")])
    denied = {draw_pair(record, "image", counts, np.random.default_rng(i))[1].turns[1].text for i in range(20)}
    assert denied and all("tree" in text for text in denied)


# Builds --------------------------------------------------------------------------------------------------------------

def test_same_seed_same_bytes_other_seed_others(tmp_path):
    index = build(world(tmp_path / "a"))
    build(world(tmp_path / "b"))
    build(world(tmp_path / "c", seed=1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    counts = index["counts"]
    assert counts["task/negative_image"] == counts["task/positive_image"] > 0
    records = [r for r, image in GritShards(tmp_path / "a") if image.size == (64, 64)]
    assert len({r.id for r in records}) == len(records) == index["records"] == 60
    for name in ("card.md", "samples.png", "histograms.png"): assert (tmp_path / "a" / name).is_file()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_grit import world, build
build(world({out!r}, num=400))
"""


def test_killed_builds_go_on(tmp_path):
    build(world(tmp_path / "calm", num=400))
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "torn"))
    for pieces in (2, 9):
        process = subprocess.Popen([sys.executable, "-c", code])
        done = lambda: len(list((tmp_path / "torn/pieces").glob("*.piece")))
        while process.poll() is None and done() < pieces: time.sleep(0.002)
        if process.poll() is None: os.kill(process.pid, signal.SIGKILL)
        process.wait()
    build(world(tmp_path / "torn", num=400))
    assert digest(tmp_path / "torn") == digest(tmp_path / "calm")


def test_repeats_and_fractions(tmp_path):
    tasks = {"object": 1.0}
    repeats = {"fifth": .2, "twice": 2}
    parts = [Part(n, "world", {"num": 200}, repeat=r, tasks=tasks, dialogues=1) for n, r in repeats.items()]
    index = build(GritConfig(str(tmp_path / "r"), parts))
    twice = index["counts"]["source/twice"]  # a scene of two objects with one box allows no question
    assert twice % 2 == 0 and 380 < twice <= 400 and 20 < index["counts"]["source/fifth"] < 60


def test_released_files_go_in_and_come_out(tmp_path):
    build(world(tmp_path / "a", pointing={"box": 1}))
    records = [Record("x.png", r.width, r.height, [d], f"{r.id}/{i}")
               for r, _ in GritShards(tmp_path / "a") for i, d in enumerate(r.dialogues)]
    write_grit_items((item for r in records for item in record_items(r)), tmp_path / "grit.json")
    again = list(read_grit(tmp_path / "grit.json"))
    for old, new in zip(records, again, strict=True):
        flat = lambda r: [t.text for t in r.dialogues[0].turns if not find_placeholders(t.text)]
        assert flat(old) == flat(new) and old.id == new.id
    part = Part("released", "grit", {"path": str(tmp_path / "grit.json"), "images": "photos"}, repeat=2)
    index = build(GritConfig(str(tmp_path / "b"), [part]))
    assert index["records"] == 2 * len(records)
    kinds = index["counts"]
    assert all(kinds[f"format/asked {k}"] > 5 for k in ("box", "point", "free-form"))
    assert GritShards(tmp_path / "b")[0][0].image == "photos/x.png"


def test_commands(tmp_path, capsys):
    text = (CONFIGS / "grit_world.yaml").read_text().replace("1000", "30")
    (tmp_path / "w.yaml").write_text(text)
    grit_build(str(tmp_path / "w.yaml"), str(tmp_path / "out"))
    grit_inspect(str(tmp_path / "out"), num=3)
    said = capsys.readouterr().out
    assert "90 records" in said and said.count("64 x 64") == 3 and (tmp_path / "out/inspect.png").is_file()


def test_the_card_repeats_the_notes_and_says_how_well_a_name_tells(tmp_path):
    index = build(world(tmp_path / "a", notes="Boxes are missing."))
    card = (tmp_path / "a" / "card.md").read_text()
    share, questions = index["blind"]
    assert "Boxes are missing." in card and f"{share:.0%} are guessed right from the name alone" in card
    assert questions == 2 * index["counts"]["task/negative_image"] and 0.1 < share < 0.7
    assert build(world(tmp_path / "a", notes="Other words.")) == index  # is no other build


def test_the_shipped_mix_is_the_releases():
    config = read_config(CONFIGS / "grit.yaml")
    assert {p.name: p.repeat for p in config.parts} == {
        "git_instruction": 3, "vg_objects": 1, "vg_relations": .2, "vg_regions": .2, "llava": 1,
        "refexp": 1, "flickr": 1, "objects365": 1}
    for part in config.parts:
        try: open_part(part)
        except FileNotFoundError: pass
        except ValueError as error: assert "no such" in str(error) or "is there" in str(error), error


def test_faulty_annotations_are_counted_not_lost_in_silence(tmp_path):
    rows = [dict(image_id=i, category_id=1, bbox=[1, 1, 9, 9] if i else [1, 1, 0, 9]) for i in range(5)]
    data = dict(images=[dict(id=i, file_name=f"{i}.jpg", width=40, height=30) for i in range(5)], annotations=rows,
                categories=[dict(id=1, name="dog")])
    (tmp_path / "c.json").write_text(json.dumps(data))
    part = Part("dogs", "coco", {"path": str(tmp_path / "c.json"), "images": None}, tasks={"object": 1.0})
    index = build(GritConfig(str(tmp_path / "g"), [part]))
    assert index["records"] == 4 and index["skipped"] == 1 and "annotations[0].bbox" in index["first_skipped"][0]
