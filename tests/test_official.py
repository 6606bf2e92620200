"""Apple's checkpoints: their numbers, every way in which they are stored, and every way in which they are broken.

    FERRET_GOLDEN_OFFICIAL=/path/to/golden pytest tests/test_official.py

`golden/official_a` holds a tiny checkpoint in Apple's format (without CLIP) and what Apple's code computed with it. The
other folders are written here, from a seed, and held against `released_features`: the release's steps, one by one."""
import importlib.util
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPVisionConfig
from transformers import CLIPVisionModel, CLIPConfig, LlamaConfig, LlamaForCausalLM

from ferret_lite.conversion import convert, export
from ferret_lite.model import FerretForConditionalGeneration
from ferret_lite.official import Checkpoint, build_config, build_processor, load, our_name, read_official
from ferret_lite.prompt import VICUNA, encode_dialogues
from ferret_lite.records import Dialogue, Turn
from ferret_lite.regions import Box, FreeForm, Point
from ferret_lite.weights import Weights, split_shards, write_safetensors

HERE = Path(__file__).parent / "golden" / "official_a"
GOLDEN = Path(os.environ.get("FERRET_GOLDEN_OFFICIAL", "no golden folder"))
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="set FERRET_GOLDEN_OFFICIAL to the golden folder")
TALK = Dialogue([Turn("user", "What is in region [region0] and [region1]?"),
                 Turn("assistant", "It is a red circle [region2]."),
                 Turn("user", "Where is the dog?"), Turn("assistant", "There is no dog.")],
                [Box(12, 34, 560, 780), Point(5, 6), Box(100, 200, 300, 400)])
SIZES = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=381)
CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56,
            patch_size=14)


# Apple's folders, written from a seed --------------------------------------------------------------------------------

def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: 1 + 0.1 * t if "norm" in key and key.endswith("weight") else 0.2 * t for key, t in draw.items()}


def clip_shapes():
    with torch.device("meta"): model = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    return {f"vision_model.{key.removeprefix('vision_model.')}": t.shape for key, t in model.state_dict().items()}


def ferret_shapes(sampler, sizes=SIZES, c=32):
    with torch.device("meta"): words = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    d, shapes = sizes["hidden_size"], {key: t.shape for key, t in words.items()}
    shapes |= {"model.mm_projector.weight": (d, c), "model.mm_projector.bias": (d,)}
    if sampler == "adapter":
        return shapes | {"model.region_fea_adapter.weight": (d, c), "model.region_fea_adapter.bias": (d,)}
    own = {"flatten_projector.weight": (c, 32 * c), "flatten_projector.bias": (c,),
           "dim_projector.weight": (d, c), "dim_projector.bias": (d,)}
    for i in range(2):
        own |= {f"diff_projector_list.{i}.weight": (c + 2, c + 2), f"diff_projector_list.{i}.bias": (c + 2,),
                f"agg_projector_list.{i}.net.0.weight": (c, 2 * (c + 2), 1), f"agg_projector_list.{i}.net.0.bias": (c,),
                f"agg_projector_list.{i}.norm.weight": (c,), f"agg_projector_list.{i}.norm.bias": (c,)}
    return shapes | {f"model.region_geo_sampler.{key}": shape for key, shape in own.items()}


