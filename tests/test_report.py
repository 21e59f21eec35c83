"""tools/report.py: its numbers against ones worked out by hand, what it refuses, and what it writes."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from test_base2new import TINY
from test_base2new import run as run_script
from test_scripts import runs as script_runs

import published
import report
import report_figures
import report_tables
from trainers.prompting.results import harmonic_mean, read_results

KEYS = {name: key for key, name in published.NAMES.items()}


def make(root, dataset, accuracy, seed=1, subset="all", trainer="LoGoPrompt", kind="few_shot", **run):
    """One run as scripts/logo would leave it. Returns its folder."""
    shots, trained = run.setdefault("shots", 16), subset != "new" and trainer != "ZeroshotCLIP"
    config = run.pop("config", "vit_b16_ctxv1")
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


def two_data_sets(root, **run):
    for dataset, accuracies in BASE.items():
        for seed, pair in enumerate(zip(accuracies, NEW[dataset]), start=1):
            for subset, accuracy in zip(("base", "new"), pair):
                make(root, dataset, accuracy, seed, subset, **run)


def build(root, *words):
    """The command's status and its folder."""
    out = root.parent / "out"
    return report.main([str(root), "--out", str(out), *words]), out


def cells(out):
    """cells.csv as {(section, row, column): {"mean": …}}; empty cells are None."""
    with open(out / "cells.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    number = {key: float for key in ("mean", "std", "published", "difference")}
    return {
        (line["section"], line["row"], line["column"]): {
            key: (number.get(key, str)(value) if value else None) for key, value in line.items()
        }
        for line in lines
    }


# ------------------------------------------------------------------------------------------------- numbers


def test_published_values_are_those_of_the_paper(golden):
    paper = json.loads((golden / "paper_tables.json").read_text())
    for key, name in published.NAMES.items():
        assert f'NAME: "{name}"' in (ROOT / "configs" / "datasets" / f"{key}.yaml").read_text()
    names = {**published.NAMES, "average": "average"}
    expected = {}
    for key, methods in paper["table1_base_to_new_vit_b16_16shot"].items():
        for method, row in methods.items():
            expected.setdefault(method, {})[names[key]] = row
    assert expected == published.BASE_TO_NEW
    for table, mine in (
        ("table2_few_shot_rn50_16shot", published.FEW_SHOT),
        ("table3_domain_generalization_vit_b16", published.DOMAIN_GENERALIZATION),
    ):
        assert mine == {
            method: {names[key]: {} if v is None else {"accuracy": v} for key, v in row.items()}
            for method, row in paper[table].items()
        }
    assert paper["table4_ablation_imagenet_rn50_16shot"] == published.ABLATION


def test_which_h_the_paper_averages():
    """What the report says of it: H of the averages, but for two methods the average of H."""
    for method, rows in published.BASE_TO_NEW.items():
        average, datasets = rows["average"], [row for name, row in rows.items() if name != "average"]
        of_means = harmonic_mean(average["base"], average["new"])
        mean_of = sum(row["H"] for row in datasets) / 11
        printed, other = (mean_of, of_means) if method in ("VPT", "DPT") else (of_means, mean_of)
        assert average["H"] == pytest.approx(printed, abs=0.006) and abs(average["H"] - other) > 0.1
        assert published.average("base2new", method, list(rows.keys() - {"average"}), "H") == round(of_means, 2)
        for name, row in rows.items():
            if name != "average" and (method, name) != ("DPT", "OxfordFlowers"):
                assert row["H"] == pytest.approx(harmonic_mean(row["base"], row["new"]), abs=0.011)
        if method in ("CLIP", "CoOp", "CoCoOp", "LoGoPrompt"):
            assert f"{method} {average['H']:.2f}" in report_tables.ABOUT_H and f"{mean_of:.2f}" in report_tables.ABOUT_H


def test_base_to_new_by_hand(tmp_path, capsys):
    two_data_sets(tmp_path / "runs")
    status, out = build(tmp_path / "runs")
    assert status == 0
    found = cells(out)
    caltech = [found["Caltech101", "LoGoPrompt", column] for column in ("base", "new", "H")]
    assert [cell["mean"] for cell in caltech] == pytest.approx([92, 70, 2 * 92 * 70 / 162])
    # deviations of the sample; H of the seeds are 72, 12880/162 and 15040/174
    assert [cell["std"] for cell in caltech] == pytest.approx([2, 10, 52.13305**0.5], abs=1e-4)
    assert caltech[2]["mean"] == pytest.approx(79.50617, abs=1e-5)
    mean_of_h = (72 + 12880 / 162 + 15040 / 174) / 3
    assert mean_of_h == pytest.approx(79.31432, abs=1e-5)  # which is another number
    eurosat = found["EuroSAT", "LoGoPrompt", "H"]
    assert eurosat["mean"] == pytest.approx(2 * 90 * 40 / 130)
    # The average: base (92 + 90) / 2, new (70 + 40) / 2, of a seed (90 + 80) / 2 = 85, 91, 97 and 55, 55, 55
    average = [found["Average of 2 data sets", "LoGoPrompt", column] for column in ("base", "new", "H")]
    assert [cell["mean"] for cell in average] == pytest.approx([91, 55, 2 * 91 * 55 / 146])
    assert [cell["std"] for cell in average] == pytest.approx([6, 0, 2.91155**0.5], abs=1e-4)
    assert average[2]["n"] == "3" and average[2]["seeds"] == "1 2 3"
    # The paper: 98.19 93.78 95.93 and 93.67 69.44 79.75; averages of these two, and H of the averages
    assert [cell["published"] for cell in caltech] == [98.19, 93.78, 95.93]
    assert caltech[0]["difference"] == pytest.approx(92 - 98.19)
    assert [cell["published"] for cell in average] == pytest.approx([95.93, 81.61, 88.19])
    text = (out / "report.md").read_text()
    assert (
        "| Caltech101 | LoGoPrompt | 92.00 ± 2.00 | 98.19 | −6.19 | 70.00 ± 10.00 | 93.78 | −23.78 | 79.51 ± " in text
    )
    assert f"Mean of the 2 H, for comparison: LoGoPrompt {(79.50617 + 55.38462) / 2:.2f}." in text
    printed = capsys.readouterr().out
    assert re.search(r"Caltech101 +│ LoGoPrompt +│ +92\.00 ± 2\.00 +│ 98\.19 │ −6\.19 ", printed)
    with open(out / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    measured = {(line["dataset"], line["subset"], int(line["seed"])): float(line["accuracy"]) for line in lines}
    assert len(lines) == len(measured) == 12 and measured["EuroSAT", "new", 3] == 30
    assert all(line["folder"].endswith(f"seed{line['seed']}") for line in lines)


def test_a_narrow_terminal_shows_every_digit(tmp_path):
    two_data_sets(tmp_path / "runs")
    two_data_sets(tmp_path / "runs", trainer="CoOp")
    made = report.Report(report.collect([tmp_path / "runs"], [1, 2, 3]), [1, 2, 3])
    wide, narrow = (Console(width=width, record=True, file=io.StringIO()) for width in (200, 80))
    for console in (wide, narrow):
        report.terminal(made, console)
    wide, narrow = wide.export_text(), narrow.export_text()
    assert "│ 92.00 ± 2.00 │ 98.19 │ −6.19 │" in wide.replace("  ", " ") and "…" not in wide + narrow
    lines = narrow.splitlines()
    at = next(i for i, line in enumerate(lines) if "Caltech101" in line)  # CoOp, on two lines
    cells = [[cell.strip() for cell in line.split("│")[3:6]] for line in lines[at : at + 2]]
    assert cells == [["92.00 ± 2.00", "70.00 ± 10.00", "79.51 ± 7.22"], ["98.00 −6.00", "89.81 −19.81", "93.73 −14.22"]]
    assert max(map(len, lines)) <= 80


def test_the_eleven_are_compared_with_the_printed_average(tmp_path):
    for name, row in published.BASE_TO_NEW["CoOp"].items():
        for subset in ("base", "new"):
            if name != "average":
                make(tmp_path / "runs", name, row[subset], 1, subset, "CoOp")
    make(tmp_path / "runs", "Shapes", 10.0, 1, "base", "CoOp")  # not of the paper: not in the average
    make(tmp_path / "runs", "Shapes", 10.0, 1, "new", "CoOp")
    status, out = build(tmp_path / "runs", "--seeds", "1")
    found = cells(out)
    average = {column: found["Average of 11 data sets", "CoOp", column] for column in ("base", "new", "H")}
    assert status == 0 and [cell["published"] for cell in average.values()] == [82.69, 63.22, 71.66]
    assert all(abs(cell["difference"]) < 0.01 and cell["std"] is None for cell in average.values())
    assert found["Shapes", "CoOp", "base"]["published"] is None


def test_few_shot_curves(tmp_path):
    for shots, config in ((1, "rn50_ep50"), (2, "rn50_ep100"), (16, "rn50")):
        for seed in (1, 2, 3):
            for dataset, accuracy in (("Caltech101", 90.0), ("Food101", 70.0)):
                make(
                    tmp_path / "runs", dataset, accuracy + shots * seed / 10, seed, config=config, shots=shots,
                    backbone="RN50",
                )  # fmt: skip
    make(tmp_path / "runs", "Caltech101", 60.0, 1, trainer="ZeroshotCLIP", config="rn50", backbone="RN50")
    make(tmp_path / "runs", "Food101", 50.0, 1, trainer="ZeroshotCLIP", config="rn50", backbone="RN50")
    status, out = build(tmp_path / "runs")
    assert status == 0  # zero-shot: one seed and one number of shots say all
    found = cells(out)
    cell = found["Caltech101", "LoGoPrompt", "16 shots"]
    assert (cell["mean"], cell["std"], cell["published"]) == (pytest.approx(93.2), pytest.approx(1.6), 92.98)
    assert found["Average of 2 data sets", "LoGoPrompt", "16 shots"]["published"] == pytest.approx((92.98 + 78.73) / 2)
    assert found["Average of 2 data sets", "LoGoPrompt", "2 shots"]["mean"] == pytest.approx(80.4)
    assert found["Food101", "LoGoPrompt", "1 shot"]["published"] is None  # 16 shots are printed, no others
    assert [found["Food101", "ZeroshotCLIP", column]["mean"] for column in ("1 shot", "2 shots", "16 shots")] == [
        50
    ] * 3
    assert (out / "few_shot.png").exists()


def test_transfers(tmp_path):
    targets = {"ImageNet": 70.0, "ImageNetV2": 60.0, "ImageNetSketch": 50.0, "ImageNetA": 40.0, "ImageNetR": 75.0}
    for kind, accuracies in (("domain_generalization", targets), ("cross_dataset", {"ImageNet": 70.0, "DTD": 40.0})):
        for dataset, accuracy in accuracies.items():
            dataset = {"DTD": "DescribableTextures"}.get(dataset, dataset)
            for seed in (1, 2, 3):
                make(
                    tmp_path / "runs", dataset, accuracy + seed, seed, kind=f"{kind}/from_imagenet", config="vit_b16_x"
                )
    make(tmp_path / "runs", "Caltech101", 50.0, 1, kind="cross_dataset/from_imagenet", config="vit_b16_x")
    status, out = build(tmp_path / "runs", "--partial")
    found = cells(out)
    average = found["Average of 5 data sets", "LoGoPrompt", "accuracy"]
    assert status == 0 and average["mean"] == pytest.approx(61) and average["std"] == pytest.approx(1)
    assert average["published"] == 63.82  # with the source; without it 60.96
    assert found["Average of 2 data sets", "LoGoPrompt", "accuracy"]["mean"] == pytest.approx((41 + 50) / 2)  # targets
    titles = re.findall(r"^## (.*)", (out / "report.md").read_text(), re.M)
    assert titles == [
        "Table 3: domain generalization from imagenet, 16 shots",
        "Cross-data-set transfer from imagenet, 16 shots",
    ]


def test_ablations_are_the_rows_that_the_script_makes(tmp_path, capsys):
    made = {
        call["--output-dir"].split("/ablation/")[1].split("/")[0]
        for call in script_runs(tmp_path, "ablation", "shapes", "1")
    }
    assert made == {folder for *_, folders in report_tables.ABLATION for folder in folders.values()}
    root = tmp_path / "runs"
    for i, row in enumerate(sorted(made - {"4c_16"})):
        for seed in (1, 2, 3):
            make(root, "ImageNet", 60.0 + i + seed, seed, kind=f"ablation/{row}", config="rn50_ep50", backbone="RN50")
    status, out = build(root)
    assert status == 0  # without initial words M is 16: the shipped row is that of 4c
    found = cells(out)
    shipped = {key[:2]: cell for key, cell in found.items() if cell["mean"] == pytest.approx(62 + 9)}
    assert [row for _, row in shipped] == ["selection", "1/7", "16", "random"]
    assert {cell["published"] for cell in shipped.values()} == {66.34}
    assert found["4a: use of the visual prompts", "none", "accuracy"]["published"] is None
    assert found["4d: place of the block", "top", "accuracy"]["published"] == 65.98
    for row in made - {"4c_16"}:
        for seed in (1, 2, 3):
            words = {"kind": f"ablation/{row}", "config": "rn50_ep50", "backbone": "RN50", "shots": 8}
            make(tmp_path / "eight", "ImageNet", 60.0, seed, **words)
    status, out = build(tmp_path / "eight")
    assert status == 0 and {cell["published"] for cell in cells(out).values()} == {None}
    # one row short, and on another data set, from words: named, and nothing to compare with
    for row in made - {"4c_16"}:
        make(tmp_path / "more", "Shapes", 60.0, 1, kind=f"ablation/{row}", config="tiny96_ep10_ctxv1", backbone="tiny")
    capsys.readouterr()
    assert build(tmp_path / "more", "--seeds", "1")[0] == 1
    assert "missing: ablation: LoGoPrompt on Shapes, tiny, 16 shots, row 4c_16 with seed 1" in capsys.readouterr().err
    status, out = build(tmp_path / "more", "--seeds", "1", "--partial")
    assert status == 0 and {cell["published"] for cell in cells(out).values()} == {None}


def test_backbones():
    for name in ("ViT-B/16", "/weights/ViT-B-16.pt", "ViT-B-16/openai", "vit-b/16"):
        assert published.same_backbone(name, "ViT-B/16")
    for name in ("ViT-B/32", "tiny", "ViT-B-16/laion2b", "RN50"):
        assert not published.same_backbone(name, "ViT-B/16")


def test_no_comparison_with_another_backbone_or_other_shots(tmp_path):
    two_data_sets(tmp_path / "a", backbone="RN50")
    two_data_sets(tmp_path / "b", shots=8)
    for runs in ("a", "b"):
        status, out = build(tmp_path / runs)
        assert status == 0 and {cell["published"] for cell in cells(out).values()} == {None}


def test_rows(tmp_path):
    """Another schedule on another data set is the same row; two on one data set, or two backbones, are two."""
    make(tmp_path / "a", "ImageNet", 60.0, config="rn50_ep50")
    make(tmp_path / "a", "Food101", 60.0, config="rn50")
    adapter = make(tmp_path / "a", "Food101", 70.0, kind="adapter/few_shot", config="rn50")
    (adapter / "config.yaml").write_text("TRAINER:\n  LOGOPROMPT:\n    ADAPTER: true\n")
    make(tmp_path / "a", "ImageNet", 70.0, kind="adapter/few_shot", config="rn50_ep50")
    (tmp_path / "a/adapter/few_shot/imagenet/shots_16/LoGoPrompt/rn50_ep50/seed1/config.yaml").write_text(
        "TRAINER:\n  LOGOPROMPT:\n    ADAPTER: true\n"
    )
    status, out = build(tmp_path / "a", "--seeds", "1")
    assert status == 0 and {row for _, row, _ in cells(out)} == {"LoGoPrompt", "LoGoPrompt+Adapter"}
    make(tmp_path / "b", "Food101", 60.0, config="rn50_ep50")
    make(tmp_path / "b", "Food101", 61.0, config="rn50")
    status, out = build(tmp_path / "b", "--seeds", "1")
    assert {row for _, row, _ in cells(out)} == {"LoGoPrompt (rn50_ep50, ViT-B/16)", "LoGoPrompt (rn50, ViT-B/16)"}
    make(tmp_path / "c", "Food101", 60.0)
    make(tmp_path / "c/more", "Food101", 61.0, backbone="RN50")
    status, out = build(tmp_path / "c", "--seeds", "1")
    assert status == 0 and len(cells(out)) == 2


# ------------------------------------------------------------------------------------------------- what is amiss


def refused(root, capsys, *words):
    """Status and the lines on stderr of a report that must not be written."""
    capsys.readouterr()
    status, out = build(root, *words)
    assert not out.exists()
    return status, capsys.readouterr().err.splitlines()


def test_missing_and_unfinished_runs_are_named(tmp_path, capsys):
    root = tmp_path / "runs"
    two_data_sets(root)
    two_data_sets(root, trainer="CoOp")
    caltech = "base2new/{}/caltech101/shots_16/LoGoPrompt/vit_b16_ctxv1/seed{}/results.json"
    (root / caltech.format("test_new", 2)).unlink()
    (root / caltech.format("train_base", 3)).unlink()
    (root / caltech.format("test_new", 3)).unlink()
    for seed in (1, 2, 3):
        for half in ("train_base", "test_new"):
            (root / f"base2new/{half}/eurosat/shots_16/CoOp/vit_b16_ctxv1/seed{seed}/results.json").unlink()
    checkpoints = root / "few_shot/dtd/shots_1/CoOp/rn50/seed1/prompt_learner"
    checkpoints.mkdir(parents=True)
    status, lines = refused(root, capsys)
    assert status == 1
    unfinished = [line for line in lines if line.startswith("unfinished: ")]
    assert len(unfinished) == 3 + 6 + 1 and sum("dtd" in line for line in unfinished) == 1
    prefix = "missing: base-to-new, 16 shots: "
    assert [line for line in lines if line.startswith("missing")] == [
        f"{prefix}CoOp on EuroSAT, base and new with seed 1, 2, 3",
        f"{prefix}LoGoPrompt on Caltech101, new with seed 2",
        f"{prefix}LoGoPrompt on Caltech101, base and new with seed 3",
    ]
    assert lines[-1] == "incomplete (13 lines above): --partial makes the report all the same"
    status, out = build(root, "--partial")
    assert status == 0
    found = cells(out)
    assert found["Caltech101", "LoGoPrompt", "base"]["mean"] == 91  # of the two that there are
    assert found["Caltech101", "LoGoPrompt", "H"]["mean"] == pytest.approx(72)  # of the one that has both
    assert ("Average of 2 data sets", "CoOp", "H") not in found  # an average over fewer is none
    assert found["Average of 2 data sets", "LoGoPrompt", "base"]["mean"] == pytest.approx((91 + 85) / 2)
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "LoGoPrompt on Caltech101, new with seed 2" in text and "(n=2)" in text


def test_a_lone_base_half_is_missing_its_new_one(tmp_path, capsys):
    for trainer in ("LoGoPrompt", "ZeroshotCLIP"):
        make(tmp_path / "runs", "Food101", 50.0, 1, "base", trainer)
    status, lines = refused(tmp_path / "runs", capsys, "--seeds", "1")
    assert status == 1 and lines[:2] == [
        "missing: base-to-new, 16 shots: ZeroshotCLIP on Food101, new",
        "missing: base-to-new, 16 shots: LoGoPrompt on Food101, new with seed 1",
    ]


@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "Expecting property name"),
        ("[1]", "list indices"),
        ("{}", "has no 'run'"),
        ('{"run": {}, "metrics": {"accuracy": 1}, "split": "test"}', "has no 'trainer'"),
        ('"accuracy": NaN', "accuracy nan"),
        ('"accuracy": 101', "accuracy 101"),
        ('"accuracy": "50"', "accuracy 50"),
        ('"seed": "1"', "seed '1'"),
        ('"subsample_classes": "half"', "subsample_classes 'half'"),
        ("\x80", ""),
    ],
)
def test_damaged_results_are_named(tmp_path, capsys, content, why):
    make(tmp_path / "runs", "Food101", 50.0)
    path = make(tmp_path / "runs", "Caltech101", 50.0) / "results.json"
    if content.startswith('"'):
        content = re.sub(rf"{content.split(':')[0]}: [^,}}]+", content, path.read_text())
    path.write_bytes(content.encode("latin-1"))
    status, lines = refused(tmp_path / "runs", capsys, "--seeds", "1")
    assert status == 1 and len(lines) == 2 and lines[0].startswith("damaged: ") and why in lines[0]
    assert "caltech101/shots_16/LoGoPrompt/vit_b16_ctxv1/seed1/results.json" in lines[0]
    assert build(tmp_path / "runs", "--seeds", "1", "--partial")[0] == 0


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    one = make(tmp_path / "runs", "Food101", 50.0)
    other = make(tmp_path / "runs/copy", "Food101", 50.0)
    for words in ((), ("--partial",)):
        status, lines = refused(tmp_path / "runs", capsys, "--seeds", "1", *words)
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: the same run 2 times: ")
        assert str(one) in lines[0] and str(other) in lines[0]
    # but a folder that is named twice, or linked to, is one
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(tmp_path / "runs" / "few_shot")
    (tmp_path / "links" / "round").symlink_to(tmp_path / "links")
    words = [str(tmp_path / "links"), str(tmp_path / "runs" / "few_shot"), "--seeds", "1"]
    assert report.main([*words, "--out", str(tmp_path / "out")]) == 0


