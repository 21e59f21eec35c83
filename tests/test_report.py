"""tools/report.py: its numbers against naive loops, what it refuses, and what it writes."""

import html
import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from mixed_runs import NINE, mixed_output
from test_scripts import runs as script_runs
from tiny import arguments

import report
import report_data
import train
from report_data import PUBLISHED, SETTINGS
from trainers.prompting.results import harmonic_mean, read_results

FILES = [(path.stem, yaml.safe_load(path.read_text())) for path in (ROOT / "configs/datasets").glob("*.yaml")]
KEYS = {config["DATASET"]["NAME"]: stem for stem, config in FILES}


def make(root, dataset, accuracy, seed=1, subset="all", trainer="LoGoPrompt", kind="few_shot", **run):
    """One run as scripts/logo would leave it. Returns its folder."""
    shots, config = run.setdefault("shots", 16), run.pop("config", "vit_b16_ctxv1")
    trained = subset != "new" and trainer != "ZeroshotCLIP"
    kind = {"base": "base2new/train_base", "new": "base2new/test_new"}.get(subset, kind)
    folder = root / kind / KEYS.get(dataset, dataset) / f"shots_{shots}" / trainer / config / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    about = {
        **{"trainer": trainer, "dataset": dataset, "subsample_classes": subset, "seed": seed, "backbone": "ViT-B/16"},
        **{"trained": trained, "model_dir": "x" if subset == "new" and trainer != "ZeroshotCLIP" else ""},
        **{"epochs": 1, "collapsed": False if trained else None, **run},
    }
    results = {"metrics": {"accuracy": accuracy}, "split": "test", "images": 9, "classes": 3, "run": about}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


BASE = {"Caltech101": (90.0, 92.0, 94.0), "EuroSAT": (80.0, 90.0, 100.0)}
NEW = {"Caltech101": (60.0, 70.0, 80.0), "EuroSAT": (50.0, 40.0, 30.0)}
AVERAGE = "Average of 2 data sets"


def two_data_sets(root, **run):
    for dataset, seed in product(BASE, (1, 2, 3)):
        make(root, dataset, BASE[dataset][seed - 1], seed, "base", **run)
        make(root, dataset, NEW[dataset][seed - 1], seed, "new", **run)
    return root


def build(root, *words):
    """The command's status and its folder."""
    out = root.parent / "out"
    defaults = {"--out": str(out), "--predictions": "0"}
    return report.main([str(root), *words, *(w for d in defaults.items() if d[0] not in words for w in d)]), out


def good(root, *words):
    """The cells of a report that must be complete."""
    status, out = build(root, *words)
    assert status == 0
    return cells(out)


def cells(out):
    """cells.csv as {(section, row, column): {"mean": …}}; empty cells are None."""
    frame = pd.read_csv(out / "cells.csv", dtype={"seeds": str}).set_index(["section", "row", "column"])
    return dict(zip(frame.index, frame.astype(object).where(frame.notna(), None).to_dict("records")))


def test_published_values_match_the_paper(golden):
    paper = json.loads((golden / "paper_tables.json").read_text())
    names = {"average": "average", **{key: name for name, key in KEYS.items()}}
    expected = {}
    for key, methods in paper["table1_base_to_new_vit_b16_16shot"].items():
        for method, row in methods.items():
            expected.update({("base2new", names[key], method, column): value for column, value in row.items()})
    tables = ["table2_few_shot_rn50_16shot", "table3_domain_generalization_vit_b16"]
    for kind, table in zip(("few_shot", "domain_generalization"), tables):
        for method, row in paper[table].items():
            expected.update({(kind, names[key], method, "accuracy"): v for key, v in row.items() if v is not None})
    found = {
        (kind, dataset, method.replace("ZeroshotCLIP", "CLIP").replace("VP+TP", "VisualPrompting"), column): value
        for kind, table in PUBLISHED.items()
        for (method, column), values in table.items()
        for dataset, value in values.dropna().items()
    }
    assert found == expected
    ablation = [value for part in paper["table4_ablation_imagenet_rn50_16shot"].values() for value in part.values()]
    assert ablation == [value for *_, value in SETTINGS if not np.isnan(value)]