def write_weights(folder, tensors, layout="bin"):
    """One file or three, pickled or safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    form, save = ("pytorch_model{}.bin", torch.save) if "bin" in layout else ("model{}.safetensors", save_file)
    keys, count = list(tensors), 3 if "sharded" in layout else 1
    placed = {key: form.format(f"-{i % count + 1:05}-of-{count:05}" if count > 1 else "") for i, key in enumerate(keys)}
    for name in set(placed.values()):
        save({key: tensors[key].clone() for key in keys if placed[key] == name}, folder / name)
    if count > 1: (folder / f"{form.format('')}.index.json").write_text(json.dumps({"weight_map": placed}))


def write_config(folder, like=HERE, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((like / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(HERE / name, folder / name)


def write_clip(folder, tensors=None, layout="bin"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CLIP, "model_type": "clip_vision_model"}))
    if tensors: write_weights(folder, tensors, layout)


def write_official(root, sampler="geo", pool="max", layout="bin", clip="bin", old=False, dtype=torch.float32,
                   sizes=SIZES, **config):
    """`root / "ferret"`, and where it wants one a CLIP; returns all tensors by their names in the bin."""
    words, eyes = random_tensors(ferret_shapes(sampler, sizes)), random_tensors(clip_shapes(), 1)
    inside = {f"model.vision_tower.vision_tower.{key}": t for key, t in eyes.items()}
    words, inside = ({key: t.to(dtype) for key, t in part.items()} for part in (words, inside))
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
               "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)} if old else {}
    folder = root / "ferret"
    write_weights(folder, words | (inside if clip == "bin" else {}) | buffers, layout)
    write_config(folder, region_geo_sampler=sampler == "geo", sampler_pooler_mode=pool if sampler == "geo" else None,
                 **{"mm_vision_tower": "nowhere/clip-tiny" if clip in ("subfolder", "argument") else "clip-tiny",
                    "num_key_value_heads": sizes["num_attention_heads"], **sizes, **config})
    place = root / {"subfolder": "ferret/vision_tower", "argument": "elsewhere"}.get(clip, "clip-tiny")
    write_clip(place, eyes if clip != "bin" else None)
    return words | inside


# The release's steps -------------------------------------------------------------------------------------------------

def released_features(tensors, image_map, masks, pool="max"):
    """One vector per (h, w) mask, as the released code computes it when FPS starts at the first point."""
    side, out = int(len(image_map)**0.5), []
    get = {key.split(".", 2)[2]: t for key, t in tensors.items() if key.startswith("model.region_geo_sampler.")}
    adapter = tensors.get("model.region_fea_adapter.weight")
    for mask in masks:
        points = torch.from_numpy(mask.T.copy()).nonzero() / torch.tensor(mask.T.shape)  # (n, 2) from a [w, h] mask
        grid = image_map.T.reshape(1, -1, side, side)
        if adapter is not None:
            projected = F.linear(image_map, adapter, tensors["model.region_fea_adapter.bias"])
            grid = projected.T.reshape(1, -1, side, side)
        x = F.grid_sample(grid, 2 * points.flip(-1)[None, None] - 1, align_corners=True)[0, :, 0].T  # (n, c)
        if adapter is not None:
            out.append(x.mean(0))
            continue
        for i, count in enumerate((128, 32)):
            kept, far = [0], torch.full((len(points),), 1e10)
            for _ in range(count - 1):
                far = torch.minimum(far, (points - points[kept[-1]]).square().sum(-1))
                kept.append(int(far.max(-1)[1]))
            new = points[kept]
            distance = -2 * torch.matmul(new[None], points[None].permute(0, 2, 1))[0]
            distance = distance + new.square().sum(-1)[:, None] + points.square().sum(-1)[None]
            near = torch.topk(distance, 24, largest=False, sorted=False)[1]  # (m, 24)
            z, anchor = torch.cat([x, points], -1)[near], torch.cat([x, points], -1)[kept][:, None]
            diff = F.linear(z - anchor, get[f"diff_projector_list.{i}.weight"], get[f"diff_projector_list.{i}.bias"])
            both = torch.cat([diff, anchor.expand_as(diff)], -1)
            name = f"agg_projector_list.{i}"
            h = F.relu(F.linear(both, get[f"{name}.net.0.weight"][..., 0], get[f"{name}.net.0.bias"]))
            h = F.layer_norm(h, h.shape[-1:], get[f"{name}.norm.weight"], get[f"{name}.norm.bias"])
            points, x = new, h.mean(1) if pool == "mean" else h.amax(1)
        x = F.linear(x.flatten(), get["flatten_projector.weight"], get["flatten_projector.bias"])
        out.append(F.linear(x, get["dim_projector.weight"], get["dim_projector.bias"]))
    return torch.stack(out)


def released_outputs(tensors, pixel_values, ids, masks, pool="max", sizes=SIZES, region=380):
    """Logits over the text with the image's 16 patches in the place of -200, and the regions' features."""
    eyes = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    prefix = "model.vision_tower.vision_tower.vision_model."
    eyes.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    image_map = eyes(pixel_values, output_hidden_states=True).hidden_states[-2][0, 1:]
    words = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-6)).eval()
    words.load_state_dict({key: tensors[key] for key in words.state_dict()})
    regions = released_features(tensors, image_map, masks, pool)
    place, embed = int((ids == -200).nonzero()), words.get_input_embeddings()
    patches = F.linear(image_map, tensors["model.mm_projector.weight"], tensors["model.mm_projector.bias"])
    after = embed(ids[place + 1:])
    after[ids[place + 1:] == region] = regions
    return words(inputs_embeds=torch.cat([embed(ids[:place]), patches, after])[None]).logits, regions


def some_masks(count=512):
    """Boxes and a scatter of exactly `count` pixels: on a grid most distances are ties."""
    rng, out = np.random.default_rng(0), np.zeros((2, 70, 90), dtype=bool)
    out[0, 30:30 + count // 32, 5:37] = True
    out[1].flat[rng.choice(70 * 90, count, replace=False)] = True
    return out


def encode(processor, talk=TALK):
    """Ids and labels; all bins of the golden prompt are pixels of a 1000 x 1000 image."""
    encoded = encode_dialogues([talk], 1000, 1000, processor.tokenizer, VICUNA, processor.image_length,
                               processor.image_token_id, rule=processor.rule)
    return torch.from_numpy(encoded.input_ids)[None], torch.from_numpy(encoded.labels)[None]


def collapse(ids, processor):
    """Ids with the image's run as one -200, and which positions that keeps."""
    is_image = ids[0] == processor.image_token_id
    keep = ~is_image | (torch.arange(ids.shape[1]) == is_image.nonzero()[0])
    return torch.where(is_image, -200, ids[0])[keep], keep


