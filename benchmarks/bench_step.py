"""A training step of the tiny Ferret, less its encoder's share, against a step of the bare LLaMA inside it.

    python benchmarks/bench_step.py [--repeats 20] [--no-compile]

- Ferret: `FerretModule.training_step` on a batch of `FerretDataModule`, backward, AdamW. Its encoder's share, forward and
  backward of the encoder alone, is measured apart and taken off.
- LLaMA: a copy of the language model on the same embeddings (which want their gradient), mask, positions and labels:
  `LlamaForCausalLM.forward`, backward, AdamW.

The measurements take turns, so that a busy machine disturbs all alike; medians are compared. Nothing is asserted."""
import argparse
import copy
import os
import platform
import statistics
import time

import torch
import transformers

from ferret_lite.data import FerretDataModule, Stage
from ferret_lite.model import packed_attention_mask, scatter_features
from ferret_lite.training import FerretModule, compile_blocks, label_weights

THREADS, BATCH, LENGTH = 2, 8, 288
VISION = dict(model_type="ferret_lite_vision")  # its defaults: width 128, 3 layers, 8 x 8 patches
TEXT = dict(model_type="llama", hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512)
FERRET = dict(vision_feature_layer=-1, vision_feature_select_strategy="full", region_feature_layers=[0, -1],
              region_feature_dim=192, sampler_num_points=[128, 32, 8])


def make():
    "The module that trains, its batch, and a copy of its language model."
    torch.manual_seed(0)
    data = FerretDataModule([Stage(10, BATCH)], max_length=LENGTH, num_workers=0)
    module = FerretModule(data.processor, vision=VISION, text=TEXT, ferret=FERRET, stages=data.stages, words=data.words)
    module.log = lambda *args, **kwargs: None  # there is no trainer
    return module, next(iter(data.train_dataloader())), copy.deepcopy(module.model.language_model)


def optimizer_of(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)


def make_steps(module, batch, llama):
    "Name -> function without arguments: the three things that are compared."
    model, optimizers = module.model, {m: optimizer_of(m) for m in (module, llama)}
    with torch.no_grad():
        vision = model.get_vision_maps(batch["pixel_values"])
        embeds = model.embed_inputs(batch["input_ids"], vision, batch["region_points"], batch["region_mask"])
        gradients = [torch.randn_like(x) for x in (vision[0], *vision[1])]
    mask = packed_attention_mask(batch["dialogue_ids"])

    def learn(m, loss):
        optimizers[m].zero_grad()
        loss.backward()
        optimizers[m].step()

    def encoder():
        features, maps = model.get_vision_maps(batch["pixel_values"])
        torch.autograd.backward([features, *maps], gradients)

    def bare():
        learn(llama, llama(inputs_embeds=embeds.detach().requires_grad_(), attention_mask=mask, use_cache=False,
                           position_ids=batch["position_ids"], labels=batch["labels"]).loss)

    return {"ferret": lambda: learn(module, module.training_step(batch, 0)), "encoder": encoder, "llama": bare}


def make_parts(module, batch):
    "Name -> function: what Ferret does beside its encoder and its LLaMA, each forward and backward."
    model, dense = module.model, {k.removeprefix("dense_"): v for k, v in batch.items() if k.startswith("dense_")}
    with torch.no_grad(): features, maps = model.get_vision_maps(batch["pixel_values"])
    leaf = lambda x: x.detach().requires_grad_()
    regions = model.get_region_features(maps, batch["region_points"], batch["region_mask"]).detach()
    ids, config = batch["input_ids"], model.config
    is_image = ids == config.image_token_id

    def sampler():
        model.get_region_features([leaf(m) for m in maps], batch["region_points"], batch["region_mask"]).sum().backward()

    def splice():
        words = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        words = scatter_features(words, is_image, model.mm_projector(leaf(features)).flatten(0, 1), "image")
        scatter_features(words, ids == config.region_token_id, leaf(regions), "region").sum().backward()

    return {"region sampler": sampler, "embed, project, splice": splice,
            "packed mask": lambda: packed_attention_mask(batch["dialogue_ids"]),
            "weights of the labels": lambda: label_weights(batch["labels"], module.token_weights),
            "dense head": lambda: module.dense_head(leaf(features), **dense).backward()}


def medians(functions, repeats):
    "Name -> median milliseconds; the functions take turns, two rounds warm up."
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def report(title, functions, repeats):
    t = medians(functions, repeats)
    print(f"{title}: a step of Ferret {t['ferret']:.1f} ms, its encoder {t['encoder']:.1f} ms, LLaMA {t['llama']:.1f} ms; "
          f"({t['ferret']:.1f} - {t['encoder']:.1f}) / {t['llama']:.1f} = "
          f"{(t['ferret'] - t['encoder']) / t['llama']:.2f} (goal: at most 1.25)", flush=True)


def main(repeats, compiled):
    torch.set_num_threads(THREADS)
    module, batch, llama = make()
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{platform.machine()}, {THREADS} threads of {os.cpu_count()} cores, float32. Medians of {repeats} rounds.")
    print(f"{count(module.model):.2f}M parameters, {count(llama):.2f}M of them LLaMA's; batch of {BATCH} images, {LENGTH} "
          f"positions, {int(batch['region_mask'].sum())} regions, {int((batch['labels'] >= 0).sum())} labels")
    report("eager", make_steps(module, batch, llama), repeats)
    for name, ms in medians(make_parts(module, batch), repeats).items(): print(f"    {name:<24}{ms:6.1f} ms")
    if not compiled: return
    if not compile_blocks(module.model): return print("no C compiler: no compiled blocks")
    for block in llama.base_model.layers: block.compile(dynamic=False)
    report("compiled blocks", make_steps(module, batch, llama), repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    main(args.repeats, not args.no_compile)
