from benchmarks.all_methods import DENSE, SPARSITIES, TASKS
from benchmarks.all_methods_table import table
from benchmarks.cells import Cell
from benchmarks.tasks.comparison import settings_of


def cell(row, sparsity, seed, score, ratio=0.2, exact=True, zeros=None):
    result = {
        "score": score,
        "train_ratio": ratio,
        "exact": exact,
        "zeros": sparsity if zeros is None else zeros,
    }
    result |= {"processor_ms": 2.0, "update_ms": None, "state_bytes": 1_000_000, "gradient_bytes": 500_000}
    made = settings_of(TASKS["digits"], "CNN", row, sparsity, 400, seed)
    return Cell(made, result, 1.0, {"threads": 1})


CELLS = [
    cell(DENSE, 0.0, 0, 97, ratio=1.0),
    *(cell("rigl", sparsity, seed, 90 + 2 * seed) for sparsity in SPARSITIES for seed in range(2)),
    cell("str", 0.9, 0, 80, exact=False, zeros=0.853),
    cell("s_ste", 0.5, 0, 95, ratio=0.67),
]


def test_the_table_says_what_is_not_at_its_column():
    lines = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in table(CELLS, TASKS, SPARSITIES).splitlines()
        if "|" in line
    ]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(rows) == [DENSE, "rigl", "str", "s_ste"]
    assert rows["rigl"]["test accuracy (%), 98%"] == "91.00 ± 1.41"
    assert rows["rigl"]["seeds"] == "2"
    assert rows["str"]["test accuracy (%), 90%"] == "80.00 (85.3% zeros)"
    assert rows["str"]["FLOPs, 90%"] == "0.200"
    assert rows["s_ste"]["test accuracy (%), 90%"] == "95.00 (50.0% zeros)"
    assert rows["s_ste"]["memory (MB)"] == "1.50"
    assert rows["s_ste"]["test accuracy (%), 98%"] == ""
