"""The full world, checked by slow independent code: what is drawn, what is said of it, and what counts as right."""
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ferret_lite.prompt import build_tiny_tokenizer, plain_tokenizer
from ferret_lite.records import check_dialogue
from ferret_lite.regions import Box, region_mask
from ferret_lite.relations import ATTRIBUTES, PREDICATES, Facts, deny, fitting, from_world
from ferret_lite.scenes import SPLITS, scene_mask
from ferret_lite.talks import WORLD_TASKS, WORLD_TEMPLATES, world_texts, world_words
from ferret_lite.textures import Photos
from ferret_lite.world import LIMITS, WORLD_COLORS, WORLD_SHAPES, hole_mask, make_world, world_mask
from ferret_lite.world_scores import (counting_score, exact_right, judge_world, list_right, region_right, said_number)
from ferret_lite.world_tasks import ask_world, draw_world_dialogues, draw_world_question

SCENES = dict(seed=st.integers(0, 2**31), index=st.integers(0, 10**9), split=st.sampled_from(list(SPLITS)))
LIMIT = settings(max_examples=60, deadline=None)
NUMBER = dict(none=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8)
SHAPE_OF = {s + ("es" if s.endswith("s") else "s"): s for s in WORLD_SHAPES}


# The slow checker: it reads the label map and the words of a sentence, and uses nothing of `relations` ----------------

