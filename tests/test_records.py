"""Records: round trips of anything valid, one clear error for anything else, images in any state."""
import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ferret_lite.records import (Dialogue, Record, Turn, check_record, find_placeholders, open_image, read_records,
                                 record_from_dict, record_to_dict, write_records)
from ferret_lite.regions import Box, FreeForm, Point

W, H = 20, 14
numbers = dict(allow_nan=False, allow_infinity=False)


def mask_from(bits):
    mask = np.array(bits).reshape(H, W)
    mask[3, 4] = True
    return FreeForm(mask=mask)


xs, ys = st.floats(0, W - 1, **numbers), st.floats(0, H - 1, **numbers)
corners = st.lists(st.tuples(xs, ys), min_size=3, max_size=5)
regions = st.one_of(
    st.builds(Point, xs, ys),
    st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), xs, ys, st.floats(0.5, 40), st.floats(0.5, 40)),
    st.lists(st.booleans(), min_size=W * H, max_size=W * H).map(mask_from),
    corners.map(lambda c: FreeForm(polygons=[[v for xy in c for v in xy]])),
    corners.map(lambda c: FreeForm(scribble=c, pen_width=2.5)))
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]"), min_size=1).filter(str.strip)


@st.composite
def dialogues(draw):
    found = draw(st.lists(regions, max_size=3))
    forms = st.sampled_from(["", ":coordinates", ":feature"])
    first = draw(words) + "".join(f" [region{i}{draw(forms)}]" for i in range(len(found))) + draw(words)
    texts = [first] + draw(st.lists(words, max_size=4))
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Dialogue(turns, found, draw(st.sampled_from(["", "refer"])))


several = st.lists(dialogues(), min_size=1, max_size=2)
records = st.builds(Record, st.none() | words, st.just(W), st.just(H), several, words)
checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example,
          HealthCheck.data_too_large]


@given(st.lists(records, max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=checks)
def test_what_is_written_is_read_back(tmp_path, many):
    path = tmp_path / "r.jsonl"
    assert write_records(many, path) == len(many)
    assert [record_to_dict(r) for r in read_records(path)] == [record_to_dict(r) for r in many]
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_like = st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
                         max_leaves=8)
fields = """id image width height dialogues dialogues.0 dialogues.0.task dialogues.0.turns dialogues.0.turns.0
dialogues.0.turns.0.role dialogues.0.turns.0.text dialogues.0.regions dialogues.0.regions.0 dialogues.0.regions.0.box
dialogues.0.regions.1.mask_rle dialogues.0.regions.2.polygons dialogues.0.regions.3.scribble
dialogues.0.regions.3.pen_width""".split()


@given(json_like, st.sampled_from(["", *fields]))
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_is_read_or_refused_by_value_error(value, field):
    d = sound()
    *steps, last = field.split(".")
    inner = d
    for step in steps:
        inner = inner[int(step) if step.isdigit() else step]
    if field:
        inner[int(last) if last.isdigit() else last] = value
    try:
        record_from_dict(d if field else value, "f.jsonl, line 3")
    except ValueError as e:
        assert str(e).startswith("f.jsonl, line 3")


def sound():
    mask = np.zeros((H, W), bool)
    mask[2:5, 3:9] = True
    found = [Box(1, 2, 9, 8), FreeForm(mask=mask), FreeForm(polygons=[[1, 1, 9, 1, 9, 9]]),
             FreeForm(scribble=[[2, 2], [8, 8]], pen_width=3)]
    question = "What is [region0] and [region2] and [region3:feature]?"
    turns = [Turn("user", question), Turn("assistant", "A cat [region1].")]
    return record_to_dict(Record("a.png", W, H, [Dialogue(turns, found, "refer")], "7"))


def talk(d):
    return d["dialogues"][0]


@pytest.mark.parametrize("edit, field, words", [
    (lambda d: d.pop("width"), "width", "is missing; add it"),
    (lambda d: d.update(extra=1), "extra", "is unknown"),
    (lambda d: d.update(height=True), "height", "positive whole number"),
    (lambda d: d.update(width=12.5), "width", "positive whole number"),
    (lambda d: d.update(image=""), "image", "give a path, or null"),
    (lambda d: d.update(image=["a"]), "image", "give a text"),
    (lambda d: d.update(dialogues=[]), "dialogues", "at least one dialogue"),
    (lambda d: d.update(dialogues={}), "dialogues", "give a list"),
    (lambda d: talk(d).update(turns=[]), "dialogues[0].turns", "at least one user turn"),
    (lambda d: talk(d)["turns"][1].update(role="user"), "dialogues[0].turns[1].role", "alternate"),
    (lambda d: talk(d)["turns"][1].pop("text"), "dialogues[0].turns[1].text", "is missing"),
    (lambda d: talk(d)["turns"][1].update(text=" \n"), "dialogues[0].turns[1].text", "is empty"),
    (lambda d: talk(d)["turns"][1].update(text="\ud83d"), "dialogues[0].turns[1].text", "valid Unicode"),
    (lambda d: talk(d)["turns"][1].update(text="[region4]"), "dialogues[0].turns[1].text", "has 4 region(s)"),
    (lambda d: talk(d)["turns"][1].update(text="[region1:feature]"), "dialogues[0].turns[1].text", "gives boxes"),
    (lambda d: talk(d)["turns"][0].update(text="[region-1]"), "dialogues[0].turns[0].text", "no placeholder"),
    (lambda d: talk(d)["turns"][0].update(text="[region0]"), "dialogues[0].regions[2]", "no turn mentions"),
    (lambda d: talk(d)["regions"].__setitem__(0, {"box": [9, 2, 1, 8]}), "dialogues[0].regions[0]", "x1 < x2"),
    (lambda d: talk(d)["regions"].__setitem__(0, {"box": [50, 2, 60, 8]}), "dialogues[0].regions[0]", "outside"),
    (lambda d: talk(d)["regions"].__setitem__(0, {"ball": []}), "dialogues[0].regions[0]", "box"),
    (lambda d: d.update(width=W + 1), "dialogues[0].regions[1]", "original image's size"),
])
def test_each_error_names_line_field_and_remedy(tmp_path, edit, field, words):
    d = sound()
    edit(d)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(sound()) + "\n\n" + json.dumps(d) + "\n" + json.dumps(sound()))
    reader = read_records(path)
    assert next(reader).id == "7"
    with pytest.raises(ValueError) as error:
        next(reader)
    assert str(error.value).startswith(f"{path}, line 3, field '{field}': ") and words in str(error.value)
    skipped = []
    assert len(list(read_records(path, skipped))) == 2 and skipped == [str(error.value)]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"width": NaN}',
                                  b"9" * 10_000])