def expand(ids, processor):
    place = int((ids == -200).nonzero())
    image = torch.full((processor.image_length,), processor.image_token_id)
    return torch.cat([ids[:place], image, ids[place + 1:]])[None]


def close(ours, theirs): assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def same_numbers(folder, tensors, pool="max", masks=None, sizes=SIZES, **options):
    """Load, and hold features and logits against the release's steps."""
    masks = some_masks() if masks is None else masks
    model, processor = load(folder, **options)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    ids = encode(processor)[0]
    logits, regions = released_outputs(tensors, pixels, collapse(ids, processor)[0], masks, pool, sizes,
                                       processor.region_token_id)
    points = torch.from_numpy(processor.mask_points(masks))[None]
    close(model.get_region_features(model.get_vision_maps(pixels)[1], points), regions)
    close(model(input_ids=ids, pixel_values=pixels, region_points=points).logits, logits)
    return model, processor


# Apple's numbers -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """The small golden: model and processor around its weights, with any CLIP; and Apple's outputs."""
    stored = load_file(HERE / "model.safetensors")
    expected = {key.removeprefix("expected."): t for key, t in stored.items() if key.startswith("expected.")}
    root = tmp_path_factory.mktemp("apple")
    weights = {key: t for key, t in stored.items() if not key.startswith("expected.")}
    eyes = {f"model.vision_tower.vision_tower.{key}": t for key, t in random_tensors(clip_shapes()).items()}
    write_weights(root / "ferret", weights | eyes)
    write_config(root / "ferret")
    write_clip(root / "clip-tiny")
    masks = np.zeros((2, 517, 331), dtype=bool)
    for mask, xy in zip(masks, expected["positions"]): mask[tuple(xy.T.flip(0).long().numpy())] = True
    return *load(root / "ferret"), masks, expected


