"""The reader of model output, on texts drawn at random: total, honest about its spans, inverse to the writer."""
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ferret_lite.dialects import DIALECTS, check_values, find_bins
from ferret_lite.grounding import format_coords, format_phrase, parse_answer, phrase_boxes_px

repeatable = settings(derandomize=True, deadline=None, max_examples=200)
PIECES = ["[", "]", ",", ";", " ", "and", "a dog", ".", ":", "-", "0.5", "7", "999", "1000", "9" * 5000, "٣", "²",
          "\ud800", "\0", "(", "*", "[1, 2, 3, 4]", "[5, 6]", "[9, 9, 1, 1]", "[0.1,0.2,0.3,0.4]", "<region_fea>",
          "\n", "\u2028"]
TAGS = ["<phrase>", "</phrase>", "<object>", "</object>", "<patch_index_0044>", "<patch_index_0863>",
        "<patch_index_9999>",
        "</delimiter_of_multi_objects/>", "<ref>", "</ref>", "<box>", "</box>", "(1,2),(3,4)", "(9,9),(1,1)"]
JSON = ["{", "}", '"', "\\", '"bbox_2d": ', '"label": ', '"point_2d": [5, 6]', '"label": "a dog"', "```json",
        '{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', "[[1, 2, 3, 4], [5, 6, 7, 8]]"]
any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates too
pieces = st.sampled_from(PIECES + TAGS + JSON)
texts = any_text | st.lists(pieces, max_size=60).map("".join) | st.lists(any_text | pieces, max_size=20).map("".join)
dialects = st.sampled_from(sorted(DIALECTS))
bins = st.integers(0, 999)
points = st.tuples(bins, bins)
boxes = st.tuples(points, points).map(lambda p: (*map(min, *p), *map(max, *p)))
phrases = st.sampled_from(["a dog", "the man in red", "Dogs", "a bow (weapon)", "an L", "two black and white cats"])
BRACKETS = ["[", "]", "[1", "[1,", "[[1, 2], ", "[1, 2, 3, 4", "[1,2,3,4]", "1", " ", "a ", "and ", "is ", "(", ": ",
            "[ ",
            ";", "[;", "[1;"]
HOSTILE = {"ferret": BRACKETS, "shikra": BRACKETS,
           "kosmos2": ["<", "a ", "<phrase>", "<object>", "<phrase><object>", "<patch_index_0001>", "</phrase> ",
                       "<phrase>a</phrase><object>", "<phrase>a</phrase><object><patch_index_0001><patch_index_0001>"],
           "qwen": ['"', '\\"', '{"', '"label": "', '"label": "\\"', '"label"  ', '"bbox_2d": [', '"bbox_2d": [1, ',
                    "{", "}",
                    '{"bbox_2d": [1, 2, 3, 4], "label": "a"}', "<box>", "<ref>", "<box>(1,2", "<ref></ref>",
                    "<box>((((", "a "]}


