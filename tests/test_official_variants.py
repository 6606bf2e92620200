"""Checkpoints in Apple's format that differ from the golden one in what the format leaves open; a kill; the way back.

    FERRET_GOLDEN_OFFICIAL=/path/to/golden pytest tests/test_official_variants.py"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM

from ferret_lite.conversion import convert, export
from ferret_lite.model import load_model
from ferret_lite.official import Checkpoint, load
from ferret_lite.regions import Box
from ferret_lite.weights import Weights
from test_official import (GOLDEN, SIZES, broken, encode, golden_outputs, needs_golden, same_numbers, write_clip,
                           write_config, write_delta, write_official, write_weights)

OPTIONAL = """architectures bos_token_id eos_token_id pad_token_id hidden_act image_aspect_ratio use_mm_proj
    initializer_range max_position_embeddings mm_use_im_patch_token mm_use_im_start_end pretraining_tp
    mm_vision_select_feature num_key_value_heads rms_norm_eps rope_scaling rope_theta torch_dtype tie_word_embeddings
    transformers_version use_cache""".split()


def both_ways(tmp_path, tensors, **options):
    """The same numbers as the release's steps, from the folder and when it is converted; and back, to the bit."""
    same_numbers(tmp_path / "ferret", tensors, **options)
    given = {"vision_tower": options["vision_tower"]} if "vision_tower" in options else {}
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"), **given)
    model, processor = same_numbers(tmp_path / "ours", tensors, **options)
    export(tmp_path / "ours", tmp_path / "back")
    back = Weights(tmp_path / "back")
    assert {*back} == {*tensors} and all(torch.equal(back[key], tensors[key]) for key in tensors)
    return model, processor


# What the format leaves open -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [
    dict(hidden_size=80, intermediate_size=216, num_hidden_layers=3, num_attention_heads=5, vocab_size=381),
    dict(SIZES, num_key_value_heads=2), dict(SIZES, vocab_size=384)], ids=["as the 13B", "grouped heads", "spare rows"])
def test_sizes(tmp_path, sizes):
    both_ways(tmp_path, write_official(tmp_path, sizes=sizes), sizes=sizes)


@pytest.mark.parametrize("layout, clip, pool", [
    ("safetensors sharded", "subfolder", "mean"), ("bin sharded", "argument", "max"),
    ("safetensors", "sibling", "mean")])
def test_mixtures(tmp_path, layout, clip, pool):
    options = {"vision_tower": str(tmp_path / "elsewhere")} if clip == "argument" else {}
    both_ways(tmp_path, write_official(tmp_path, layout=layout, clip=clip, pool=pool, old=True), pool=pool, **options)


def test_settings_that_may_be_absent(tmp_path):
    both_ways(tmp_path, write_official(tmp_path, **dict.fromkeys(OPTIONAL)))


@pytest.mark.parametrize("added", [
    {"<region_fea>": 381, "<im_patch>": 380}, {"<region_fea>": 380, "<im_start>": 381, "<im_end>": 382}])
def test_several_added_tokens(tmp_path, added):
    sizes = dict(SIZES, vocab_size=380 + len(added))
    tensors = write_official(tmp_path, sizes=sizes, im_region_fea_token=added["<region_fea>"],
                             mm_use_im_patch_token=True)
    (tmp_path / "ferret" / "added_tokens.json").write_text(json.dumps(added))
    _, processor = both_ways(tmp_path, tensors, sizes=sizes)
    assert {token: processor.tokenizer.convert_tokens_to_ids(token) for token in added} == added
    plain = load(tmp_path / "ferret")[1]
    for one in (processor, plain):
        ids = encode(one)[0]
        assert (ids == added["<region_fea>"]).sum() == 2 and (ids == one.image_token_id).sum() == 16


def test_added_token_as_newer_transformers_writes_it(tmp_path):
    tensors = write_official(tmp_path)
    folder = tmp_path / "ferret"
    (folder / "added_tokens.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    token = dict(content="<region_fea>", lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": {"380": token}}))
    write_official(tmp_path / "plain")
    _, processor = both_ways(tmp_path, tensors)
    assert torch.equal(encode(processor)[0], encode(load(tmp_path / "plain" / "ferret")[1])[0])


