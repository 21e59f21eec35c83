"""tools/mechanisms.py: its rows are what they say, its runs are taken up again, its numbers are those of the runs."""

import json
from pathlib import Path

import pytest
import torch

import mechanisms
from datasets import shapes
from trainers import logoprompt
from trainers.prompting.results import read_results

SHORT = ("OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 2, "test": 3})


def test_every_setting_of_the_paper_is_tried():
    known = mechanisms.experiments(["0.002"])
    options = {row.opts for _, rows in known.values() for row in rows}
    for key, values in {
        "VISUAL_PROMPT": ("none", "text_augmentation", "paired"),
        "LOCATION": ("top", "bottom"),
        "K": ("1", "3", "10"),
        "BLOCK_HEIGHT": (str(1 / 14), str(2 / 7)),
    }.items():
        assert {(f"TRAINER.LOGOPROMPT.{key}", value) for value in values} <= options
    names = {row.name for _, rows in known.values() for row in rows}
    settings = {(row.trainer, row.opts, row.block, row.protocol) for _, rows in known.values() for row in rows}
    assert len(names) == len(settings)


def test_a_row_is_measured_once_and_on_the_images_it_names(few, tmp_path, monkeypatch):
    row = mechanisms.Row("x", opts=("TRAINER.LOGOPROMPT.K", "2"), split="val")
    found = mechanisms.measure(row, 1, tmp_path / "data", tmp_path, SHORT, torch.get_num_threads())
    folder = Path(found["folder"])
    assert folder.is_relative_to(tmp_path / row.name)
    for subset in ("base", "new"):
        results = read_results(str(folder / f"val_{subset}"))
        assert results["split"] == "val" and results["images"] == 2 * 16  # all of them, not four a class
        assert found[subset] == results["metrics"]["accuracy"]
    assert read_results(str(folder / "train"))["metrics"] == {}  # the test images were not looked at
    assert 0 < found["gradient"]["first"] <= found["gradient"]["largest"] * 1.0001
    monkeypatch.setattr(mechanisms, "run", lambda argv: pytest.fail("run again"))
    assert mechanisms.measure(row, 1, tmp_path / "data", tmp_path, SHORT, 1) == found


def test_other_blocks():
    cfg = type(
        "C", (), {"BLOCK_HEIGHT": 1 / 7, "BLOCK_WIDTH": 1.0, "VISUAL_SEED": 0, "MIN_CONTRAST": 4.5, "FONT": ""}
    )()
    names = ["cup", "key", "cup"]
    text = logoprompt.draw_visual_prompts(cfg, names, 96)
    with mechanisms.other_blocks("noise"):
        noise = logoprompt.draw_visual_prompts(cfg, names, 96)
    with mechanisms.other_blocks("plain"):
        plain = logoprompt.draw_visual_prompts(cfg, names, 96)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert noise.shape == plain.shape == text.shape and noise.std() > 0.2
    assert plain.flatten(2).std(dim=2).max() < 1e-6
    assert torch.allclose(plain[:, :, 0, 0], text[:, :, 0, 0])
    assert torch.equal(logoprompt.draw_visual_prompts(cfg, names, 96), text)


def test_the_table_states_mean_and_deviation():
    rows = [mechanisms.Row("a", split="val"), mechanisms.Row("b", "CoOp", split="val")]
    results = {}
    for row in rows:
        for seed, h in ((1, 10.0), (2, 14.0)):
            results[row.name, "val", seed] = {
                **{"base": h + 1, "new": h - 1, "H": h, "collapsed": row.label == "a" and seed == 2},
                "gradient": {"first": 0.5 * seed, "largest": 2.0 * seed},
            }
    lines = mechanisms.table(rows, results, [1, 2]).splitlines()
    assert lines[2] == "| a | 13.00 ± 2.83 | 11.00 ± 2.83 | 12.00 ± 2.83 | 1 of 2 | 0.75 | 3 |"
    assert lines[3].endswith("| 0 of 2 | 0.75 | 3 |")


def test_the_choice_is_made_on_base_classes_and_prefers_small_steps():
    rows = [
        mechanisms.Row(f"{form}, lr {rate}", opts=("TRAINER.LOGOPROMPT.LOSS", form, "OPTIM.LR", rate), split="val")
        for form in ("infonce", "paper")
        for rate in ("0.01", "0.1", "1")
    ]
    rows += [mechanisms.Row(f"CoOp, lr {rate}", "CoOp", ("OPTIM.LR", rate), split="val") for rate in ("0.01", "0.1")]
    base = [60.0, 78.0, 80.0, 60.0, 79.0, 20.0, 50.0, 90.0]  # one standard error of 80 % on 400 images is 2
    new = [99.0, 0.0, 0.0, 99.0, 0.0, 99.0, 99.0, 0.0]
    results = {
        (row.name, "val", seed): {"base": b + (seed - 1.5), "new": n, "images_base": 400}
        for row, b, n in zip(rows, base, new)
        for seed in (1, 2)
    }
    ours, coop = mechanisms.choice(rows, results, [1, 2]).split("\n\n")
    assert "infonce, lr 1 (80.00, standard error 2.00)" in ours and "chosen is paper, lr 0.1 (79.00)" in ours
    assert "chosen is CoOp, lr 0.1 (90.00)" in coop


def test_domain_generalization_trains_on_all_classes_and_tests_both_worlds(few, tmp_path):
    row = next(r for r in mechanisms.experiments([])["shift"][1] if r.trainer == "CoOp")
    found = mechanisms.measure(row, 1, tmp_path / "data", tmp_path, SHORT, torch.get_num_threads())
    folder = Path(found["folder"])
    assert folder.is_relative_to(tmp_path / row.name)
    for column, dataset in (("source", "Shapes"), ("ShapesShifted", "ShapesShifted")):
        results = read_results(str(folder / f"test_{column}"))
        assert (results["run"]["dataset"], results["classes"], results["images"]) == (dataset, 32, 3 * 32)
        assert found[column] == results["metrics"]["accuracy"]
    assert read_results(str(folder / "train"))["classes"] == 32
    results = {(row.name, "test", seed): found for seed in (1, 2)}
    assert mechanisms.table([row], results, [1, 2]).startswith("| setting | source | ShapesShifted |\n")


def test_other_settings_defaults_or_weights_are_not_answered_with_old_numbers(few, tmp_path, monkeypatch):
    row = mechanisms.Row("CoOp", "CoOp")
    words = row, 1, tmp_path / "data", tmp_path
    first = mechanisms.measure(*words, SHORT, torch.get_num_threads())
    calls = []
    original = mechanisms.run
    monkeypatch.setattr(mechanisms, "run", lambda argv: calls.append(argv) or original(argv))
    assert mechanisms.measure(*words, SHORT, torch.get_num_threads()) == first and not calls
    other = mechanisms.measure(*words, (*SHORT, "OPTIM.LR", "0.5"), torch.get_num_threads())
    assert len(calls) == 3 and other["folder"] != first["folder"]  # trained anew, tested on base and new
    assert "LR: 0.5" in (Path(other["folder"]) / "train" / "config.yaml").read_text()
    monkeypatch.setattr(mechanisms, "TINY", __file__)  # other weights
    assert mechanisms.measure(*words, SHORT, torch.get_num_threads())["folder"] != first["folder"]
    assert len(calls) == 6


def test_an_interrupted_training_begins_anew(few, tmp_path, monkeypatch):
    row = mechanisms.Row("CoOp", "CoOp")
    words = row, 1, tmp_path / "data", tmp_path, (*SHORT, "TRAIN.CHECKPOINT_FREQ", "1"), torch.get_num_threads()
    update = mechanisms.PromptTrainer.after_epoch

    def stop(self):
        update(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(mechanisms.PromptTrainer, "after_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        mechanisms.measure(*words)
    monkeypatch.setattr(mechanisms.PromptTrainer, "after_epoch", update)
    found = mechanisms.measure(*words)
    log = (Path(found["folder"]) / "train" / "log.txt").read_text()
    assert "train from scratch" in log and "Resuming" not in log


def test_figure_1b_against_the_scores_themselves(few, tmp_path):
    text = mechanisms.figure1b(
        tmp_path / "data", tmp_path / "figure1b", "shapes", mechanisms.CONFIG, ("DATALOADER.NUM_WORKERS", "0")
    )
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[2:]}
    assert len(rows) == 1 + 3 * 3
    hidden, true, wrong = (
        float(rows[f"{block} class"][0])
        for block in ("plain colour, the true", "class name, the true", "class name, any wrong")
    )
    # The embedded CLIP reads: of blocks that hide as much, the name of the true class helps and that of another harms.
    assert true > hidden > wrong
    before, after = map(float, rows["class name, any wrong class"][2].split(" → "))
    assert after > before


def test_one_command_writes_the_tables(few, tmp_path, capsys, monkeypatch):
    class Here:  # the runs in this process: the few images are known only here
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, *args):
            result = function(*args[:-1], torch.get_num_threads())
            return type("F", (), {"result": lambda self: result})()

    monkeypatch.setattr(mechanisms, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(mechanisms, "as_completed", list)
    words = ["--output", str(tmp_path), "--only", "main", "--seeds", "1", "--opts", *SHORT]
    assert mechanisms.main(words) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "tables_main.md").read_text()
    assert table in printed and "ZeroshotCLIP" in table
    row = next(r for r in mechanisms.experiments([])["main"][1] if r.trainer == "CoOp")
    (path,) = (tmp_path / row.name).glob("seed1-*/test.json")
    coop = json.loads(path.read_text())
    assert f"| CoOp | {coop['base']:.2f} ± 0.00 | {coop['new']:.2f} ± 0.00 |" in table
    with pytest.raises(SystemExit) as end:
        mechanisms.main(["--only", "nonsense"])
    assert end.value.code == 2


def test_mistakes_end_in_one_line(few, tmp_path, capsys):
    for mistake in (["--config", "nosuch"], ["--dataset", "nosuch"], ["--jobs", "0"]):
        assert mechanisms.main(["--output", str(tmp_path), "--only", "main", *mistake]) == 2
        assert capsys.readouterr().err.startswith("error: ")