def test_seeds_of_other_settings_do_not_share_a_cell(tmp_path, capsys):
    for seed, rate in ((1, 0.1), (2, 0.1), (3, 0.2)):
        folder = make(tmp_path / "runs", "Food101", 50.0, seed)
        (folder / "config.yaml").write_text(
            f"OUTPUT_DIR: {folder}\nSEED: {seed}\nDATALOADER:\n  NUM_WORKERS: {seed}\nOPTIM:\n  LR: {rate}\n"
        )
    status, lines = refused(tmp_path / "runs", capsys)
    assert status == 1 and len(lines) == 2 and lines[0].startswith("mixed: ")
    assert "seed3 has OPTIM.LR 0.2, not 0.1 as " in lines[0]


def test_notes_do_not_make_it_fail(tmp_path, capsys):
    root = tmp_path / "runs"
    make(root, "Food101", 50.0, 1, collapsed=True)
    make(root, "Food101", 60.0, 4)
    for dataset, change in (("Caltech101", {"split": "val"}), ("EuroSAT", {"metrics": {}, "split": None})):
        path = make(root, dataset, 60.0) / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    status, out = build(root, "--seeds", "1", "--predictions", "0")
    lines = capsys.readouterr().err.splitlines()
    assert status == 0 and len(lines) == 4
    assert any(line.startswith("collapsed: the training of ") and "food101" in line for line in lines)
    assert any("seed4 has seed 4, which is not among --seeds" in line for line in lines)
    assert sum("measured nothing on test images" in line for line in lines) == 2
    assert len(cells(out)) == 1 and "collapsed: the training of" in (out / "report.html").read_text()


