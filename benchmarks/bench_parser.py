"""Characters per second of the answer parser, up to 10 MB and at doubling sizes, against the usual one-liner.

    python benchmarks/bench_parser.py [megabytes]

- answers: what a trained model writes, a box every 35 characters or so.
- prose: words without a box. hostile: brackets, digits, commas and words at random.
- one-liner: one regular expression, "words, then four numbers". On answers it is fine; on prose it is quadratic, so it
  gets only small texts, and its time for the full size is continued from the last doubling.
- dialects: the notations of other models, a box every 60 characters or so, and pieces of each notation at random, at
  a tenth of the size.
A doubling should take twice as long: the column "x" is the ratio to the line before. One process, one core, processor
time. Python's garbage collector is off while the clock runs, as in `timeit`: it walks over all objects made so far,
again and again, which adds a share that grows with the number of phrases kept; one line says what it costs at the full
size.
"""
import gc, os, platform, random, re, sys, time
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import ferret_lite
from ferret_lite.dialects import DIALECTS
from ferret_lite.grounding import format_phrase, parse_answer

ONE_LINER = re.compile(r"([\w ]+)\s*\[(\d+), *(\d+), *(\d+), *(\d+)\]")


def one_liner(text):
    "(phrase, box) pairs."
    return [(words.strip(), tuple(map(int, box))) for words, *box in ONE_LINER.findall(text)]


def repeat_to(draw, size):
    "A text of `size` characters, from 20,000 drawn pieces, repeated."
    block = "".join(draw() for _ in range(20_000))
    return (block * (size // len(block) + 1))[:size]


def texts(size, rng=random.Random(0)):
    "name -> text"
    words = "red green blue disc ring wedge a the man dog runs near under table and is with".split()
    def box():
        x, y = sorted(rng.sample(range(1000), 2)), sorted(rng.sample(range(1000), 2))
        return f"[{x[0]}, {y[0]}, {x[1]}, {y[1]}]"
    def answer(): return f"There is a {rng.choice(words)} {rng.choice(words)} {box()} and an L {box()}. "
    noise = ["[", "]", ", ", "1", "999", "a ", "[1, 2, 3, 4]", "[[1, 2", ";", " "]
    return {"answers": repeat_to(answer, size),
            "prose": repeat_to(lambda: rng.choice(words) + " ", size),
            "hostile": repeat_to(lambda: rng.choice(noise), size)}


HOSTILE = {"ferret": ["[", "]", ", ", "1", "[1, 2,", "a "], "shikra": ["[", "]", ";", ".5", "[0.1,", "a "],
           "kosmos2": ["<phrase>", "</phrase>", "<object>", "</object>", "<patch_index_0044>", "a "],
           "qwen": ["{", "}", '"', "\\", '"bbox_2d": [', "1, 2", "]", '"label": "', "a "]}


def dialect_texts(name, size, rng=random.Random(0)):
    "What a model of this family writes; noise of its notation."
    def box():
        x, y = (sorted(rng.sample(range(32 if name == "kosmos2" else 1000), 2)) for _ in "xy")
        values = (x[0], y[0], x[1], y[1])
        return tuple(v / 1000 for v in values) if name == "shikra" else values
    def answer(): return format_phrase("a " + rng.choice(["dog", "red car", "man in a hat"]), [box()], name) + " and "
    return repeat_to(answer, size), repeat_to(lambda: rng.choice(HOSTILE[name]), size)


def seconds(function, text, repeats=3, collector=False):
    "Processor time of the best of a few runs; other programs of the machine do not count."
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        if not collector: gc.disable()
        start = time.process_time()
        found = function(text)
        best = min(best, time.process_time() - start)
        gc.enable()
        del found
    return best


def table(name, function, text, sizes):
    "Print one line per size; seconds of the last."
    last = None
    for size in sizes:
        took = seconds(function, text[:size])
        grown = "" if last is None else f"x {took / last:.2f}"
        print(f"{name:<20} {size / 1e6:>8.3f} MB {took:>9.4f} s {size / 1e6 / took:>9.2f} MB/s   {grown}", flush=True)
        last = took
    return last


def main(megabytes=10.0):
    full = int(megabytes * 1e6)
    sizes = [full >> i for i in (4, 3, 2, 1, 0)]
    drawn = texts(full)
    print(f"parser throughput; Python {platform.python_version()}, NumPy {np.__version__}, "
          f"ferret_lite {ferret_lite.__version__}, {platform.machine()}, {os.cpu_count()} cores, 1 used\n")
    ours = {name: table(name, parse_answer, text, sizes) for name, text in drawn.items()}
    collected = seconds(parse_answer, drawn["answers"], collector=True)
    print(f"\nanswers, {megabytes:g} MB, garbage collector on: {collected:.2f} s, {megabytes / collected:.2f} MB/s")
    boxes = sum(len(p.boxes) for p in parse_answer(drawn["answers"]))
    print(f"{boxes} boxes in the answers: {boxes / ours['answers']:.0f} boxes per second\n")
    rival = table("one-liner, answers", one_liner, drawn["answers"], sizes[-1:])
    for name in DIALECTS:
        answers, noise = dialect_texts(name, full // 10)
        for kind, text in (("answers", answers), ("hostile", noise)):
            table(f"{name}, {kind}", lambda text: parse_answer(text, name), text, [full // 40, full // 20, full // 10])
    small = [5_000, 10_000, 20_000]
    slow = table("one-liner, prose", one_liner, drawn["prose"], small) * (full / small[-1]) ** 2
    print(f"\none-liner / ours: answers {rival / ours['answers']:.2f}; prose {slow / ours['prose']:.2g} "
          f"({slow / 3600:.0f} hours for {megabytes:g} MB if each doubling goes on to cost four times as much)")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
