from benchmarks import one_shot


def test_every_task_has_its_rows_and_sparsegpt_loses_least(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["one_shot", "--quick"])
    monkeypatch.setattr(one_shot, "TASKS", {"digits": (one_shot.TASKS["digits"][0], "MLP", 50)})
    monkeypatch.setattr(one_shot, "PATTERNS", {"2:4": one_shot.PATTERNS["2:4"]})
    monkeypatch.setattr(one_shot, "LAST", ("5",))
    monkeypatch.setattr(one_shot, "BATCHES", 4)
    one_shot.main()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| digits")]
    assert [line[3].strip() for line in lines] == ["", "magnitude", "wanda", "sparsegpt"]
    errors = [float(line[6]) for line in lines[1:]]
    assert errors[2] < errors[1] < errors[0]
