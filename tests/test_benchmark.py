"""tools/benchmark.py: ways are compared in alternation, and memory is that of one call alone."""

import json
import time

import benchmark


def allocate(megabytes):
    return {"block": lambda: bytearray(b"x") * (megabytes * 2**20)}


def test_memory_is_that_of_one_call_alone():
    (small,), (large,) = (benchmark.peaks(allocate, size) for size in (8, 200))
    assert 150 < large - small < 250


def test_ratios_are_medians_relative_to_the_first_way():
    slow, fast = benchmark.compare("x", {"slow": lambda: time.sleep(0.1), "fast": lambda: time.sleep(0.02)}, rounds=3)
    assert (slow["label"], slow["ratio"], fast["label"]) == ("x: slow", 1, "x: fast") and slow["seconds"] > 0.1
    assert fast["ratio"] == fast["seconds"] / slow["seconds"] < 0.5


def test_table_and_json_hold_the_same_rows(tmp_path, capsys, monkeypatch):
    rows = [{"label": "a", "seconds": 2.0, "ratio": 1.0, "megabytes": None}]
    monkeypatch.setitem(benchmark.BENCHMARKS, "text", lambda quick: iter(rows))
    assert benchmark.main(["--only", "text", "--quick", "--json", str(tmp_path / "numbers.json")]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"text": rows}
    assert capsys.readouterr().out.splitlines()[-2].split() == ["|", "a", "|", "2.00", "|", "1.000", "|", "|"]
