"""The model: saved and loaded, generating in batches, packed, spliced, with other encoders and decoders."""
import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil
from transformers.utils import logging

from ferret_lite.model import FerretConfig, FerretForConditionalGeneration
from ferret_lite.model import answer, packed_attention_mask, scatter_features
from ferret_lite.processor import FerretProcessor
from ferret_lite.prompt import build_tiny_tokenizer
from ferret_lite.records import Dialogue, Record, Turn
from ferret_lite.regions import Box, FreeForm, Point
from ferret_lite.vision import ConvStemVisionConfig, ConvStemVisionModel

logging.disable_progress_bar()
SIZE = 40  # of the images, pixels
TEXTS = ["What is [12, 34, 567, 890]?", "Is the red disc above the blue square?", "Where is it?", "Yes. No."]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
CONV = dict(**SMALL, model_type="ferret_lite_vision", stem_channels=16, image_size=32)
CLIP = dict(**SMALL, model_type="clip_vision_model", image_size=28, patch_size=14)
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
LLAMA = dict(**SMALL, model_type="llama", initializer_range=0.3)
QWEN = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)  # has a vector for each position
READS = {"ferret_lite_vision": dict(vision_feature_layer=-1, vision_feature_select_strategy="full",
                                    region_feature_layers=[0, -1], region_feature_dim=16 + 32),
         "clip_vision_model": {}, "siglip_vision_model": dict(vision_feature_select_strategy="full")}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def make(tokenizer):
    """A function from vision and text settings to a processor and a model with random weights."""
    def build(vision=CONV, text=LLAMA, **settings):
        torch.manual_seed(0)
        patches = (vision["image_size"] // vision.get("patch_size", 8)) ** 2
        processor = FerretProcessor(CLIPImageProcessorPil(), tokenizer, "tiny", image_size=vision["image_size"],
                                    image_length=patches, num_points=16, point_radius=2.0)
        text = {**text, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
        settings = {"sampler_num_points": (16, 8, 4), "sampler_k": 6, **READS[vision["model_type"]], **settings}
        config = FerretConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id,
                              region_token_id=processor.region_token_id, **settings)
        return processor, FerretForConditionalGeneration(config).eval()
    return build


@pytest.fixture(scope="module")
def tiny(make):
    return make()


@pytest.fixture(scope="module")
def images():
    return [np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for i in range(4)]


def user(text): return Turn("user", text)


def said(text): return Turn("assistant", text)


MASK = np.triu(np.ones((SIZE, SIZE), dtype=bool))
PLAIN = Dialogue([user("Where is the red disc?")])
ONE = Dialogue([user("What is [region0]?")], [Box(4, 5, 20, 30)])
TWO = Dialogue([user("Is [region1] above [region0], or [region0] above [region1:feature]?")],
               [Point(30, 9), FreeForm(mask=MASK)])
TALK = Dialogue([user("What is [region0]?"), said("The red disc."), user("Is it above [region1:feature]?")],
                [Box(1, 1, 9, 9), Point(5, 35)])
BATCHES = {"mixed": [PLAIN, TWO, ONE, TALK], "regions everywhere": [ONE, TWO, TALK, ONE], "no region": [PLAIN] * 4}

RECORDS = [
    Record(None, SIZE, SIZE, [Dialogue(ONE.turns + [said("The red disc.")], ONE.regions),
                              Dialogue(TALK.turns + [said("Yes.")], TALK.regions),
                              Dialogue(PLAIN.turns + [said("The red disc [region0].")], [Box(4, 4, 9, 9)])]),
    Record(None, SIZE, SIZE, [Dialogue(PLAIN.turns + [said("No.")])]),
    Record(None, SIZE, SIZE, [Dialogue(TWO.turns + [said("Yes.")], TWO.regions),
                              Dialogue(ONE.turns + [said("No.")], ONE.regions)]),
]


def generated(model, inputs, **settings):
    """New ids alone; every row as long as the longest, filled with padding."""
    ids = model.generate(**inputs, **{"max_new_tokens": 10, "do_sample": False, **settings})
    return ids[:, inputs["input_ids"].shape[1]:]


# Saving and loading --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vision, text", [(CONV, LLAMA), (CLIP, QWEN)])
def test_round_trip_is_equal_to_the_bit(make, images, tmp_path, vision, text):
    processor, model = make(vision, text)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json"}
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FerretForConditionalGeneration and not any(info.values()) and not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FerretConfig
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(images, BATCHES["mixed"])
    loaded_inputs = loaded_processor(images, BATCHES["mixed"])
    for name in inputs: assert_close(loaded_inputs[name], inputs[name], rtol=0, atol=0)
    with torch.no_grad(): assert torch.equal(loaded(**loaded_inputs).logits, model(**inputs).logits)
    assert answer(loaded, loaded_processor, loaded_inputs, 8) == answer(model, processor, inputs, 8)


def test_tied_embeddings_stay_tied(make, tmp_path):
    _, model = make(text=QWEN)
    model.save_pretrained(tmp_path)
    loaded = FerretForConditionalGeneration.from_pretrained(tmp_path)
    for m in (model, loaded): assert m.get_output_embeddings().weight is m.get_input_embeddings().weight
    assert sum("embed_tokens" in k or "lm_head" in k for k in load_file(tmp_path / "model.safetensors")) == 1


def test_second_save_says_the_same(tiny, tmp_path):
    FerretForConditionalGeneration.save_pretrained(tiny[1], tmp_path / "a")
    FerretForConditionalGeneration.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    for config in (a, b):
        for part in ("vision_config", "text_config"): config[part].pop("dtype", None)  # written once it is known
    assert a == b


class Evil:
    def __reduce__(self): return exec, ("raise SystemExit('code ran')",)


def test_pickle_with_code_is_refused(tiny, tmp_path):
    tiny[1].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    for load in (FerretForConditionalGeneration.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(OSError, match=f"no file named model.safetensors found in directory {tmp_path}"):
            load(tmp_path)


def test_the_encoder_stands_alone(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**CONV)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    assert type(loaded) is ConvStemVisionModel
    assert [s.shape for s in states] == [(2, 64, 16)] + [(2, 16, 32)] * 3
    for a, b in zip(states, loaded(pixel_values).hidden_states): assert torch.equal(a, b)


# Generation ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [LLAMA, QWEN, GPT2], ids=lambda t: t["model_type"])
@pytest.mark.parametrize("dialogues", BATCHES.values(), ids=BATCHES)
def test_batch_cache_and_one_by_one_agree(make, images, text, dialogues):
    processor, model = make(text=text)
    model.double()  # ties between random scores must not depend on rounding
    inputs = processor(images, dialogues)
    settings = dict(eos_token_id=list(range(2, 60)), pad_token_id=3)  # many tokens end an answer: rows end apart
    together = generated(model, inputs, **settings)
    assert torch.equal(together, generated(model, inputs, use_cache=False, **settings))
    for row, image, dialogue in zip(together, images, dialogues):
        alone = generated(model, processor(image, dialogue), **settings)[0]
        assert torch.equal(row[:len(alone)], alone) and (row[len(alone):] == 3).all()


def test_beams_repeat_regions_with_their_row(tiny, images):
    processor, model = tiny
    model = copy.deepcopy(model).double()
    settings = dict(num_beams=3, num_return_sequences=2, max_new_tokens=6, min_new_tokens=6)
    together = generated(model, processor(images, BATCHES["mixed"]), **settings)
    alone = [generated(model, processor(i, d), **settings) for i, d in zip(images, BATCHES["mixed"])]
    assert torch.equal(together, torch.cat(alone))


def test_sampling_repeats_with_its_seed(tiny, images):
    processor, model = tiny
    inputs, drawn = processor(images, BATCHES["mixed"]), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generated(model, inputs, do_sample=True, min_new_tokens=10))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_image_and_regions_are_read_once(tiny, images):
    processor, model = tiny
    calls, parts = [], (model.vision_tower, model.region_sampler)
    hooks = [part.register_forward_hook(lambda module, *_: calls.append(module)) for part in parts]
    generated(model, processor(images, BATCHES["mixed"]), min_new_tokens=5)
    for hook in hooks: hook.remove()
    assert calls == [*parts]


def test_the_region_token_is_never_said(tiny, images):
    processor, model = tiny
    model = copy.deepcopy(model)
    with torch.no_grad():  # a head that would say nothing else
        head = model.get_output_embeddings().weight.zero_()
        head[processor.region_token_id] = 1
    for cache in (True, False):
        assert processor.region_token_id not in generated(model, processor(images, BATCHES["mixed"]), use_cache=cache)


def test_prompt_positions_do_not_count_padding(tiny, images):
    processor, model = tiny
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    inputs = processor(images, BATCHES["mixed"])
    generated(model, inputs, max_new_tokens=2, min_new_tokens=2)
    hook.remove()
    lengths = inputs["attention_mask"].sum(1)
    for row, mask, length in zip(seen[0], inputs["attention_mask"], lengths):
        assert row[mask == 1].tolist() == list(range(length))
    assert seen[1].flatten().tolist() == lengths.tolist()


def test_answer_is_text_without_prompt(tiny, images):
    processor, model = tiny
    texts = answer(model, processor, processor(images, BATCHES["mixed"]), max_new_tokens=4)
    assert len(texts) == 4 and all(isinstance(t, str) and t == t.strip() for t in texts)
    assert not any("USER" in t or "<" in t for t in texts)


# Packed dialogues ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attention, tolerance", [("sdpa", 1e-10), ("eager", 1e-5)])  # eager's softmax is in float32
def test_packed_dialogues_equal_each_alone(make, images, attention, tolerance):
    processor, model = make()
    model.set_attn_implementation(attention)
    model.double()
    batch = processor.encode_records(RECORDS, images[:3], max_length=200)
    with torch.no_grad():
        packed = model(**batch).logits
        for b, record in enumerate(RECORDS):
            for d, dialogue in enumerate(record.dialogues):
                alone = processor.encode_records([Record(None, SIZE, SIZE, [dialogue])], [images[b]])
                owner = batch["dialogue_ids"][b]
                own = (owner == 0) | (owner == d + 1)
                assert_close(packed[b, own], model(**alone).logits[0], rtol=0, atol=tolerance)
                question = {k: v for k, v in alone.items() if k not in ("dialogue_ids", "position_ids", "labels")}
                assert_close(packed[b, own], model(**question).logits[0], rtol=0, atol=tolerance)  # the usual mask


def test_loss_is_the_mean_over_answers(tiny, images):
    processor, model = tiny
    batch = processor.encode_records(RECORDS, images[:3])
    out = model(**batch)
    labels = batch["labels"][:, 1:]
    scores = out.logits[:, :-1][labels != -100].log_softmax(-1)
    assert_close(out.loss, -scores.gather(1, labels[labels != -100][:, None]).mean())


def test_packed_mask_in_words():
    mask = packed_attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]])) == 0
    expected = """100000
                  110000
                  111000
                  111100
                  110010
                  110001"""
    assert ["".join(str(int(x)) for x in row) for row in mask[0, 0]] == expected.split()
    assert packed_attention_mask(torch.zeros(1, 3, dtype=torch.long), torch.float16).dtype == torch.float16


