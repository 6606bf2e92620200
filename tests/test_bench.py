"""Ferret-Bench: the released files, a judge over a real server on this machine, and the bench that needs none.

    FERRET_BENCH=/path/to/ferret_bench pytest tests/test_bench.py
"""
import json
import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from ferret_lite.bench import (BENCH_CLASSES, bench_note, bench_question, bench_scores, judge_answers, read_bench,
                               read_bench_answers, read_rules, read_verdict, shown_answer)
from ferret_lite.chats import ChatSettings
from ferret_lite.evaluate_cli import evaluate_command
from ferret_lite.regions import region_coords
from ferret_lite.world_bench import DRAW, bench_questions, bench_table, rule_verdict, true_answer

THREE = '{"question_id": 3, "category": "ground_conv", "text": ""}'
LARGE = Path(os.environ.get("FERRET_BENCH", "no folder"))


@pytest.fixture
def folder(tmp_path):
    """The released form with two questions of each class, all about one image."""
    for name, category in BENCH_CLASSES.items():
        (tmp_path / name).mkdir()
        for kind in ("question", "answer", "context"):
            text = "What is [0.100, 0.200, 0.300, 1.000]?" if kind == "question" else f"the {kind} of {category}"
            rows = [dict(question_id=i, image="a.jpg", category=category, text=f"{text} {i}") for i in (3, 5)]
            (tmp_path / name / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = {c: dict(role="Assistant", prompt=f"Rate {c}.") for c in BENCH_CLASSES.values()}
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.jpg")
    return tmp_path


@pytest.fixture
def said(folder):
    """A file of answers to all six."""
    rows = [dict(question_id=i, category=c,
                 text="It is a dog [1, 2, 3, 4].") for c in BENCH_CLASSES.values() for i in (3, 5)]
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "said.jsonl"


@pytest.fixture
def judge(tmp_path):
    """(settings, requests by text, moods by text): a server that gives the first answer 8 points, the second 6."""
    seen, moods, lock = Counter(), {}, threading.Lock()

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][1]["content"]
            with lock:
                seen[text] += 1
                mood = next((m for part, m in moods.items() if part in text), ["8 6\nBecause."])
                reply = mood[min(seen[text], len(mood)) - 1]
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            content = {"choices": [{"message": {"content": reply}}]}
            if isinstance(reply, str): self.wfile.write(json.dumps(content).encode())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = ChatSettings(f"http://127.0.0.1:{server.server_port}/v1", "judge", str(tmp_path / "cache"), timeout=5,
                            per_minute=60_000, retries=3, longest_wait=0.02)
    yield settings, seen, moods
    server.shutdown()
    server.server_close()


# The files ------------------------------------------------------------------------------------------------------------

def test_questions_and_prompts(folder):
    items = read_bench(folder)
    assert [item.key for item in items] == [f"{c}/{i}" for c in BENCH_CLASSES.values() for i in (3, 5)]
    question = bench_question(items[0], folder / "a.jpg")
    assert question.dialogue.turns[0].text == "What is [100, 200, 300, 999] [region0:feature]? 3"
    assert region_coords(question.dialogue.regions[0], 60, 40).tolist() == pytest.approx([6, 8, 18, 40])
    assert "300, 1000]" in bench_question(items[0], folder / "a.jpg", "released").dialogue.turns[0].text


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "ground_conv" / "context.jsonl").write_text(THREE),
     "question.jsonl, line 2: .*context.jsonl has nothing for 'ground_conv/5'"),
    (lambda f: (f / "refer_reason" / "answer.jsonl").write_text('{"question_id": 3}\n'),
     "field 'category': is missing"),
    (lambda f: (f / "refer_caption" / "question.jsonl").write_text("{"), "line 1: is no JSON")])
def test_spoiled_files_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message): read_bench(folder)


@pytest.mark.skipif(not LARGE.is_dir(), reason="set FERRET_BENCH")
def test_the_released_folder(tmp_path):
    items = read_bench(LARGE)
    assert Counter(item.category for item in items) == dict.fromkeys(BENCH_CLASSES.values(), 40)
    assert set(read_rules(LARGE)) == set(BENCH_CLASSES.values())
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    for item in items:
        dialogue = bench_question(item, tmp_path / "a.jpg").dialogue
        boxes = re.findall(r"\[\d+, \d+, \d+, \d+\] \[region(\d+):feature\]", dialogue.turns[0].text)
        assert len(boxes) == len(dialogue.regions) == item.text.count("[")