def hull(mask):
    """The tight half-open box of the visible pixels, pixel by pixel."""
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = zip(*pixels)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def enclosed(mask):
    """Pixels that cannot be reached from the border without crossing the mask."""
    h, w = mask.shape
    outside, todo = set(), [(x, y) for x in range(w) for y in range(h) if x in (0, w - 1) or y in (0, h - 1)]
    while todo:
        x, y = todo.pop()
        if not (0 <= x < w and 0 <= y < h) or (x, y) in outside or mask[y, x]: continue
        outside.add((x, y))
        todo += [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
    return {(x, y) for x in range(w) for y in range(h) if not mask[y, x]} - outside


class Seen:
    """One object as the slow checker sees it."""
    def __init__(self, scene, i):
        o, mask = scene.objects[i], scene.label_map == i + 1
        self.box = hull(mask)
        longer = max(self.box[2] - self.box[0], self.box[3] - self.box[1])
        side = mask.shape[0]
        self.rank = 0 if longer < LIMITS[0] * side else 1 if longer < LIMITS[1] * side else 2
        self.words = {("small", "medium", "large")[self.rank], o.fill, o.color, o.shape}
        self.color, self.shape, self.mask = o.color, o.shape, mask
        self.values = dict(size=("small", "medium", "large")[self.rank], fill=o.fill, color=o.color, shape=o.shape)

    def hole(self):
        return enclosed(self.mask) if self.shape in ("ring", "frame") else set()

    def pixels(self):
        return {(int(x), int(y)) for y, x in np.argwhere(self.mask)}


def holds(a, predicate, b, possibly=False):
    """Does "a <predicate> b" hold for sure, or possibly?"""
    if a is b: return False
    if predicate in ("left of", "above"):
        k = 0 if predicate == "left of" else 1
        if possibly: return a.box[k] < b.box[k] or a.box[k + 2] < b.box[k + 2]
        return a.box[k + 2] - 1 < b.box[k]
    if predicate in ("right of", "below"):
        return holds(b, {"right of": "left of", "below": "above"}[predicate], a, possibly)
    if predicate == "inside": return a.pixels() <= b.hole()
    if predicate == "larger than": return a.rank > b.rank
    if predicate == "smaller than": return a.rank < b.rank
    return a.color == b.color


def fits(seen, phrase):
    """Objects that a phrase such as "small red disc", "red thing" or "things" fits."""
    words = [SHAPE_OF.get(w, w) for w in phrase.split() if w not in ("thing", "things", "a", "an", "the")]
    return [o for o in seen if set(words) <= o.words]


def split_clause(text):
    """ "disc left of the red ring" -> "disc", "left of", "red ring"; no relation: "disc", None, None. """
    for p in PREDICATES:
        if f" {p} " in f" {text}": return [part.strip() for part in f" {text}".split(f" {p} ")][0], p, text.split(p)[1].strip()
    return text, None, None


def meant(seen, text, possibly=False, it=None):
    """Objects that an expression with or without a relation fits."""
    head, predicate, anchor = split_clause(text)
    found = fits(seen, head)
    if predicate is None: return found
    (b,) = [it] if anchor == "it" else fits(seen, anchor)
    return [o for o in found if holds(o, predicate, b, possibly)]


def mentioned(dialogue, seen, text):
    """(words before the mention, object with exactly that box and that name) of each mention in an answer."""
    out = []
    for m in re.finditer(r"((?:[A-Za-z]+ )+)\[region(\d+)\]", text):
        words = re.split(r"\b(?:a|an|the|A|An|The)\b", m[1])[-1].strip()
        box = dialogue.regions[int(m[2])]
        assert isinstance(box, Box)
        same = [o for o in fits(seen, words) if o.box == (box.x1, box.y1, box.x2, box.y2)]
        assert len(same) == 1, (words, box)
        out.append(same[0])
    return out


def marked(dialogue, seen, index, size):
    """The object that a user's region marks: the one with most of its pixels, or with exactly its box."""
    region = dialogue.regions[index]
    if isinstance(region, Box):
        (one,) = [o for o in seen if o.box == (region.x1, region.y1, region.x2, region.y2)]
        return one
    mask = region_mask(region, size, size, point_radius=0.1)
    return max(seen, key=lambda o: (o.mask & mask).sum() / mask.sum())


def affirms(answer):
    """Yes or no, which is the last word and a sentence of its own."""
    return {". Yes.": True, ". No.": False}[re.search(r"\. \w+\.$", answer)[0]]


def check_existence(asked, answer, said, seen):
    """Names what comes nearest, and then decides: rightly, and as whoever has read that far must."""
    head, predicate, anchor = split_clause(asked)
    true, yes, words = meant(seen, asked), affirms(answer), head.removesuffix("thing").split()
    assert true == meant(seen, asked, possibly=True) and yes == bool(true)
    if predicate:
        assert fits(seen, anchor) == said[:1]
        anchor, *said = said
    candidates = [o for o in fits(seen, words[-1] if words else "") if o is not anchor]
    shared = lambda o: sum(SHAPE_OF.get(w, w) in o.words for w in words)
    most = [o for o in candidates if shared(o) == max(map(shared, candidates))]
    assert said == (true or sorted(most, key=lambda o: o.box[:2])[:1]) and ("None." in answer) == (not said)
    named = re.findall(r"\b[Aa]n? ((?:\w+ )+)\[region", answer)
    if predicate in ("larger than", "smaller than"): assert set(named[0].split()) & set(ATTRIBUTES["size"])
    if predicate is None and named: assert yes == (set(words) <= set(named[0].split()))


def check_exchange(question, answer, dialogue, seen, it, size):
    """Assert that a canonical exchange is true; return what "it" is afterwards."""
    said = mentioned(dialogue, seen, answer)
    if m := re.fullmatch(r"What is \[region(\d+)\]\?", question):
        one = marked(dialogue, seen, int(m[1]), size)
        assert one in fits(seen, re.sub(r"^An? |\.$", "", answer))
        return one
    if question == "Where is it?": assert said == [it]; return it
    if m := re.fullmatch(r"Where is the (.+)\?", question):
        assert meant(seen, m[1]) == meant(seen, m[1], possibly=True) == said and len(said) == 1
        return said[0]
    if m := re.fullmatch(r"Is there an? (.+)\?", question):
        check_existence(m[1], answer, said, seen)
    elif m := re.fullmatch(r"Describe \[region(\d+)\]\.", question):
        one, text = marked(dialogue, seen, int(m[1]), size), re.sub(r" \[region\d+\]|\.$", "", answer)
        what, _, where = text.partition(", ")
        assert set(re.sub("^An? ", "", what).split()) == one.words - {"plain"}
        if where: assert holds(one, split_clause(where)[1], said[0]) and said[0] in fits(seen, split_clause(where)[2])
        else: assert not any(holds(one, p, o) for p in PREDICATES[:5] for o in seen)
    elif m := re.fullmatch(r"Are (.+) and (.+) the same (\w+)\?", question):
        pair = [it if x == "it" else marked(dialogue, seen, int(re.search(r"\d+", x)[0]), size) for x in m.groups()[:2]]
        u, v = (o.values[m[3]] for o in pair)
        assert pair[0] is not pair[1] and affirms(answer) == (u == v)
        said_values = [SHAPE_OF.get(w, w) for w in re.findall("[A-Za-z]+", answer) if SHAPE_OF.get(w, w) in ATTRIBUTES[m[3]]]
        assert said_values == [u, v]
    elif m := re.fullmatch(r"Which objects are (.+)\?", question):
        true = meant(seen, f"things {m[1]}", it=it)
        assert true == meant(seen, f"things {m[1]}", possibly=True, it=it)
        assert set(said) == set(true) and len(said) == len(true) and (answer == "None.") == (not true)
        assert [o.box[:2] for o in said] == sorted(o.box[:2] for o in said)
        return said[0] if len(said) == 1 else None
    elif m := re.fullmatch(r"(?:How many|Give the number of) (\w+(?: things)?)(?: are there\?|\.)", question):
        true = fits(seen, m[1])
        assert NUMBER[re.search(r"(\w+)\.$", answer)[1].lower()] == len(true)
        if question.startswith("How"): assert set(said) == set(true) and len(said) == len(true)
    elif question == "Describe the image.": assert set(said) == set(seen) and len(said) == len(seen)
    elif m := re.fullmatch(r"(?:What color|What size) is it\?|Is it plain, striped or dotted\?", question):
        assert re.fullmatch(r"It is (\w+)\.", answer)[1] in it.words
    elif m := re.fullmatch(r"Is it (.+)\?", question):
        _, asked, anchor = split_clause(m[1])
        assert fits(seen, anchor) == said
        assert affirms(answer) == holds(it, asked, said[0]) == holds(it, asked, said[0], possibly=True)
        _, told, _ = split_clause(answer.removeprefix("It is "))
        assert holds(it, told, said[0])
    else: raise AssertionError(f"a question that the checker does not know: {question}")
    return it


def check_truth(dialogue, seen, size):
    """Every exchange of a canonical dialogue."""
    it = None
    for question, answer in zip(dialogue.turns[::2], dialogue.turns[1::2]):
        if dialogue.task == "compound":
            parts = [re.findall(r"[^.?]+[.?](?: (?:Yes|No)[.])?", t.text) for t in (question, answer)]
            for q, a in zip(*parts, strict=True): check_exchange(q.strip(), a.strip(), dialogue, seen, it, size)
        else: it = check_exchange(question.text, answer.text, dialogue, seen, it, size)


# Pictures -------------------------------------------------------------------------------------------------------------

@LIMIT
@given(**SCENES, size=st.sampled_from([64, 96, 128]), same_box=st.sampled_from([None, True]))
def test_what_a_scene_promises(seed, index, split, size, same_box):
    scene = make_world(seed, index, split, size, same_box)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert 2 <= len(scene.objects) <= 8 and len({(o.name, o.size) for o in scene.objects}) == len(scene.objects)
    for i, o in enumerate(scene.objects):
        mask = scene_mask(scene, i)
        assert tuple(o.box) == hull(mask)
        assert o.name == f"{o.color} {o.shape}"
        assert Seen(scene, i).values["size"] == o.size          # the size can be read off the visible box
    if scene.kind == "same_box":
        a, b = (scene.objects[j] for j in scene.pair)
        assert tuple(a.box) == tuple(b.box) and a.shape == b.shape and a.color != b.color
    if same_box: assert scene.kind == "same_box"
    if scene.kind == "nested": assert scene.objects[1].inside == 0


@LIMIT
@given(**SCENES)
def test_inside_is_what_a_flood_from_the_border_cannot_reach(seed, index, split):
    scene = make_world(seed, index, split)
    seen = [Seen(scene, i) for i in range(len(scene.objects))]
    for i, o in enumerate(scene.objects):
        around = [j for j, b in enumerate(seen) if j != i and holds(seen[i], "inside", b)]
        assert around == ([] if o.inside is None else [o.inside])


@pytest.mark.parametrize("shape", WORLD_SHAPES)
def test_every_width_touches_all_sides_in_one_piece(shape):
    for w in range(8, 60):
        mask = world_mask(shape, w)
        assert all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
        left, todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}, [tuple(np.argwhere(mask)[0])]
        while todo:
            y, x = todo.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        assert not left, (shape, w)
        hole = hole_mask(shape, w)
        if hole is not None: assert {(int(x), int(y)) for y, x in np.argwhere(hole)} == enclosed(mask)


