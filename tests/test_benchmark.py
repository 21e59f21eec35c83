"""tools/benchmark.py: measurements are of their own processes, and the table is what was measured."""

import json

import pytest

import benchmark


def allocate(megabytes):
    block = bytearray(megabytes * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])  # every page is touched
    return f"{len(block)} bytes"


def fail():
    raise ValueError("for a reason")


def test_a_measurement_sees_the_memory_of_its_own_call():
    small, large = benchmark.measure("small", allocate, 8), benchmark.measure("large", allocate, 200)
    assert small.note == f"{8 * 2**20} bytes"
    assert 150 < large.megabytes - small.megabytes < 250
    with pytest.raises(ValueError, match="for a reason"):
        benchmark.measure("none", fail)


def test_ratios_are_to_the_first_row():
    rows = [benchmark.Row("a", 2.0, 1), benchmark.Row("b", 1.0, 1), benchmark.Row("c", 1.0, 1, "x", 7.0)]
    assert [line.split(" | ")[2] for line in benchmark.table(rows).splitlines()[2:]] == ["1.000", "0.500", "7.000"]


def test_lists(tmp_path, capsys):
    assert benchmark.main(["--only", "lists", "--quick", "--json", str(tmp_path / "numbers.json")]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text())["lists"]
    assert [row["note"].split()[0] for row in rows] == ["1,600", "1,600", "1,600", "20,000"]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["label"] in capsys.readouterr().out