@torch.no_grad()
def test_small_golden(apple, monkeypatch):
    model, processor, masks, expected = apple
    ids, labels = encode(processor)
    ours, keep = collapse(ids, processor)
    assert ours.tolist() == expected["input_ids"][0].tolist()
    assert labels[0][keep].tolist() == expected["labels"][0].tolist()
    features = expected["image_features"]  # (1, 16, 32)
    maps = [features.mT.reshape(1, 32, 4, 4)]
    points = torch.from_numpy(processor.mask_points(masks))[None]
    close(model.get_region_features(maps, points), expected["region_features"])
    monkeypatch.setattr(model, "get_vision_maps", lambda pixel_values: (features, maps))
    pixels = torch.zeros(1, 3, 56, 56)
    out = model(input_ids=ids, pixel_values=pixels, region_points=points, labels=labels)
    close(out.logits[:, -30:], expected["logits_last"])
    close(out.loss, expected["loss"][0])
    prompt = expand(expected["generate_input_ids"][0].long(), processor)
    tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels,
                            region_points=points, max_new_tokens=24, do_sample=False)
    assert tokens[0, prompt.shape[1]:].tolist() == expected["generate_greedy_ids"][0].tolist()


def test_the_releases_options_each_matter(apple):
    """Every option of the released behaviour moves the golden's numbers, so a switch that does nothing is noticed."""
    model, processor, masks, expected = apple
    maps = [expected["image_features"].mT.reshape(1, 32, 4, 4)]
    points = torch.from_numpy(processor.mask_points(masks))[None]
    for name in ("region_transposed", "align_corners"):
        setattr(model.config, name, False)
        changed = model.get_region_features(maps, points)
        setattr(model.config, name, True)
        assert (changed - expected["region_features"]).abs().max() > 1e-2
    for name, value in {"corner_points": False, "few_pixels": "jitter"}.items():
        old = getattr(processor, name)
        setattr(processor, name, value)
        assert not np.array_equal(processor.mask_points(masks), points[0].numpy())
        setattr(processor, name, old)


def golden_outputs(model, processor):
    expected = load_file(GOLDEN / "expected.safetensors")
    masks = expected["masks_hw"].numpy() > 0
    ids, labels = encode(processor)
    ours, keep = collapse(ids, processor)
    assert ours.tolist() == expected["input_ids"][0].tolist()
    assert labels[0][keep].tolist() == expected["labels"][0].tolist()
    points, pixels = torch.from_numpy(processor.mask_points(masks))[None], expected["pixel_values"]
    features, maps = model.get_vision_maps(pixels)
    close(features, expected["image_features"])
    close(model.get_region_features(maps, points), expected["region_features"])
    out = model(input_ids=ids, labels=labels, pixel_values=pixels, region_points=points)
    close(out.logits, expected["logits"])
    close(out.loss, expected["loss"][0])
    prompt = expand(expected["generate_input_ids"][0], processor)
    tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels,
                            region_points=points, max_new_tokens=24, do_sample=False)
    assert tokens[0, prompt.shape[1]:].tolist() == expected["generate_greedy_ids"][0].tolist()


@needs_golden
@torch.no_grad()
def test_full_golden(tmp_path):
    golden_outputs(*load(GOLDEN / "ferret-tiny"))
    convert(out=str(tmp_path / "a"), official=str(GOLDEN / "ferret-tiny"))
    golden_outputs(*load(tmp_path / "a"))
    convert(out=str(tmp_path / "b"), base=str(GOLDEN / "vicuna-tiny"), delta=str(GOLDEN / "ferret-tiny-delta"))
    golden_outputs(*load(tmp_path / "b"))
    export(tmp_path / "a", tmp_path / "back")
    folders = GOLDEN / "ferret-tiny", tmp_path / "back"
    one, two = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Every way to store a checkpoint -------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["bin", "bin sharded", "safetensors", "safetensors sharded"])
def test_layouts(tmp_path, layout):
    same_numbers(tmp_path / "ferret", write_official(tmp_path, layout=layout, old=True))


