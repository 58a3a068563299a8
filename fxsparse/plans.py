"""What is wanted: a frozen value without tensors, validated when it is made, that prints, compares and serialises."""

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from fxsparse import allocation as allocations
from fxsparse import methods, transforms
from fxsparse import pattern as patterns
from fxsparse.budget import Budget
from fxsparse.errors import PlanError
from fxsparse.knapsack import KeepLargest
from fxsparse.method import GlobalRule, Method
from fxsparse.pattern import NM, Block, Pattern, Strided, Unstructured
from fxsparse.transforms import Transform
from fxsparse.transposable import Transposable

VERSION = 1
STORAGES = ("auto", "masked", "compact")


@dataclass(frozen=True)
class Override:
    """Other wishes for the weights that `glob` matches; unset fields keep the plan's.

    `glob` matches full weight names (``layer4.*``) or a module prefix (``layer4``).  ``sparsity=0`` keeps them dense
    at every step; where the method decides counts by itself (str, soft_movement) or freezes weights (supermask) it
    leaves them out, as `exclude` does.
    """

    glob: str
    sparsity: float | None = None
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.glob, str) or not self.glob:
            raise PlanError(f"Override: expected a glob of weight names, got {self.glob!r}.")
        if self.sparsity is None and self.pattern is None:
            raise PlanError(f"Override({self.glob!r}) changes nothing: give sparsity= or pattern=.")
        if self.sparsity is not None:
            _check_sparsity(self.sparsity, f"Override({self.glob!r})")
            _check_agreement(self.sparsity, self.pattern, f"Override({self.glob!r}).sparsity")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `fxsparse.compile` should do with a model.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1).  May be left out with an N:M pattern.
        budget: in its place, a share of the dense model's FLOPs, bytes, time or other cost; the allocation is then
            taken at the least sparsity that meets it ("global_magnitude" ranks magnitudes by their cost).
        allocation: how the total is shared among weights: a policy name, or a table ``{glob: sparsity}``, which decides
            for the weights that it names (`sparsity` is then that of the others; the report notes a difference);
            "uniform" with a transform, else the method's own where its paper has one (GSE's "er_unrolled"), else "erk".
        pattern: the constraint on each mask; the method's own where it has one, else unstructured.
        method: what trains the masks.
        transform: one of Sparse-IFT's four (`fxsparse.transforms`): the model is first made into one of other shapes
            that costs as many FLOPs at this sparsity.  The sparsity is then solved anew for these FLOPs.
        storage: "masked" keeps dense weights beside a mask, "compact" stores nonzeros only, "auto" takes what was
            measured faster at the example inputs.  A weight that cannot be compact is masked, with a note in the
            report; on meta that is a PlanError where such weights together are large (8 GiB).
        exclude: globs of weights that stay dense and out of the budget.
        overrides: first match wins.
        keep_dense_counts: weights kept dense count in the budget, the others get sparser (SRigL's uniform); otherwise
            they do not (RigL's).
        seed: of every random choice.

    Raises:
        PlanError: any field is out of range; the message names the field.
    """

    sparsity: float | None = None
    budget: Budget | None = None
    allocation: str | Mapping[str, float] = field(default=None, hash=False)  # pyright: ignore[reportAssignmentType]
    pattern: Pattern = None  # pyright: ignore[reportAssignmentType]  # set by __post_init__
    method: Method = field(default_factory=lambda: methods.static("magnitude"))
    transform: Transform | None = None
    storage: str = "auto"
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    keep_dense_counts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _strings(self.exclude, "exclude"))
        if not isinstance(self.overrides, tuple | list):
            raise PlanError(f"Plan.overrides: expected a tuple of Override values, got {self.overrides!r}.")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        if self.pattern is None and isinstance(self.method, Method):
            object.__setattr__(self, "pattern", self.method.pattern or Unstructured())
        if self.allocation is None and isinstance(self.method, Method):
            object.__setattr__(self, "allocation", _default_allocation(self.method, self.transform))
        _check_types(self)
        if self.budget is None:
            object.__setattr__(self, "sparsity", _implied_sparsity(self.sparsity, self.pattern))
        else:
            _check_budget(self)
        allocations.check(self.allocation)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; fields left at their default are omitted, ``version`` is always there."""
        default = replace(Plan(sparsity=0.0), allocation=_default_allocation(self.method, self.transform))
        row: dict[str, Any] = {"version": VERSION}
        if self.sparsity is not None:
            row["sparsity"] = self.sparsity
        for name in (f.name for f in fields(self) if f.name != "sparsity"):
            value = getattr(self, name)
            if value != getattr(default, name):
                row[name] = _plain(value)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises:
            PlanError: an unknown field, or a version newer than this package.
        """
        row = dict(_table(row, "plan"))
        version = row.pop("version", VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
            raise PlanError(
                f"plan version {version!r} is not readable here: expected 1 to {VERSION}; upgrade fxsparse."
            )
        _check_fields(cls, row, "plan")
        if "pattern" in row:
            row["pattern"] = patterns.from_dict(_table(row["pattern"], "pattern"))
        if "method" in row:
            row["method"] = methods.from_dict(_table(row["method"], "method"))
        if "transform" in row:
            row["transform"] = transforms.from_dict(_table(row["transform"], "transform"))
        if "budget" in row:
            row["budget"] = _budget(_table(row["budget"], "budget"))
        if "overrides" in row:
            row["overrides"] = _overrides(row["overrides"])
        return cls(**row)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write TOML; the file appears whole or not at all, and of a link the target is written.

        Raises:
            PlanError: the path cannot be written.
        """
        path = Path(os.path.realpath(path))
        text = tomli_w.dumps(self.to_dict())
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder, "plan.toml")
                whole.write_text(text, encoding="utf-8")
                os.replace(whole, path)
        except OSError as error:
            raise PlanError(
                f"{path}: expected a file in a folder that exists and may be written, got: {error.strerror}."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read what `save` wrote, or a file written by hand."""
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PlanError(f"{path}: expected a TOML plan file: {error}") from error

    @classmethod
    def preset(cls, name: str) -> "Plan":
        """``"<method>-<percent of zeros>"`` such as "gse-90" with the paper's defaults, or ``"<n>:<m>"`` (SR-STE).

        Raises:
            PlanError: the name is neither; the message lists the methods.
        """
        if not isinstance(name, str):
            raise PlanError(f"Plan.preset: expected a name such as 'rigl-90' or '2:4', got {name!r}.")
        head, _, percent = name.partition("-")
        if name.count(":") == 1 and name.replace(":", "").isdecimal():
            n, m = (int(part) for part in name.split(":"))
            return cls(pattern=NM(n, m), method=methods.sr_ste())
        if percent.isdecimal() and int(percent) < 100:
            return cls(sparsity=int(percent) / 100, method=methods.from_dict({"name": head}))
        raise PlanError(
            f"no preset {name!r}: expected '<method>-<percent of zeros>' such as rigl-90, or 'n:m'."
        )


def _default_allocation(method: Method, transform: Transform | None) -> str:
    """Sparse-IFT shares nonzeros uniformly (arXiv:2303.11525), so that one sparsity can be solved for."""
    return "uniform" if transform is not None else method.allocation or "erk"


def _check_types(plan: Plan) -> None:
    expected = {"method": Method, "seed": int, "keep_dense_counts": bool}
    for name, kind in expected.items():
        value = getattr(plan, name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise PlanError(f"Plan.{name}: expected {kind.__name__}, got {value!r}.")
    if not 0 <= plan.seed < 2**63:
        raise PlanError(f"Plan.seed: expected an integer in [0, 2**63), got {plan.seed}.")
    if not hasattr(plan.pattern, "project") or isinstance(plan.pattern, type):
        raise PlanError(
            f"Plan.pattern: expected a pattern such as Unstructured() or NM(2, 4), got {plan.pattern!r}."
        )
    if plan.storage not in STORAGES:
        raise PlanError(f"Plan.storage: expected one of {', '.join(STORAGES)}, got {plan.storage!r}.")
    for override in plan.overrides:
        if not isinstance(override, Override):
            raise PlanError(f"Plan.overrides: expected Override values, got {override!r}.")
    if plan.transform is not None and not isinstance(plan.transform, Transform):
        known = ", ".join(f"{kind.__name__}()" for kind in transforms.TRANSFORMS.values())
        raise PlanError(f"Plan.transform: expected an instance, one of {known}, got {plan.transform!r}.")
    _check_method_pattern(plan)
    if isinstance(plan.method.rule, KeepLargest):
        _check_largest(plan, plan.method.rule)
    rule = plan.method.rule
    if isinstance(rule, GlobalRule) and not getattr(rule, "own_counts", False):
        _check_shared(plan, "Override(glob, sparsity=0) keeps a weight dense.")


def _check_budget(plan: Plan) -> None:
    if not isinstance(plan.budget, Budget):
        raise PlanError(f"Plan.budget: expected a Budget such as Budget(flops=0.5), got {plan.budget!r}.")
    if plan.sparsity is not None:
        raise PlanError("Plan: expected either a sparsity or a budget, got both. Leave one out.")
    if plan.transform is not None:
        raise PlanError("Plan.budget: a transform sizes the model by its sparsity; give sparsity= instead.")
    if fixed_sparsity(plan.pattern) is not None:
        raise PlanError(
            f"Plan.budget: {plan.pattern} fixes every count, so that nothing is left to decide: leave it out."
        )
    if isinstance(plan.allocation, Mapping):
        raise PlanError(
            "Plan.budget: a table of sparsities decides every count already; expected the name of a policy."
        )


def _budget(row: Mapping[str, Any]) -> Budget:
    _check_fields(Budget, row, "budget")
    return Budget(**row)


def _check_method_pattern(plan: Plan) -> None:
    own = plan.method.pattern
    for where, pattern in _patterns(plan).items():
        if own is not None and type(pattern) is not type(own):
            raise PlanError(
                f"{where}.pattern: {plan.method.name} trains {type(own).__name__} only, got {pattern!r}; leave it out."
            )


def _check_largest(plan: Plan, rule: KeepLargest) -> None:
    """Refuse what a choice of the largest entries or blocks cannot give."""
    name = plan.method.name
    for where, pattern in _patterns(plan).items():
        if not isinstance(pattern, Unstructured | Block):
            raise PlanError(
                f"{where}.pattern: {name} keeps the largest entries or blocks of a weight: expected Unstructured() or "
                f"Block(rows, cols), got {pattern!r}. Train {type(pattern).__name__} by another method, such as sr_ste "
                "for N:M or srigl for a constant fan-in."
            )
    if not rule.together:
        return
    _check_shared(
        plan, f"Use {name}(scope='layer'), or Override(glob, sparsity=0) for weights that are to stay dense."
    )


def _check_shared(plan: Plan, advice: str) -> None:
    """Refuse sparsities of single weights where all of them share one budget."""
    name = plan.method.name
    if isinstance(plan.allocation, Mapping):
        raise PlanError(
            f"Plan.allocation: all weights of {name} share one budget: expected the name of a policy, "
            f"got {dict(plan.allocation)!r}. {advice}"
        )
    for o in plan.overrides:
        if o.sparsity:
            raise PlanError(
                f"Override({o.glob!r}).sparsity: all weights of {name} share one budget: expected 0 or "
                f"none, got {o.sparsity}. {advice}"
            )


def _patterns(plan: Plan) -> dict[str, Pattern]:
    """{what asks for it: pattern}."""
    return {"Plan": plan.pattern} | {f"Override({o.glob!r})": o.pattern for o in plan.overrides if o.pattern}


def _implied_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    implied = fixed_sparsity(pattern)
    if sparsity is None and implied is None:
        raise PlanError(
            "Plan.sparsity is missing: give the fraction of zeros, for example Plan(sparsity=0.9)."
        )
    if sparsity is None:
        sparsity = implied
    sparsity = _check_sparsity(sparsity, "Plan.sparsity")
    _check_agreement(sparsity, pattern, "Plan.sparsity")
    return sparsity


def fixed_sparsity(pattern: Pattern | None) -> float | None:
    """What a pattern says of the sparsity by itself; None where that is left to the plan."""
    if isinstance(pattern, Strided):
        return 1 - 1 / pattern.m
    if isinstance(pattern, Transposable):
        return 0.5
    return 1 - pattern.n / pattern.m if isinstance(pattern, NM) else None


def _check_agreement(sparsity: float, pattern: Pattern | None, where: str) -> None:
    implied = fixed_sparsity(pattern)
    if implied is not None and abs(sparsity - implied) > 1e-9:
        raise PlanError(
            f"{where}={sparsity} disagrees with {pattern}, which is {implied}: leave sparsity out."
        )


def _check_sparsity(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise PlanError(f"{where}: expected a fraction of zeros in [0, 1), got {value!r}.")
    return float(value)


def _strings(value: Any, field_name: str) -> tuple[str, ...]:
    sequence = isinstance(value, tuple | list)
    if not sequence or not all(isinstance(item, str) for item in value):
        raise PlanError(f"Plan.{field_name}: expected a tuple of globs such as ('head',), got {value!r}.")
    return tuple(value)


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{what}: expected a table of fields (a mapping), got {value!r}.")
    return value


def _check_fields(cls: type, row: Mapping[str, Any], where: str) -> None:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(row) - known)
    if unknown:
        raise PlanError(
            f"{where}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}."
        )


def _overrides(rows: Any) -> tuple[Override, ...]:
    if not isinstance(rows, list | tuple):
        raise PlanError(f"overrides: expected a list of tables ([[overrides]] in TOML), got {rows!r}.")
    return tuple(_override(row) for row in rows)


def _override(row: Mapping[str, Any]) -> Override:
    row = dict(_table(row, "override"))
    _check_fields(Override, row, "override")
    if "glob" not in row:
        raise PlanError(f"override: expected a glob of weight names as glob=, got only {sorted(row)}.")
    if "pattern" in row:
        row["pattern"] = patterns.from_dict(_table(row["pattern"], "pattern"))
    return Override(**row)


def _plain(value: Any) -> Any:
    """The TOML form of a field: dicts, lists, strings and numbers, unset entries left out."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Transform):
        return transforms.to_dict(value)
    if isinstance(value, Override):
        row = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {key: item for key, item in row.items() if item is not None}
    if hasattr(value, "project"):
        return patterns.to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