def test_base_to_new_against_loops(tmp_path):
    root = two_data_sets(tmp_path / "runs")
    found, out = good(root), tmp_path / "out"
    halves = {name: (BASE[name], NEW[name]) for name in BASE}
    halves[AVERAGE] = tuple([mean(pair) for pair in zip(*half.values())] for half in (BASE, NEW))
    paper = {"Caltech101": (98.19, 93.78, 95.93), "EuroSAT": (93.67, 69.44, 79.75), AVERAGE: (95.93, 81.61, 88.19)}
    for name, (base, new) in halves.items():
        h = [2 * b * n / (b + n) for b, n in zip(base, new)]
        means = [mean(base), mean(new), harmonic_mean(mean(base), mean(new))]  # H of the means
        for column, values, expected, printed in zip(("base", "new", "H"), (base, new, h), means, paper[name]):
            cell = found[name, "LoGoPrompt", column]
            assert (cell["n"], cell["seeds"]) == (3, "1 2 3")
            assert cell["mean"] == pytest.approx(expected) and cell["std"] == pytest.approx(stdev(values), abs=1e-9)
            assert cell["published"] == pytest.approx(printed)
            assert cell["difference"] == pytest.approx(expected - printed)
    text = re.sub(r" +", " ", (out / "report.md").read_text())
    assert "| 92.00 ± 2.00 | 98.19 (−6.19) | 70.00 ± 10.00 | 93.78 (−23.78) | 79.51 ± " in text
    for run in pd.read_csv(out / "runs.csv").itertuples():
        assert run.accuracy == {"base": BASE, "new": NEW}[run.subset][run.dataset][run.seed - 1]
        assert json.loads(Path(run.folder, "results.json").read_text())["metrics"]["accuracy"] == run.accuracy


def test_best_of_each_column_is_bold(tmp_path):
    for trainer, accuracy in (("Unheard", 70.004), ("CoOp", 70.0), ("LoGoPrompt", 60.0)):
        make(tmp_path / "runs", "Food101", accuracy, trainer=trainer)
    status, out = build(tmp_path / "runs", "--seeds", "1")
    text = (out / "report.md").read_text()
    bold = re.findall(r"\| (\w+) +\| +\*\*70\.00\*\*", text)
    assert status == 0 and bold == ["CoOp", "Unheard"] and "**60" not in text  # equal as printed


def test_eleven_data_sets_are_compared_with_the_printed_average(tmp_path):
    for name, subset in product(PUBLISHED["base2new"].index.drop("average"), ("base", "new")):
        make(tmp_path / "runs", name, PUBLISHED["base2new"].at[name, ("CoOp", subset)], 1, subset, "CoOp")
    for subset in ("base", "new"):
        make(tmp_path / "runs", "Shapes", 10.0, 1, subset, "CoOp")  # not in the paper, not in the average
    found = good(tmp_path / "runs", "--seeds", "1")
    average = [found["Average of 11 data sets", "CoOp", column] for column in ("base", "new", "H")]
    assert [cell["published"] for cell in average] == [82.69, 63.22, 71.66]
    assert all(abs(cell["difference"]) < 0.01 and cell["std"] is None for cell in average)
    assert found["Shapes", "CoOp", "base"]["published"] is None


def test_few_shot_curves(tmp_path):
    run = {"backbone": "RN50"}
    for (shots, config), seed in product(((1, "rn50_ep50"), (2, "rn50_ep100"), (16, "rn50")), (1, 2, 3)):
        for dataset, accuracy in (("Caltech101", 90.0), ("Food101", 70.0)):
            accuracy += shots * seed / 10
            make(tmp_path / "runs", dataset, accuracy, seed, config=config, shots=shots, **run)
    make(tmp_path / "runs", "Caltech101", 60.0, trainer="ZeroshotCLIP", config="rn50", **run)
    make(tmp_path / "runs", "Food101", 50.0, trainer="ZeroshotCLIP", config="rn50", **run)
    found = good(tmp_path / "runs")  # untrained: one run stands for all seeds and shots
    cell = found["Caltech101", "LoGoPrompt", "16 shots"]
    assert (cell["mean"], cell["std"], cell["published"]) == (pytest.approx(93.2), pytest.approx(1.6), 92.98)
    assert found[AVERAGE, "LoGoPrompt", "16 shots"]["published"] == pytest.approx((92.98 + 78.73) / 2)
    assert found[AVERAGE, "LoGoPrompt", "2 shots"]["mean"] == pytest.approx(80.4)
    assert found["Food101", "LoGoPrompt", "1 shot"]["published"] is None  # the paper prints 16 shots only
    assert [found["Food101", "ZeroshotCLIP", name]["mean"] for name in ("1 shot", "2 shots", "16 shots")] == [50] * 3