def test_a_line_that_is_no_record(tmp_path, line):
    path, skipped = tmp_path / "x.jsonl", []
    path.write_bytes(line + b"\n" + json.dumps(sound()).encode())
    assert len(list(read_records(path, skipped))) == 1
    assert len(skipped) == 1 and f"{path}, line 1" in skipped[0]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, good = tmp_path / "deep" / "r.jsonl", record_from_dict(sound())
    write_records([good], path)

    def stops():
        yield good
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(stops(), path)
    with pytest.raises(ValueError, match="record 1 for .*, field 'width'"):
        write_records([good, replace(good, width=0)], path)
    assert list(read_records(path)) == [good] and [p.name for p in path.parent.iterdir()] == ["r.jsonl"]
    assert write_records(read_records(path), path) == 1  # onto itself


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    record = Record(None, W, H, [Dialogue([Turn("user", "a\u2028b\x85c\r\nd é 中")])])
    write_records([record], tmp_path / "r.jsonl")
    assert list(read_records(tmp_path / "r.jsonl")) == [record]


def test_numpy_sizes_and_missing_file(tmp_path):
    record = Record(None, np.int64(W), np.int32(H), [Dialogue([Turn("user", "Hello?")])])
    assert type(record_to_dict(check_record(record))["width"]) is int
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read_records(tmp_path / "none.jsonl")


@given(st.text("[]region0123:coordinates feature"))
def test_placeholders_lie_where_they_say(text):
    for p in find_placeholders(text):
        assert text[p.start:p.end].startswith("[region") and text[p.end - 1] == "]"
        assert p.form in ("", "coordinates", "feature") and str(p.index) in text[p.start:p.end]


RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


def make(mode):
    if mode == "I;16":
        return Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(RGB)
    return image.convert("RGB").quantize(256) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode, ending", [
    ("L", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("I;16", "png"), ("I;16", "tif"),
    ("CMYK", "tif"), ("CMYK", "jpg"), ("RGB", "webp"), ("YCbCr", "jpg"), ("RGB", "bmp")])
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    path = tmp_path / f"a.{ending}"
    make(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (W, H))
    exact = ending not in ("jpg", "webp") and mode not in ("1", "P")
    if exact:
        wanted = Image.fromarray(RGB[..., 0]) if mode == "I;16" else make(mode)
        assert np.array_equal(image, wanted.convert("RGB"))


def test_the_content_decides_not_the_extension(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "kitchen.png", format="JPEG")
    with Image.open(tmp_path / "kitchen.png") as image:
        assert image.format == "JPEG"
    assert open_image(str(tmp_path / "kitchen.png")).size == (W, H)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    steps = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # what the camera did
    image, exif = Image.fromarray(RGB), Image.Exif()
    for step in steps:
        image = image.transpose(Image.Transpose(step))
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), RGB)
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(open_image(opened), RGB)


def test_transparent_parts_are_white():
    rgba = np.dstack([RGB, np.where(np.arange(W) < 5, 0, 255)[None].repeat(H, 0).astype(np.uint8)])
    shown = np.asarray(open_image(rgba))
    assert (shown[:, :5] == 255).all() and np.array_equal(shown[:, 5:], RGB[:, 5:])
    palette = Image.fromarray(RGB).quantize(4)
    palette.info["transparency"] = 0
    assert (np.asarray(open_image(palette))[np.asarray(palette) == 0] == 255).all()


def test_the_result_is_a_copy():
    image, array = Image.fromarray(RGB), RGB.copy()
    open_image(image).putpixel((0, 0), (1, 2, 3))
    open_image(array).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(image, RGB) and np.array_equal(array, RGB)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def broken_files():
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    cut = whole.getvalue()
    return dict(text=b"I am no picture.", empty=b"", cut=cut[:1500], header=cut[:10], huge=huge)


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_one_error_that_names_it(tmp_path, name):
    path = tmp_path / f"{name}.png"
    path.write_bytes(broken_files()[name])
    with pytest.raises(ValueError, match=f"{name}.png: .*(replace it|shrink it)"):
        open_image(path)


def test_missing_files_folders_and_arrays_that_are_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png: no such image"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(tmp_path)
    for array in (RGB.astype(float), RGB.transpose(2, 0, 1), RGB[:0], RGB[0, 0], np.zeros((4, 4), np.int64)):
        with pytest.raises(ValueError, match="give uint8"):
            open_image(array)