def own(values, dialect):
    """Bins 0..999 as numbers of a dialect."""
    if dialect == "shikra": return tuple(v / 1000 for v in values)
    return tuple(v * 32 // 1000 for v in values) if dialect == "kosmos2" else tuple(values)


def reading(phrases):
    """What does not depend on how a dialect groups boxes into phrases."""
    return [(p.text, v) for p in phrases for v in p.boxes + p.points]


@repeatable
@given(texts, dialects)
@example("[" + "1" * 10_000 + ", 2]", "ferret")
@example("[" + "." * 10_000 + ";,]", "shikra")
@example('{"label": "a", "bbox_2d": [1, 2, 3, 4]} <box>', "qwen")
def test_any_text_is_read_and_every_span_is_true(text, dialect):
    d, end = DIALECTS[dialect], 0
    for phrase in parse_answer(text, dialect):
        assert text[slice(*phrase.span)] == phrase.text == phrase.text.strip()
        spans = phrase.box_spans + phrase.point_spans + [m.span for m in phrase.rejected]
        assert len(phrase.boxes) == len(phrase.box_spans) and len(phrase.points) == len(phrase.point_spans) and spans
        assert all(d.check(b, d.num_bins) == "" and len(b) == 4 for b in phrase.boxes)
        assert all(d.check(p, d.num_bins) == "" and len(p) == 2 for p in phrase.points)
        assert all(m.problem for m in phrase.rejected)
        if dialect in ("ferret", "shikra"):  # the words stand before their boxes, and are few
            assert end <= phrase.span[0] <= phrase.span[1] <= min(spans)[0] and len(phrase.text) <= 300
        for start, stop in sorted(spans):
            assert end <= start < stop <= len(text)
            end = stop


@repeatable
@given(texts)
def test_each_box_is_what_stands_at_its_span(text):
    for phrase in parse_answer(text):
        for box, (start, stop) in zip(phrase.boxes, phrase.box_spans):
            assert [m.values for m in find_bins(text[start:stop])] == [box]


@repeatable
@given(st.lists(boxes, min_size=1, max_size=5), dialects)
def test_what_is_written_is_read(values, dialect):
    values = [own(v, dialect) for v in values]
    read = parse_answer(format_phrase("a red disc", values, dialect), dialect)
    assert reading(read) == [("a red disc", v) for v in values] and not any(p.rejected for p in read)
    assert len(read) == 1 or dialect == "qwen"  # one object, one phrase


@repeatable
@given(st.lists(points, min_size=1, max_size=5), st.sampled_from(["ferret", "shikra", "qwen"]))
def test_points_that_are_written_are_read(values, dialect):
    values = [own(v, dialect) for v in values]
    assert reading(parse_answer(format_phrase("a nose", values, dialect), dialect)) == [("a nose", v) for v in values]


@repeatable
@given(st.lists(st.tuples(phrases, st.lists(boxes, min_size=1, max_size=3)), max_size=4),
       st.sampled_from([". ", " and ", ", "]), dialects)
def test_a_sentence_of_phrases_keeps_words_and_boxes_together(parts, glue, dialect):
    if dialect in ("ferret", "shikra") and glue != ". ": parts = [("the " * (p == "Dogs") + p, b) for p, b in parts]
    parts = [(p, [own(b, dialect) for b in bs]) for p, bs in parts]
    read = parse_answer(glue.join(format_phrase(p, b, dialect) for p, b in parts), dialect)
    assert reading(read) == [(p, b) for p, bs in parts for b in bs]


@repeatable
@given(st.lists(boxes, min_size=1, max_size=6), dialects, st.integers(0, 400))
def test_a_cut_loses_no_complete_box(values, dialect, cut):
    written = [format_phrase(f"thing{i}", [own(v, dialect)], dialect) for i, v in enumerate(values)]
    ends = [sum(map(len, written[:i + 1])) + 2 * i for i in range(len(written))]
    found = reading(parse_answer(". ".join(written)[:cut], dialect))
    whole = [(f"thing{i}", own(v, dialect)) for i, v in enumerate(values) if ends[i] <= cut]
    assert found[:len(whole)] == whole


@repeatable
@given(st.lists(boxes, min_size=1, max_size=4), dialects, st.sampled_from(["[", "{", "(", '"', "```", "<", "[[", "]]"]))
def test_nesting_loses_no_box(values, dialect, wrap):
    written = ". ".join(format_phrase("a thing", [own(v, dialect)], dialect) for v in values)
    found = [b for p in parse_answer(wrap + written + wrap, dialect) for b in p.boxes]
    assert found == [own(v, dialect) for v in values]


@repeatable
@given(texts, dialects, st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_for_every_box_and_order_kept(text, dialect, width, height):
    phrases = parse_answer(text, dialect)
    good, every = (phrase_boxes_px(phrases, width, height, rejected=r) for r in (False, True))
    assert len(good) == sum(len(p.boxes) for p in phrases) <= len(every)
    for _, (x1, y1, x2, y2) in good: assert 0 <= x1 <= x2 <= width + 1e-9 and 0 <= y1 <= y2 <= height + 1e-9
    rest = iter(every)
    assert all(any(g[0] == e[0] and (g[1] == e[1]).all() for e in rest) for g in good)


@repeatable
@given(st.lists(st.integers(-5, 1005), min_size=1, max_size=5))
def test_the_writer_refuses_what_the_reader_rejects(values):
    if check_values(tuple(values)):
        with pytest.raises(ValueError, match="cannot write"): format_coords(values)
    else:
        [phrase] = parse_answer(format_coords(values))
        assert phrase.boxes + phrase.points == [tuple(values)]


@pytest.mark.parametrize("dialect, values", [("shikra", (0, 0, 1.5, 1)), ("kosmos2", (0, 0, 32, 1)),
                                             ("qwen", (0, 0, 1001, 1)), ("qwen", (5, 0, 1, 1))])
def test_every_dialect_has_its_own_range(dialect, values):
    with pytest.raises(ValueError, match="cannot write"): format_coords(values, dialect)


@pytest.mark.parametrize("dialect, unit", [(d, unit) for d, units in HOSTILE.items() for unit in units])
def test_a_million_hostile_characters(dialect, unit):
    """Nothing is timed: a quadratic reader would need hours here."""
    parse_answer("[" + unit * (1_000_000 // len(unit)) + "[1, 2, 3, 4]", dialect)
