"""The shipped configs of the paper's sizes: read, run on small parts, counted on the meta device."""
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ferret_lite.config import FerretConfig
from ferret_lite.model import FerretForConditionalGeneration, answer, load_model
from ferret_lite.records import Dialogue, Record, Turn, write_records
from ferret_lite.regions import Box, Point

ROOT = Path(__file__).resolve().parent.parent
LARGE = sorted((ROOT / "configs").glob("vicuna_*.yaml"))
SAMPLER = {"sampler_num_points": [16, 8, 4], "sampler_k": 4}


def write_tokenizer(folder, texts):
    """A sentencepiece tokenizer as LLaMA's: a byte-fallback BPE with single digits, in one file, `tokenizer.model`."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, normalization_rule_name="identity", pad_id=-1,
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def write_data(folder):
    """Six records with their pictures; two of them for validation."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    folder.mkdir()
    Image.fromarray(picture).save(folder / "a.png")
    refer = [Turn("user", "What is [region0]?"), Turn("assistant", "A red disc [region0]."),
             Turn("user", "And [region1]?"), Turn("assistant", "A blue ring.")]
    dialogues = [Dialogue(refer, [Box(3, 4, 20, 25), Point(9, 9)]),
                 Dialogue([Turn("user", "Is there a cat?"), Turn("assistant", "No, there is no cat.")])]
    records = [Record("a.png", 40, 30, dialogues, id=str(i)) for i in range(6)]
    write_records(records[:4], folder / "train.jsonl"), write_records(records[4:], folder / "val.jsonl")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a small CLIP, of a small LLaMA with its tokenizer, and of data."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 28}).save_pretrained(root / "clip")
    (root / "llama").mkdir()
    texts = ["What is [1, 2]?", "A red disc. USER: ASSISTANT:", "Is there a blue ring?"]
    rows = write_tokenizer(root / "llama", texts * 9)
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=512, **sizes)).save_pretrained(root / "llama")
    write_data(root / "data")
    return root


def fit(path, parts, out, *words):
    """Two steps of two accumulated batches, with the config's own settings but for sizes and devices."""
    from ferret_lite.cli import main
    stages = [{**stage, "steps": 2, "batch_size": 2} for stage in yaml.safe_load(path.read_text())["data"]["stages"]]
    names = {part: str(parts / folder) for part, folder in (("vision", "clip"), ("text", "llama"))}
    changes = {"trainer.default_root_dir": out, "trainer.accelerator": "cpu", "trainer.devices": 1,
               "trainer.strategy": "auto", "trainer.precision": "32-true", "trainer.accumulate_grad_batches": 2,
               "trainer.enable_progress_bar": "false", "trainer.log_every_n_steps": 1, "trainer.val_check_interval": 4,
               "checkpoint.every_n_train_steps": 2, "data.root": parts / "data", "data.max_length": 480,
               "data.processor": json.dumps({**names, "template": "vicuna", "num_points": 16}), "data.num_workers": 0,
               "data.stages": json.dumps(stages), "model.ferret": json.dumps(SAMPLER), "model.dtype": "float32",
               **{f"model.{part}": json.dumps({"pretrained": name}) for part, name in names.items()}}
    main(["fit", "--config", str(path), *(str(w) for k, v in changes.items() for w in (f"--{k}", v)), *map(str, words)])
    return out


