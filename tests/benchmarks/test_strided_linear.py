from benchmarks import strided_linear


def test_every_shape_is_measured_beside_the_best_for_a_constant_fan_in(monkeypatch, capsys):
    monkeypatch.setattr(strided_linear, "SHAPES", ((32, 64),))
    monkeypatch.setattr(strided_linear, "BATCHES", (1, 9))
    monkeypatch.setattr(strided_linear, "ANY_COLUMNS", ("cpu-csr", "cpu-striped"))
    monkeypatch.setattr("sys.argv", ["strided_linear", "--rounds", "3"])
    strided_linear.main()
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert [row[:3] for row in cells] == [["64 -> 32", f"1:{m}", b] for m in (4, 8, 16) for b in ("1", "9")]
    assert {row[5] for row in cells} <= {"cpu-strided", "cpu-csr", "cpu-striped"}
    assert all(row[8] in ("cpu-csr", "cpu-striped") and row[-1].endswith("x") for row in cells)