# The splice and the regions ------------------------------------------------------------------------------------------

def test_scatter_equals_loops():
    torch.manual_seed(0)
    embeds, slots = torch.randn(3, 7, 4), torch.rand(3, 7) < 0.4
    features = torch.randn(int(slots.sum()), 4)
    expected, rest = embeds.clone(), iter(features)
    for i, j in slots.nonzero().tolist(): expected[i, j] = next(rest)
    assert torch.equal(scatter_features(embeds, slots, features, "image"), expected)


def test_a_region_moves_its_own_place_alone(tiny, images):
    processor, model = tiny
    inputs = processor(images, BATCHES["mixed"])
    moved = inputs["region_points"].clone()
    moved[1, 0] = moved[1, 0].flip(-1)  # the first mention in the second row
    moved[0] = 0.9                      # that row has no region: padding
    with torch.no_grad():
        seen = [model.read_image(inputs["pixel_values"], points, inputs["region_mask"])
                for points in (inputs["region_points"], moved)]
        a, b = (model.embed_inputs(inputs["input_ids"], *images_and_regions) for images_and_regions in seen)
    changed = (a != b).any(-1).nonzero()
    place = (inputs["input_ids"][1] == processor.region_token_id).nonzero()[0, 0]
    assert changed.tolist() == [[1, place.item()]]


