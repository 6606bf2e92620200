"""Data sets whose texts are tied to boxes, in their authors' own forms."""
import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from ferret_lite.annotated import Relation
from ferret_lite.corpora import flickr30k_records, mdetr_records, read_plain_pickle, refcoco_records
from ferret_lite.genome import visual_genome_records
from ferret_lite.released import llava_records

BOX = dict(x=2, y=3, w=10, h=8)


def write(folder, **files):
    for name, data in files.items(): (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def genome(folder, **changes):
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    image = dict(image_id=1, width=40, height=30, url=url, coco_id=None)
    man = dict(object_id=7, names=["man"], synsets=[], merged_object_ids=[], **BOX)
    hat = dict(object_id=9, name="Hat", **BOX)
    data = dict(image_data=[image], objects=[dict(image_id=1, objects=[man])],
                relationships=[dict(image_id=1, relationships=[dict(predicate="wears", subject=man, object=hat)])])
    return write(folder, **(data | changes))


def test_objects_known_by_a_relation_only_are_added(tmp_path):
    (record,) = visual_genome_records(genome(tmp_path))
    assert [o.name for o in record.objects] == ["man", "hat"] and record.relations == [Relation(0, "wears", 1)]
    assert record.absent == [] and record.counted == set() and record.image == "VG_100K_2/1.jpg"


def test_genome_images_lie_in_one_folder_or_two(tmp_path):
    genome(tmp_path)
    for folder in (tmp_path / "flat", tmp_path / "two" / "VG_100K_2"):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / "1.jpg")
        (record,) = visual_genome_records(tmp_path, tmp_path / folder.relative_to(tmp_path).parts[0])
        assert record.image == str(folder / "1.jpg")


@pytest.mark.parametrize("objects, message", [
    ([dict(object_id=1, names=[], **BOX)], "objects[0]': has no name"),
    ([dict(BOX, names=["a"], w=0)], "is empty"),
    ([dict(BOX, names=["a"], x=None)], "give x, y, width and height"),
    ([dict(BOX, names=["a"], w=99)], "leaves the 40 x 30 image"),
])
def test_odd_genome_objects_name_file_and_field(tmp_path, objects, message):
    genome(tmp_path, objects=[dict(image_id=1, objects=objects)])
    with pytest.raises(ValueError) as error: list(visual_genome_records(tmp_path))
    assert message in str(error.value) and "objects.json" in str(error.value)
    skipped = []
    assert len(list(visual_genome_records(tmp_path, skipped=skipped))) == 1 and message in skipped[0]


@pytest.mark.parametrize("payload", [
    b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    b"\x80\x02cos\nsystem\n)\x81.", pickle.dumps({1, 2}.__class__), b"", b"\x80", b"not a pickle", b"P1\n."])
def test_no_pickle_runs(tmp_path, payload):
    (tmp_path / "refs.p").write_bytes(payload)
    with pytest.raises(ValueError, match="refs.p: not read"): read_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("protocol", range(5))
def test_plain_pickles_of_all_protocols(tmp_path, protocol):
    data = [{"ref_id": 1, "sentences": [{"sent": "the caf\u00e9", "tokens": ["the"]}], "x": (1.5, None, True, 2**70)}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(data, protocol))
    assert read_plain_pickle(tmp_path / "refs.p") == data


def test_refcoco_takes_its_split_and_reports_lost_annotations(tmp_path):
    write(tmp_path, instances=dict(images=[dict(id=i, file_name=f"{i}.jpg", width=40, height=30) for i in (1, 2)],
                                   annotations=[dict(id=5, image_id=1, category_id=1, bbox=[2, 3, 10, 8])],
                                   categories=[dict(id=1, name="dog")]))
    sentences = [dict(sent="the dog"), dict(sent="the dog"), dict(raw="Left dog.")]
    ref = dict(ann_id=5, image_id=1, split="train", sentences=sentences)
    refs = [ref, ref | dict(ann_id=6), ref | dict(image_id=2, split="val")]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, 2))
    skipped = []
    (record,) = refcoco_records(tmp_path / "refs.p", tmp_path / "instances.json", skipped=skipped)
    assert [o.name for o in record.expressions] == ["the dog", "left dog"]
    assert record.expressions[0].box == (2, 3, 12, 11)
    assert len(skipped) == 1 and "ann_id 6" in skipped[0]


def test_mdetr_spans_must_lie_in_the_caption(tmp_path):
    write(tmp_path, m=dict(images=[dict(id=0, file_name="0.jpg", width=40, height=30, caption="a dog")], categories=[],
                           annotations=[dict(image_id=0, bbox=[2, 3, 10, 8], tokens_positive=[[0, 5]]),
                                        dict(image_id=0, bbox=[2, 3, 5, 5], tokens_positive=[[0, 5], [2, 5], [3, 9]])]))
    skipped = []
    (record,) = mdetr_records(tmp_path / "m.json", skipped=skipped)
    assert record.captions[0].spans == [(0, 5, [(2, 3, 12, 11), (2, 3, 7, 8)])] and "[3, 9]" in skipped[0]


def test_flickr_phrases_without_boxes_keep_their_words(tmp_path):
    for folder in ("Sentences", "Annotations"): (tmp_path / folder).mkdir()
    (tmp_path / "Sentences/1.txt").write_text("[/EN#1/people/clothing A man] sees [/EN#0/notvisual it] .\n")
    (tmp_path / "Annotations/1.xml").write_text(
        "<annotation><size><width>40</width><height>30</height></size><object><name>1</name><name>2</name><bndbox>"
        "<xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>11</ymax></bndbox></object></annotation>")
    (tmp_path / "val.txt").write_text("1\n")
    (record,) = flickr30k_records(tmp_path, split="val")
    assert record.captions[0].text == "A man sees it ." and record.captions[0].spans == [(0, 5, [(2, 3, 12, 11)])]


@pytest.mark.skipif("FERRET_GOLDEN_METRICS" not in os.environ, reason="needs the golden folder")
def test_flickr_golden_agrees_with_mdetrs_file():
    root = Path(os.environ["FERRET_GOLDEN_METRICS"])
    ours = {r.id: r for r in flickr30k_records(root / "flickr30k", split="test", skipped=[])}
    for image in json.loads((root / "final_flickr_mergedGT_test.json").read_text())["images"]:
        caption = ours[str(image["original_img_id"])].captions[image["sentence_id"]]
        assert caption.text == image["caption"]
        spans = {(s.start, s.end) for s in caption.spans}
        assert {tuple(t) for some in image["tokens_positive_eval"] for t in some} <= spans


def test_llava_sizes_come_from_the_photograph(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    talk = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A dog."}]
    write(tmp_path, llava=[dict(id="a", image="1.jpg", conversations=talk),
                           dict(id="b", image="2.jpg", conversations=talk),
                           dict(id="c", image="1.jpg", conversations=talk[::-1])])
    skipped = []
    (record,) = llava_records(tmp_path / "llava.json", tmp_path, skipped)
    assert (record.width, record.height) == (40, 30) and record.dialogues[0].turns[0].text == "What is it?"
    assert len(skipped) == 2