def test_transfers_average_over_the_right_data_sets(tmp_path):
    generalization = {"ImageNet": 70, "ImageNetV2": 60, "ImageNetSketch": 50, "ImageNetA": 40, "ImageNetR": 75}
    cross = {"ImageNet": 70, "DescribableTextures": 40, "Caltech101": 50}
    for kind, accuracies in (("domain_generalization", generalization), ("cross_dataset", cross)):
        for (dataset, accuracy), seed in product(accuracies.items(), (1, 2, 3)):
            make(tmp_path / "runs", dataset, accuracy + seed, seed, kind=f"{kind}/from_imagenet")
    found = good(tmp_path / "runs")
    average = found["Average of 5 data sets", "LoGoPrompt", "accuracy"]  # with the source
    assert (average["mean"], average["std"]) == (pytest.approx(61), pytest.approx(1))
    assert average["published"] == 63.82
    assert found[AVERAGE, "LoGoPrompt", "accuracy"]["mean"] == pytest.approx(47)  # targets only
    sections = list(dict.fromkeys(section for section, *_ in found))
    assert sections[:2] == ["Average of 5 data sets", "ImageNet"]  # the source first


def test_ablations(tmp_path):
    calls = script_runs(tmp_path, "logo/ablation", "shapes", "1")
    folders = {call["--output-dir"].split("/ablation/")[1].split("/")[0] for call in calls}
    assert folders == {folder for _, _, folder, _ in SETTINGS}
    folders = sorted(folders - {"4c_16"})  # without initial words M is 16: it is the shipped one
    run = {"config": "rn50_ep50", "backbone": "RN50"}
    for (i, folder), seed in product(enumerate(folders), (1, 2, 3)):
        make(tmp_path / "a", "ImageNet", 60.0 + i + seed, seed, kind=f"ablation/{folder}", **run)
        make(tmp_path / "b", "ImageNet", 60.0, seed, kind=f"ablation/{folder}", shots=8, **run)
    found = good(tmp_path / "a")
    assert len(found) == len(SETTINGS)
    for part, setting, folder, printed in SETTINGS:
        cell = found[part, setting, "accuracy"]
        i = folders.index("shipped" if folder == "4c_16" else folder)
        assert (cell["mean"], cell["std"]) == (pytest.approx(62 + i), pytest.approx(1))
        assert cell["published"] == (None if np.isnan(printed) else printed)
    assert {cell["published"] for cell in good(tmp_path / "b").values()} == {None}  # other shots


def test_only_the_backbone_and_shots_of_the_paper_are_compared(tmp_path):
    run = {"dataset": "ImageNet", "accuracy": 50.0, "kind": "domain_generalization/from_imagenet"}
    same, others = ("ViT-B/16", "/w/ViT-B-16.pt", "ViT-B-16/openai"), ("RN50", "ViT-B/32", "ViT-B-16/laion2b")
    for i, name in enumerate((*same, *others)):
        make(tmp_path / f"runs/{i}", backbone=name, **run)
    make(tmp_path / "runs/8", shots=8, trainer="CoOp", **run)
    found = {row: cell["published"] for (_, row, _), cell in good(tmp_path / "runs", "--seeds", "1").items()}
    rows = {name: f"LoGoPrompt ({name.removeprefix('/w/')})" for name in (*same, *others)}
    expected = {row: 75.27 if name in same else None for name, row in rows.items()}
    assert found == {**expected, "CoOp": None}