def test_mistakes_end_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "runs", "Food101", 50.0)
    (tmp_path / "file").touch()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").touch()
    (pictures / "captions.json").write_text('{"b.png": "b"}')
    one = (tmp_path / "runs", "--seeds", "1")
    for (root, *words), why in (
        ((tmp_path / "nowhere",), "nowhere: no such folder"),
        ((tmp_path / "empty",), "no results.json"),
        ((tmp_path / "runs", "--seeds", "7"), "no results.json with a test accuracy of --seeds"),
        ((*one, "--examples", str(tmp_path / "nowhere")), "(--examples)"),
        ((*one, "--examples", str(tmp_path / "empty")), "no PNG or JPEG files"),
        ((*one, "--examples", str(pictures)), "captions.json: there is no picture b.png"),
        ((*one, "--out", str(tmp_path / "file")), "file"),
    ):
        capsys.readouterr()
        assert build(root, *words)[0] == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith("error: ") and why in errors[-1] and sum("error" in line for line in errors) == 1


# ------------------------------------------------------------------------------------------------- what it writes


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what would be loaded and the rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.rows, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        self.loads += [value for key, value in attributes if key in ("src", "srcset", "data")]
        self.loads += [value for key, value in attributes if key.endswith("href") and not value.startswith("#")]
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "tr" in self.open:
            self.rows[-1] += f" {text.strip()}"
        self.words.append(text)


