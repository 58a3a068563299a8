import dataclasses

import pytest

from fxsparse import Override, Plan
from fxsparse.errors import FxSparseError, PatternError, PlanError
from fxsparse.methods import gmp, rigl, set_, sr_ste, static
from fxsparse.pattern import NM, Block, ConstantFanIn, Strided, Unstructured

PLANS = [
    Plan(sparsity=0.9),
    Plan(sparsity=0, storage="compact"),
    Plan(pattern=NM(2, 4), method=sr_ste(decay=1e-4)),
    Plan(sparsity=0.5, pattern=Block(4, 1), method=set_(every=10), seed=3),
    Plan(sparsity=0.75, pattern=ConstantFanIn(), allocation="uniform", keep_dense_counts=True),
    Plan(
        sparsity=0.9,
        allocation={"fc*": 0.5, "*": 0.95},
        method=rigl(every=7, stop=70, drop_fraction=0.2, variant="torch"),
        exclude=("head", "layer1.*"),
        overrides=(Override("layer4.*", sparsity=0.95), Override("fc", pattern=NM(1, 4))),
    ),
    Plan(sparsity=0.6, method=gmp(start=0, stop=100, every=10)),
    Plan.preset("rigl-90"),
    Plan.preset("2:4"),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.method.name)
def test_round_trip_through_dict_and_toml(plan, tmp_path):
    assert Plan.from_dict(plan.to_dict()) == plan
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_the_defaults_are_the_documented_ones_and_are_left_out_of_the_file():
    plan = Plan(sparsity=0.9)
    assert (plan.allocation, plan.pattern, plan.method, plan.storage) == (
        "erk",
        Unstructured(),
        static("magnitude"),
        "auto",
    )
    assert plan.to_dict() == {"version": 1, "sparsity": 0.9}


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan(sparsity=0.9).sparsity = 0.5  # type: ignore[misc]


def test_n_m_implies_its_sparsity():
    assert Plan(pattern=NM(1, 4)).sparsity == 0.75
    assert Plan(pattern=Strided(8)).sparsity == 0.875
    assert Plan(pattern=NM(2, 4), sparsity=0.5).sparsity == 0.5


def test_a_hand_written_file_of_version_one_still_loads(tmp_path):
    (tmp_path / "old.toml").write_text(
        'sparsity = 0.8\nexclude = ["head"]\n[method]\nname = "rigl"\nevery = 50\n'
    )
    assert Plan.load(tmp_path / "old.toml") == Plan(sparsity=0.8, exclude=("head",), method=rigl(every=50))


def test_equal_plans_hash_the_same_whatever_their_fields():
    for plan in PLANS:
        assert hash(Plan.from_dict(plan.to_dict())) == hash(plan)
    assert len(
        {*PLANS, Plan(sparsity=0.9, allocation={"*": 0.9}), Plan(sparsity=0.9, allocation={"*": 0.8})}
    ) == (len(PLANS) + 2)


