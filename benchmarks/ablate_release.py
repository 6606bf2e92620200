"""What each difference between the paper and the released code does to the tiny Ferret: trained with and without.

    python benchmarks/ablate_release.py                  # prints what is left to do, and the table so far
    python benchmarks/ablate_release.py --run            # every switch, three seeds: half a day on two cores
    python benchmarks/ablate_release.py --run --only paper transposed --seeds 0 --share 0.25

Each run is `ferret-lite fit` with the recipe and one switch turned to the released behaviour, in a folder of its own.
One run at a time. What is there already is kept: a finished run is not repeated, an interrupted one goes on from its
last checkpoint; so the script can be stopped and started at will. After each run the table is written anew (mean, and
smallest to largest over the seeds), as `table.md` for people and as `table.json`, whose copy as
`benchmarks/ablate_release.json` the page "Paper or code?" shows."""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
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
SCORES = ("refer point/accuracy", "refer box/accuracy", "refer free-form/accuracy", "same-box feature/accuracy",
          "REC/acc@0.5")


def write_processor(folder, settings, changes):
    "The recipe's processor with some attributes changed, as `--data.processor` takes it."
    from ferret_lite.data import FerretDataModule, Stage
    processor = FerretDataModule(**{**settings["data"], "stages": [Stage(1, 1)], "num_workers": 0}).processor
    for name, value in changes.items(): setattr(processor, name, value)
    processor.save_pretrained(folder)


def command(run, settings, name, seed, share):
    "The words of one `ferret-lite fit`. What an interrupted run has reached is taken up."
    model, processor = SWITCHES[name]
    stages = [{**stage, "steps": max(round(share * stage["steps"]), 1)} for stage in settings["data"]["stages"]]
    words = ["fit", "--config", str(RECIPE), "--seed_everything", str(seed), "--data.seed", str(seed),
             "--trainer.default_root_dir", str(run), "--data.stages", json.dumps(stages)]
    for field, value in model.items(): words += [f"--model.ferret.{field}", json.dumps(value)]
    if processor: words += ["--data.processor", str(run / "processor")]
    if (run / "checkpoints" / "last.ckpt").is_file(): words += ["--ckpt_path", "last"]
    return words


def read_scores(root, name, seeds):
    "Score -> its values over the seeds that are finished."
    files = [root / name.replace(" ", "_") / f"seed{seed}" / "scores.json" for seed in seeds]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    return {score: [scores[score]["value"] for scores in found] for score in SCORES if all(score in s for s in found)}


def write_table(root, seeds):
    "All that is finished, as `table.json` and `table.md`."
    table = {name: read_scores(root, name, seeds) for name in SWITCHES}
    table = {name: scores for name, scores in table.items() if any(scores.values())}
    root.mkdir(parents=True, exist_ok=True)
    (root / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    lines = ["| switched | " + " | ".join(SCORES) + " | seeds |", "| --- |" + " ---: |" * (len(SCORES) + 1)]
    for name, scores in table.items():
        values = [[100 * v for v in scores[score]] for score in SCORES]
        cells = [f"{sum(v) / len(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(scores[SCORES[0]])} |")
    (root / "table.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/ablate_release"), help="of the runs and the table")
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), default=list(SWITCHES), metavar="SWITCH",
                        help=f"of {', '.join(SWITCHES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of the recipe's steps; each wants its own --root")
    parser.add_argument("--run", action="store_true", help="train; without it the commands that are left are printed")
    args, more = parser.parse_known_args()  # the rest goes to every fit
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for seed in args.seeds:
        for name in args.only:
            run = args.root / name.replace(" ", "_") / f"seed{seed}"
            if (run / "scores.json").is_file(): continue
            words = [*command(run, settings, name, seed, args.share), *more]
            print("ferret-lite", shlex.join(words), flush=True)
            if not args.run: continue
            if SWITCHES[name][1]: write_processor(run / "processor", settings, SWITCHES[name][1])
            subprocess.run([sys.executable, "-c", "from ferret_lite.cli import main; main()", *words], check=True)
            print(write_table(args.root, args.seeds), flush=True)
    print(write_table(args.root, args.seeds))


if __name__ == "__main__": main()
