import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fxsparse.errors import UnsupportedError
from fxsparse.topology import draw
from fxsparse.topology.plots import grid


def row(name, step, active=4, fan_in=2.0, churn=None, itop=None):
    return {
        "name": name,
        "step": step,
        "numel": 40,
        "active_neurons": active,
        "neurons": 4,
        "fan_in_mean": fan_in,
        "churn": churn,
        "itop": itop,
        "itop_since": None if itop is None else 3,
    }


ROWS = [
    row("a", 0),
    row("a", 10, active=3, churn=0.5, itop=0.25),
    row("b<>", 0),
    row("b<>", 20, active=1, fan_in=8.0, churn=0.25, itop=0.5),
]


def test_a_value_lasts_until_the_next_update_of_its_weight():
    steps, values = grid({"a": ROWS[:2], "b": ROWS[2:]}, lambda row, first: row["churn"])
    assert steps == [0, 10, 20]
    np.testing.assert_array_equal(values, [[np.nan, 0.5, 0.5], [np.nan, np.nan, 0.25]])


def test_every_quantity_has_a_figure_that_names_weights_and_numbers():
    plots = draw(ROWS)
    assert list(plots) == ["Active neurons", "Fan-in", "Churn", "ITOP rate"]
    comments = {title: svg.decode() for title, svg in plots.items()}
    for svg in comments.values():
        ET.fromstring(svg)
    # matplotlib writes every text as a comment beside its outlines
    assert "<!-- 3 / 4 -->" in comments["Active neurons"]
    assert "of all: 50.00% -->" in comments["Active neurons"]
    assert "<!-- 2 → 8 -->" in comments["Fan-in"]
    assert "<!-- 25.0% -->" in comments["Churn"]
    assert "since step 3; of all: 37.50% -->" in comments["ITOP rate"]
    assert draw(ROWS) == plots


def test_only_what_is_known_is_drawn():
    assert list(draw([row("a", 0), row("a", 5, churn=0.0)])) == ["Active neurons", "Fan-in", "Churn"]
    assert draw([]) == {}


def test_fifty_weights_at_a_thousand_steps_stay_small():
    rows = [row(f"layer{w}.weight", step, active=w % 5) for w in range(50) for step in range(1000)]
    assert all(len(svg) < 600_000 for svg in draw(rows).values())


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fxsparse\[viz\]'"):
        draw(ROWS)