def test_the_page_needs_nothing_else(tmp_path):
    root = tmp_path / "runs"
    two_data_sets(root)
    make(root, "<script>alert(1)</script>", 50.0, 1, config='"&')
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("b.png", "a_cat.jpg"):
        Image.new("RGB", (4, 4), "red").save(pictures / name)
    (pictures / "notes.txt").touch()
    status, out = build(root, "--partial", "--examples", str(pictures))
    text = (out / "report.html").read_text()
    page = Page(text)
    assert status == 0 and len(page.loads) == 2
    assert page.loads[0].startswith("data:image/jpeg;base64,") and page.loads[1].startswith("data:image/png;base64,")
    assert "url(http" not in text and "@import" not in text and "<script" not in text
    assert "a cat" in page.words and "Captions: the file names." in page.words
    rows = [" ".join(row.split()) for row in page.rows]
    assert "LoGoPrompt 92.00 ± 2.00 98.19 (−6.19) 70.00 ± 10.00 93.78 (−23.78) 79.51 ± 7.22 95.93 (−16.42)" in rows
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 3 + 1 and "currentColor" in text and report_figures.CURRENT not in text
    # captions that came with the pictures
    (pictures / "captions.json").write_text('{"b.png": "dog, 0.9 <b>"}')
    build(root, "--partial", "--examples", str(pictures))
    page = Page((out / "report.html").read_text())
    assert "dog, 0.9 <b>" in page.words and "a cat" in page.words and "Captions: captions.json." in page.words