def test_scenes_are_functions_of_their_arguments():
    first = [make_world(3, i, split).image.tobytes() for split in SPLITS for i in range(40)]
    again = [make_world(3, i, split).image.tobytes() for split in reversed(SPLITS) for i in reversed(range(40))]
    assert first == again[::-1] and len(set(first)) == 120


def test_photographs_change_the_background_alone(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    photos = Photos(tmp_path)
    for i in range(20):
        plain, photo = make_world(0, i), make_world(0, i, photos=photos)
        assert (plain.label_map == photo.label_map).all()
        covered = plain.label_map > 0
        assert (plain.image[covered] == photo.image[covered]).all() and (plain.image != photo.image).any()
        assert (photo.image == make_world(0, i, photos=Photos(tmp_path)).image).all()


@pytest.mark.parametrize("wrong", [dict(split="dev"), dict(index=-1), dict(seed=-1), dict(size=40), dict(size=1000)])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="choose|must be"): make_world(**{**dict(seed=0, index=0), **wrong})


# Sentences ------------------------------------------------------------------------------------------------------------

@LIMIT
@given(**SCENES, draw=st.integers(0, 10**6))
def test_every_statement_is_true(seed, index, split, draw):
    scene = make_world(seed, index, split)
    seen, things, rng = [Seen(scene, i) for i in range(len(scene.objects))], from_world(scene), np.random.default_rng(draw)
    for task in WORLD_TASKS:
        for _ in range(3 if task == "chat" else 1):
            dialogue = draw_world_question(things, task, rng)
            if dialogue is None: continue
            check_dialogue(dialogue, 96, 96)
            check_truth(dialogue, seen, 96)


