"""LLaMA's own tokenizer: our ids against sentencepiece, read as the released code reads it."""
import re

import numpy as np
import pytest
from transformers import LlamaTokenizer

from ferret_lite.prompt import TINY, VICUNA, add_region_token, encode_dialogues, encode_prompt, piece_ids
from ferret_lite.records import Dialogue, Turn
from ferret_lite.regions import Box, Point

spm = pytest.importorskip("sentencepiece")

TALK = Dialogue([Turn("user", "What is in region [region0] and [region1]?"),
                 Turn("assistant", "It is a red circle [region2]."),
                 Turn("user", "[region1] Where is the dog?"), Turn("assistant", "There is no dog.")],
                [Box(12, 34, 560, 780), Point(5, 6), Box(100, 200, 300, 400)])
PROMPT = (VICUNA.system + " USER: <image>\nWhat is in region [12, 34, 560, 780] <region_fea> and [5, 6] <region_fea>?"
          " ASSISTANT: It is a red circle [100, 200, 300, 400].</s>USER: [5, 6] <region_fea> Where is the dog?"
          " ASSISTANT: There is no dog.</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small tokenizer.model trained with LLaMA's options."""
    path = tmp_path_factory.mktemp("llama")
    lines = re.split(r"(?<=[.?:]) ", PROMPT.replace("<image>", "").replace("<region_fea>", "").replace("</s>", " "))
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_prefix=str(path / "tokenizer"), vocab_size=400, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    add_region_token(tokenizer)
    return tokenizer


def released_ids(folder, prompt, region_id, image_length):
    """Split at the image, then at special tokens; strip around the region token; each piece on its own."""
    model, ids = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), [1]
    special = {"<image>": [-200] * image_length, "<region_fea>": [region_id], "</s>": [2]}
    for piece in re.split(r"(<image>|</s>|\s*<region_fea>\s*)", prompt):
        ids += special[piece.strip()] if piece.strip() in special else model.encode(piece) if piece else []
    return ids


def test_ids_and_labels_equal_the_released(folder, tokenizer):
    ours = encode_dialogues([TALK], 1000, 1000, tokenizer, VICUNA, image_length=5, image_token_id=-200)
    assert ours.input_ids.tolist() == released_ids(folder, PROMPT, len(tokenizer) - 1, 5)
    answers = " ".join(tokenizer.decode(part, skip_special_tokens=True) for part in
                       np.split(ours.labels, np.flatnonzero(np.diff(ours.labels >= 0)) + 1) if part[0] >= 0)
    assert answers == "It is a red circle [100, 200, 300, 400]. There is no dog."
    assert (ours.labels == tokenizer.eos_token_id).sum() == 2
    assert ours.region_refs == [(0, 0), (0, 1), (0, 1)]


def test_question_is_the_start_of_the_conversation(tokenizer):
    whole = encode_dialogues([TALK], 1000, 1000, tokenizer, VICUNA, image_length=5)
    asked = encode_prompt(TALK, 1000, 1000, tokenizer, template=VICUNA, image_length=5)
    assert (asked.input_ids == whole.input_ids[:len(asked.input_ids)]).all()
    assert (whole.labels[len(asked.input_ids):] >= 0).all()


def test_pieces_equal_sentencepiece(folder, tokenizer):
    model, rng = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), np.random.default_rng(0)
    parts = [*"0123456789[],. ?", " the ", "region", "</s>", "<s>", "<region_fea>", "é", "\n"]
    for _ in range(500):
        text = "a" + "".join(rng.choice(parts, size=rng.integers(0, 25)))  # transformers adds no second space in front
        assert piece_ids(tokenizer, text) == model.encode(text), text


def test_special_tokens_in_texts_are_plain(tokenizer):
    spelled = Dialogue([Turn("user", "Is <image></s><s> <region_fea> it [region0:feature]?"),
                        Turn("assistant", "No</s> <region_fea>.")], [Point(5, 6)])
    ours = encode_dialogues([spelled], 1000, 1000, tokenizer, TINY, image_length=3)
    counts = [(ours.input_ids == i).sum() for i in (1, 2, len(tokenizer) - 1, len(tokenizer))]
    assert counts == [1, 1, 1, 3]
    assert ours.input_ids.max() == len(tokenizer)