def test_both_kinds_of_files(tmp_path):
    tensors = write_official(tmp_path, layout="safetensors sharded")
    write_weights(tmp_path / "ferret", {key: torch.zeros_like(t) for key, t in tensors.items()}, "bin sharded")
    both_ways(tmp_path, tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_saved_as_parameters_or_by_an_old_pytorch(tmp_path, zipped):
    tensors = write_official(tmp_path)
    parameters = {key: nn.Parameter(t) for key, t in tensors.items()}
    torch.save(parameters, tmp_path / "ferret" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    both_ways(tmp_path, tensors)


def test_clip_in_the_bin_with_the_new_keys(tmp_path):
    tensors = write_official(tmp_path)
    bare = {key.replace(".vision_tower.vision_model.", ".vision_tower."): t for key, t in tensors.items()}
    assert bare.keys() != tensors.keys()
    torch.save(bare, tmp_path / "ferret" / "pytorch_model.bin")
    both_ways(tmp_path, tensors)


def test_a_tensor_that_two_shards_hold(tmp_path):
    tensors = write_official(tmp_path, layout="bin sharded")
    index = json.loads((tmp_path / "ferret" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    other = next(path for path in sorted((tmp_path / "ferret").glob("*-of-*")) if path.name != index["lm_head.weight"])
    more = torch.load(other, weights_only=True) | {"lm_head.weight": torch.zeros(381, 48)}
    torch.save(more, other)
    same_numbers(tmp_path / "ferret", tensors)


@needs_golden
@torch.no_grad()
@pytest.mark.parametrize("layout", ["bin sharded", "safetensors", "safetensors sharded"])
@pytest.mark.parametrize("clip", ["bin", "subfolder", "argument"])
def test_golden_stored_otherwise(tmp_path, layout, clip):
    stored = torch.load(GOLDEN / "ferret-tiny" / "pytorch_model.bin", weights_only=True)
    eyes = torch.load(GOLDEN / "clip-tiny" / "pytorch_model.bin", weights_only=True)
    rest = {key: t for key, t in stored.items() if "vision_tower" not in key}
    inside = {f"model.vision_tower.vision_tower.{key}": t for key, t in eyes.items()}
    write_weights(tmp_path / "ferret", rest | (inside if clip == "bin" else {}), layout)
    write_config(tmp_path / "ferret", GOLDEN / "ferret-tiny", mm_vision_tower="clip-tiny")
    place = tmp_path / {"bin": "clip-tiny", "subfolder": "ferret/vision_tower", "argument": "elsewhere"}[clip]
    if clip != "bin": shutil.copytree(GOLDEN / "clip-tiny", place)
    else: write_clip(place)
    golden_outputs(*load(tmp_path / "ferret", vision_tower=str(place) if clip == "argument" else None))


def test_pixels_of_the_release(tmp_path):
    """Stretched to a square with PIL's bicubic filter, whatever the image's form; CLIP's mean and deviation."""
    write_official(tmp_path)
    _, processor = load(tmp_path / "ferret")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    pixels = processor(image, "What is [region0]?", [Box(1, 2, 30, 40)])["pixel_values"][0]
    square = np.asarray(image.resize((56, 56), Image.BICUBIC), dtype=np.float64) / 255
    expected = (square - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(pixels.numpy().transpose(1, 2, 0), expected, atol=1e-5)


# Deltas --------------------------------------------------------------------------------------------------------------

def test_half_precision_delta_is_rounded_once(tmp_path):
    write_delta(tmp_path)
    base, delta = ({key: t.half() for key, t in Weights(tmp_path / name).items()} for name in ("vicuna", "delta"))
    for name, tensors in (("vicuna", base), ("delta", delta)):
        for file in (tmp_path / name).glob("pytorch_model*"): file.unlink()
        write_weights(tmp_path / name, tensors)
    convert(out=str(tmp_path / "ours"), base=str(tmp_path / "vicuna"), delta=str(tmp_path / "delta"))
    export(tmp_path / "ours", tmp_path / "back")
    back = Weights(tmp_path / "back")
    for key, tensor in delta.items():
        if key in base: tensor[:len(base[key])] += base[key]  # as the release adds
        assert back[key].dtype == torch.float16 and torch.equal(back[key], tensor), key


@pytest.mark.parametrize("rows, good", [(380, True), (381, True), (379, False), (382, False)])
def test_delta_with_two_added_tokens(tmp_path, rows, good):
    """The base may know the first of them already, as a padding token that was added to Vicuna; not the region's."""
    sizes = dict(SIZES, vocab_size=382)
    tensors = write_official(tmp_path, sizes=sizes, im_region_fea_token=381)
    (tmp_path / "ferret" / "added_tokens.json").write_text(json.dumps({"<pad>": 380, "<region_fea>": 381}))
    base = {key: 0.1 * torch.ones_like(t) for key, t in tensors.items()
            if key.startswith(("model.layers", "model.norm"))}
    base |= {key: 0.1 * torch.ones(rows, 48) for key in ("model.embed_tokens.weight", "lm_head.weight")}
    delta = {key: t.clone() for key, t in tensors.items()}
    for key, t in base.items(): delta[key][:len(t)] -= t[:382]
    write_weights(tmp_path / "vicuna", base)
    (tmp_path / "vicuna" / "config.json").write_text(json.dumps({"vocab_size": rows, "model_type": "llama"}))
    write_weights(tmp_path / "ferret", delta)
    folders = {"base": str(tmp_path / "vicuna"), "delta": str(tmp_path / "ferret")}
    if not good: return broken(tmp_path, f"({rows}, 48)", "another base", **folders)
    convert(out=str(tmp_path / "ours"), **folders)
    same_numbers(tmp_path / "ours", tensors, sizes=sizes)


def test_base_with_another_tokenizer(tmp_path):
    write_delta(tmp_path)
    (tmp_path / "vicuna" / "tokenizer.model").write_bytes(b"other")
    broken(tmp_path, "tokenizer.model is not the delta's", base=str(tmp_path / "vicuna"), delta=str(tmp_path / "delta"))


# A real kill ---------------------------------------------------------------------------------------------------------

SLOWLY = """
import sys, time, ferret_lite.weights as weights
from ferret_lite.official import Checkpoint
weights.SHARD_BYTES = 60_000
read = Checkpoint.__getitem__
def slowly(self, name):
    time.sleep(PAUSE)
    return read(self, name)
Checkpoint.__getitem__ = slowly
from ferret_lite.cli import main
sys.argv = ["ferret-lite", "convert", "--official", OFFICIAL, "--out", OUT]
main()
"""


def start(tmp_path, pause):
    names = dict(PAUSE=pause, OFFICIAL=str(tmp_path / "ferret"), OUT=str(tmp_path / "ours"))
    code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + SLOWLY
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_process(tmp_path):
    """SIGKILL in the middle of a file: nothing is there under the new name, and the same command finishes the work."""
    tensors, part = write_official(tmp_path), tmp_path / ".ours.part"
    first = start(tmp_path, 0.05)
    while len(list(part.glob("*.safetensors"))) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "ours").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in part.glob("*.safetensors")}
    second = start(tmp_path, 0)
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "GB as float32" in out
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ours").glob("*.safetensors")}
    assert len(files) > len(kept) and kept.items() <= files.items()
    assert not part.exists() and not list((tmp_path / "ours").glob("*.part"))
    same_numbers(tmp_path / "ours", tensors)


def test_disk_too_small(tmp_path, monkeypatch):
    write_official(tmp_path)
    monkeypatch.setattr("ferret_lite.conversion.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    broken(tmp_path, "make room", official=str(tmp_path / "ferret"), error=OSError)


# Broken in other places ----------------------------------------------------------------------------------------------

def test_another_encoder(tmp_path):
    write_official(tmp_path)
    (tmp_path / "clip-tiny" / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    broken(tmp_path, "clip-tiny/config.json", "siglip_vision_model")


def test_clip_without_a_tensor(tmp_path):
    write_official(tmp_path, clip="sibling")
    path = tmp_path / "clip-tiny" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    tensors.pop("vision_model.embeddings.class_embedding")
    torch.save(tensors, path)
    broken(tmp_path, "clip-tiny/pytorch_model.bin", "class_embedding")


def test_index_that_is_no_json(tmp_path):
    write_official(tmp_path, layout="bin sharded")
    (tmp_path / "ferret" / "pytorch_model.bin.index.json").write_text("{")
    broken(tmp_path, "pytorch_model.bin.index.json")


def test_damaged_tokenizer(tmp_path):
    write_official(tmp_path)
    (tmp_path / "ferret" / "tokenizer.model").write_bytes(b"none")
    broken(tmp_path, "tokenizer.model is damaged")


def test_unconverted(tmp_path):
    write_official(tmp_path)
    with pytest.raises(OSError, match="convert it first"): AutoModelForCausalLM.from_pretrained(tmp_path / "ferret")
    with pytest.raises(ValueError, match="convert it first"): load_model(tmp_path / "ferret")


# The way back --------------------------------------------------------------------------------------------------------

def test_export_refuses_adapters_and_other_shapes(tmp_path):
    peft = pytest.importorskip("peft")
    write_official(tmp_path)
    model, _ = load(tmp_path / "ferret")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge adapters first"): export(lora.base_model.model, tmp_path / "back")
    model, _ = load(tmp_path / "ferret")
    model.language_model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match=r"\(400, 48\), Apple's is \(381, 48\)"): export(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_export_in_half_precision(tmp_path):
    tensors = write_official(tmp_path, dtype=torch.bfloat16)
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    export(tmp_path / "ours", tmp_path / "back")
    back = Weights(tmp_path / "back")
    assert all(back[key].dtype == torch.bfloat16 and torch.equal(back[key], tensors[key]) for key in tensors)
    assert Checkpoint(tmp_path / "back").dtype == torch.bfloat16
