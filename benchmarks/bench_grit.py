"""How fast a GRIT is built and read, and how much memory it takes, on generated annotation files.

    python benchmarks/bench_grit.py                                # 20,000 and 60,000 records
    python benchmarks/bench_grit.py --kill                         # each build is killed (-9) on its way, and goes on
    python benchmarks/bench_grit.py --records 1100000 --kill --check_ids --folder DIR   # the paper's size, 5 GB of disk

Each image comes four times, with other questions: a record is one image with one dialogue, or a pair of yes and no.
With `--out FILE` the rows are also added to a JSON list, as in `benchmarks/bench_grit.json`, which the chapter shows.
CPU seconds are those of the build alone, a killed part included; wall seconds depend on what else the machine does."""
import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import tarfile
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


COPIES = 4  # of each image: 1.1 million records are 275,000 images with 2.2 million boxes


def config(folder):
    from ferret_lite.mix import GritConfig, Part
    tasks = {"object": 1.0, "detect": 1.0, "negative_image": 0.5}
    files = {"path": str(folder / "instances.json"), "images": None}
    return GritConfig(str(folder / "grit"), [Part("objects", "coco", files, COPIES, tasks, dialogues=1)])


def build_one(folder, results):
    """In a process of its own, so that its peak of memory is its own."""
    from ferret_lite.grit import build
    index = build(config(folder))
    results.put((index, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def read_one(folder, worker, results):
    """Records that one reader reads in a CPU second, by number in a drawn order."""
    from ferret_lite.shards import GritShards
    shards = GritShards(folder / "grit")
    numbers = np.random.default_rng(worker).permutation(len(shards))[:3000].tolist()
    for i in numbers[:300]: shards[i]
    start = time.process_time()
    for i in numbers: shards[i]
    results.put(len(numbers) / (time.process_time() - start))


def start(function, *arguments):
    results = multiprocessing.Queue()
    process = multiprocessing.Process(target=function, args=(*arguments, results))
    process.start()
    return process, results


def together(function, folder, workers):
    """The answers of some processes at once."""
    running = [start(function, folder, worker) for worker in range(workers)]
    return [(results.get(), process.join())[0] for process, results in running]


def seconds_of(pid):
    """CPU seconds of a process that is still running."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def build_and_kill(folder, pieces):
    """Start a build, kill it with SIGKILL when it has so many pieces; its CPU seconds."""
    process, _ = start(build_one, folder)
    while len(list((folder / "grit" / "pieces").glob("*.piece"))) < pieces:
        if not process.is_alive(): raise RuntimeError("the build ended before it could be killed")
        time.sleep(0.05)
    seconds = seconds_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return seconds


def digest(folder):
    "One hash of all shards."
    total = hashlib.sha1()
    for path in sorted((folder / "grit").glob("*.tar")):
        with open(path, "rb") as file: total.update(hashlib.file_digest(file, "sha1").digest())
    return total.hexdigest()[:12]


def count_ids(folder):
    "How many different records the shards hold, and how many in all; without the library's own reader."
    seen, total = set(), 0
    for path in sorted((folder / "grit").glob("*.tar")):
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                name = re.search(rb'"id": ?"([^"]+)"', tar.extractfile(member).read())[1]
                seen.add(hashlib.blake2b(name, digest_size=8).digest())
                total += 1
    return len(seen), total


def bench(records, folder, kill, check_ids):
    """One row of the table."""
    write_coco(folder / "instances.json", records // COPIES)
    begin, before = time.perf_counter(), 0.0
    if kill: before = build_and_kill(folder, max(records // COPIES // 2000 // 3, 1))
    process, results = start(build_one, folder)
    index, seconds, peak = results.get()
    process.join()
    wall, seconds, made = time.perf_counter() - begin, seconds + before, index["records"]
    one, two = together(read_one, folder, 1), together(read_one, folder, 2)
    sizes = [shard["bytes"] for shard in index["shards"]]
    told = {"records": f"{made:,}", "killed": f"after {before:.0f} s" if kill else "no", "CPU s": f"{seconds:.0f}",
            "wall s": f"{wall:.0f}", "rec / CPU s": f"{made / seconds:.0f}", "peak MiB": f"{peak:.0f}",
            "json MB": f"{(folder / 'instances.json').stat().st_size / 1e6:.0f}",
            "shards": f"{len(sizes)} x {np.mean(sizes) / 1e6:.1f} MB", "read / CPU s, 1 worker": f"{one[0]:.0f}",
            "each of 2": " ".join(f"{speed:.0f}" for speed in two), "sha1": digest(folder)}
    if check_ids: told["different ids"] = "{:,} of {:,}".format(*count_ids(folder))
    if made + index["counts"].get("nothing to ask", 0) != records // COPIES * COPIES:
        raise RuntimeError(f"{records} records were asked for, {made} are there")
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--kill", action="store_true", help="kill each build (-9) after a third, and let it go on")
    parser.add_argument("--check_ids", action="store_true", help="read all shards: does each record come once?")
    parser.add_argument("--folder", help="where the files go; default: a folder that is removed at the end")
    parser.add_argument("--out", type=Path, help="JSON file that the rows are added to")
    args = parser.parse_args()
    import webdataset
    versions = f"numpy {np.__version__}, webdataset {webdataset.__version__}"
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores", flush=True)
    for n, records in enumerate(args.records):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            told = bench(records, Path(folder), args.kill, args.check_ids)
        if not n: print(f"| {' | '.join(told)} |\n|{' ---: |' * len(told)}", flush=True)
        print(f"| {' | '.join(told.values())} |", flush=True)
        if args.out:
            rows = json.loads(args.out.read_text()) if args.out.is_file() else []
            args.out.write_text(json.dumps([*rows, told], indent=1) + "\n")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