@pytest.mark.parametrize("clip", ["bin", "subfolder", "sibling", "argument"])
def test_clip_places(tmp_path, clip):
    options = {"vision_tower": str(tmp_path / "elsewhere")} if clip == "argument" else {}
    same_numbers(tmp_path / "ferret", write_official(tmp_path, clip=clip), **options)


def test_clip_from_the_hubs_cache_and_from_a_whole_clip(tmp_path, monkeypatch):
    tensors = write_official(tmp_path, clip="sibling")
    text = dict(SIZES, max_position_embeddings=8)
    whole = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=text, projection_dim=16))
    shutil.move(tmp_path / "clip-tiny", tmp_path / "cached")
    eyes = torch.load(tmp_path / "cached" / "pytorch_model.bin", weights_only=True)
    rest = {key: t for key, t in whole.state_dict().items() if not key.startswith("vision_model.")}
    torch.save({key: t.clone() for key, t in (eyes | rest).items()}, tmp_path / "cached" / "pytorch_model.bin")
    whole.config.save_pretrained(tmp_path / "cached")
    monkeypatch.setattr("ferret_lite.clip.snapshot_download", lambda name, **options: str(tmp_path / "cached"))
    same_numbers(tmp_path / "ferret", tensors)


def test_mean_pooling(tmp_path):
    same_numbers(tmp_path / "ferret", write_official(tmp_path, pool="mean"), pool="mean")


@pytest.mark.parametrize("count", [512, 96])
def test_adapter(tmp_path, count):
    """The older variant averages over the pixels that there are; fewer than 512 are no approximation."""
    tensors = write_official(tmp_path, sampler="adapter")
    same_numbers(tmp_path / "ferret", tensors, masks=some_masks(count))
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    again, _ = same_numbers(tmp_path / "ours", tensors, masks=some_masks(count))
    export(again, tmp_path / "back")
    back, first = (torch.load(f / "pytorch_model.bin") for f in (tmp_path / "back", tmp_path / "ferret"))
    assert back.keys() == first.keys() and all(torch.equal(back[key], first[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept_or_chosen(tmp_path, dtype):
    write_official(tmp_path, dtype=dtype, clip="sibling")  # CLIP's own file is float32
    model, _ = load(tmp_path / "ferret")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for p in load(tmp_path / "ferret", dtype="float32")[0].parameters()} == {torch.float32}


def test_masks_and_points_of_the_release(tmp_path):
    write_official(tmp_path)
    _, processor = load(tmp_path / "ferret")
    from ferret_lite.regions import region_mask
    box = region_mask(Box(10, 20, 30, 40), 90, 70, rule=processor.mask_rule)
    assert box.sum() == 21 * 21 and box[40, 30] and box[20, 10]
    click = region_mask(Point(3.7, 69), 90, 70, rule=processor.mask_rule)
    assert click.sum() == 9 * 6 and click[64, 0] and click[69, 8]
    points = processor.mask_points(np.stack([box, click]))
    xy = np.stack(np.nonzero(click.T), 1) / np.float32([90, 70])
    np.testing.assert_allclose(points[1, :54], xy, atol=1e-7)  # all of them, down the columns
    assert {*map(tuple, points[1, 54:])} <= {*map(tuple, points[1, :54])}
    assert np.array_equal(points, processor.mask_points(np.stack([box, click])))
    processor.repeatable = False
    assert not np.array_equal(points, processor.mask_points(np.stack([box, click])))


# There and back ------------------------------------------------------------------------------------------------------

def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr("ferret_lite.weights.SHARD_BYTES", 1)
    tensors = write_official(tmp_path, layout="bin sharded", old=True)
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    same_numbers(tmp_path / "ours", tensors)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    model = FerretForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.config.region_transposed and model.config.align_corners and model.config.sampler_norm
    export(tmp_path / "ours", tmp_path / "one")
    model.save_pretrained(tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "two", like=tmp_path / "ours")
    for out in ("one", "two"):
        back = Weights(tmp_path / out)
        assert {*back} == {*tensors}
        assert all(torch.equal(back[key], tensors[key]) for key in tensors)
        for name in ("tokenizer.model", "config.json", "added_tokens.json"):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "ferret" / name).read_bytes()
        same_numbers(tmp_path / out, tensors)


def write_delta(tmp_path, base_changes=None):
    tensors = write_official(tmp_path, clip="sibling")
    words = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 380})).state_dict()
    base = random_tensors({key: t.shape for key, t in words.items()}, 3) | (base_changes or {})
    folder = tmp_path / "vicuna"
    write_weights(folder, base, "bin sharded")
    (folder / "config.json").write_text(json.dumps({**SIZES, "vocab_size": 380, "model_type": "llama"}))
    delta = {key: t.clone() for key, t in tensors.items() if "vision_tower" not in key}
    for key, t in base.items(): delta[key][:len(t)] -= t
    (tmp_path / "ferret").rename(tmp_path / "delta")
    write_weights(tmp_path / "delta", delta)
    return tensors