def test_without_a_mask_all_regions_are_real(tiny, images):
    processor, model = tiny
    inputs = processor(images[:2], [ONE, ONE])
    with torch.no_grad():
        vision = model.get_vision_maps(inputs["pixel_values"])
        a = model.get_region_features(vision[1], inputs["region_points"], inputs["region_mask"])
        assert torch.equal(a, model.get_region_features(vision[1], inputs["region_points"]))


@pytest.mark.parametrize("change, message", [
    (lambda x: x.pop("region_points"), "3 region placeholders in the text, but 0 region features"),
    (lambda x: x["region_mask"].fill_(True), "3 region placeholders in the text, but 4 region features"),
    (lambda x: x.pop("pixel_values"), "give pixel_values"),
    (lambda x: x.update(pixel_values=x["pixel_values"][:1]), "regions of 2 images, but 1 images"),
    (lambda x: x.update(pixel_values=torch.zeros(2, 3, 64, 64)), r"\(64, 64\) pixels; the encoder takes 32 x 32"),
    (lambda x: x.update(region_points=x["region_points"][:, :, :9]), "9 points a region, but the sampler takes 16"),
    (lambda x: x.update(inputs_embeds=torch.zeros(2, 9, 32)), "either input_ids or inputs_embeds"),
    (lambda x: x.pop("input_ids"), "either input_ids or inputs_embeds"),
])
def test_what_does_not_fit_is_named(tiny, images, change, message):
    processor, model = tiny
    inputs = processor(images[:2], [ONE, Dialogue(TALK.turns, TALK.regions)])
    change(inputs)
    with pytest.raises(ValueError, match=message): model(**inputs)


