"""The client of a language model against a real HTTP server on loopback, which answers, fails, stalls and lies."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ferret_lite.annotated import world_records
from ferret_lite.chats import ChatSettings, Pacer, Refused, describe_image, estimate, read_reply, write_chats
from ferret_lite.coords import quantize
from ferret_lite.records import check_record, read_records

ROOT = Path(__file__).resolve().parent.parent
KEY = "a secret of ours"


def truth(text):
    """A reply that follows from the request's list."""
    name, box = re.search(r"thing: (.+?) (\[.*?\])", text).groups()
    return json.dumps({"turns": [{"question": f"What is at {box}?", "answer": f"A {name} {box}."}]})


LIES = {"prose": "I would rather not.", "half": '{"turns": [{"question": "What',
        "list": '["turns"]', "number": '{"turns": 3}',
        "empty": '{"turns": []}', "mute": '{"turns": [{"question": "What is it?"}]}',
        "boxless": '{"turns": [{"question": "Why?", "answer": "So."}]}',
        "elsewhere": '{"turns": [{"question": "What is at [1, 1, 9, 9]?", "answer": "A pin."}]}',
        "huge": '{"turns": [{"question": "What is at [0, 0, 9999, 9999]?", "answer": "All."}]}'}


class Server(ThreadingHTTPServer):
    """Does to each image what `moods` says, request by request; the last mood stays."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods, self.asked, self.times, self.bodies = {}, Counter(), defaultdict(list), []
        self.lock, self.now, self.most, self.delay = threading.Lock(), 0, 0, 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args): pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def say(self, status, text="", **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        s = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][1]["content"]
        with s.lock:
            s.asked[text] += 1
            s.times[text].append(time.monotonic())
            s.bodies.append(body)
            s.now += 1
            s.most = max(s.most, s.now)
            moods = s.moods.get(text, ["fine"])
            mood = moods[min(s.asked[text], len(moods)) - 1]
        try: self.act(mood, text)
        except OSError: pass  # the client has gone
        finally:
            with s.lock: s.now -= 1

    def act(self, mood, text):
        time.sleep(self.server.delay)
        if self.path != "/v1/chat/completions": return self.say(404, "no such page")
        if self.headers.get("authorization") != f"Bearer {KEY}": return self.say(401, "who are you?")
        if isinstance(mood, tuple): return self.say(429, Retry_After=mood[1])
        if isinstance(mood, int): return self.say(mood)
        if mood == "stalls": time.sleep(1.5)
        if mood == "hangs up": return self.connection.shutdown(2)
        if mood == "no completion": return self.say(200, '{"error": "overloaded"}')
        self.say(200, json.dumps({"choices": [{"message": {"content": LIES.get(mood, truth(text))}}]}))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(server, tmp_path):
    return ChatSettings(server.url, "some", str(tmp_path / "cache"), "TEST_KEY", concurrent=4,
                        per_minute=60_000, timeout=0.7, retries=4, longest_wait=0.3)


IMAGES = list(world_records(16, seed=8))


def test_answers_become_records_in_the_order_of_the_images(server, settings):
    records = list(write_chats(IMAGES, settings))
    assert [r.id for r in records] == [image.id for image in IMAGES]
    for record, image in zip(records, IMAGES):
        check_record(record)
        box = vars(record.dialogues[0].regions[0]).values()
        assert tuple(box) in {o.box for o in image.objects}
        assert record.dialogues[0].turns[0].text == "What is at [region0]?"
    assert 2 <= server.most <= 4 and all(body["model"] == "some" for body in server.bodies)


@pytest.mark.parametrize("moods, attempts", [
    ([500, 503, "fine"], 3), ([("busy", "0.01"), "fine"], 2), (["stalls", "fine"], 2), (["hangs up", "fine"], 2),
    (["no completion", "fine"], 2)])
def test_what_passes_is_tried_again(server, settings, moods, attempts):
    text = describe_image(IMAGES[0])
    server.moods[text] = moods
    assert len(list(write_chats(IMAGES[:1], settings))) == 1 and server.asked[text] == attempts


def test_a_busy_server_says_when(server, settings):
    text = describe_image(IMAGES[0])
    server.moods[text] = [("busy", "0.25"), ("busy", "9"), "fine"]  # the second wish is longer than we wait
    list(write_chats(IMAGES[:1], settings))
    first, second, third = server.times[text]
    assert second - first >= 0.25 and 0.3 <= third - second < 3


@pytest.mark.parametrize("mood", [500, "stalls", "hangs up"])
def test_what_never_passes_is_refused_and_the_others_go_on(server, settings, mood):
    server.moods[describe_image(IMAGES[1])] = [mood]
    refused = Counter()
    records = list(write_chats(IMAGES[:3], settings, refused))
    assert [r.id for r in records] == [IMAGES[0].id, IMAGES[2].id] and refused == {"no answer after 4 attempts": 1}
    assert server.asked[describe_image(IMAGES[1])] == 4


def test_lies_are_refused_and_their_reasons_counted(server, settings):
    for image, lie in zip(IMAGES, LIES): server.moods[describe_image(image)] = [lie]
    refused = Counter()
    records = list(write_chats(IMAGES, settings, refused))
    assert [r.id for r in records] == [image.id for image in IMAGES[len(LIES):]]
    assert refused == {"no JSON with turns": 3, "not 1 to 10 turns": 2, "a turn without question or answer": 1,
                       "no box at all": 1, "a box of nothing": 2}


def test_a_wrong_key_ends_it_at_once_without_telling_it(server, settings, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "another secret")
    with pytest.raises(ValueError, match="status 401.*TEST_KEY") as error: list(write_chats(IMAGES, settings))
    assert "another secret" not in str(error.value) and max(server.asked.values()) == 1


def test_nothing_is_asked_twice(server, settings):
    first = list(write_chats(IMAGES, settings))
    assert list(write_chats(IMAGES, settings)) == first and sum(server.asked.values()) == 16
    other = ChatSettings(**{**vars(settings), "model": "another"})  # by content: another model is another question
    assert estimate(IMAGES, settings)["requests"] == 0 and estimate(IMAGES, other)["requests"] == 16
    changed = list(world_records(16, seed=8))
    changed[3].objects[0].name = "thing"
    assert estimate(changed, settings)["requests"] == 1
    cache = [path.read_text() for path in Path(settings.cache).iterdir()]
    assert len(cache) == 16 and not any(KEY in text for text in [*cache, *os.listdir(settings.cache)])


def test_the_cost_is_known_before(server, settings):
    settings.price_in, settings.price_out = 1000.0, 2000.0
    cost = estimate(IMAGES, settings)
    letters = sum(len(m["content"]) for image in IMAGES for m in [*_messages(image)])
    assert cost["requests"] == 16 and cost["tokens_in"] == letters // 4
    assert cost["tokens_out"] == 16 * settings.max_tokens // 2
    assert cost["price"] == pytest.approx((cost["tokens_in"] * 1000 + cost["tokens_out"] * 2000) / 1e6, abs=0.01)
    assert not server.asked


def _messages(image):
    from ferret_lite.chats import messages_for
    return messages_for(image)


def test_the_pace_is_kept(server, settings):
    settings.per_minute, settings.concurrent = 1200, 8  # one in 0.05 s
    list(write_chats(IMAGES[:8], settings))
    times = sorted(t for some in server.times.values() for t in some)
    assert times[-1] - times[0] >= 7 * 0.05 - 0.04
    pacer, start = Pacer(per_minute=3000), time.monotonic()
    for _ in range(6): pacer.wait()
    assert time.monotonic() - start >= 0.1 - 0.005


def test_boxes_may_be_a_little_off():
    image = IMAGES[0]
    box = quantize(image.objects[0].box, 64, 64).tolist()
    reply = lambda box: json.dumps({"turns": [{"question": f"And {box}?", "answer": "Yes."}]})
    assert tuple(vars(read_reply(reply([v + 3 for v in box]), image).regions[0]).values()) == image.objects[0].box
    with pytest.raises(Refused, match="a box of nothing"): read_reply(reply([v // 2 for v in box]), image)


@pytest.mark.parametrize("reply", [
    "", "{" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, '{"turns": null}', '{"turns": [1]}',
    '{"turns": [{"question": 1, "answer": 2}]}', '\x00{"turns": [{"question": " ", "answer": "x"}]}', "}{",
    '{"turns": [[]]}'])
def test_no_reply_breaks_the_reader(reply):
    with pytest.raises(Refused): read_reply(reply, IMAGES[0])


def test_texts_cannot_pass_for_mentions():
    image = IMAGES[0]
    box = quantize(image.objects[0].box, 64, 64).tolist()
    turn = {"question": f"What is {box} [region7] [sic]?", "answer": "[region0:feature] a [1, 2] thing."}
    dialogue = read_reply(json.dumps({"turns": [turn]}), image)
    question, answer = (turn.text for turn in dialogue.turns)
    assert len(dialogue.regions) == 1 and question.count("[region") == 1 and "[region" not in answer


# The command ---------------------------------------------------------------------------------------------------------

def chat(server, folder, *words):
    (folder / "mix.yaml").write_text("out: x\nparts: [{name: w, format: world, files: {num: 40, seed: 8}}]\n")
    options = dict(part="w", base_url=server.url, model="some", key_env="TEST_KEY", per_minute=60000, concurrent=4,
                   price_in=1, price_out=2, out=folder / "chats.jsonl")
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "ferret_lite.cli", "grit", "chat", str(folder / "mix.yaml"), *flags, *words]


def run(*words):
    done = subprocess.run(*words, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and KEY not in done.stdout + done.stderr, done.stderr
    return done.stdout


def test_the_command_prints_the_cost_and_asks_only_when_told(server, tmp_path):
    said = run(chat(server, tmp_path))
    assert re.search(r"still to ask: 40 requests, [\d,]+ tokens_in, 18,000 tokens_out, 0\.\d+ price", said)
    assert "add --yes true" in said
    assert not server.asked and not (tmp_path / "chats.jsonl").exists()
    server.moods[describe_image(IMAGES[2])] = ["prose"]
    said = run(chat(server, tmp_path, "--yes", "true"))
    assert said.index("still to ask") < said.index("39 conversations in") and "{'no JSON with turns': 1}" in said
    assert len(list(read_records(tmp_path / "chats.jsonl"))) == 39


def test_a_killed_run_asks_only_for_what_it_has_not_got(server, tmp_path):
    server.delay = 0.03
    words = chat(server, tmp_path, "--yes", "true")
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
    while process.poll() is None and sum(server.asked.values()) < 14: time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    before, cached = sum(server.asked.values()), len(list((tmp_path / "cache").glob("*.json")))
    assert 8 <= cached <= before < 40
    assert f"still to ask: {40 - cached} requests" in run(chat(server, tmp_path, "--yes", "true"))
    assert sum(server.asked.values()) == before + 40 - cached and before - cached <= 4
    whole = tmp_path / "whole"
    whole.mkdir()
    run(chat(server, whole, "--yes", "true"))
    assert (whole / "chats.jsonl").read_bytes() == (tmp_path / "chats.jsonl").read_bytes()
