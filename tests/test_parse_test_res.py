"""CoOp's ``parse_test_res.py`` reads accuracies out of ``log.txt``: on our run folders it finds what results.json says.

What it looks for is written down here once more, in a few lines of our own: in every folder of a folder, in its
``log.txt``, after a line that is the signal ("Finish training", for test-only runs "=> result"), the last line with
``* accuracy: <number>%``; then the mean over the folders, and the standard deviation or 1.96 standard errors.
"""

import re
import sys

import numpy as np
import pytest
from tiny import arguments

import train
from trainers.prompting.results import read_results

TRAINED, TESTED = "Finish training", "=> result"


def parse(folder, signal, keyword="accuracy"):
    """{name of the folder: number} for the folders in which there is one."""
    pattern, found = re.compile(rf"\* {keyword}: ([\.\deE+-]+)%"), {}
    for run in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        begun = False
        for line in (run / "log.txt").read_text().splitlines():
            begun = begun or line.strip() == signal
            match = pattern.search(line.strip())
            if begun and match:
                found[run.name] = float(match[1])
    return found


def summary(found, ci95=False):
    """Mean, and the standard deviation or the half-width of the 95 % confidence interval."""
    values = list(found.values())
    return np.mean(values), 1.96 * np.std(values) / len(values) ** 0.5 if ci95 else np.std(values)


@pytest.fixture(scope="module")
def tree(data_root, rn_file, tmp_path_factory):
    """base2new of two seeds: runs that trained, and test-only runs of their models on the new classes."""
    root, stdout = tmp_path_factory.mktemp("runs"), sys.stdout
    try:
        for seed in (1, 2):
            trained = root / "train_base" / f"seed{seed}"
            flags = ["--eval-only", "--model-dir", trained]
            tested, new = root / "test_new" / f"seed{seed}", ["DATASET.SUBSAMPLE_CLASSES", "new"]
            for argv in (
                arguments("LoGoPrompt", data_root, rn_file, trained, "TEST.FINAL_MODEL", "best_val", seed=seed),
                arguments("LoGoPrompt", data_root, rn_file, tested, *new, flags=flags, seed=seed),
            ):
                assert train.main(argv) == 0
                sys.stdout.flush()
                sys.stdout = stdout
    finally:
        sys.stdout = stdout
    return root


@pytest.mark.parametrize("kind, signal", [("train_base", TRAINED), ("test_new", TESTED)])
@pytest.mark.parametrize("keyword", ["accuracy", "error", "macro_f1"])
def test_averages_are_those_of_the_results(tree, kind, signal, keyword):
    found = parse(tree / kind, signal, keyword)
    name = {"error": "error_rate"}.get(keyword, keyword)
    exact = {f"seed{s}": read_results(str(tree / kind / f"seed{s}"))["metrics"][name] for s in (1, 2)}
    assert found == {seed: round(value, 1) for seed, value in exact.items()}  # the log has one decimal
    for ci95 in (False, True):
        mean, spread = summary(found, ci95)
        wanted, wanted_spread = summary(exact, ci95)
        assert mean == pytest.approx(wanted, abs=0.05) and spread == pytest.approx(wanted_spread, abs=0.1)


def test_validation_during_training_is_not_taken_for_the_result(tree):
    """With best_val an accuracy is logged after every epoch; what counts comes after "Finish training"."""
    for seed in (1, 2):
        log = (tree / "train_base" / f"seed{seed}" / "log.txt").read_text()
        before, after = log.split(f"\n{TRAINED}\n")
        assert before.count("* accuracy: ") == 2 and after.count("* accuracy: ") == 1
    assert parse(tree / "test_new", TRAINED) == {}  # test-only runs have another signal
