"""Memory and time of `ferret-lite convert` on a checkpoint in Apple's format with the 7B's widths, in bfloat16.

    python benchmarks/bench_convert.py                # two of its 32 layers: 2 GB, twice
    python benchmarks/bench_convert.py --layers 32    # all of it: 14 GB, twice; needs 30 GB of disk
    python benchmarks/bench_convert.py --layers 32 --delta

The numbers are random and written file by file, so that this script itself stays small. The conversion is a process of
its own, and its peak is the largest resident set that the system saw; so is opening the result (with --load)."""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from ferret_lite.clip import CLIP_LARGE
from ferret_lite.model import FerretForConditionalGeneration
from ferret_lite.official import build_config, official_name
from ferret_lite.weights import split_shards, write_index

SMALL = Path(__file__).resolve().parent.parent / "tests" / "golden" / "official_a"  # a tokenizer, far from LLaMA's size
TOWER = "openai/clip-vit-large-patch14-336"  # its settings are known without a file


def make_shapes(layers):
    "Config and shapes by their released keys."
    settings = json.loads((SMALL / "config.json").read_text())
    settings |= dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
                     num_key_value_heads=32, vocab_size=32001, max_position_embeddings=2048, mm_hidden_size=1024,
                     mm_vision_tower=TOWER, torch_dtype="bfloat16")
    with torch.device("meta"):
        model = FerretForConditionalGeneration(build_config(settings, CLIPVisionConfig(**CLIP_LARGE, image_size=336)))
    shapes = {official_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return settings, {key: (*shape, 1) if key.endswith("net.0.weight") else shape for key, shape in shapes.items()}


def write(folder, settings, shapes, block):
    "A folder in Apple's format. The numbers repeat: there are not so many random ones in `block`."
    folder.mkdir()
    for path in SMALL.glob("*token*"): shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(settings))
    sizes = {key: 2 * torch.Size(shape).numel() for key, shape in shapes.items()}
    shards = split_shards(sizes, "pytorch_model{}.bin")
    for file, keys in shards.items():
        tensors = {}
        for key in keys:
            flat = tensors.setdefault(key, torch.empty(shapes[key], dtype=torch.bfloat16)).view(-1)
            for start in range(0, len(flat), len(block)): flat[start:start + len(block)] = block[:len(flat) - start]
        torch.save(tensors, folder / file)
    write_index(folder / "pytorch_model.bin.index.json", shards, sum(sizes.values()))
    return sum(sizes.values()), len(shards)


CONVERT = "from ferret_lite.cli import main; main()"
LOAD = "import sys; from ferret_lite.official import load; load(sys.argv[1])"
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def measure(code, words, size):
    "Run code in a process of its own; what it took, in words."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + PEAK, *words], check=True, stdout=subprocess.PIPE, text=True)
    peak = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    return f"peak {peak / 1e9:.2f} GB, {peak / size:.2f} of one copy; {time.perf_counter() - start:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the language model; the 7B has 32")
    parser.add_argument("--delta", action="store_true", help="a base and a delta on it, instead of a whole checkpoint")
    parser.add_argument("--load", action="store_true", help="open the converted folder as well")
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    args = parser.parse_args()
    settings, shapes = make_shapes(args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        root, block = Path(root), torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()
        size, files = write(root / "ferret", settings, shapes, 0.02 * block)
        print(f"{args.layers} layers: {size / 1e9:.2f} GB in {files} files")
        command = ["convert", "--out", str(root / "ours"), "--official", str(root / "ferret")]
        if args.delta:
            known = settings["im_region_fea_token"]  # of the small tokenizer
            base = {key: (known, *shape[1:]) if shape[0] == 32001 else shape for key, shape in shapes.items()
                    if key.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))}
            write(root / "vicuna", settings, base, 0.01 * block)
            command = [*command[:3], "--base", str(root / "vicuna"), "--delta", str(root / "ferret")]
        print(f"convert: {measure(CONVERT, command, size)}", flush=True)
        if args.load: print(f"load: {measure(LOAD, [str(root / 'ours')], size)}")


if __name__ == "__main__": main()
