import copy
import pickle
import tomllib

import pytest
import torch

from fxsparse.errors import FxSparseError, PlanError
from fxsparse.method import Method, from_dict, register
from fxsparse.methods import METHODS, gmp, rigl, set_, sr_ste, static
from fxsparse.reparam import HardMask
from fxsparse.scores import score_named

VARIED = [
    static("magnitude"),
    set_(every=100, stop=25_000, decay="cosine", init="magnitude"),
    rigl(every=50, stop=1_000, drop_fraction=0.5, decay="cubic", variant="torch"),
    gmp(start=0, stop=100, every=10, initial_sparsity=0.5),
    sr_ste(decay=0.0),
]


@pytest.mark.parametrize("method", [*(build() for build in METHODS), *VARIED], ids=lambda m: str(m.to_dict()))
def test_round_trips_by_name_and_options(method):
    assert from_dict(method.to_dict()) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert copy.deepcopy(method) == method
    assert hash(copy.deepcopy(method)) == hash(method)


def test_options_at_their_default_are_left_out():
    assert rigl().to_dict() == {"name": "rigl"}
    assert set_(every=390, stop=900).to_dict() == {"name": "set", "stop": 900}
    assert static("magnitude").to_dict() == {"name": "static", "score": "magnitude"}


def test_a_toml_table_is_enough():
    table = tomllib.loads('name = "rigl"\nevery = 50\nvariant = "torch"')
    assert from_dict(table) == rigl(every=50, variant="torch")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rigle"}, "expected the name of a registered method, got 'rigle'. Known: "),
        ({}, "registered method, got None"),
        ({"name": ["rigl"]}, r"registered method, got \['rigl'\]"),
        ({"name": "rigl", "evry": 3}, "method 'rigl' has no option 'evry'. It has every, stop,"),
        ({"name": "rigl", "every": 0}, "every as an integer >= 1, got 0"),
        ({"name": "rigl", "every": 1.5}, "every as an integer >= 1, got 1.5"),
        (
            {"name": "rigl", "stop": None, "decay": "cosine"},
            "stop as an integer for decay='cosine', got None",
        ),
        ({"name": "rigl", "stop": -1}, "stop as an integer >= 1, got -1"),
        ({"name": "rigl", "variant": "torch", "stop": 50}, "stop as an integer >= 100, got 50"),
        ({"name": "rigl", "drop_fraction": 1.5}, "drop fraction as a number from 0 to 1, got 1.5"),
        ({"name": "rigl", "drop_fraction": "0.3"}, "drop fraction as a number from 0 to 1, got '0.3'"),
        ({"name": "rigl", "decay": "step"}, "one of constant, cosine, linear, cubic, got 'step'"),
        ({"name": "rigl", "variant": "tf"}, "variant as paper or torch, got 'tf'"),
        (
            {"name": "rigl", "init": "erk"},
            "expected a score among force, given, grasp, iter_snip, magnitude, random, snip, synflow, got 'erk'",
        ),
        ({"name": "set", "decay": "cosine"}, "stop as an integer for decay='cosine', got None"),
        ({"name": "set", "drop_fraction": -0.1}, "number from 0 to 1, got -0.1"),
        (
            {"name": "static", "score": "best"},
            "a score among force, given, grasp, iter_snip, magnitude, random, snip, synflow, got 'best'",
        ),
        ({"name": "gmp", "stop": 10_000}, "stop as an integer >= 10001, got 10000"),
        ({"name": "gmp", "every": 7_000}, r"multiple of every, got 25000 - 10000 and 7000.* Use stop=24000"),
        ({"name": "gmp", "initial_sparsity": 2}, "initial_sparsity as a number from 0 to 1, got 2"),
        ({"name": "sr_ste", "decay": -1}, "decay as a number >= 0, got -1"),
    ],
    ids=str,
)
def test_unknown_names_options_and_values_are_refused(fields, message):
    with pytest.raises(PlanError, match=message):
        from_dict(fields)


@pytest.fixture
def unregistered(monkeypatch):
    import fxsparse.method as module

    monkeypatch.setattr(module, "_METHODS", dict(module._METHODS))


@pytest.mark.usefixtures("unregistered")
def test_a_third_party_adds_a_method_by_registering_one_function():
    @register
    def frozen(start: int = 5) -> Method:
        return Method("frozen", HardMask(), score_named("random"), source=f"a note, page {start}")

    assert frozen(start=7).to_dict() == {"name": "frozen", "start": 7}
    assert from_dict({"name": "frozen", "start": 7}).source == "a note, page 7"


@pytest.mark.usefixtures("unregistered")
def test_options_without_a_default_and_functions_that_give_no_method_are_refused():
    def needy(start: int, stop: int = 5) -> Method:
        raise AssertionError

    def loose(**options: int) -> Method:
        raise AssertionError

    @register
    def empty() -> Method:
        return None  # type: ignore[return-value]

    with pytest.raises(
        PlanError, match=r"method 'needy': expected options .* got start: int. Write start=..."
    ):
        register(needy)
    with pytest.raises(PlanError, match=r"method 'loose': expected options .* got \*\*options: int"):
        register(loose)
    with pytest.raises(
        PlanError, match=r"expected what .*test_method.*empty returns to be a Method, got NoneType"
    ):
        empty()


@pytest.mark.usefixtures("unregistered")
def test_a_file_of_a_method_whose_package_is_not_imported_says_to_import_it(tmp_path, monkeypatch):
    import fxsparse
    import fxsparse.method as module

    @register
    def elsewhere() -> Method:
        return Method("elsewhere", HardMask(), score_named("random"), source="a note")

    model = torch.nn.Linear(8, 8)
    fxsparse.save(fxsparse.compile(model, fxsparse.Plan(sparsity=0.5, method=elsewhere())), tmp_path / "file")
    monkeypatch.delitem(module._METHODS, "elsewhere")
    with pytest.raises(FxSparseError, match=r"'elsewhere'.* Import the package that registers it"):
        fxsparse.load(tmp_path / "file", torch.nn.Linear(8, 8))


@pytest.mark.usefixtures("unregistered")
def test_a_taken_name_is_refused():
    def rigl() -> Method:
        raise AssertionError

    with pytest.raises(PlanError, match=r"method 'rigl' is registered by fxsparse.methods.rigl already"):
        register(rigl)


def test_an_unregistered_method_cannot_be_written():
    with pytest.raises(PlanError, match="registered method, got 'mine'"):
        Method("mine", HardMask(), score_named("random"), source="-").to_dict()