def test_regions_of_another_row_are_named(tiny, images):
    processor, model = tiny
    inputs = processor(images[:2], [TALK, ONE])
    assert inputs["region_mask"].sum(1).tolist() == [2, 1]
    inputs["region_mask"] = inputs["region_mask"].flip(0)  # the total is the same
    with pytest.raises(ValueError, match="row 0: 2 region placeholders in the text, but 1 region features"):
        model(**inputs)
    slots, features = torch.tensor([[False, True, False], [True, True, False]]), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="row 1: 2 region placeholders in the text, but 0 region features"):
        scatter_features(torch.zeros(2, 3, 4), slots, features, "region", torch.tensor([1]))  # rows are missing


@pytest.mark.parametrize("settings, message", [
    (dict(sampler_points=(8, 4)), "FerretConfig has no 'sampler_points'"), (dict(vision_layer=1), "no 'vision_layer'"),
    (dict(vision_feature_select_strategy="cls"), "'default' or 'full'"), (dict(sampler_pool="sum"), "pool is 'sum'"),
    (dict(sampler="round"), "unknown sampler 'round'"),
])
def test_config_slips_are_named(make, settings, message):
    with pytest.raises(ValueError, match=message): make(**settings)


def test_a_dropped_class_token_that_is_none_is_named(make):
    _, model = make(vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="no square map.*'full' for others"):
        model.get_vision_maps(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("patch, side", [(4, 64), (14, 28), (8, 30)])
def test_a_stem_that_cannot_be_is_named(patch, side):
    with pytest.raises(ValueError, match="patches of 8, 12 or 16 pixels"):
        ConvStemVisionModel(ConvStemVisionConfig(patch_size=patch, image_size=side))


@pytest.mark.parametrize("patch", [8, 12, 16])
def test_stem_sizes(patch):
    config = ConvStemVisionConfig(**{**CONV, "patch_size": patch, "image_size": 4 * patch})
    states = ConvStemVisionModel(config)(torch.randn(1, 3, 4 * patch, 4 * patch)).hidden_states
    assert [s.shape[1] for s in states] == [64, 16, 16, 16]


# Training ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["ferret", "mean"])
def test_gradient_reaches_every_parameter(make, images, sampler):
    processor, model = make(sampler=sampler)
    model(**processor.encode_records(RECORDS, images[:3])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_regions_the_sampler_gets_zeros(make, images):
    processor, model = make()
    model(**processor.encode_records(RECORDS[1:2], images[1:2])).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.region_sampler.parameters())  # DDP stops at None
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_no_gradient(make, images):
    processor, model = make()
    batch, grads = processor.encode_records(RECORDS, images[:3]), []
    for again in (False, True):
        if again: model.train().gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads): assert_close(a, b)


def test_a_frozen_encoder_stays(make, images):
    processor, model = make()
    model.vision_tower.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**processor.encode_records(RECORDS, images[:3])).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("vision_tower")}


def test_half_precision_runs(make, images):
    processor, model = make()
    batch = processor.encode_records(RECORDS, images[:3])
    full = model(**batch).logits
    half = model.to(torch.bfloat16)(**batch)
    assert half.logits.dtype == torch.bfloat16 and half.loss.isfinite()
    assert_close(half.logits.float(), full, rtol=0.1, atol=0.1 * full.abs().max().item())


# Any encoder, any language model -------------------------------------------------------------------------------------

@pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=lambda v: v["model_type"])
def test_the_projector_reads_the_last_layer_but_one(make, images, vision):
    processor, model = make(vision)
    pixel_values = processor(images, BATCHES["mixed"])["pixel_values"]
    with torch.no_grad():
        features, maps = model.get_vision_maps(pixel_values)
        states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    class_tokens = states[-2].shape[1] - 4
    assert class_tokens == (vision is CLIP) and torch.equal(features, states[-2][:, class_tokens:])
    assert torch.equal(maps[0][:, :, 1, 0], features[:, 2]) and len(maps) == 1  # row-major


@pytest.mark.parametrize("vision, text", [(CLIP, LLAMA), (SIGLIP, QWEN), (CLIP, GPT2)],
                         ids=lambda part: part["model_type"].removesuffix("_vision_model"))
def test_other_parts_train_and_answer(make, images, vision, text):
    processor, model = make(vision, text)
    model(**processor.encode_records(RECORDS, images[:3])).loss.backward()
    for part in (model.mm_projector, model.region_sampler, model.language_model):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    inputs = processor(images, BATCHES["mixed"])
    alone = [answer(model, processor, processor(i, d), 6)[0] for i, d in zip(images, BATCHES["mixed"])]
    assert answer(model, processor, inputs, 6) == alone
