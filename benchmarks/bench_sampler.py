"""The sampler against the direct form of Eq. 1 with one copy of the feature map per region: time, memory, equality.

    python benchmarks/bench_sampler.py [--rounds 3] [--cpu]

Every measurement runs in a child process of its own. Nothing is asserted: read the ratios. Both forms keep the same
points and neighbours and the same last two layers. The map asks for its gradient, as when the encoder is trained."""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from einops import rearrange, repeat
from ferret_lite.points import bilinear_features, fps, gather_points, knn
from ferret_lite.sampler import RegionSampler, SamplerBlock

SIZES = {  # regions, feature map side, images, channels, points, channels of the language model
    "paper": dict(regions=8, side=24, images=1, dim=1024, num_points=(512, 128, 32), dim_out=4096),
    "tiny": dict(regions=22, side=8, images=1, dim=128, num_points=(128, 32, 8), dim_out=128),
}


class DirectBlock(SamplerBlock):
    "Eq. 1 and 2 as printed: theta and sigma see every neighbour of every anchor."
    def forward(self, features, points):
        anchors = fps(points, self.num_points)  # (r, m)
        kept = gather_points(points, anchors)  # (r, m, 2)
        neighbours = knn(kept, points, min(self.k, points.shape[1]))  # (r, m, k)
        z = torch.cat([features, points], dim=-1)  # (r, n, d+2)
        z_i = gather_points(z, anchors)[:, :, None]  # (r, m, 1, d+2)
        difference = self.theta(gather_points(z, neighbours) - z_i)  # (r, m, k, d+2)
        h = self.sigma(torch.cat([difference, z_i.expand_as(difference)], dim=-1))  # (r, m, k, d)
        return h.amax(dim=2), kept


def make(size, form):
    "A sampler, a feature map and points; the same numbers for both forms."
    torch.manual_seed(0)
    sampler = RegionSampler(size["dim"], size["dim_out"], size["num_points"])
    feature_map = torch.randn(size["images"], size["dim"], size["side"], size["side"], requires_grad=True)
    points = torch.rand(size["images"], size["regions"], size["num_points"][0], 2)
    if form == "direct":
        for block in sampler.blocks: block.__class__ = DirectBlock
    return sampler, feature_map, points


def region_vectors(sampler, feature_map, points, form):
    "The whole way from the feature map to the language model's vectors, `(b * r, dim_out)`."
    if form == "direct":  # every region reads a copy of its image's map, as the release does
        copies = repeat(feature_map, "b d h w -> (b r) d h w", r=points.shape[1])
        features = bilinear_features(copies, rearrange(points, "b r n xy -> (b r) 1 n xy"))
    else:
        features = bilinear_features(feature_map, points)
    return sampler(features.flatten(0, 1), points.flatten(0, 1))


def step(form, backward, sampler, feature_map, points):
    "One pass. Gradients start as None, so that their memory is part of the measurement."
    with torch.set_grad_enabled(backward):
        out = region_vectors(sampler, feature_map, points, form)
        if backward: out.square().sum().backward()
    return out


def clear(sampler, feature_map):
    sampler.zero_grad(set_to_none=True)
    feature_map.grad = None


def measure_time(size, form, backward, repeats):
    "Milliseconds of each pass, after two to warm up."
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    parts, times = make(size, form), []
    for _ in range(repeats + 2):
        clear(*parts[:2])
        start = clock()
        step(form, backward, *parts)
        times.append(1e3 * (clock() - start))
    return times[2:]


def measure_memory(size, form, backward, repeats):
    "MiB by which one pass raises the peak of this process; weights and inputs are there before."
    unit = 1024 ** 2 if sys.platform == "darwin" else 1024
    step(form, backward, *make(SIZES["tiny"], form))  # load libraries and start threads before the count
    parts = make(size, form)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(form, backward, *parts)
    return [(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit]


def measure_difference(size, form, backward, repeats):
    """Vectors: largest difference of the two forms over the largest value. Gradients: for each form, the norm of its
    difference from the direct form in float64, over that norm, for the worst parameter."""
    def run(form, dtype):
        sampler, feature_map, points = make(size, form)
        feature_map = feature_map.detach().to(dtype).requires_grad_()
        out = step(form, True, sampler.to(dtype), feature_map, points.to(dtype))
        return out.detach(), [feature_map.grad, *(p.grad for p in sampler.parameters())]

    _, exact = run("direct", torch.float64)
    runs = [run(form, torch.float32) for form in ("direct", "factored")]
    worst = [max(((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact)) for _, grads in runs]
    return [((runs[1][0] - runs[0][0]).abs().max() / runs[0][0].abs().max()).item(), *worst]


MEASURES = dict(time=measure_time, memory=measure_memory, difference=measure_difference)


def child(what, size, threads, form="factored", backward=False, repeats=1):
    "One measurement in a fresh process."
    job = json.dumps(dict(what=what, size=size, threads=threads, form=form, backward=backward, repeats=repeats))
    out = subprocess.run([sys.executable, __file__, "--job", job], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_job(what, size, threads, form, backward, repeats):
    torch.set_num_threads(threads)
    print(json.dumps(MEASURES[what](SIZES[size], form, backward, repeats)))


def compare(name, threads, backward, rounds):
    "A line of times, the best of all rounds: the two forms by turns, so that a busy machine disturbs both."
    repeats, forms = (2 if name == "paper" else 20), ("direct", "factored")
    times = {form: [] for form in forms}
    for _ in range(rounds):
        for form in forms: times[form] += child("time", name, threads, form, backward, repeats)
    best = [min(times[form]) for form in forms]
    middle = [statistics.median(times[form]) for form in forms]
    print(f"  {'forward + backward' if backward else 'forward':<19}"
          f"direct {best[0]:8.1f} ms   factored {best[1]:7.1f} ms   ratio {best[0] / best[1]:5.1f}"
          f"   (medians {middle[0]:.1f}, {middle[1]:.1f}: {middle[0] / middle[1]:.1f})", flush=True)


def main(rounds, threads):
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {threads} thread(s) on "
          f"{os.cpu_count()} cores, float32; {'wall' if threads > 1 else 'CPU'} time, best of {rounds} rounds")
    for name, size in SIZES.items():
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in size.items()) + ", k 24")
        for backward in (False, True): compare(name, threads, backward, rounds)
        for backward in (False, True):
            mib = [child("memory", name, threads, form, backward)[0] for form in ("direct", "factored")]
            print(f"  peak of a {'forward + backward' if backward else 'forward'} pass: direct {mib[0]:.0f} MiB, "
                  f"factored {mib[1]:.0f} MiB, {mib[1] / max(mib[0], 1e-9):.2f} of it", flush=True)
        vectors, direct, factored = child("difference", name, threads)
        print(f"  vectors: relative difference {vectors:.1e}. Worst gradient against float64: direct {direct:.1e}, "
              f"factored {factored:.1e} (near ties of the maximum)", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread: right on a busy machine, too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_job(**json.loads(args.job)) if args.job else main(args.rounds, 1 if args.cpu else 2)
