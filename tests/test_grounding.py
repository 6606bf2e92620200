"""The reader of model output, on texts drawn at random: total, honest about its spans, inverse to the writer."""
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ferret_lite.grounding import (DIALECTS, check_values, find_bins, format_coords, format_phrase, parse_answer,
                                   phrase_boxes_px)

repeatable = settings(derandomize=True, deadline=None, max_examples=200)
PIECES = ["[", "]", ",", ";", " ", "and", "a dog", ".", ":", "-", "0.5", "7", "999", "1000", "9" * 5000, "٣", "²",
          "\ud800", "\0", "(", "*", "[1, 2, 3, 4]", "[5, 6]", "[9, 9, 1, 1]", "[0.1,0.2,0.3,0.4]", "<region_fea>",
          "\n", "\u2028"]
any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates too
bracket_text = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
texts = any_text | bracket_text | st.lists(any_text | st.sampled_from(PIECES), max_size=20).map("".join)
dialects = st.sampled_from(sorted(DIALECTS))
bins = st.integers(0, 999)
points = st.tuples(bins, bins)
boxes = st.tuples(points, points).map(lambda p: (*map(min, *p), *map(max, *p)))
phrases = st.sampled_from(["a dog", "the man in red", "Dogs", "a bow (weapon)", "an L", "two black and white cats"])
HOSTILE = ["[", "]", "[1", "[1,", "[[1, 2], ", "[1, 2, 3, 4", "[1,2,3,4]", "1", " ", "a ", "and ", "is ", "(", ": ",
           "[ ", ";", "[;", "[1;"]


@repeatable
@given(texts, dialects)
@example("[" + "1" * 10_000 + ", 2]", "ferret")
@example("[" + "." * 10_000 + ";,]", "shikra")
def test_any_text_is_read_and_every_span_is_true(text, dialect):
    end = 0
    for phrase in parse_answer(text, dialect):
        assert text[slice(*phrase.span)] == phrase.text == phrase.text.strip()
        assert phrase.span[0] >= end and len(phrase.text) <= 300
        spans = phrase.box_spans + phrase.point_spans + [m.span for m in phrase.rejected]
        assert len(phrase.boxes) == len(phrase.box_spans) and len(phrase.points) == len(phrase.point_spans) and spans
        assert all(check_values(b) == "" and len(b) == 4 for b in phrase.boxes)
        assert all(check_values(p) == "" and len(p) == 2 for p in phrase.points)
        assert all(m.problem for m in phrase.rejected)
        for start, stop in sorted(spans):
            assert max(end, phrase.span[1]) <= start < stop <= len(text)
            end = stop


@repeatable
@given(texts)
def test_each_box_is_what_stands_at_its_span(text):
    for phrase in parse_answer(text):
        for box, (start, stop) in zip(phrase.boxes, phrase.box_spans):
            assert [m.values for m in find_bins(text[start:stop])] == [box]


@repeatable
@given(st.lists(boxes | points, min_size=1, max_size=5), dialects)
def test_what_is_written_is_read(values, dialect):
    [phrase] = parse_answer(format_phrase("a red disc", values, dialect), dialect)
    assert phrase.text == "a red disc" and not phrase.rejected
    assert phrase.boxes == [v for v in values if len(v) == 4] and phrase.points == [v for v in values if len(v) == 2]


@repeatable
@given(st.lists(st.tuples(phrases, st.lists(boxes, min_size=1, max_size=3)), max_size=4),
       st.sampled_from([". ", " and ", ", "]))
def test_a_sentence_of_phrases_keeps_words_and_boxes_together(parts, glue):
    if glue != ". ": parts = [("the " * (p == "Dogs") + p, b) for p, b in parts]
    read = parse_answer(glue.join(format_phrase(p, b) for p, b in parts))
    assert [(p.text, p.boxes) for p in read] == parts


@repeatable
@given(texts, st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_for_every_box_and_order_kept(text, width, height):
    phrases = parse_answer(text)
    good, every = (phrase_boxes_px(phrases, width, height, rejected=r) for r in (False, True))
    assert len(good) == sum(len(p.boxes) for p in phrases) <= len(every)
    assert all(0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height for _, (x1, y1, x2, y2) in good)
    rest = iter(every)
    assert all(any(g[0] == e[0] and (g[1] == e[1]).all() for e in rest) for g in good)


@repeatable
@given(st.lists(st.integers(-5, 1005), min_size=1, max_size=5), dialects)
def test_the_writer_refuses_what_the_reader_rejects(values, dialect):
    if check_values(tuple(values)):
        with pytest.raises(ValueError, match="cannot write"): format_coords(values, dialect)
    else:
        [phrase] = parse_answer(format_coords(values, dialect), dialect)
        assert phrase.boxes + phrase.points == [tuple(values)]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_half_a_million_hostile_characters(unit, dialect):
    """Nothing is timed: a quadratic reader would need hours here."""
    text = unit * (500_000 // len(unit))
    for start, end in (("", ""), ("[", ""), ("", "[1, 2, 3, 4]")): parse_answer(start + text + end, dialect)
