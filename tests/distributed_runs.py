"""Runs of ``train.py`` one after another in the processes of one ``torchrun``; tests/test_distributed.py starts it.

    torchrun --nproc_per_node 2 tests/distributed_runs.py RUNS FOUND

RUNS is a JSON file of argument lists by name. The first process writes the loss of every step, the predictions and the
exit status of every run to FOUND.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (makes `import dassl` work)
from trainers.prompting import distributed
from trainers.prompting.trainer import PromptTrainer


def measure(argv):
    """Losses, predictions and status of a run."""
    losses, found, known, stdout = [], {}, PromptTrainer.forward_backward, sys.stdout

    def forward_backward(self, batch):
        losses.append(known(self, batch)["loss"])
        return {"loss": losses[-1]}

    known_build = train.build_trainer

    def build(cfg):
        found["trainer"] = known_build(cfg)
        return found["trainer"]

    PromptTrainer.forward_backward, train.build_trainer, train.collect_env_info = forward_backward, build, str
    try:
        status = train.main(argv)
    finally:
        sys.stdout.flush()
        sys.stdout = stdout if distributed.is_main() else sys.stdout
        PromptTrainer.forward_backward, train.build_trainer = known, known_build
    evaluation = getattr(found.get("trainer"), "evaluation", None)
    return {
        "status": status,
        "losses": losses,
        "predictions": evaluation.predictions if evaluation else {},
        "metrics": {**evaluation.metrics, **evaluation.extra_metrics} if evaluation else {},
    }


if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text())
    found = {name: measure(argv) for name, argv in runs.items()}
    if distributed.is_main():
        Path(sys.argv[2]).write_text(json.dumps({"processes": distributed.processes(), **found}))