def test_figures_show_the_numbers(tmp_path):
    two_data_sets(tmp_path / "runs")
    two_data_sets(tmp_path / "runs", trainer="CoOp")
    _, out = build(tmp_path / "runs")
    picture = np.asarray(Image.open(out / "base2new.png").convert("RGB"), dtype=int)
    for colour in ([0xD1, 0x49, 0x5B], [0x4C, 0x86, 0xC6]):
        assert (np.abs(picture - colour) < 12).all(-1).sum() > 300
    (plot,) = report.plots(report.Report(report.collect([tmp_path / "runs"], [1, 2, 3]), [1, 2, 3]))
    assert [panel.title for panel in plot.panels] == ["base", "new", "H"] and plot.compared
    axes = Figure().subplots()
    report_figures.draw_panel(axes, plot.panels[1], "black")
    coop, ours = axes.containers
    assert list(ours.lines[0].get_xdata()) == pytest.approx([55, 70, 40])  # average, Caltech101, EuroSAT
    assert list(coop.lines[0].get_xdata()) == list(ours.lines[0].get_xdata())
    assert (coop.lines[0].get_ydata() < ours.lines[0].get_ydata()).all()
    segments = ours.lines[2][0].get_segments()
    assert [sorted(segment[:, 0]) for segment in segments][1] == pytest.approx([60, 80])
    hollow = [list(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert hollow[1] == pytest.approx([81.61, 93.78, 69.44])
    low, high = axes.get_xlim()
    assert low < 30 and high > 98.19  # all panels have one scale


def test_the_same_runs_give_the_same_bytes(tmp_path):
    two_data_sets(tmp_path / "runs")
    _, out = build(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {
        *("base2new.png", "base2new.svg", "report.html", "report.md", "runs.csv", "cells.csv"),
    }
    (out / "few_shot.png").touch()  # of an earlier report
    (out / "mine.png").touch()
    build(tmp_path / "runs")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after == {**before, "mine.png": b""}


def test_a_failed_report_leaves_the_former_one(tmp_path, monkeypatch):
    two_data_sets(tmp_path / "runs")
    _, out = build(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    two_data_sets(tmp_path / "runs", trainer="CoOp")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(report.os, "replace", fail)
    assert build(tmp_path / "runs")[0] == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folders_of_the_scripts_say_what_a_run_is(tmp_path):
    words = {"SOURCE": "shapes", "TARGETS": "shapes_shifted"}
    for script, arguments, kind, scope in (
        ("few_shot", ("shapes", "1", "1"), "few_shot", ""),
        ("domain_generalization", ("1",), "domain_generalization", "shapes"),
        ("cross_dataset", ("1",), "cross_dataset", "shapes"),
    ):
        calls = script_runs(tmp_path, script, *arguments, **words)
        assert calls
        for call in calls:
            assert report_tables.place(Path(call["--output-dir"]), "all") == (kind, scope)
    nested = tmp_path / "ablation" / "x" / "few_shot" / "seed1"  # the innermost counts
    assert report_tables.place(nested, "all") == ("few_shot", "")
    assert report_tables.place(tmp_path / "ablation/4a_none/imagenet/seed1", "all") == ("ablation", "4a_none")


def test_of_real_runs(data_root, rn_file, tmp_path, capsys):
    """What base2new.sh leaves is what the report reads."""
    places = {"DATA": str(data_root), "BACKBONE": rn_file, "OUTPUT": "runs", "TRAINER": "CoOp"}
    done = run_script(tmp_path, "caltech101", "1", *TINY, **places)
    assert done.returncode == 0, done.stderr
    status, out = build(tmp_path / "runs", "--seeds", "1")
    assert status == 0 and capsys.readouterr().err == ""
    common = "caltech101/shots_2/CoOp/photo64_ep50_ctxv1/seed1"
    folders = [tmp_path / "runs" / "base2new" / half / common for half in ("train_base", "test_new")]
    base, new = (read_results(str(folder))["metrics"]["accuracy"] for folder in folders)
    assert {key: cell["mean"] for key, cell in cells(out).items()} == {
        ("Caltech101", "CoOp", "base"): base,
        ("Caltech101", "CoOp", "new"): new,
        ("Caltech101", "CoOp", "H"): pytest.approx(harmonic_mean(base, new)),
    }
    (folders[1] / "results.json").unlink()
    assert build(tmp_path / "runs", "--seeds", "1")[0] == 1