def test_delta(tmp_path):
    tensors = write_delta(tmp_path)
    convert(out=str(tmp_path / "ours"), base=str(tmp_path / "vicuna"), delta=str(tmp_path / "delta"))
    same_numbers(tmp_path / "ours", tensors)


class Stopped(Exception): pass


def test_interrupted_conversion_goes_on_or_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ferret_lite.weights.SHARD_BYTES", 100_000)
    tensors = write_official(tmp_path)
    read, calls = Checkpoint.__getitem__, []

    def stop(self, name):
        calls.append(name)
        if len(calls) == 40: raise Stopped
        return read(self, name)
    monkeypatch.setattr(Checkpoint, "__getitem__", stop)
    with pytest.raises(Stopped): convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    part, before = tmp_path / ".ours.part", len(calls)
    assert not (tmp_path / "ours").exists()
    done = {p.name: p.stat().st_mtime_ns for p in part.glob("*.safetensors")}
    assert done and list(part.glob("*.part"))
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    assert {name: (tmp_path / "ours" / name).stat().st_mtime_ns for name in done} == done  # kept
    assert not part.exists() and not list((tmp_path / "ours").glob("*.part"))
    same_numbers(tmp_path / "ours", tensors)
    calls.clear()
    with pytest.raises(Stopped): convert(out=str(tmp_path / "other"), official=str(tmp_path / "ferret"))
    convert(out=str(tmp_path / "other"), official=str(tmp_path / "ferret"), dtype="bfloat16")  # so: from the start
    assert {t.dtype for t in Weights(tmp_path / "other").values()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["official", "delta"])
