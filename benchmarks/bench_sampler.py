"""The sampler against the direct form of Eq. 1 with one copy of the feature map per region: time, memory, equality.

    python benchmarks/bench_sampler.py

Every measurement runs in a child process of its own. Nothing is asserted: read the ratios."""
import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from ferret_lite.points import bilinear_features, fps, gather_points, knn
from ferret_lite.sampler import RegionSampler, SamplerBlock
from einops import rearrange, repeat

THREADS = 2
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
    "Milliseconds of each pass, after one to warm up."
    parts, times = make(size, form), []
    for _ in range(repeats + 1):
        clear(*parts[:2])
        start = time.perf_counter()
        step(form, backward, *parts)
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


def measure_memory(size, form, backward, repeats):
    "MiB by which one pass raises the peak of this process, inputs and weights not counted."
    step(form, backward, *make(SIZES["tiny"], form))  # load libraries and start threads before the count
    parts = make(size, form)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    before = peak()
    step(form, backward, *parts)
    return [(peak() - before) / (1024 ** 2 if sys.platform == "darwin" else 1024)]


def child(what, size, form, backward, repeats=1):
    "Run one measurement in a fresh process."
    job = json.dumps(dict(what=what, size=size, form=form, backward=backward, repeats=repeats))
    out = subprocess.run([sys.executable, __file__, "--job", job], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_job(job):
    measure = dict(time=measure_time, memory=measure_memory)[job["what"]]
    print(json.dumps(measure(SIZES[job["size"]], job["form"], job["backward"], job["repeats"])))
