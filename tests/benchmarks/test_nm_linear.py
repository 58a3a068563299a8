from benchmarks import nm_linear


def test_every_layer_group_and_batch_has_a_row(monkeypatch, capsys):
    monkeypatch.setattr(nm_linear, "SHAPES", ((32, 64),))
    monkeypatch.setattr(nm_linear, "BATCHES", (1, 9))
    monkeypatch.setattr(nm_linear, "KERNELS", ("cpu-nm", "cpu-csr"))
    monkeypatch.setattr("sys.argv", ["nm_linear", "--rounds", "3"])
    nm_linear.main()
    printed = capsys.readouterr().out
    assert [printed.count(f"| {group} ") for group in ("2:4", "1:4", "1:8")] == [2, 2, 2]
    assert "cpu-nm (ms)" in printed
    assert printed.count("64 -> 32") == 6