def test_memory_stays_far_below_one_copy(tmp_path, mode):
    """A checkpoint of 480 MB, in one file."""
    sizes = dict(SIZES, hidden_size=1024, intermediate_size=2816, num_hidden_layers=9, num_attention_heads=8,
                 num_key_value_heads=8)
    words = {key: torch.randn(shape) for key, shape in ferret_shapes("geo", sizes).items()}
    words |= {f"model.vision_tower.vision_tower.{key}": t for key, t in random_tensors(clip_shapes()).items()}
    total = sum(t.nbytes for t in words.values())
    assert total > 4.5e8
    write_weights(tmp_path / "ferret", words)
    write_config(tmp_path / "ferret", **sizes)
    write_clip(tmp_path / "clip-tiny")
    options = {"official": str(tmp_path / "ferret")}
    if mode == "delta":
        kinds = ("model.layers", "model.norm", "lm_head", "model.embed")
        base = {key: t[:380].clone() if t.shape[0] == 381 else t for key, t in words.items() if key.startswith(kinds)}
        write_weights(tmp_path / "vicuna", base)
        (tmp_path / "vicuna" / "config.json").write_text(json.dumps({**sizes, "vocab_size": 380}))
        options = {"base": str(tmp_path / "vicuna"), "delta": str(tmp_path / "ferret")}
    del words
    code = f"""
import resource, ferret_lite.conversion as c
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * {1 if sys.platform == "darwin" else 1024}
from ferret_lite.official import Checkpoint
from transformers import LlamaTokenizer
before = peak()
c.convert(out={str(tmp_path / "ours")!r}, **{options!r})
print("GROWTH", peak() - before)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split("GROWTH")[1])
    print(f"{mode}: {total / 1e6:.0f} MB, growth {growth / 1e6:.0f} MB")
    assert growth < total * (0.6 if mode == "official" else 0.9)


# What is broken says what and where ----------------------------------------------------------------------------------

def broken(tmp_path, *words, error=ValueError, **options):
    """Loading and converting fail with one line that holds all of `words`, and nothing is left behind."""
    options = options or {"official": str(tmp_path / "ferret")}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught: convert(out=str(tmp_path / "ours"), **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert sorted(tmp_path.rglob("*")) == before


def change(tmp_path, edit):
    path = tmp_path / "ferret" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


def test_missing_shard(tmp_path):
    write_official(tmp_path, layout="bin sharded")
    (tmp_path / "ferret" / "pytorch_model-00002-of-00003.bin").unlink()
    broken(tmp_path, "pytorch_model-00002-of-00003.bin is missing", error=FileNotFoundError)


def test_shard_without_its_key(tmp_path):
    write_official(tmp_path, layout="bin sharded")
    path = tmp_path / "ferret" / "pytorch_model-00002-of-00003.bin"
    tensors = torch.load(path, weights_only=True)
    key = next(iter(tensors))
    torch.save({k: t for k, t in tensors.items() if k != key}, path)
    broken(tmp_path, key, path.name)


def test_key_too_few(tmp_path):
    write_official(tmp_path)
    change(tmp_path, lambda t: t.pop("model.mm_projector.bias"))
    broken(tmp_path, "lacks model.mm_projector.bias", "pytorch_model.bin")


def test_key_too_many(tmp_path):
    write_official(tmp_path)
    change(tmp_path, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 48)}))
    broken(tmp_path, "model.layers.2.mlp.up_proj.weight", "no place", "pytorch_model.bin")


def test_wrong_shape(tmp_path):
    write_official(tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(380, 48)}))
    broken(tmp_path, "lm_head.weight is (380, 48)", "(381, 48)", "pytorch_model.bin")


def test_sampler_of_the_other_kind(tmp_path):
    write_official(tmp_path, sampler="adapter")
    write_config(tmp_path / "ferret", mm_vision_tower="clip-tiny")
    broken(tmp_path, "region_fea_adapter.weight", "no place", "pytorch_model.bin")


class Code:
    def __reduce__(self): return os.system, ("touch /tmp/this_ran",)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: pickle.dump(x, open(path, "wb"))])
def test_pickle_with_code(tmp_path, write):
    write_official(tmp_path)
    write({"lm_head.weight": Code()}, tmp_path / "ferret" / "pytorch_model.bin")
    broken(tmp_path, "pytorch_model.bin", "refused")
    assert not Path("/tmp/this_ran").exists()


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_truncated_file(tmp_path, layout):
    write_official(tmp_path, layout=layout)
    path = next(p for p in (tmp_path / "ferret").iterdir() if p.suffix in (".bin", ".safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    broken(tmp_path, path.name, "damaged")


@pytest.mark.parametrize("change, words", [
    ({"mm_vision_tower": None}, ["lacks mm_vision_tower"]),
    ({"im_region_fea_token": None}, ["lacks im_region_fea_token"]),
    ({"mm_use_im_start_end": True}, ["mm_use_im_start_end is True"]), ({"image_aspect_ratio": "pad"}, ["'pad'"]),
    ({"sampler_pooler_mode": "min"}, ["sampler_pooler_mode is 'min'"]), ({"model_type": "llava"}, ["'llava'"]),
    ({"mm_vision_select_feature": "cls_patch"}, ["cls_patch"]), ({"mm_hidden_size": 64}, ["mm_hidden_size 64"])])
def test_config(tmp_path, change, words):
    write_official(tmp_path)
    write_config(tmp_path / "ferret", **{"mm_vision_tower": "clip-tiny", **change})
    broken(tmp_path, "config.json", *words)


def test_tokenizer_without_the_region_token(tmp_path):
    write_official(tmp_path)
    (tmp_path / "ferret" / "added_tokens.json").unlink()
    broken(tmp_path, "<region_fea>", "added_tokens.json")
    write_config(tmp_path / "ferret", im_region_fea_token=379, mm_vision_tower="clip-tiny")
    broken(tmp_path, "im_region_fea_token 379")
    (tmp_path / "ferret" / "tokenizer.model").unlink()
    broken(tmp_path, "tokenizer.model is missing", error=FileNotFoundError)


def test_no_clip_anywhere(tmp_path):
    write_official(tmp_path, clip="sibling")
    shutil.rmtree(tmp_path / "clip-tiny")
    broken(tmp_path, "clip-tiny", "--vision-tower", error=FileNotFoundError)
    folders = {"official": str(tmp_path / "ferret"), "vision_tower": str(tmp_path / "x")}
    broken(tmp_path, "no CLIP in", **folders, error=FileNotFoundError)
    write_clip(tmp_path / "clip-tiny")  # settings alone
    broken(tmp_path, "--vision-tower", error=FileNotFoundError)


@pytest.mark.parametrize("change, words", [
    ({"model.layers.1.mlp.up_proj.weight": torch.zeros(95, 48)}, ["model.layers.1.mlp.up_proj.weight is (95, 48)"]),
    ({"model.embed_tokens.weight": torch.zeros(379, 48)}, ["model.embed_tokens.weight is (379, 48)", "(380, 48)"]),
    ({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 48)}, ["has model.layers.2.mlp.up_proj.weight"])])
def test_delta_for_another_base(tmp_path, change, words):
    write_delta(tmp_path)
    path = tmp_path / "vicuna"
    tensors = {**Weights(path)} | change
    for file in path.glob("pytorch_model*"): file.unlink()
    write_weights(path, tensors)
    broken(tmp_path, *words, "another base", base=str(path), delta=str(tmp_path / "delta"))
    (path / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5}))
    broken(tmp_path, "rms_norm_eps is 1e-05", base=str(path), delta=str(tmp_path / "delta"))


def test_arguments(tmp_path):
    write_official(tmp_path)
    folder = str(tmp_path / "ferret")
    for options in ({"base": folder}, {"delta": folder}, {"official": folder, "base": folder, "delta": folder}):
        broken(tmp_path, "give either", **options)
    broken(tmp_path, "dtype 'int8'", official=folder, dtype="int8")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    broken(tmp_path, "exists already", official=folder, error=FileExistsError)


def test_auto_classes_say_convert_it_first(tmp_path):
    write_official(tmp_path)
    for cls in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, FerretForConditionalGeneration):
        with pytest.raises((OSError, ValueError), match="convert it first"): cls.from_pretrained(tmp_path / "ferret")


def test_export_refuses_what_apple_would_compute_otherwise(tmp_path):
    write_official(tmp_path)
    model, _ = load(tmp_path / "ferret")
    model.config.region_transposed = False
    with pytest.raises(ValueError, match="region_transposed is False"): export(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# Training ------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_lora_trains(tmp_path):
    from peft import LoraConfig, get_peft_model
    write_official(tmp_path)
    convert(out=str(tmp_path / "ours"), official=str(tmp_path / "ferret"))
    model, processor = load(tmp_path / "ours")
    ids, labels = encode(processor)
    batch = dict(input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, 56, 56),
                 region_points=torch.from_numpy(processor.mask_points(some_masks()))[None])
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = lora(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "back", like=tmp_path / "ours")
    again, _ = load(tmp_path / "back")
    assert_close(again(**batch).logits, merged(**batch).logits)
