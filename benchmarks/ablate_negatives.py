"""Does a tiny Ferret say less that is not there when its GRIT holds negatives? Trained with and without them.

    python benchmarks/ablate_negatives.py                # prints what is left to do, and the table so far
    python benchmarks/ablate_negatives.py --run          # 2,000 shared steps, then 400 of each arm and seed

One start is shared by all: an encoder taught by the dense stage of the recipe, and behind it a model that learned to
answer on the build `without_negatives`, in which whatever is asked for is there. From this start, which grounds but was
never told "no", each arm goes on for `--steps` steps, on a build `with_negatives` or on the one it knows; their mixes
differ in the last two tasks only. The seeds draw the order of the images, the dialogues of each and how regions are
mentioned; they do not draw the start.

Then all are asked the same questions about held-out scenes, half about what is there, half about what is not. Negatives
are of three kinds: *random*, any absent name; *changed*, a name of the scene with one word changed; *mixed*, colour and
shape both in the scene, on different objects.

What is there already is kept: a finished run is not repeated, an interrupted one goes on from its last checkpoint.
After each arm `table.json` is written anew; its copy as `benchmarks/ablate_negatives.json` is what the chapter shows.
"""
import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from trainings import do, fit, stage, trained_model

ARMS = {"with": "with_negatives", "without": "without_negatives"}
KINDS = ("mixed", "changed", "random")  # of negatives
SCORES = {"accuracy": "existence accuracy", "yes ratio": "yes ratio", "yes": "right where it is there",
          "boxed": "and its box right", "no random": "right, random absent", "no changed": "right, one word changed",
          "no mixed": "right, colour and shape mixed", "REC": "REC acc@0.5", "refer": "refer point"}


def fit_on(run, data, seed, stages, start=None, more=()):
    "The words of one training on a build, from a trained model or from nothing."
    words = ["--data.format", "grit", "--data.root", str(data)]
    if start: words += ["--model.init_from", str(start / "model"), "--data.processor", str(start / "model")]
    return fit(run, seed, stages, [*words, *more])


def absent_names(objects, kind):
    "The names of the embedded world that an image does not show, of one kind of negative."
    from ferret_lite.tasks import WORLD_NAMES
    present = {o.name for o in objects}
    colors, shapes = (set(words) for words in zip(*(name.split() for name in sorted(present))))
    shared = {"mixed": (2,), "changed": (1, 2), "random": (0, 1, 2)}[kind]  # words that an object of the image has
    return [n for n in WORLD_NAMES if n not in present
            and (n.split()[0] in colors) + (n.split()[1] in shapes) in shared]


def existence_questions(kind, num):
    'Canonical questions about held-out scenes: kind "yes", or one of the negatives.'
    from ferret_lite.examples import Question, SceneExamples
    from ferret_lite.tasks import exists
    examples, questions = SceneExamples("test"), []
    for i in range(len(examples)):
        example, rng = examples[i], np.random.default_rng([7, i])
        names = sorted({o.name for o in example.objects}) if kind == "yes" else absent_names(example.objects, kind)
        if not names: continue  # all that its colours and shapes can make is there
        dialogue = exists(example.objects, names[rng.integers(len(names))], rng)
        questions.append(Question(f"{example.id}/{kind}", "exists", example, dialogue))
        if len(questions) == num: return questions