def test_answers_come_as_a_file_or_as_a_folder(folder, said):
    items, parts = read_bench(folder), folder / "parts"
    whole = read_bench_answers(said, items)
    for name, category in BENCH_CLASSES.items():
        rows = [dict(question_id=i, text=whole[f"{category}/{i}"]) for i in (3, 5)]  # no class: the folder tells
        (parts / name).mkdir(parents=True)
        (parts / name / "ferret_answer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_bench_answers(parts, items) == whole


# The judge ------------------------------------------------------------------------------------------------------------

def test_both_orders_cancel_a_liking_for_the_first_place(folder, said, judge):
    settings, seen, _ = judge
    items = read_bench(folder)
    answers = read_bench_answers(said, items)
    rows = judge_answers(items, answers, read_rules(folder), settings)
    assert len(rows) == 12 == sum(seen.values()) and bench_scores(rows)["all"].value == 1
    assert "the first place is worth +2.00 points" in bench_note(rows, settings)
    released = judge_answers(items, answers, read_rules(folder), settings, "released")
    assert bench_scores(released,
                        "released")["all"].value == .75 and {r["order"] for r in released} == {"reference first"}
    assert [sum(f"[Context]{c}the" in text for text in seen) for c in "\\\n"] == [6, 12]  # the release's slip, and ours
    assert all("[1, 2, 3, 4]" not in text for text in seen)  # bins never reach the judge
    assert sum("[0.001, 0.002, 0.003, 0.004]" in text for text in seen) == 6  # the grounded class, in three orders


def test_a_failing_server_is_asked_again_and_nothing_twice(folder, said, judge):
    settings, seen, moods = judge
    items = read_bench(folder)
    answers, rules = read_bench_answers(said, items), read_rules(folder)
    moods |= {"the answer of refer_desc": [500, 429, "9 9"], "the answer of ground_conv": [500] * 3 + ["9 3"]}
    with pytest.raises(ValueError, match="nothing is asked twice"): judge_answers(items, answers, rules, settings)
    rows = judge_answers(items, answers, rules, settings)
    assert [r["points"] for r in rows[:4]] == [(9, 9)] * 4
    assert all(n == 3 for t, n in seen.items() if "of refer_desc" in t) and len(rows) == 12
    before = sum(seen.values())
    assert judge_answers(items, answers, rules, settings) == rows and sum(seen.values()) == before


def test_verdicts_that_cannot_be_read_are_left_out_and_counted(folder, said, judge):
    settings, _, moods = judge
    items = read_bench(folder)
    moods["the answer of refer_desc"] = ["I like both."]
    rows = judge_answers(items, read_bench_answers(said, items), read_rules(folder), settings)
    scores = bench_scores(rows)
    assert scores["refer_desc"].n == 0 and scores["all"].n == 4 and "4 of 12 verdicts unread" in bench_note(rows,
                                                                                                            settings)


def test_a_wrong_key_is_one_error(folder, said, judge):
    settings, _, moods = judge
    moods["the"] = [401]
    items = read_bench(folder)
    with pytest.raises(ValueError, match="status 401.*OPENAI_API_KEY"):
        judge_answers(items, read_bench_answers(said, items), read_rules(folder), settings)


@pytest.mark.parametrize("reply, points", [("7 9", (7, 9)), ("Scores: 7.5/10 and 9/10\n1 1", (7.5, 9)), ("10 1",
                                                                                                         (10, 1)),
                                           ("7", None), ("0 5", None), ("", None), ("\n\n8,8", (8, 8)), ("1 2 3",
                                                                                                         None)])
def test_verdicts(reply, points):
    assert read_verdict(reply) == points


@pytest.mark.parametrize("text, desc, conv", [
    ("a dog [100, 200, 300, 400].", "a dog.", "a dog [0.100, 0.200, 0.300, 0.400]."),
    ("a dog [here], see [1, 2].", "a dog [here], see.", "a dog [here], see [0.001, 0.002]."), ("no box", "no box",
                                                                                               "no box")])
def test_what_the_judge_sees(text, desc, conv):
    assert [shown_answer(text, c) for c in ("refer_desc", "ground_conv")] == [desc, conv]


def test_the_command_scores_a_file_of_answers(folder, said, judge, capsys):
    settings, *_ = judge
    evaluate_command("bench", data=str(folder), predictions=str(said), judge=settings, json=str(folder / "scores.json"))
    assert json.loads((folder / "scores.json").read_text())["scores"]["all"]["value"] == 1
    assert "ground_conv" in capsys.readouterr().out


def test_the_judge_is_named_on_the_command_line(folder, said, judge, capsys):
    from ferret_lite.cli import main
    settings, *_ = judge
    words = ["evaluate", "bench", "--data", folder, "--predictions", said, "--judge.base_url", settings.base_url,
             "--judge.model", "judge", "--judge.cache", folder / "cache", "--judge.per_minute", "60000"]
    main([str(word) for word in words])
    assert "refer_reason" in capsys.readouterr().out


# The bench that needs no judge ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", DRAW)
def test_three_times_forty_questions_with_true_answers(world):
    sets = bench_questions(world)
    assert {name: len(some) for name, some in sets.items()} == dict.fromkeys(("refer_desc", "refer_reason",
                                                                              "ground_conv"), 40)
    asked = [q for some in sets.values() for q in some]
    assert len({q.key for q in asked}) == 120
    table = bench_table(sets, [true_answer(q) for q in asked])
    assert {s.value for s in table.values()} == {1} and all(s.baseline < .8 for s in table.values())
    assert all(0 <= rule_verdict(q, text) < 1 for q in asked for text in ("", "[", "Blue blue blue."))