def test_saving_onto_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "plan.toml").mkdir()
    with pytest.raises(PlanError, match=r"plan.toml: expected a file"):
        Plan(sparsity=0.9).save(tmp_path / "plan.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


BAD = {
    "no sparsity": (lambda: Plan(), r"Plan.sparsity is missing"),
    "all zeros": (lambda: Plan(sparsity=1.0), r"fraction of zeros in \[0, 1\), got 1.0"),
    "negative": (lambda: Plan(sparsity=-0.1), r"\[0, 1\), got -0.1"),
    "percent": (lambda: Plan(sparsity=90), r"\[0, 1\), got 90"),
    "nan": (lambda: Plan(sparsity=float("nan")), r"got nan"),
    "text": (lambda: Plan(sparsity="0.9"), r"got '0.9'"),
    "bool": (lambda: Plan(sparsity=True), r"got True"),
    "against n:m": (
        lambda: Plan(sparsity=0.9, pattern=NM(2, 4)),
        r"0.9 disagrees with NM\(n=2, m=4\), which is 0.5",
    ),
    "override against n:m": (
        lambda: Override("0", pattern=NM(2, 4), sparsity=0.9),
        r"Override\('0'\).sparsity=0.9 disagrees with NM\(n=2, m=4\), which is 0.5: leave sparsity out",
    ),
    "allocation": (lambda: Plan(sparsity=0.9, allocation="erl"), r"expected .*erk.*, got 'erl'"),
    "pattern class": (lambda: Plan(sparsity=0.9, pattern=NM), r"Plan.pattern: expected a pattern"),
    "pattern text": (lambda: Plan(sparsity=0.9, pattern="2:4"), r"Plan.pattern: expected a pattern"),
    "method text": (lambda: Plan(sparsity=0.9, method="rigl"), r"Plan.method: expected Method, got 'rigl'"),
    "method function": (lambda: Plan(sparsity=0.9, method=rigl), r"Plan.method: expected Method"),
    "storage": (lambda: Plan(sparsity=0.9, storage="csr"), r"one of auto, masked, compact, got 'csr'"),
    "exclude text": (
        lambda: Plan(sparsity=0.9, exclude="head"),
        r"expected a tuple of globs such as \('head',\)",
    ),
    "exclude number": (lambda: Plan(sparsity=0.9, exclude=(1,)), r"Plan.exclude: expected a tuple of globs"),
    "exclude none": (lambda: Plan(sparsity=0.9, exclude=None), r"Plan.exclude: expected a tuple of globs"),
    "override text": (
        lambda: Plan(sparsity=0.9, overrides=("head",)),
        r"expected Override values, got 'head'",
    ),
    "override alone": (
        lambda: Plan(sparsity=0.9, overrides=Override("head", sparsity=0)),
        r"expected a tuple of Override",
    ),
    "override empty": (lambda: Override("head"), r"changes nothing: give sparsity= or pattern="),
    "override range": (
        lambda: Override("head", sparsity=2),
        r"Override\('head'\): expected a fraction of zeros",
    ),
    "override glob": (lambda: Override("", sparsity=0.5), r"expected a glob of weight names"),
    "seed": (lambda: Plan(sparsity=0.9, seed=1.5), r"Plan.seed: expected int, got 1.5"),
    "seed too large": (lambda: Plan(sparsity=0.9, seed=2**63), r"Plan.seed: expected .*2\*\*63\), got 9223"),
    "seed negative": (lambda: Plan(sparsity=0.9, seed=-1), r"Plan.seed: expected .*2\*\*63\), got -1"),
    "counts": (lambda: Plan(sparsity=0.9, keep_dense_counts=1), r"keep_dense_counts: expected bool, got 1"),
    "unknown field": (
        lambda: Plan.from_dict({"sparsity": 0.9, "sparsty": 1}),
        r"unknown field 'sparsty'; expected some",
    ),
    "future version": (
        lambda: Plan.from_dict({"version": 99, "sparsity": 0.9}),
        r"version 99 is not readable here",
    ),
    "version a bool": (
        lambda: Plan.from_dict({"version": True, "sparsity": 0.9}),
        r"version True is not readable here",
    ),
    "block without cols": (
        lambda: Plan.from_dict({"sparsity": 0.9, "pattern": {"name": "block", "rows": 4}}),
        r"pattern 'block' needs \['rows', 'cols'\], got \['rows'\]: give cols",
    ),
    "n:m without numbers": (
        lambda: Plan.from_dict({"pattern": {"name": "nm"}}),
        r"pattern 'nm' needs \['n', 'm'\], got \[\]: give n, m",
    ),
    "pattern name a list": (
        lambda: Plan.from_dict({"sparsity": 0.9, "pattern": {"name": ["nm"]}}),
        r"expected a pattern with name=",
    ),
    "override without glob": (
        lambda: Plan.from_dict({"sparsity": 0.9, "overrides": [{"sparsity": 0.5}]}),
        r"override: expected a glob of weight names as glob=, got only \['sparsity'\]",
    ),
    "overrides a number": (
        lambda: Plan.from_dict({"sparsity": 0.9, "overrides": 3}),
        r"overrides: expected a list of tables .*, got 3",
    ),
    "unknown method": (
        lambda: Plan.from_dict({"sparsity": 0.9, "method": {"name": "rgl"}}),
        r"got 'rgl'. Known: .*rigl",
    ),
    "unknown option": (
        lambda: Plan.from_dict({"sparsity": 0.9, "method": {"name": "rigl", "evry": 1}}),
        r"method 'rigl' has no option 'evry'",
    ),
    "unknown pattern": (
        lambda: Plan.from_dict({"sparsity": 0.9, "pattern": {"name": "2:4"}}),
        r"expected a pattern with name=",
    ),
    "method a text": (lambda: Plan.from_dict({"sparsity": 0.9, "method": "rigl"}), r"expected a table"),
    "pattern a text": (lambda: Plan.from_dict({"sparsity": 0.9, "pattern": "nm"}), r"expected a table"),
    "preset": (lambda: Plan.preset("srigol-90"), r"'srigol'. Known"),
    "preset a number": (lambda: Plan.preset(3), r"Plan.preset: expected a name such as 'rigl-90'.*, got 3"),
    "preset percent": (lambda: Plan.preset("rigl-100"), r"no preset 'rigl-100'"),
    "preset empty": (lambda: Plan.preset(""), r"no preset ''"),
    "not a dict": (lambda: Plan.from_dict([1, 2]), r"expected a table of fields"),
    "no such folder": (
        lambda: Plan(sparsity=0.9).save("/nonexist/x.toml"),
        r"^/nonexist/x.toml: expected a file in a folder that exists.*No such file or directory",
    ),
    "no such file": (
        lambda: Plan.load("/nowhere/plan.toml"),
        r"/nowhere/plan.toml: expected a TOML plan file",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_a_bad_plan_says_what_was_expected(make, message):
    with pytest.raises((PlanError, PatternError), match=message) as caught:
        make()
    assert isinstance(caught.value, FxSparseError)
    assert isinstance(caught.value, ValueError)


def test_a_file_that_is_not_toml_is_a_plan_error(tmp_path):
    (tmp_path / "bad.toml").write_text("sparsity 0.9")
    with pytest.raises(PlanError, match=r"bad.toml: expected a TOML plan file"):
        Plan.load(tmp_path / "bad.toml")


def test_a_link_to_a_plan_is_followed(tmp_path):
    (tmp_path / "shared.toml").write_text("old")
    (tmp_path / "plan.toml").symlink_to("shared.toml")
    Plan(sparsity=0.9).save(tmp_path / "plan.toml")
    assert (tmp_path / "plan.toml").is_symlink()
    assert Plan.load(tmp_path / "shared.toml") == Plan(sparsity=0.9)