@LIMIT
@given(**SCENES)
def test_expressions_fit_one_and_denials_none(seed, index, split):
    scene = make_world(seed, index, split)
    facts, seen = Facts(from_world(scene)), [Seen(scene, i) for i in range(len(scene.objects))]
    for p in PREDICATES:
        for e in facts.expressions[p]:
            found = [i for i, o in enumerate(seen) if o in fits(seen, e.head) and holds(o, p, seen[e.anchor], True)]
            assert found == [e.target] and holds(seen[e.target], p, seen[e.anchor])
        for e in facts.denials[p]:
            assert not any(holds(o, p, seen[e.anchor], True) for o in fits(seen, e.head))


@LIMIT
@given(**SCENES)
def test_no_expression_is_missed(seed, index, split):
    scene = make_world(seed, index, split)
    facts, seen = Facts(from_world(scene)), [Seen(scene, i) for i in range(len(scene.objects))]
    heads = [*{o.shape for o in seen}, *(f"{c} thing" for c in {o.color for o in seen}), "thing"]
    shapes = Counter(o.shape for o in seen)
    for p in PREDICATES[:7]:
        slow = set()
        for head in heads:
            for j, b in enumerate(seen):
                if p == "inside" and b.shape not in ("ring", "frame"): continue
                found = [i for i, o in enumerate(seen) if o in fits(seen, head) and holds(o, p, b, True)]
                if len(found) == 1 and holds(seen[found[0]], p, b): slow.add((head, j, found[0]))
        assert slow == {(e.head, e.anchor, e.target) for e in facts.expressions[p]}
    assert all(shapes[seen[e.anchor].shape] == 1 for e in facts.expressions[PREDICATES[7]])


def stream(num=300, n=12):
    rng = np.random.default_rng(0)
    return [d for i in range(num) for d in draw_world_dialogues(make_world(1, i), rng, n=n)]


def test_training_dialogues_are_sound_and_answers_balanced():
    dialogues = stream()
    for d in dialogues: check_dialogue(d, 96, 96)
    assert {d.task for d in dialogues} == set(WORLD_TASKS)
    for task in ("exists", "exists_relation", "same"):
        yes = [affirms(d.turns[1].text) for d in dialogues if d.task == task]
        assert .42 < np.mean(yes) < .58, task
    assert {len(d.turns) for d in dialogues if d.task == "chat"} == {4, 6, 8}


