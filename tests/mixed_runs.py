"""Run folders as people have them after some weeks: the data sets, methods, weights and settings of a mixed output.

    python tests/mixed_runs.py output/mixed && python tools/report.py output/mixed

Every folder holds the ``config.yaml`` and ``results.json`` that its command would write; the accuracies are made up.
"""

from __future__ import annotations

import os
import random
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from runner import arguments  # isort: skip (makes `import dassl` work)
import train
from trainers.prompting.names import command_settings
from trainers.prompting.results import write_results, write_text

NINE = {  # name -> accuracy on base and new classes
    "ZeroshotCLIP": (74.0, 79.0),
    "CoOp": (78.6, 80.3),
    "ProGrad": (76.0, 80.8),
    "KgCoOp": (74.5, 79.1),
    "ProDA": (65.8, 56.4),
    "CLIPAdapter": (82.3, 79.1),
    "TipAdapter": (76.7, 79.0),
    "TipAdapterF": (81.3, 79.0),
    "LoGoPrompt": (78.8, 75.2),
}
WARM_UP = "stage 1 has 1 epoch, all warm-up: it hardly learns. Raise OPTIM.MAX_EPOCH or lower OPTIM.WARMUP_EPOCH"
CHANCE = "the accuracy is that of chance: nothing was learned"


def write_run(folder: Path, accuracy: float, trainer: str, *opts: object, old: bool = False, **more: object) -> Path:
    """The folder that a command of ``train.py`` leaves: seed 1, Shapes and the embedded CLIP unless told otherwise."""
    dataset, config = more.get("dataset", "shapes"), more.get("config", "tiny96_ep10_ctxv1")
    model, seed, subset = str(more.get("model_dir", "")), more.get("seed", 1), more.get("subset", "all")
    untrained = trainer.startswith("ZeroshotCLIP")
    flags = ["--eval-only"] * bool(model or untrained) + ["--model-dir", model] * bool(model)
    argv = arguments(trainer, dataset, config, more.get("root", "/data"), folder, seed, subset, flags)
    cfg = train.setup_cfg(args := train.parse_args([*argv, *map(str, opts)]))
    run = {
        **{"trainer": trainer, "dataset": cfg.DATASET.NAME, "subsample_classes": subset},
        **{"shots": cfg.DATASET.NUM_SHOTS, "seed": seed, "backbone": cfg.MODEL.BACKBONE.NAME},
        **{"trained": not flags, "epochs": 0 if untrained else more.get("epochs", cfg.OPTIM.MAX_EPOCH)},
        **{"model_dir": model, "collapsed": None if flags else False},
    }
    if not old:
        run |= command_settings(["--config-file", args.config_file, *args.opts], cfg) | {"seconds": 99.0, "commit": "0"}
    results = {"metrics": {"accuracy": accuracy}, "observed": more.get("observed", {}), "split": "test", "images": 800}
    results |= {"classes": 16, "warnings": more.get("warnings", []), "run": run}
    write_text(str(folder / "config.yaml"), cfg.dump())
    write_text(str(folder / "log.txt"), "")
    write_results(str(folder), results)
    return folder


def mixed_output(root: Path) -> Path:
    """The run folders below ``root``. Returns it."""
    noise = random.Random(0)
    for (method, halves), seed in product(NINE.items(), (1, 2, 3)):  # nine methods, by the script
        for half, subset, accuracy in zip(("train_base", "test_new"), ("base", "new"), halves):
            name = f"base2new/{half}/shapes/shots_16/{method}/tiny96_ep10_ctxv1/seed{seed}"
            learned = method != "ZeroshotCLIP"
            model = root / name.replace("test_new", "train_base") if subset == "new" and learned else ""
            observed = {"log_odds_rise_true": -0.2, "log_odds_rise_wrong": 0.5} if method == "LoGoPrompt" else {}
            accuracy += noise.gauss(0, 0.8) * learned
            write_run(root / name, accuracy, method, seed=seed, subset=subset, model_dir=model, observed=observed)
    for method, subset in product(("ZeroshotCLIP", "CoOp", "LoGoPrompt"), ("base", "new")):  # the demo
        accuracy = NINE[method][subset == "new"] - 0.06 * (method == "CoOp")
        folder, model = root / f"demo/runs/{method}", root / f"demo/runs/{method}/base"
        model = model if subset == "new" and method != "ZeroshotCLIP" else ""
        write_run(folder / subset, accuracy, method, subset=subset, model_dir=model)

    weights = [root / f"weights/{name}/clip.pt" for name in ("first", "second")]
    for path in weights:
        write_text(str(path), "")

    def own(name: str, accuracy: float, trainer: str, data: str, *opts: object, clip: int = 0, **more: object) -> Path:
        opts = ("DATASET.NUM_SHOTS", 4, "MODEL.BACKBONE.NAME", weights[clip], *opts)
        return write_run(root / name, accuracy, trainer, *opts, root=data, dataset="folder", config="rn50_ep50", **more)

    mine = own("mine", 81.0, "LoGoPrompt", "/data/a/photos")
    own("mine_eval", 81.0, "LoGoPrompt", "/data/a/photos", model_dir=mine)
    own("mine_clip2", 79.5, "LoGoPrompt", "/data/a/photos", clip=1)
    own("mine_coop", 81.06, "CoOp", "/data/a/photos")
    own("mine_short", 70.0, "LoGoPrompt", "/data/a/photos", "OPTIM.MAX_EPOCH", 2, warnings=[WARM_UP])
    own("mine_rate", 70.0, "LoGoPrompt", "/data/a/photos", "OPTIM.LR", 0.1, "TRAINER.LOGOPROMPT.K", 3)
    own("mine_chance", 70.0, "LoGoPrompt", "/data/a/photos", "OPTIM.LR", 9.0, warnings=[CHANCE])
    own("other", 66.0, "LoGoPrompt", "/data/b/photos")
    title = ("DATASET.TITLE", "Birds of Europe")
    own("birds", 55.0, "CoOp", "/data/birds", *title)
    own("birds_by_photos", 31.0, "LoGoPrompt", "/data/birds", *title, model_dir=mine)
    own("old", 60.0, "LoGoPrompt", "/data/birds2", old=True)
    for shots in (1, 4, 16):
        accuracy = 60 + 8 * shots**0.4
        write_run(root / f"shots/{shots}", accuracy, "CoOp", "DATASET.NUM_SHOTS", shots)
        write_run(root / f"shots/ours{shots}", accuracy + 0.03, "LoGoPrompt", "DATASET.NUM_SHOTS", shots)
    (root / "unfinished/prompt_learner").mkdir(parents=True)
    return root


if __name__ == "__main__":
    print(mixed_output(Path(os.path.abspath(sys.argv[1]))))
