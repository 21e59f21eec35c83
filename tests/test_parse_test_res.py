"""CoOp's ``parse_test_res.py`` finds the accuracies of results.json in the ``log.txt`` of our run folders.

Its reading is repeated here: after a line that is the signal ("Finish training", or "=> result" for test-only runs),
the last line with ``* accuracy: <number>%``.
"""

import re

import pytest
from helpers import Runs

from trainers.prompting.results import read_results

TRAINED, TESTED = "Finish training", "=> result"


def parse(run, signal, keyword):
    """The number in a run's log; None without the signal."""
    found, begun = None, False
    for line in (run / "log.txt").read_text().splitlines():
        begun = begun or line.strip() == signal
        match = re.search(rf"\* {keyword}: ([\.\deE+-]+)%", line.strip())
        found = float(match[1]) if begun and match else found
    return found


@pytest.fixture(scope="module")
def runs(data_root, rn_file, tmp_path_factory):
    """A training run, and a test-only run of its model on the new classes."""
    runs = Runs(data_root, rn_file, tmp_path_factory.mktemp("runs"))
    runs("TEST.FINAL_MODEL", "best_val", out="base")
    runs("DATASET.SUBSAMPLE_CLASSES", "new", out="new", flags=runs.evaluation("base"))
    return runs.folder


@pytest.mark.parametrize("out, signal", [("base", TRAINED), ("new", TESTED)])
@pytest.mark.parametrize("keyword, name", [("accuracy", "accuracy"), ("error", "error_rate"), ("macro_f1", "macro_f1")])
def test_log_has_the_metrics_of_the_results(runs, out, signal, keyword, name):
    expected = read_results(str(runs / out))["metrics"][name]
    assert parse(runs / out, signal, keyword) == round(expected, 1)  # the log has one decimal


def test_validation_during_training_is_not_taken_for_the_result(runs):
    """With best_val an accuracy is logged after every epoch; the result comes after "Finish training"."""
    before, after = (runs / "base" / "log.txt").read_text().split(f"\n{TRAINED}\n")
    assert before.count("* accuracy: ") == 2 and after.count("* accuracy: ") == 1
    assert parse(runs / "new", TRAINED, "accuracy") is None  # test-only runs have another signal
