"""How fast a GRIT is built and read, and how much memory it takes, on generated annotation files.

    python benchmarks/bench_grit.py                        # 20,000 and 60,000 records
    python benchmarks/bench_grit.py --records 1100000      # the paper's size
"""
import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

NAMES = [f"{color} {thing}" for color in "red blue green black white".split() for thing in
         "car dog cat person chair table cup bottle bicycle horse sheep boat train bird clock vase".split()]


def write_coco(path, images, seed=0):
    """Eight boxes an image, half of them with a polygon, written row by row."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        categories = json.dumps([{"id": i, "name": n} for i, n in enumerate(NAMES)])
        file.write(f'{{"categories": {categories}, "images": [')
        for i in range(images):
            row = {"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480}
            file.write(", " * (i > 0) + json.dumps(row))
        file.write('], "annotations": [')
        for i in range(images):
            boxes = (rng.random((8, 4)) * (400, 300, 200, 150) + (0, 0, 20, 20)).round(2).tolist()
            for j, (x, y, w, h) in enumerate(boxes):
                row = {"id": 8 * i + j, "image_id": i, "category_id": int(rng.integers(len(NAMES))),
                       "bbox": [x, y, w, h], "iscrowd": 0}
                if j % 2: row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                file.write(", " * (i + j > 0) + json.dumps(row))
        file.write("]}")


def build_one(records, folder, results):
    """In a process of its own, so that its peak of memory is its own."""
    from ferret_lite.grit import build
    from ferret_lite.mix import GritConfig, Part
    coco = Path(folder) / "instances.json"
    write_coco(coco, records)
    tasks = {"object": 1.0, "detect": 1.0, "negative_image": 0.5}
    part = Part("objects", "coco", {"path": str(coco), "images": None}, tasks=tasks)
    start = time.perf_counter()
    index = build(GritConfig(str(Path(folder) / "grit"), [part]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put((index["records"], seconds, peak, coco.stat().st_size, [s["bytes"] for s in index["shards"]]))


def read_one(folder, worker, results):
    """Records a second of one reader, in order and by number."""
    from ferret_lite.shards import GritShards
    shards = GritShards(Path(folder) / "grit")
    numbers = np.random.default_rng(worker).permutation(len(shards))[:3000].tolist()
    start = time.perf_counter()
    for i in numbers: shards[i]
    results.put(len(numbers) / (time.perf_counter() - start))


def in_process(function, *arguments):
    results = multiprocessing.Queue()
    process = multiprocessing.Process(target=function, args=(*arguments, results))
    process.start()
    answer = results.get()
    process.join()
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--folder", help="where the files go; default: a folder that is removed at the end")
    args = parser.parse_args()
    print(f"{'records':>10} {'rec/s':>8} {'peak MiB':>9} {'json MB':>8} {'shards':>7} {'MB each':>8} "
          f"{'read rec/s':>11}")
    for records in args.records:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            made, seconds, peak, size, shards = in_process(build_one, records, folder)
            speed = in_process(read_one, folder, 0)
        print(f"{made:10,} {made / seconds:8.0f} {peak:9.0f} {size / 1e6:8.1f} {len(shards):7} "
              f"{np.mean(shards) / 1e6:8.1f} {speed:11.0f}", flush=True)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
