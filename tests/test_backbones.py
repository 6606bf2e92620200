"""Other encoders and other language models, through transformers' Auto classes: trained, asked, saved, loaded."""
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import (AutoModelForCausalLM, BitImageProcessorPil, Dinov2Config, Dinov2Model,
                          Dinov2WithRegistersConfig, Dinov2WithRegistersModel, Gemma3TextConfig, GemmaConfig,
                          LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, SiglipConfig, SiglipImageProcessorPil,
                          SiglipModel)
from transformers.utils import logging

from ferret_lite.build import build_model, pretrained_processor
from ferret_lite.model import answer, load_model, save_model
from ferret_lite.records import Dialogue, Record, Turn
from ferret_lite.regions import Box, Point
from ferret_lite.templates import VICUNA, find_template

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful."
          "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
CHATS = {"chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(eos_token="<|im_end|>")),
         "gemma": (GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
                   dict(eos_token="<eos>", bos_token="<bos>"))}


def siglip(folder):
    """Both towers, as on the Hub; no class token."""
    SiglipModel(SiglipConfig(vision_config=dict(**SIZES, intermediate_size=64, image_size=28, patch_size=14),
                             text_config=dict(**SIZES, intermediate_size=64))).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


def dinov2(folder):
    """A class token before the patches."""
    Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, image_size=28, patch_size=14)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def registers(folder):
    """A class token and four registers before the patches."""
    config = Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, image_size=28, patch_size=14, num_register_tokens=4)
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def byte_tokenizer(chat):
    """A byte-level BPE, as GPT's, Qwen's and SmolLM's, with a chat template."""
    template, specials, names = CHATS[chat]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["What is this? Where is the red ring?", "A red ring."], trainer)
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=specials[0], chat_template=template, **names)


DECODERS = {"qwen2": (Qwen2Config, "chatml", dict(num_key_value_heads=1, tie_word_embeddings=True)),
            "smollm": (LlamaConfig, "chatml", dict(num_key_value_heads=1, tie_word_embeddings=True)),
            "gemma": (GemmaConfig, "gemma", dict(num_key_value_heads=1, head_dim=16)),
            "gemma3": (Gemma3TextConfig, "gemma", dict(num_key_value_heads=1, head_dim=16, sliding_window=512))}


def decoder(folder, name):
    """A language model and its tokenizer; the vocabulary has spare rows, as Qwen's has."""
    config, chat, more = DECODERS[name]
    tokenizer = byte_tokenizer(chat)
    ids = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    spare = 8 if name == "qwen2" else 0
    config = config(vocab_size=len(tokenizer) + spare, intermediate_size=64, max_position_embeddings=1024, **SIZES,
                    **ids, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


REFER = Dialogue([Turn("user", "What is [region0]?"), Turn("assistant", "A red ring [region0]."),
                  Turn("user", "And [region1]?"), Turn("assistant", "A disc.")], [Box(3, 4, 20, 25), Point(9, 9)])
EXISTS = Dialogue([Turn("user", "Is there a cat?"), Turn("assistant", "No, there is no cat.")])
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
PAIRS = [("siglip", "qwen2"), ("dinov2", "smollm"), ("registers", "gemma"), ("siglip", "gemma3")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def built(request, tmp_path_factory):
    """(model, processor) of two folders."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    vision, text = request.param
    root = tmp_path_factory.mktemp("parts")
    {"siglip": siglip, "dinov2": dinov2, "registers": registers}[vision](root / "vision")
    decoder(root / "text", text)
    processor = pretrained_processor(str(root / "vision"), str(root / "text"), num_points=16)
    assert processor.template == "chat" and processor.image_length == 4
    sampler = dict(sampler_num_points=[16, 8, 4], sampler_k=4)
    model = build_model(processor, {"pretrained": str(root / "vision")}, {"pretrained": str(root / "text")}, **sampler)
    return model.eval(), processor


def batch_of(processor, *dialogues):
    return processor.encode_records([Record(None, 40, 30, list(dialogues))], [IMAGE])


def test_labels_are_the_answers_and_their_ends(built):
    model, processor = built
    batch, end = batch_of(processor, REFER), processor.tokenizer.decode(processor.end_token_id)
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learned) == f"A red ring [75, 133, 500, 833].{end}A disc.{end}"
    assert end in ("<|im_end|>", "<end_of_turn>")
    assert model.generation_config.eos_token_id == processor.end_token_id


def test_honest_text_becomes_what_the_chat_template_makes(built):
    model, processor = built
    tokenizer, ids = processor.tokenizer, batch_of(processor, EXISTS)["input_ids"][0]
    ours = tokenizer.decode(ids[ids != processor.image_token_id])
    talk = [{"role": turn.role, "content": turn.text} for turn in EXISTS.turns]
    theirs = tokenizer.apply_chat_template(talk, tokenize=False)
    assert theirs.startswith(ours.replace("\nIs there", "Is there"))  # the line break behind the image is ours
    assert VICUNA.system not in ours


def test_marks_in_a_persons_text_stay_text(built):
    model, processor = built
    end = processor.tokenizer.decode(processor.end_token_id)
    asked = processor(IMAGE, f"Is it red?{end}").input_ids[0]
    honest = processor(IMAGE, "Is it red?").input_ids[0]
    assert (asked == processor.end_token_id).sum() == (honest == processor.end_token_id).sum()


def test_a_training_step_reaches_what_is_new_and_lowers_the_loss(built):
    model, processor = built
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batch, losses = batch_of(processor, REFER, EXISTS), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    silent = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert silent <= {"vision_tower"}  # the encoder's last layer, its head: nobody reads them
    model.load_state_dict(before)


def test_packed_dialogues_equal_each_alone(built):
    """Also where a model makes masks of its own, as Gemma 3 with its window."""
    model, processor = built
    packed = batch_of(processor, REFER, EXISTS)
    with torch.no_grad():
        logits = model(**packed).logits[0]
        for d, dialogue in enumerate((REFER, EXISTS)):
            own = (packed["dialogue_ids"][0] == 0) | (packed["dialogue_ids"][0] == d + 1)
            assert_close(logits[own], model(**batch_of(processor, dialogue)).logits[0], rtol=1e-4, atol=1e-4)


def test_it_answers_alone_and_in_a_batch_and_after_a_round_trip(built, tmp_path):
    model, processor = built
    asked = [Dialogue(REFER.turns[:3], REFER.regions), Dialogue(EXISTS.turns[:1])]
    together = answer(model, processor, processor([IMAGE] * 2, asked), max_new_tokens=6)
    assert together == [answer(model, processor, processor(IMAGE, one), max_new_tokens=6)[0] for one in asked]
    save_model(model, processor, tmp_path / "model")
    loaded, again = load_model(tmp_path / "model")
    for name, x in model.state_dict().items(): assert torch.equal(x, loaded.state_dict()[name]), name
    assert find_template("chat", again.tokenizer) == find_template("chat", processor.tokenizer)
    assert together == answer(loaded, again, again([IMAGE] * 2, asked), max_new_tokens=6)
