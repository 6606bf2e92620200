"""Answers per second: questions in batches of 16 against one by one.

    python benchmarks/bench_generate.py [--questions 96] [--model DIR]

The questions are held-out ones of the embedded world: where something is, what a box, point or free form is, whether
there is something. Everything counts, from image and question to the text. Random weights (the default) write exactly
24 tokens an answer, about what an answer with a box needs; a trained model (`--model`) stops where it wants to. The two
ways take turns and medians are printed. Nothing is asserted."""
import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
import yaml

from ferret_lite.data import FerretDataModule, SceneExamples, make_questions
from ferret_lite.model import FerretForConditionalGeneration, answer
from ferret_lite.processor import FerretProcessor
from ferret_lite.build import build_model

THREADS, BATCH, TOKENS = 2, 16, 24
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
TASKS = ("locate", "refer_box", "refer_point", "refer_free_form", "exists")


def make_model():
    "Processor and model of configs/tiny.yaml, with random weights."
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    processor = FerretDataModule(**config["data"]).processor
    model = build_model(processor, *(config["model"][name] for name in ("vision", "text")), **config["model"]["ferret"])
    return processor, model.eval()


def load_model(folder):
    "Processor and model that training saved."
    return FerretProcessor.from_pretrained(folder), FerretForConditionalGeneration.from_pretrained(folder)


def ask(processor, model, questions, size, settings):
    "All answers in batches of `size`; seconds, and the processor's share of them."
    start, processing, answers = time.perf_counter(), 0.0, []
    for i in range(0, len(questions), size):
        begin, part = time.perf_counter(), questions[i:i + size]
        inputs = processor([q.example.image for q in part], [q.dialogue for q in part])
        processing += time.perf_counter() - begin
        answers += answer(model, processor, inputs, **settings)
    return answers, time.perf_counter() - start, processing


def main(num_questions, folder, rounds):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    processor, model = load_model(folder) if folder else make_model()
    settings = dict(max_new_tokens=64) if folder else dict(min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    examples = SceneExamples("test", num_questions)
    per_task = -(-num_questions // len(TASKS))
    questions = [q for task in TASKS for q in make_questions(examples, task, per_task)][:num_questions]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{platform.machine()}, {THREADS} threads of {os.cpu_count()} cores, float32. Medians of {rounds} rounds.")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(questions)} questions, "
          f"{'answers as long as the model wants' if folder else f'{TOKENS} tokens an answer'}")
    for size in (1, BATCH): ask(processor, model, questions[:size], size, settings)  # warm up
    runs = {size: [] for size in (1, BATCH)}
    for _ in range(rounds):
        for size in runs: runs[size].append(ask(processor, model, questions, size, settings))
    rates = {}
    for size, done in runs.items():
        seconds = statistics.median(s for _, s, _ in done)
        rates[size] = len(questions) / seconds
        share = statistics.median(p / s for _, s, p in done)
        print(f"  batches of {size:2}: {rates[size]:7.1f} answers/s ({share:.0%} of the time in the processor)")
    print(f"  ratio {rates[BATCH] / rates[1]:.1f} (goal: at least 4)")
    same = sum(a == b for a, b in zip(*(done[0][0] for done in runs.values())))
    print(f"  {same} of {len(questions)} answers are the same text both ways")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a folder that training saved")
    args = parser.parse_args()
    main(args.questions, args.model, args.rounds)
