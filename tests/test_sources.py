"""Annotation files as the world writes them: read right, or refused with file, field and remedy."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ferret_lite.records import check_dialogue
from ferret_lite.sources import class_names, coco_records, image_size, open_source, voc_records
from ferret_lite.tasks import TASKS, all_questions, draw_dialogues

OBJECT = ("<object><name>{name}</name>{extra}<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
          "<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>")
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def thing(box, name="cell", extra=""):
    return OBJECT.format(name=name, box=box, extra=extra)


def picture(path, size=(40, 30), **options):
    Image.new("RGB", size, "gray").save(path, **options)


@pytest.fixture
def voc(tmp_path):
    """Write a VOC folder from {image: body of its annotation}; all images are in the split "train"."""
    def write(**bodies):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path/folder).mkdir(parents=True, exist_ok=True)
        for name, body in bodies.items():
            (tmp_path/f"Annotations/{name}.xml").write_text(f"<annotation>{body}</annotation>")
            picture(tmp_path/f"JPEGImages/{name}.jpg")
        (tmp_path/"ImageSets/Main/train.txt").write_text("\n".join(bodies) + "\n\n")
        return tmp_path
    return write


@pytest.fixture
def coco(tmp_path):
    """Write a COCO folder with two images from a list of annotations."""
    def write(annotations, **changes):
        for folder in ("images", "annotations"):
            (tmp_path/folder).mkdir(exist_ok=True)
        for name in "ab":
            picture(tmp_path/f"images/{name}.jpg")
        images = [dict(id=7, file_name="b.jpg", width=40, height=30), dict(id=3, file_name="a.jpg")]
        data = dict(images=images, annotations=annotations,
                    categories=[dict(id=5, name="dog"), dict(id=9, name="traffic light")]) | changes
        (tmp_path/"annotations/instances_train.json").write_text(json.dumps(data))
        return tmp_path
    return write


def note(box=(2, 3, 10, 8), image=7, category=5, **more):
    return dict(image_id=image, category_id=category, bbox=list(box), **more)


def test_voc_boxes_become_half_open_in_the_order_of_the_split(voc):
    root = voc(z=SIZE + thing((1, 1, 40, 30)), a=SIZE + thing((5, 6, 9.5, 12)) + thing((0, 2, 41, 9), "dog"))
    first, second = voc_records(root, "train")
    assert [first.id, second.id] == ["z", "a"] and (first.width, first.height) == (40, 30)
    assert first.objects[0].box == (0, 0, 40, 30)
    assert [o.box for o in second.objects] == [(4, 5, 9.5, 12), (0, 1, 40, 9)]  # a pixel over the border: cut
    assert class_names([first, second]) == ["cell", "dog"]


def test_voc_reads_a_missing_size_from_the_file_and_turns_it_as_shown(voc):
    root = voc(a=thing((1, 1, 20, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root/"JPEGImages/a.jpg", exif=exif)
    (record,) = voc_records(root, "train")
    assert (record.width, record.height) == (30, 40) == image_size(record.image)


def test_voc_finds_images_by_name_then_by_filename_then_by_extension(voc):
    root = voc(a=SIZE + "<filename>b.jpg</filename>", b=SIZE, c=SIZE, d=SIZE + "<filename>../other.jpg</filename>")
    for old, new in (("c.jpg", "c.PNG"), ("d.jpg", "other.jpg")):
        (root/"JPEGImages"/old).rename(root/"JPEGImages"/new)
    assert [r.image.rsplit("/", 1)[1] for r in voc_records(root, "train")] == ["a.jpg", "b.jpg", "c.PNG", "other.jpg"]


def test_voc_difficult_objects_are_present_but_never_asked_about(voc):
    body = SIZE + thing((1, 1, 9, 9), "cat", "<difficult>1</difficult>") + thing((12, 1, 19, 9), "dog")
    (record,) = voc_records(voc(a=body), "train")
    assert [o.ignore for o in record.objects] == [True, False]
    names = ["cat", "dog", "cow"]
    said = [d for t in TASKS for d in all_questions(record.objects, t, np.random.default_rng(0), names=names)]
    assert said and not any("cat" in turn.text for d in said for turn in d.turns)


@pytest.mark.parametrize("body, message", [
    (SIZE + thing((5, 6, 5, 9)), r"field 'object\[0\].bndbox': has no size: xmin 5, xmax 5"),
    (SIZE + thing((9, 6, 5, 9)), r"give xmin < xmax"),
    (SIZE + thing((60, 6, 65, 9)), r"lies outside of the 40 x 30 image"),
    (SIZE + thing((30, 6, 45, 9)), r"leaves the 40 x 30 image"),
    (SIZE + thing(("nan", 6, 45, 9)), r"NaN"),
    (SIZE + thing(("five", 6, 45, 9)), r"bndbox.xmin': is 'five'"),
    (SIZE + thing((1, 2, 3, 4)).replace("<ymax>4</ymax>", ""), r"bndbox.ymax': is missing"),
    (SIZE + thing((1, 2, 3, 4), " "), r"object\[0\].name': is missing"),
    (SIZE.replace("40", "0") + thing((1, 2, 3, 4)), r"field 'size': is '0' x '30'"),
    (SIZE.replace("<width>40</width>", ""), r"field 'size': is None x '30'"),
])
def test_voc_odd_annotations_raise_or_are_listed(voc, body, message):
    root = voc(odd=body, fine=SIZE + thing((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=message) as error:
        list(voc_records(root, "train"))
    assert "odd.xml" in str(error.value)
    skipped = []
    records = list(voc_records(root, "train", skipped=skipped))
    assert len(skipped) == 1 and str(error.value) == skipped[0]
    assert [r.id for r in records] == ["odd", "fine"] and records[0].width == 40
    for record in records:  # what is left can be asked about
        for dialogue in draw_dialogues(record.objects, 40, 30, np.random.default_rng(0), names=["cell", "dog"]):
            check_dialogue(dialogue, 40, 30)


def test_voc_broken_files_cost_one_image(voc):
    root = voc(a=SIZE, b=SIZE, c=SIZE, d=SIZE, e=SIZE, f=SIZE + thing((1, 2, 3, 4)))
    (root/"Annotations/a.xml").unlink()
    (root/"Annotations/b.xml").write_text("<annotation><size>")
    (root/"JPEGImages/c.jpg").unlink()
    (root/"Annotations/d.xml").write_text("<html/>")
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]><annotation><object><name>&a;</name></object></annotation>'
    (root/"Annotations/e.xml").write_text(bomb)
    skipped = []
    assert [r.id for r in voc_records(root, "train", skipped=skipped)] == ["f"]
    for problem, words in zip(skipped, ("a.xml: no such annotation", "b.xml: no readable XML", "no image", "<html>",
                                        "e.xml: no readable XML"), strict=True):
        assert words in problem


def test_unknown_split_and_format_name_what_there_is(voc):
    root = voc(a=SIZE)
    with pytest.raises(ValueError, match="test.txt: no such split; the folder's splits are train"):
        voc_records(root, "test")
    with pytest.raises(ValueError, match="is this a Pascal VOC folder"):
        voc_records(root/"JPEGImages", "train")
    with pytest.raises(ValueError, match="unknown format 'yolo'"):
        open_source(root, "train", "yolo")
    with pytest.raises(ValueError, match="no split 'train'"):
        open_source(root, "train", "coco")


def test_coco_order_boxes_names_and_masks(coco):
    polygons = [[2, 3, 12, 3, 12, 11, 2, 11], [20, 20, 25, 20, 25, 25]]
    counts = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))
    text = dict(size=[30, 40], counts=counts["counts"].decode())
    runs = dict(size=[30, 40], counts=[0, 30, 1170])
    root = coco([note(image=3, segmentation=text), note((2.5, 3, 10, 8), segmentation=polygons),
                 note((0, 0, 1, 30), category=9, segmentation=runs, iscrowd=1), note(category=9)])
    first, second = open_source(root, "train", "coco")
    assert [first.id, second.id] == ["7", "3"]                 # the order of the file, not of the ids
    assert (second.width, second.height) == (40, 30)           # read from the image
    assert [o.name for o in first.objects] == ["dog", "traffic light", "traffic light"]
    assert first.objects[0].box == (2.5, 3, 12.5, 11) and first.objects[2].mask is None
    assert [o.ignore for o in first.objects] == [False, True, False]
    mask = first.objects[0].mask
    assert mask[3:11, 2:12].all() and 80 < mask.sum() < 80 + 25  # both polygons, the second a triangle
    assert first.objects[1].mask.sum() == 30 and first.objects[1].mask[:, 0].all()
    np.testing.assert_array_equal(second.objects[0].mask, np.eye(30, 40, dtype=bool))


@pytest.mark.parametrize("row, message", [
    (note((2, 3, 0, 8)), r"annotations\[0\].bbox.*is empty"),
    (note((50, 3, 5, 8)), r"outside of the 40 x 30 image"),
    (note((2, 3, 99, 8)), r"leaves the 40 x 30 image"),
    (note((2, "3", 9, 8)), r"annotations\[0\].bbox': is \[2, '3', 9, 8\]"),
    (note((2, 3, 8)), r"annotations\[0\].bbox': is \[2, 3, 8\]"),
    (dict(image_id=7, category_id=5), r"annotations\[0\].bbox': is None"),
    (note(category=1), r"annotations\[0\].category_id': is 1"),
    (note(image=1), r"annotations\[0\].image_id': is 1"),
    ("dog", r"annotations\[0\].image_id': is None"),
    (note(segmentation=[[1, 2, 3]]), r"annotations\[0\].segmentation"),
    (note(segmentation=[["x"] * 6]), r"annotations\[0\].segmentation"),
    (note(segmentation=dict(size=[40, 30], counts=[1200])), r"of size \[30, 40\]"),
    (note(segmentation=dict(size=[30, 40], counts=[7])), r"annotations\[0\].segmentation"),
])
def test_coco_odd_annotations_raise_or_are_listed(coco, row, message):
    root = coco([row, note()])
    with pytest.raises(ValueError, match=message) as error:
        list(open_source(root, "train", "coco"))
    assert "instances_train.json" in str(error.value)
    skipped = []
    record = next(open_source(root, "train", "coco", skipped=skipped))
    assert len(skipped) == 1 and str(error.value) == skipped[0]
    for dialogue in draw_dialogues(record.objects, 40, 30, np.random.default_rng(0), names=["dog", "cat"], n=20):
        check_dialogue(dialogue, 40, 30)


@pytest.mark.parametrize("changes, message", [
    (dict(images=None), "field 'images'"), (dict(categories=[dict(id=5)]), r"categories\[0\].name"),
    (dict(images=[dict(id=[1], file_name="a.jpg")]), r"images\[0\].id"),
    (dict(images=[dict(id=7, file_name="gone.jpg")]), r"images\[0\].file_name': no image"),
    (dict(images=[dict(id=7, file_name="a.jpg", width=0, height=3)]), "width, height': is 0 x 3"),
])
def test_coco_broken_tables_name_the_field(coco, changes, message):
    with pytest.raises(ValueError, match=message):
        list(open_source(coco([], **changes), "train", "coco"))


def test_coco_files_that_are_no_json_and_images_that_are_none(coco):
    root = coco([])
    (root/"images/a.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="a.jpg: no readable image"):
        list(open_source(root, "train", "coco"))
    (root/"annotations/instances_train.json").write_text("{")
    with pytest.raises(ValueError, match="no readable JSON"):
        coco_records(root/"annotations/instances_train.json", root/"images")


def test_nan_is_no_json_and_ends_the_file(coco):
    root = coco([note((2, 3, float("nan"), 8))])
    with pytest.raises(ValueError, match="instances_train.json: no readable JSON"):
        open_source(root, "train", "coco", skipped=[])


def test_tables_in_any_order_and_large_ids(coco):
    root = coco([note(image=2**40)], images=[dict(id=2**40, file_name="a.jpg", width=40, height=30)])
    path = root/"annotations/instances_train.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: data[k] for k in ("annotations", "categories", "images")}))
    (record,) = open_source(root, "train", "coco")
    assert record.id == str(2**40) and len(record.objects) == 1


def test_without_a_folder_no_image_is_looked_at(coco):
    root = coco([note()], images=[dict(id=7, file_name="train/gone.jpg", width=40, height=30)])
    (record,) = coco_records(root/"annotations/instances_train.json", None)
    assert record.image == "train/gone.jpg" and record.absent is None


def test_lvis_knows_what_it_checked(coco):
    root = coco([note(image=1, category=1), note(image=1, category=2)], categories=[
        dict(id=1, name="chili_(vegetable)"), dict(id=2, name="traffic_light"), dict(id=3, name="cow"), dict(id=4, name="pig")],
        images=[dict(id=1, coco_url="http://images.cocodataset.org/val2017/a.jpg", width=40, height=30,
                     neg_category_ids=[3], not_exhaustive_category_ids=[2])])
    (root/"annotations/instances_train.json").rename(root/"annotations/lvis_v1_train.json")
    (record,) = open_source(root, "train", "lvis")
    assert [o.name for o in record.objects] == ["chili", "traffic light"] and record.image.endswith("images/a.jpg")
    assert record.absent == ["cow"] and record.counted == {"chili"}


def test_objects365_paths_names_and_fakes(coco):
    root = coco([note(isfake=1), note(category=9)], categories=[dict(id=5, name="Cabinet/shelf"), dict(id=9, name="Street Lights")],
                images=[dict(id=7, file_name="images/v1/patch8/a.jpg", width=40, height=30)])
    (root/"images/patch8").mkdir()
    (root/"images/a.jpg").rename(root/"images/patch8/a.jpg")
    (record,) = open_source(root, "train", "objects365")
    assert [(o.name, o.ignore) for o in record.objects] == [("cabinet or shelf", True), ("street lights", False)]