def test_what_is_a_row(tmp_path):
    """Another schedule on another data set is the same row; two on one data set, or two backbones, are two."""
    for dataset, config in (("ImageNet", "rn50_ep50"), ("Food101", "rn50")):
        make(tmp_path / "a", dataset, 60.0, config=config)
        adapter = make(tmp_path / "a/adapter", dataset, 70.0, config=config)
        (adapter / "config.yaml").write_text("TRAINER:\n  LOGOPROMPT:\n    ADAPTER: true\n")
    make(tmp_path / "b", "Food101", 60.0, config="rn50_ep50")
    make(tmp_path / "b", "Food101", 61.0, config="rn50")
    make(tmp_path / "c", "Food101", 60.0)
    make(tmp_path / "c/more", "Food101", 61.0, backbone="RN50")
    make(tmp_path / "d", "Food101", 60.0)
    make(tmp_path / "d/more", "Food101", 61.0, epochs=5)
    make(tmp_path / "e", "Food101", 60.0)
    make(tmp_path / "e/more", "Food101", 61.0)  # of the same settings
    make(tmp_path / "e/copy", "Food101", 60.0)  # counted once
    for name, rows in (
        ("a", {"LoGoPrompt", "LoGoPrompt+Adapter"}),
        ("b", {"LoGoPrompt (rn50_ep50)", "LoGoPrompt (rn50)"}),
        ("c", {"LoGoPrompt (ViT-B/16)", "LoGoPrompt (RN50)"}),
        ("d", {"LoGoPrompt (1 epoch)", "LoGoPrompt (5 epochs)"}),
        ("e", {"LoGoPrompt", "LoGoPrompt (more/few_shot/food101/shots_16/LoGoPrompt/vit_b16_ctxv1/seed1)"}),
    ):
        assert {row for _, row, _ in good(tmp_path / name, "--seeds", "1")} == rows


def incomplete(root, capsys, *words):
    """Status, folder and the lines on stderr of a report."""
    capsys.readouterr()
    status, out = build(root, *words)
    return status, out, capsys.readouterr().err.splitlines()


def test_missing_and_unfinished_runs_are_named(tmp_path, capsys):
    root = two_data_sets(tmp_path / "runs")
    two_data_sets(root, trainer="CoOp")
    make(root, "Caltech101", 50.0, 1, "base", "ZeroshotCLIP")
    run = "base2new/{}/shots_16/{}/vit_b16_ctxv1/seed{}/results.json"
    for half, seed in (("test_new", 2), ("train_base", 3), ("test_new", 3)):
        (root / run.format(f"{half}/caltech101", "LoGoPrompt", seed)).unlink()
    for half, seed in product(("train_base", "test_new"), (1, 2, 3)):
        (root / run.format(f"{half}/eurosat", "CoOp", seed)).unlink()
    (root / "few_shot/dtd/shots_1/CoOp/rn50/seed1/prompt_learner").mkdir(parents=True)
    status, out, lines = incomplete(root, capsys)
    assert status == 1 and lines[-1] == "incomplete (13 lines at the end of the report)"
    unfinished = [line for line in lines if line.startswith("unfinished: ")]
    assert len(unfinished) == 3 + 6 + 1 and sum("dtd" in line for line in unfinished) == 1
    prefix = "missing: base-to-new, 16 shots: "  # of rows that have a run
    assert sorted(line for line in lines if line.startswith("missing")) == [
        f"{prefix}LoGoPrompt on Caltech101, base with seed 3",
        f"{prefix}LoGoPrompt on Caltech101, new with seed 2, 3",
        f"{prefix}ZeroshotCLIP on Caltech101, new",
    ]
    assert ("EuroSAT", "CoOp", "base") not in cells(out)
    status, out = build(root, "--partial")
    found = cells(out)
    assert status == 0 and found["Caltech101", "LoGoPrompt", "base"]["mean"] == 91  # of the two finished ones
    assert found["Caltech101", "LoGoPrompt", "H"]["mean"] == pytest.approx(72)  # of the one seed with both
    assert (AVERAGE, "CoOp", "H") not in found  # no average over fewer data sets
    assert found[AVERAGE, "LoGoPrompt", "base"]["mean"] == pytest.approx((91 + 85) / 2)
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "LoGoPrompt on Caltech101, new with seed 2, 3" in text and "± 1.41 (n=2)" in text


