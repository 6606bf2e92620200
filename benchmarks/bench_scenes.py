"""Scenes per second on one core: `make_scene` against the two ways one would write it first.

    python benchmarks/bench_scenes.py [scenes]

- loop: every pixel asks in Python which object covers it. Same scenes, checked to be equal to the byte.
- plain: NumPy, but the geometry of every object is computed anew on the whole image in float64, boolean masks paint
  three channels, and 12,288 normal numbers are drawn per scene. Same layouts, other pixels at the edges.
"""
import os, platform, sys, time
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
from ferret_lite import scenes
from ferret_lite.scenes import COLORS, SIZE, SPLITS, make_scene, stamp_mask


def start(index):
    "The generator and the layout of a scene, as `make_scene` draws them."
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0, spawn_key=(SPLITS["train"], index))))
    chance = rng.random()
    return rng, scenes._layout(rng, "same_box" if chance < 1 / 8 else "nested" if chance < 1 / 4 else "plain")


def scene_loop(index):
    "Image of one scene, pixel by pixel."
    rng, stamps = start(index)
    palette, gx, gy, noise = scenes._draw_look(rng, stamps)
    masks = [stamp_mask(s.shape, s.width, s.flip, s.interlocked) for s in stamps]
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for y in range(SIZE):
        for x in range(SIZE):
            top = 0
            for i, (s, mask) in enumerate(zip(stamps, masks)):
                if 0 <= x - s.x < s.width and 0 <= y - s.y < s.width and mask[y - s.y, x - s.x]: top = i + 1
            light = 0 if top else int(gx[x]) + int(gy[y])
            for c in range(3): image[y, x, c] = min(max(int(palette[top, c]) + light + int(noise[y, x, c]), 0), 255)
    return image


def inside_plain(stamp, u, v):
    "Boolean image of one stamp; `u`, `v` run from -1 to 1 over its square."
    if stamp.flip & 1: u = -u
    if stamp.flip & 2: v = -v
    square, d = (abs(u) < 1) & (abs(v) < 1), u * u + v * v
    return square & dict(disc=d < 1, square=square, triangle=abs(u) < (v + 1) / 2, ring=(d < 1) & (d > .44),
                         cross=(abs(u) < 1 / 3) | (abs(v) < 1 / 3), wedge=v > u, L=(u < -.4) | (v > .4))[stamp.shape]


def scene_plain(index):
    "Image and boxes of one scene, on whole-image grids."
    rng, stamps = start(index)
    y, x = np.mgrid[:SIZE, :SIZE] + .5
    image = rng.uniform(30, 200) + rng.uniform(-25, 25, 3) + np.zeros((SIZE, SIZE, 3))
    image += ((x / 32 - 1) * rng.uniform(-25, 25) + (y / 32 - 1) * rng.uniform(-25, 25))[..., None]
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for i, s in enumerate(stamps):
        r = s.width / 2
        mask = inside_plain(s, (x - s.x - r) / r, (y - s.y - r) / r)
        image[mask] = np.array(COLORS[s.color]) * rng.uniform(.8, 1.08) + rng.uniform(-12, 12, 3)
        labels[mask] = i + 1
    boxes = []
    for i in range(len(stamps)):
        ys, xs = np.nonzero(labels == i + 1)
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8), boxes


def per_second(f, count, repeats=3):
    "Best rate of `repeats` runs over scenes 0 to `count` - 1."
    f(0)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for i in range(count): f(i)
        times.append(time.perf_counter() - begin)
    return count / min(times)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    for i in range(5): assert (scene_loop(i) == make_scene(0, i).image).all()
    rates = {"make_scene": per_second(lambda i: make_scene(0, i), count),
             "plain": per_second(scene_plain, max(count // 10, 1)),
             "loop": per_second(scene_loop, max(count // 100, 1))}
    print(f"scenes: {SIZE} x {SIZE} RGB, 2 to 5 objects, boxes and label map; {count} scenes, best of 3, one core")
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{'':12}{'scenes/s':>10}{'us/scene':>10}{'make_scene is':>20}")
    for name, rate in rates.items():
        ratio = f"{rates['make_scene'] / rate:.1f} x as fast"
        print(f"{name:12}{rate:>10,.0f}{1e6 / rate:>10,.0f}{'' if name == 'make_scene' else ratio:>20}")


if __name__ == "__main__": main()