def test_the_vocabulary_is_closed():
    words = {w for d in stream(400) for t in d.turns for w in re.findall("[A-Za-z]+", re.sub(r"\[[^\]]*\]", "", t.text))}
    assert words <= set(world_words())
    tokenizer = plain_tokenizer(build_tiny_tokenizer(list(world_texts()), 1 << 16))
    for d in stream(30):
        for t in d.turns:
            text = re.sub(r"\[region\d+[^\]]*\]", "[012, 345, 678, 999]", t.text)
            assert not [x for x in tokenizer.encode(text, add_special_tokens=False).tokens if x.startswith("<0x") or x == "<unk>"]


def test_streams_repeat_and_questions_are_canonical():
    things = from_world(make_world(0, 5))
    a, b = ([t.text for d in draw_world_dialogues(things, np.random.default_rng(3)) for t in d.turns] for _ in range(2))
    assert a == b
    assert all(len(texts) >= 3 for texts in WORLD_TEMPLATES.values())
    with pytest.raises(ValueError, match="unknown task 'riddle'"): ask_world(Facts(things), "riddle", np.random.default_rng(0))


# Scores ---------------------------------------------------------------------------------------------------------------

@LIMIT
@given(**SCENES)
def test_the_true_answer_is_right_and_another_is_not(seed, index, split):
    scene, rng = make_world(seed, index, split), np.random.default_rng(0)
    things = from_world(scene)
    for task in WORLD_TASKS:
        d = draw_world_question(things, task, rng)
        if d is None or task.startswith("refer") or task in ("locate", "exists", "describe"): continue
        text = d.turns[-1].text
        pairs = [(re.split(r",| and |: ", text[:m.start()])[-1].strip(), np.array([getattr(d.regions[int(m[1])], k) for k in
                  ("x1", "y1", "x2", "y2")])) for m in re.finditer(r"\[region(\d+)\]", text)]
        if task != "describe_region": assert judge_world(task, text, text, pairs, pairs)["right"] == 1
        assert judge_world(task, "A pig.", text, [], pairs)["right"] == 0


def test_something_is_denied_where_all_eight_colors_are_there():
    """No "<color> thing" is missing then: another phrase must be found, and the search must end."""
    things = next(found for i in range(200) if len(found := from_world(make_world(0, i))) == 8)
    for thing, color in zip(things, WORLD_COLORS): thing.color = color
    for seed in range(20):
        phrase = deny(things, np.random.default_rng(seed), "blue thing")
        assert not fitting(things, phrase.removesuffix(" thing"))


def test_counting():
    assert [said_number(t) for t in ("Three: a red disc [1, 2, 3, 4]", "A red disc [1, 2, 3, 4]. One.", "None.", "8", "many", "", "zero")] == [
        3, 1, 0, 8, None, None, 0]
    scores = counting_score(["Two.", "None.", "a lot", "Five."], [2, 1, 3, 5])
    assert scores["counting/accuracy"].value == .5 and scores["counting/within one"].value == .75


def test_lists_and_exact_answers():
    box, other = np.array([0, 0, 10, 10]), np.array([40, 40, 50, 50])
    assert list_right([], []) == 1 and list_right([("a red disc", box)], []) == 0
    assert list_right([("a red disc", box), ("a blue ring", other)], [("the blue ring", other)]) == pytest.approx(2 / 3)
    assert exact_right("It is red.", "It is red.", [], []) and not exact_right("It is red.", "It is blue.", [], [])
    assert not exact_right("The L [1, 2, 3, 4].", "The L [region0].", [("The L", other)], [("The L", box)])


def test_a_description_may_name_any_true_relation():
    for i in range(30):
        things = from_world(make_world(0, i))
        facts = Facts(things)
        full = {p: [(a, b) for a, b in np.argwhere(facts.table[p][0])] for p in PREDICATES[:5]}
        for p, pairs in full.items():
            for a, b in pairs:
                name = " ".join(w for w in things[a].words if w != "plain")
                text = f"A {name}, {p} the {things[b].name} [1, 2, 3, 4]."
                assert region_right(text, [("", things[b].box)], facts, a)["right"]
                assert not region_right(text, [("", things[a].box)], facts, a)["place"] or things[a].box == things[b].box
                wrong = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}.get(p, "above")
                assert p == "inside" or not region_right(text.replace(p, wrong), [("", things[b].box)], facts, a)["place"]
