"""A training step of the tiny Ferret, less its encoder's share, against a step of the bare LLaMA inside it.

    python benchmarks/bench_step.py [--rounds 20] [--no-compile]

- Ferret: `FerretModule.training_step` with the sizes of configs/tiny.yaml on batches of `FerretDataModule`, backward,
  AdamW. Its encoder's share, forward and backward of the encoder alone, is measured apart and taken off.
- LLaMA: a copy of the language model on the same embeddings (which want their gradient), mask, positions and labels:
  `LlamaForCausalLM.forward`, backward, AdamW.

The measurements take turns, so that a busy machine disturbs all alike; medians are compared. Nothing is asserted."""
import argparse
import copy
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
import yaml

from ferret_lite.data import FerretDataModule, Stage
from ferret_lite.model import packed_attention_mask, scatter_features
from ferret_lite.training import FerretModule, compile_blocks

THREADS, BATCHES = 2, 8
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"


def make():
    "The module that trains, some of its batches, and a copy of its language model."
    torch.manual_seed(0)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    size = config["data"]["stages"][-1]["batch_size"]
    data = FerretDataModule(**{**config["data"], "stages": [Stage(BATCHES, size)], "num_workers": 0})
    module = FerretModule(data.processor, stages=data.stages, words=data.words, **{**config["model"], "compile": False})
    module.log = lambda *args, **kwargs: None  # there is no trainer
    return module, list(data.train_dataloader()), copy.deepcopy(module.model.language_model)


def make_steps(module, llama):
    "Name -> function of a batch and of what it needs ready: the three things that are compared."
    model = module.model
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (module, llama)}

    def learn(m, loss):
        optimizers[m].zero_grad()
        loss.backward()
        optimizers[m].step()

    def encoder(batch, ready):
        features, maps = model.get_vision_maps(batch["pixel_values"])
        torch.autograd.backward([features, *maps], ready["gradients"])

    def bare(batch, ready):
        learn(llama, llama(inputs_embeds=ready["embeds"].detach().requires_grad_(), attention_mask=ready["mask"],
                           position_ids=batch["position_ids"], labels=batch["labels"], use_cache=False).loss)

    def ferret(batch, ready): learn(module, module.training_step(batch, 0))

    return {"ferret": ferret, "encoder": encoder, "llama": bare}


@torch.no_grad()
def make_ready(model, batch):
    "What the encoder and the bare LLaMA are given."
    features, maps = model.get_vision_maps(batch["pixel_values"])
    regions = model.get_region_features(maps, batch["region_points"], batch["region_mask"])
    embeds = model.embed_inputs(batch["input_ids"], model.mm_projector(features), regions)
    return {"embeds": embeds, "mask": packed_attention_mask(batch["dialogue_ids"]), "features": features, "maps": maps,
            "gradients": [torch.randn_like(x) for x in (features, *maps)],
            "regions": regions}


def leaf(x): return x.detach().requires_grad_()


def make_parts(module):
    "Name -> function: what Ferret does beside its encoder and its LLaMA, each forward and backward."
    model = module.model

    def sampler(batch, ready):
        maps = [leaf(m) for m in ready["maps"]]
        model.get_region_features(maps, batch["region_points"], batch["region_mask"]).sum().backward()

    def splice(batch, ready):
        ids = batch["input_ids"]
        is_image, is_region = (ids == i for i in (model.config.image_token_id, model.config.region_token_id))
        embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        patches = model.mm_projector(leaf(ready["features"])).flatten(0, 1)
        embeds = scatter_features(embeds, is_image, patches, "image")
        scatter_features(embeds, is_region, leaf(ready["regions"]), "region").sum().backward()

    def dense(batch, ready):
        features = leaf(ready["features"])
        losses = module.dense_losses(batch, features, model.mm_projector(features), leaf(ready["regions"]))
        sum(losses.values()).backward()

    return {"region sampler": sampler, "embed, project, splice": splice, "dense head": dense,
            "packed mask": lambda batch, ready: packed_attention_mask(batch["dialogue_ids"])}


def medians(functions, batches, rounds):
    "Name -> median milliseconds; the functions take turns on one batch after another, two rounds warm up."
    times = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function(*batches[i % len(batches)])
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def report(title, functions, batches, rounds):
    t = medians(functions, batches, rounds)
    print(f"{title}: Ferret {t['ferret']:.1f} ms, its encoder {t['encoder']:.1f} ms, LLaMA {t['llama']:.1f} ms; "
          f"({t['ferret']:.1f} - {t['encoder']:.1f}) / {t['llama']:.1f} = "
          f"{(t['ferret'] - t['encoder']) / t['llama']:.2f} (goal: at most 1.25)", flush=True)


def main(rounds, compiled):
    torch.set_num_threads(THREADS)
    module, batches, llama = make()
    regions, labels = (statistics.mean(int(f(b)) for b in batches)
                       for f in (lambda b: b["region_mask"].sum(), lambda b: (b["labels"] >= 0).sum()))
    b, s = batches[0]["input_ids"].shape
    batches = [(batch, make_ready(module.model, batch)) for batch in batches]
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{platform.machine()}, {THREADS} threads of {os.cpu_count()} cores, float32. Medians of {rounds} rounds.")
    print(f"{count(module.model):.2f}M parameters, {count(llama):.2f}M of them LLaMA's; batches of {b} images, {s} "
          f"positions, {regions:.0f} regions and {labels:.0f} labels on average", flush=True)
    steps = make_steps(module, llama)
    report("eager", steps, batches, rounds)
    for name, ms in medians(make_parts(module), batches, rounds).items(): print(f"    {name:<24}{ms:6.1f} ms")
    if not compiled: return
    if not compile_blocks(module.model): return print("no C compiler: no compiled blocks")
    for block in llama.base_model.layers: block.compile(dynamic=False)
    report("compiled blocks", steps, batches, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    main(args.rounds, not args.no_compile)
