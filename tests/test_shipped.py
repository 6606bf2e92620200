"""The tiny Ferret inside the package: small, quick to load, sound, and described by the scores that lie beside it."""
import json
import re
import subprocess
import sys

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import TextIteratorStreamer

from ferret_lite.ask import give_answer
from ferret_lite.files import open_image
from ferret_lite.metrics import Score, score_markdown
from ferret_lite.model import FerretForConditionalGeneration, answer, load_model
from ferret_lite.processor import SHIPPED, FerretProcessor
from ferret_lite.records import Dialogue, Turn
from ferret_lite.regions import Box, Point
from ferret_lite.world import make_world

LOAD = """
import time
from ferret_lite.model import FerretForConditionalGeneration
from ferret_lite.processor import FerretProcessor
start = time.process_time()
FerretForConditionalGeneration.tiny(), FerretProcessor.tiny()
print(time.process_time() - start)
"""


@pytest.fixture(scope="module")
def tiny(): return load_model()


def test_it_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10e6
    assert {"model.safetensors", "config.json", "README.md", "scores.json", "config.yaml"} <= \
        {path.name for path in SHIPPED.iterdir()}


def test_it_loads_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10  # seconds; about a third of one: a bound against a loop, not a timing


def test_it_computes_in_float32(tiny):
    model, _ = tiny
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training


def test_card_and_scores_agree():
    told = json.loads((SHIPPED / "scores.json").read_text())
    scores = {name: Score(**values) for name, values in told.items()}
    assert score_markdown(scores) in (SHIPPED / "README.md").read_text()


def test_it_refers_and_grounds_on_scenes_it_has_not_seen(tiny):
    """Far above chance (1 in 96 names; one box of several): what the card says in numbers, on a few scenes."""
    named = found = asked = 0
    for i in range(6):
        scene = make_world(7, i, "test")
        image = open_image(scene.image)
        for o in scene.objects[:2]:
            text, _ = give_answer(*tiny, image, "What is [region0]?", [Box(*o.box)])
            _, boxes = give_answer(*tiny, image, f"Where is the {o.name}?", [])
            named += o.name in text
            found += bool(boxes) and overlap(boxes[0][1], o.box) >= .5
            asked += 1
    assert named > asked / 2 and found > asked / 2


def overlap(a, b):
    from ferret_lite.coords import box_iou
    return box_iou([a], [b])[0, 0]


def test_it_takes_every_kind_of_region(tiny):
    scene = make_world(0, 4, "test")
    text, _ = give_answer(*tiny, open_image(scene.image), "Are [region0] and [region1] the same color?",
                          [Point(25, 60), Box(*scene.objects[0].box)])
    assert re.fullmatch(r"The first is \w+ and the second is \w+\. (Yes|No)\.", text)


def test_it_answers_two_questions_in_one_turn(tiny):
    scene = make_world(0, 4, "test")
    text, _ = give_answer(*tiny, open_image(scene.image), "What is [region0]? What is [region1]?",
                          [Point(25, 60), Box(*scene.objects[0].box)])
    assert text.count(".") == 2


def test_layers_may_lie_on_the_disk(tiny, tmp_path):
    """`device_map` with too little memory for all of it: the same answers."""
    model, processor = tiny
    torn = FerretForConditionalGeneration.from_pretrained(SHIPPED, device_map="auto", max_memory={"cpu": "9MB"},
                                                          offload_folder=tmp_path, dtype=torch.float32)
    assert torn.hf_device_map["region_sampler"] == "cpu" and "disk" in torn.hf_device_map.values()
    assert {p.device.type for p in torn.parameters()} == {"cpu", "meta"}
    inputs = ask_scenes(processor)
    assert answer(torn, processor, inputs) == answer(model, processor, inputs)


def test_no_device_gets_half_a_block_of_the_sampler(tiny):
    """Wherever the memory ends: `SamplerBlock` multiplies the weights of its layers."""
    model, _ = tiny
    assert "region_sampler.blocks.0.sigma" in place_parts(model, 5800, [])  # what happens without the rule
    for kilobytes in range(5000, 7000, 100):
        places = place_parts(model, kilobytes, model._no_split_modules)
        assert not [name for name in places if name.endswith((".theta", ".sigma"))]


def place_parts(model, kilobytes, whole):
    return infer_auto_device_map(model, {"cpu": f"{kilobytes}KB", "disk": "1GB"}, no_split_module_classes=whole)


def test_it_streams_its_words(tiny):
    model, processor = tiny
    inputs = ask_scenes(processor, 1)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text, = answer(model, processor, inputs, streamer=streamer)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 1 and "".join(pieces) == text


def ask_scenes(processor, num=3):
    scenes = [make_world(0, i, "test") for i in range(num)]
    turns = [Turn("user", "What is [region0]?")]
    return processor([open_image(s.image) for s in scenes], [Dialogue(turns, [Box(*s.objects[0].box)]) for s in scenes])


def test_processor_and_model_belong_together(tiny):
    model, _ = tiny
    processor = FerretProcessor.tiny()
    assert isinstance(model, FerretForConditionalGeneration)
    assert processor.image_size == model.config.vision_config.image_size
    assert len(processor.tokenizer) <= model.get_input_embeddings().weight.shape[0]