def score_model(folder, num):
    "The numbers of one trained model."
    from ferret_lite.answering import answer_questions, said_boxes
    from ferret_lite.coords import box_iou
    from ferret_lite.data import make_questions
    from ferret_lite.examples import SceneExamples
    from ferret_lite.model import load_model
    from ferret_lite.questions import judge, true_boxes
    model, processor = load_model(folder / "model")
    ask = lambda questions: answer_questions(model, processor, questions, progress=False)
    def right(questions): return float(np.mean([judge(q, text)["right"] for q, text in zip(questions, ask(questions))]))
    def boxed(question, text):
        said = [box for _, box in said_boxes(question, text)]
        return bool(said) and box_iou(said[:1], [true_boxes(question)[0][1]])[0, 0] >= 0.5
    asked = existence_questions("yes", num)
    texts = ask(asked)
    yes = [judge(q, text)["right"] for q, text in zip(asked, texts)]
    scores = {"yes": float(np.mean(yes)),
              "boxed": float(np.mean([y and boxed(q, t) for y, q, t in zip(yes, asked, texts)]))}
    scores |= {f"no {kind}": right(existence_questions(kind, num)) for kind in KINDS}
    no = statistics.mean(scores[f"no {kind}"] for kind in KINDS)
    scores |= {"accuracy": (scores["yes"] + no) / 2, "yes ratio": (scores["yes"] + 1 - no) / 2}
    examples = SceneExamples("test")
    return scores | {name: right(make_questions(examples, task, num))
                     for name, task in (("REC", "locate"), ("refer", "refer_point"))}


def score_run(run, args):
    "Write the numbers of a finished run beside it; False if they are there already."
    file = run / "existence.json"
    if file.is_file(): return False
    file.write_text(json.dumps(score_model(run, args.num), indent=1) + "\n")
    return True


def write_table(root, args):
    "All that is finished, as `table.json`, and as text."
    files = {arm: {seed: root / f"{arm}_{seed}" / "existence.json" for seed in args.seeds} for arm in ARMS}
    files = {"start": {0: root / "start" / "existence.json"}} | files
    runs = {arm: {str(seed): json.loads(file.read_text()) for seed, file in some.items() if file.is_file()}
            for arm, some in files.items()}
    told = {name: getattr(args, name) for name in ("dense_steps", "start_steps", "steps", "lr", "num")}
    root.mkdir(parents=True, exist_ok=True)
    (root / "table.json").write_text(json.dumps(told | {"runs": runs}, indent=1) + "\n")
    head = [f"{arm} ({len(found)})" for arm, found in runs.items()]
    lines = [f"| % (seeds) | {' | '.join(head)} | always yes |", "| --- |" + " ---: |" * (len(head) + 1)]
    for score, title in SCORES.items():
        cells = []
        for found in runs.values():
            values = [100 * scores[score] for scores in found.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        blind = {"accuracy": "50", "yes ratio": "100", "yes": "100"}.get(score, "0" if score.startswith("no ") else "")
        lines.append(f"| {title} | {' | '.join(cells)} | {blind} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/ablate_negatives"), help="of the builds and the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense_steps", type=int, default=1000, help="of the encoder")
    parser.add_argument("--start_steps", type=int, default=2000, help="in which the start learns to answer")
    parser.add_argument("--steps", type=int, default=400, help="of each arm behind the start")
    parser.add_argument("--lr", type=float, default=1e-3, help="of these; the start has the recipe's")
    parser.add_argument("--num", type=int, default=500, help="questions of each kind")
    parser.add_argument("--run", action="store_true", help="train; without it the commands that are left are printed")
    args, more = parser.parse_known_args()  # the rest goes to every fit
    data, encoder = {arm: args.root / "data" / name for arm, name in ARMS.items()}, args.root / "encoder"
    for arm, name in ARMS.items():
        do(["grit", "build", name, "--out", str(data[arm])], data[arm] / "card.md", args.run)
    start = args.root / "start"
    words = fit_on(encoder, data["with"], 0, stage("dense", steps=args.dense_steps), more=more)  # it knows all words
    do(words, trained_model(encoder), args.run)
    words = fit_on(start, data["without"], 0, stage("answers", steps=args.start_steps), encoder, more)
    if do(words, trained_model(start), args.run): score_run(start, args)
    for seed in args.seeds:
        for arm in ARMS:
            run = args.root / f"{arm}_{seed}"
            words = fit_on(run, data[arm], seed, stage("answers", steps=args.steps, lr=args.lr), start, more)
            if do(words, trained_model(run), args.run) and score_run(run, args):
                print(write_table(args.root, args), flush=True)
    print(write_table(args.root, args))


if __name__ == "__main__": main()