def logged(run, name):
    with open(run / "logs" / "version_0" / "metrics.csv") as f: rows = list(csv.DictReader(f))
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_every_large_config_fits_small_parts(path, parts, tmp_path):
    words = []
    if path.stem == "vicuna_13b":  # also from LLaVA's projector
        axes = {"weight": 2, "bias": 1}
        stage_1 = {f"model.mm_projector.{name}": torch.full((32,) * n, 0.1) for name, n in axes.items()}
        torch.save(stage_1, tmp_path / "mm_projector.bin")
        words = ["--model.projector", tmp_path / "mm_projector.bin"]
    run = fit(path, parts, tmp_path / "run", *words)
    assert len(logged(run, "train/answer_loss")) >= 2 and len(logged(run, "val/answer_loss")) == 1
    model, processor = load_model(run / "model")
    clip = CLIPVisionModel.from_pretrained(parts / "clip").state_dict()
    for name, x in model.vision_tower.state_dict().items(): assert torch.equal(x, clip[name]), name  # frozen
    base = LlamaForCausalLM.from_pretrained(parts / "llama")
    ours, theirs = (m.model.layers[0].self_attn.q_proj.weight for m in (model.language_model, base))
    assert not torch.equal(ours, theirs)  # trained, by adapters too
    if words: assert_close(model.mm_projector.weight, torch.full((32, 32), 0.1), rtol=0, atol=1e-3)
    copied = (run / "model" / "tokenizer.model").read_bytes()
    assert copied == (parts / "llama" / "tokenizer.model").read_bytes()
    picture = Image.open(parts / "data" / "a.png")
    assert len(answer(model, processor, processor(picture, "What is [region0]?", [Point(3, 3)]), max_new_tokens=2)) == 1


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_leave_out_what_is_found_by_its_name(parts, tmp_path):
    """And a run without validation records is one all the same."""
    shutil.copytree(parts / "data", tmp_path / "data")
    (tmp_path / "data" / "val.jsonl").unlink()
    fit(ROOT / "configs" / "vicuna_7b_lora.yaml", parts, tmp_path / "run", "--data.root", tmp_path / "data")
    names = {*torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]}
    kept = {name.split(".")[1] for name in names}
    assert kept == {"language_model", "mm_projector", "region_sampler"}
    assert all("lora_" in name for name in names if "language_model" in name)


@pytest.mark.parametrize("path", [path for path in LARGE if "lora" not in path.stem], ids=lambda path: path.stem)
def test_the_strategy_can_be_made(path):
    """Lightning refuses FSDP on a CPU; its settings are read all the same."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    said = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    strategy = parser.instantiate_classes(parser.parse_object({"strategy": said})).strategy
    assert isinstance(strategy, FSDPStrategy)
    assert {*strategy.kwargs["auto_wrap_policy"]._module_classes} == {LlamaDecoderLayer}


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_step_has_128_images_and_a_run_3_epochs(path):
    config = yaml.safe_load(path.read_text())
    stage, = config["data"]["stages"]
    per_step = config["trainer"]["devices"] * config["trainer"]["accumulate_grad_batches"] * stage["batch_size"]
    assert per_step == 128 and stage["steps"] == 3 * 1_100_000 // 128
    assert config["data"]["processor"]["vision"] == config["model"]["vision"]["pretrained"]
    assert config["data"]["processor"]["text"] == config["model"]["text"]["pretrained"]


CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
              patch_size=14)
LLAMA = {"7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
         "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)}
COUNTS = {"7b": 6_738_415_616, "13b": 13_015_864_320}  # Vicuna's, with 32,000 rows


@pytest.mark.parametrize("size", LLAMA)
def test_parts_have_the_papers_sizes(size):
    """Counted by hand from the paper's numbers: 1,024 channels, 512 -> 128 -> 32 points, xy beside the features."""
    config = yaml.safe_load((ROOT / "configs" / f"vicuna_{size}.yaml").read_text())
    text = LlamaConfig(vocab_size=32_001, **LLAMA[size])
    ferret = FerretConfig(vision_config=CLIPVisionConfig(**CLIP_L), text_config=text, **config["model"]["ferret"])
    with torch.device("meta"): model = FerretForConditionalGeneration(ferret)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    c, d = 1024, LLAMA[size]["hidden_size"]
    block = (c + 2) * (c + 2) + (c + 2) + 2 * (c + 2) * c + c  # theta, sigma
    assert count == {"vision_tower": 303_507_456, "mm_projector": c * d + d, "language_model": COUNTS[size] + 2 * d,
                     "region_sampler": 2 * block + 32 * c * c + c + c * d + d}