DAMAGED = ["{", "[1]", "{}", '{"run": {}, "metrics": {"accuracy": 1}, "split": "test"}', "\x80"]
CONFIGS = ["{", "[1]", "a: !!python/object:os.system {}", "{" * 9999]
IMPOSSIBLE = {"accuracy": ["NaN", "101", '"50"'], "seed": ['"1"'], "subsample_classes": ['"half"']}
CASES = [*product(["results.json"], DAMAGED), *product(["config.yaml"], CONFIGS)]
CASES += [(key, value) for key, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize("name, content", CASES)
def test_damaged_files_and_impossible_values_are_named(tmp_path, capsys, name, content):
    make(tmp_path / "runs", "Food101", 50.0)
    folder = make(tmp_path / "runs", "Caltech101", 50.0)
    if name in IMPOSSIBLE:
        text = (folder / "results.json").read_text()
        (folder / "results.json").write_text(re.sub(rf'"{name}": [^,}}]+', f'"{name}": {content}', text))
    else:
        (folder / name).write_bytes(content.encode("latin-1"))
    status, _, lines = incomplete(tmp_path / "runs", capsys, "--seeds", "1")
    assert status == 1 and len(lines) == 2 and lines[0].startswith("damaged: ") and str(folder) in lines[0]
    assert name not in IMPOSSIBLE or (f"{name} " in lines[0] and content.strip('"').lower() in lines[0])
    assert build(tmp_path / "runs", "--seeds", "1", "--partial")[0] == 0


def test_a_run_that_is_found_twice_counts_once(tmp_path):
    make(tmp_path / "runs", "Food101", 50.0)
    (tmp_path / "links").mkdir()  # named twice, or linked to
    (tmp_path / "links/there").symlink_to(tmp_path / "runs/few_shot")
    (tmp_path / "links/round").symlink_to(tmp_path / "links")
    assert build(tmp_path / "links", str(tmp_path / "runs/few_shot"), "--seeds", "1")[0] == 0
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 1


@pytest.mark.parametrize(
    "section, key, usual, other",
    [("OPTIM", "LR", 0.1, 0.2), ("TRAIN", "DROP_LAST", True, False), ("TEST", "FINAL_MODEL", "last_step", "best_val")],
)
def test_seeds_with_other_settings_do_not_share_a_cell(tmp_path, section, key, usual, other):
    for seed, value in ((1, usual), (2, usual), (3, other)):
        config = f"SEED: {seed}\nDATALOADER:\n  NUM_WORKERS: {seed}\n{section}:\n  {key}: {value}\n"
        (make(tmp_path / "runs", "Food101", 50.0 + seed, seed) / "config.yaml").write_text(config)
    assert {row: cell["mean"] for (_, row, _), cell in good(tmp_path / "runs").items()} == {
        "LoGoPrompt": 51.5,
        f"LoGoPrompt ({section}.{key} {other})": 53,
    }


def test_notes_do_not_make_it_fail(tmp_path, capsys):
    make(tmp_path / "runs", "Food101", 50.0, collapsed=True)
    make(tmp_path / "runs", "Food101", 60.0, 4)
    for dataset, change in (("Caltech101", {"split": "val"}), ("EuroSAT", {"metrics": {}, "split": None})):
        path = make(tmp_path / "runs", dataset, 60.0) / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    status, out, lines = incomplete(tmp_path / "runs", capsys, "--seeds", "1")
    text = (out / "report.md").read_text()
    assert status == 0 and len(cells(out)) == 1 and "50.00†" in text
    assert "† LoGoPrompt on Food101, seed 1: training collapsed." in text
    assert [line.split(": ")[0] for line in lines] == ["left out"] * 3


def test_mistakes_end_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    make(tmp_path / "runs", "Food101", 50.0)
    for (root, *words), why in (
        ((tmp_path / "nowhere",), "nowhere: no such folder"),
        ((tmp_path / "empty",), "no results.json"),
        ((tmp_path / "runs", "--seeds", "7"), "no results.json with a test accuracy of --seeds"),
        ((tmp_path / "runs", "--seeds", "1", "--out", str(tmp_path / "file")), "file"),
    ):
        capsys.readouterr()
        assert build(root, *words)[0] == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith("error: ") and why in errors[-1] and sum("error" in line for line in errors) == 1


def page_loads(out):
    """The page's text without markup, and what it would load."""
    page = (out / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|object)|url\(|@import", page)
    return html.unescape(re.sub(r"<[^>]*>", "\n", page)), re.findall(r'\b(?:src|srcset|href|data)="([^"]*)"', page)


def test_the_page_is_self_contained(tmp_path):
    root = two_data_sets(tmp_path / "runs")
    make(root, "<script>alert(1)</script>", 50.0, trainer="![x](http://a.b/c.png)", config='"&')
    make(root, "<b>|*x*|", 50.0, trainer="[x](http://a.b)")
    status, out = build(root, "--partial")
    text, loads = page_loads(out)
    kinds = [re.match(r"data:image/([a-z+]+);base64,", load)[1] for load in loads]
    assert status == 0 and kinds == ["svg+xml"] * 4  # for wide and for narrow screens
    for words in ("± 2.00", "<script>alert(1)</script>", "<b>|*x*|", "[x](http://a.b)"):
        assert f"\n{words}\n" in text


def test_figures_show_the_numbers(tmp_path):
    two_data_sets(tmp_path / "runs", trainer="CoOp")
    root = two_data_sets(tmp_path / "runs")
    tables = report_data.make_report([root], [1, 2, 3]).tables
    for narrow in (False, True):
        ((name, figure),) = report.figures(tables, narrow)
        base, new, h = figure.axes
        assert name == "base2new" and [axes.get_title() for axes in (base, new, h)] == ["base", "new", "H"]
        coop, ours = new.containers
        assert list(ours.lines[0].get_xdata()) == list(coop.lines[0].get_xdata()) == pytest.approx([55, 70, 40])
        assert (coop.lines[0].get_ydata() < ours.lines[0].get_ydata()).all()
        segments = [sorted(segment[:, 0]) for segment in ours.lines[2][0].get_segments()]
        assert np.array(segments) == pytest.approx(np.array([[55, 55], [60, 80], [30, 50]]))
        hollow = [list(line.get_xdata()) for line in new.lines if line.get_fillstyle() == "none"]
        assert hollow[1] == pytest.approx([81.61, 93.78, 69.44])
        assert base.get_xlim() == new.get_xlim() == h.get_xlim()
    assert figure.get_figwidth() < 4.5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The report of a mixed output, its folder and the frame of its runs."""
    root = mixed_output(tmp_path_factory.mktemp("mixed") / "runs")
    _, out = build(root, "--partial")
    return root, out, pd.read_csv(out / "runs.csv", keep_default_na=False)


def test_a_mixed_output_is_reported_without_refusal(mixed):
    root, out, runs = mixed
    assert set(runs.folder) == {str(path.parent.resolve()) for path in root.rglob("results.json")}
    assert {"a/photos", "b/photos", "Birds of Europe", "birds2", "Shapes"} == set(runs.dataset)
    assert {"tiny", "first/clip.pt", "second/clip.pt"} == set(runs.backbone)
    mine = runs[runs.folder.str.endswith("/mine_rate")].iloc[0]
    assert (mine.epochs, mine.overrides) == (50, "DATASET.NUM_SHOTS 4, DATASET.SUBSAMPLE_CLASSES all, "
        f"MODEL.BACKBONE.NAME {root}/weights/first/clip.pt, OPTIM.LR 0.1, TRAINER.LOGOPROMPT.K 3")  # fmt: skip
    found = cells(out)
    ours = {row: cell["mean"] for (section, row, _), cell in found.items() if section == "a/photos"}
    assert ours == {
        "CoOp": 81.06,
        "LoGoPrompt (first/clip.pt, 50 epochs)": 81,
        "LoGoPrompt (second/clip.pt, 50 epochs)": 79.5,
        "LoGoPrompt (first/clip.pt, 2 epochs)": 70,
        "LoGoPrompt (first/clip.pt, 50 epochs, OPTIM.LR 0.1, K 3)": 70,
        "LoGoPrompt (first/clip.pt, 50 epochs, OPTIM.LR 9.0)": 70,
    }
    assert found["Birds of Europe", "LoGoPrompt (first/clip.pt, 50 epochs, on photos)", "4 shots"]["mean"] == 31
    demo = [found["Shapes", "CoOp (demo/runs/CoOp/base)", column]["mean"] for column in ("base", "new", "H")]
    assert demo == pytest.approx([78.54, 80.24, harmonic_mean(78.54, 80.24)])
    text = (out / "report.md").read_text()
    assert "counted once" in text and "/mine_eval repeats " in text and "the same run" not in text
    assert len(re.findall(r"70\.00†", text)) == 2 and "mine: nothing was learned" not in text
    assert "The block of the true class changes its log-odds by -0.20" in text
    empty = [line for line in text.splitlines() if line.startswith("|") and " – " in line]
    assert not empty  # every row has all of its columns


def test_methods_are_told_apart_by_colour_and_marker(mixed):
    tables = report_data.make_report([mixed[0]], []).tables
    drawn = [figure for _, figure in report.figures(tables) if figure]
    looks = {}
    for figure in drawn:
        legend = figure.legends[0]
        names, within = [text.get_text() for text in legend.get_texts()], {}
        for axes in figure.axes:
            for handle, name in zip(*axes.get_legend_handles_labels()):
                line = handle.lines[0]
                within[name] = line.get_color(), line.get_marker(), line.get_fillstyle()
                looks.setdefault(name, set()).add(within[name])
            low, high = axes.get_ylim() if "shots" in axes.get_xlabel() else axes.get_xlim()
            assert high - low >= report.MIN_SPAN
        assert set(within) == set(names) and len(set(within.values())) == len(names)
    nine = [looks[name] for name in NINE]
    assert all(len(look) == 1 for look in nine)  # in all figures the same
    assert len({next(iter(look))[:2] for look in nine}) == 9
    curves = drawn[-1].axes[0].containers
    dodged = [{round(float(x), 6) for x in container.lines[0].get_xdata()} for container in curves]
    assert dodged[0].isdisjoint(dodged[1])


def test_the_same_runs_give_the_same_bytes(tmp_path, monkeypatch):
    root = two_data_sets(tmp_path / "runs")
    _, out = build(root)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"base2new.png", "base2new.svg", "report.html", "report.md", "runs.csv", "cells.csv"}
    (out / "few_shot.png").touch()  # of an earlier report: removed
    (out / "mine.png").touch()
    build(root)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after == {**before, "mine.png": b""}

    def full(*_):
        raise OSError("no space left")

    two_data_sets(root, trainer="CoOp")
    monkeypatch.setattr("os.replace", full)
    assert build(root)[0] == 2  # and the earlier report is unchanged
    assert {path.name: path.read_bytes() for path in out.iterdir()} == after


def test_kind_follows_from_the_folder(tmp_path):
    for folder, expected in {
        "few_shot/shapes/shots_1": ("few_shot", ""),
        "domain_generalization/from_shapes/shapes_shifted/shots_16": ("domain_generalization", "shapes"),
        "cross_dataset/from_imagenet/dtd/shots_16": ("cross_dataset", "imagenet"),
        "cross_dataset/mine/seed1": ("few_shot", ""),
        "ablation/4a_none/imagenet/seed1": ("ablation", "4a_none"),
        "ablation/few_shot/x/seed1": ("few_shot", ""),  # the innermost
    }.items():
        assert report_data.kind_and_scope(tmp_path / folder, "all") == expected


@pytest.fixture(scope="module")
def real_run(data_root, rn_file, tmp_path_factory):
    folder, stdout = tmp_path_factory.mktemp("runs") / "real", sys.stdout
    try:
        assert train.main(arguments("LoGoPrompt", data_root, rn_file, folder)) == 0
    finally:
        sys.stdout = stdout
    return folder


def test_a_real_run_with_predictions(real_run, capsys):
    status, out = build(real_run, "--seeds", "1", "--partial", "--predictions", "4")
    text, loads = page_loads(out)
    assert status == 0 and "no example predictions" not in capsys.readouterr().err
    (mean,) = [cell["mean"] for cell in cells(out).values()]
    assert mean == pytest.approx(read_results(str(real_run))["metrics"]["accuracy"])
    captions = re.findall(r"\n([\w ]+)/image_\d+\.jpg: (right|wrong), ([\w ]+)\n", text)
    assert sum(load.startswith("data:image/png") for load in loads) == len(captions) == 4
    assert all((verdict == "right") == (truth == predicted) for truth, verdict, predicted in captions)


def test_a_report_without_data_or_weights_has_no_predictions(real_run, data_root, rn_file, tmp_path, capsys):
    config = (real_run / "config.yaml").read_text()
    for name, old, new in (("a", str(data_root), str(tmp_path)), ("b", str(rn_file), "RN101")):
        folder = shutil.copytree(real_run, tmp_path / name)
        (folder / "config.yaml").write_text(config.replace(old, new))
        capsys.readouterr()
        assert build(folder, "--seeds", "1", "--partial", "--predictions", "4")[0] == 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("no example predictions (--predictions): ") and new in last
