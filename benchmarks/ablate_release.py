"""What each difference between the paper and the released code does to the tiny Ferret: trained with and without.

    python benchmarks/ablate_release.py                  # prints what is left to do, and the table so far
    python benchmarks/ablate_release.py --run            # every switch, three seeds: two hours on two cores
    python benchmarks/ablate_release.py --run --only paper transposed --seeds 0

The switches touch how a region is read and nothing else, so all of the training asks about regions, and what does not
depend on them is shared: each seed's encoder is taught once, by the dense stage of configs/tiny.yaml, and stays as it
is. From there every switch starts with the same weights and sees the same questions. (LayerNorm's own weights are new.)
It is then asked about held-out scenes in two ways: by coordinates and feature, as in the paper, and by the region's
feature alone, which cannot be made up for by the coordinates. "random points" is the paper's Ferret, asked with points
that are drawn anew each time; training draws them anew anyway.

One run at a time. What is there already is kept: a finished run is not repeated, an interrupted one goes on from its
last checkpoint; so the script can be stopped and started at will. After each run `table.json` is written anew, whose
copy as `benchmarks/ablate_release.json` the page "Paper or code?" shows."""
import argparse
import json
import statistics
from pathlib import Path

from trainings import do, fit, stage, trained_model

SWITCHES = {  # name -> fields of FerretConfig, attributes of the processor
    "paper": ({}, {}),
    "transposed": ({"region_transposed": True}, {}),
    "stretched grid": ({"align_corners": True}, {"corner_points": True}),
    "ReLU and LayerNorm": ({"sampler_norm": True}, {}),
    "square window": ({}, {"mask_rule": "released"}),
    "repeats": ({}, {"few_pixels": "repeat"}),
    "random points": ({}, {"repeatable": False}),
    "all of them": ({"region_transposed": True, "align_corners": True, "sampler_norm": True},
                    {"corner_points": True, "mask_rule": "released", "few_pixels": "repeat", "repeatable": False}),
}
TASKS = {"point": "refer_point", "box": "refer_box", "free-form": "refer_free_form"}
FORMS = {"hybrid": "", "feature alone": "feature"}


def write_switched(start, name, folder):
    "The shared start with one switch turned."
    from ferret_lite.config import FerretConfig
    from ferret_lite.model import FerretForConditionalGeneration, save_model
    from ferret_lite.processor import FerretProcessor
    config, processor = FerretConfig.from_pretrained(start), FerretProcessor.from_pretrained(start)
    for thing, changes in zip((config, processor), SWITCHES[name]):
        for field, value in changes.items(): setattr(thing, field, value)
    save_model(FerretForConditionalGeneration.from_pretrained(start, config=config), processor, folder)


def score_model(folder, name, num):
    "Score -> share of right answers to held-out questions."
    from ferret_lite.answering import answer_questions
    from ferret_lite.examples import SceneExamples, make_questions
    from ferret_lite.model import load_model
    from ferret_lite.questions import judge
    model, processor = load_model(folder)
    for field, value in SWITCHES[name][1].items(): setattr(processor, field, value)
    scores = {}
    for form, key in FORMS.items():
        for kind, task in TASKS.items():
            questions = make_questions(SceneExamples("test"), task, num, key)
            texts = answer_questions(model, processor, questions, progress=False)
            scores[f"{kind}, {form}"] = statistics.mean(judge(q, t)["right"] for q, t in zip(questions, texts))
    return scores


def write_table(root, seeds):
    "All that is finished, as `table.json`, and as text: mean, smallest to largest."
    files = {name: [root / f"{name.replace(' ', '_')}_{seed}" / "scores.json" for seed in seeds] for name in SWITCHES}
    runs = {name: [json.loads(file.read_text()) for file in some if file.is_file()] for name, some in files.items()}
    table = {name: {score: [run[score] for run in found] for score in found[0]} for name, found in runs.items() if found}
    root.mkdir(parents=True, exist_ok=True)
    (root / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    heads = list(next(iter(table.values()), {}))
    lines = ["| switched | " + " | ".join(heads) + " | seeds |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for name, scores in table.items():
        cells = [f"{100 * statistics.mean(v):.1f} ({100 * min(v):.1f} to {100 * max(v):.1f})" for v in scores.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(scores[heads[0]])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/ablate_release"), help="of the runs and the table")
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), default=list(SWITCHES), metavar="SWITCH",
                        help=f"of {', '.join(SWITCHES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense_steps", type=int, default=600, help="of each seed's encoder")
    parser.add_argument("--steps", type=int, default=500, help="in which each switch learns to name regions")
    parser.add_argument("--num", type=int, default=400, help="held-out questions of each kind")
    parser.add_argument("--run", action="store_true", help="train; without it the commands that are left are printed")
    args, more = parser.parse_known_args()  # the rest goes to every fit
    more = ["--model.compile", "false", *more]  # compiling would take longer than such a run gains by it
    for seed in args.seeds:
        start = args.root / f"start_{seed}"
        ready = do(fit(start, seed, stage("dense", steps=args.dense_steps), more), trained_model(start), args.run)
        for name in args.only:
            run, begin = args.root / f"{name.replace(' ', '_')}_{seed}", args.root / f"begin_{name.replace(' ', '_')}"
            if (run / "scores.json").is_file(): continue
            trained = args.root / f"paper_{seed}" if name == "random points" else run
            new = trained == run and not trained_model(run).is_file()
            if ready and args.run and new: write_switched(start / "model", name, begin)
            words = fit(trained, seed, stage("answers", steps=args.steps), [
                "--model.init_from", str(begin), "--data.processor", str(begin), "--data.mix", '{"refer": 1.0}',
                "--data.max_length", "192", "--trainer.limit_val_batches", "0", *more])
            if not do(words, trained_model(trained), args.run) or not args.run: continue
            run.mkdir(exist_ok=True)
            (run / "scores.json").write_text(json.dumps(score_model(trained / "model", name, args.num), indent=1) + "\n")
            print(write_table(args.root, args.seeds), flush=True)
    print(write_table(args.root, args.seeds))


if __name__ == "__main__": main()
