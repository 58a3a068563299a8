"""What a sparse-training method is made of: Method = Reparam + UpdateRule + Schedule, all frozen values."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, ParamSpec, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxsparse.errors import InvariantError, PlanError
from fxsparse.options import check_defaults, check_is
from fxsparse.pattern import Pattern
from fxsparse.schedule import Schedule


class Probe(Enum):
    """The gradient information that is needed beyond the active entries: by an update, or by every step."""

    NONE = "none"
    SAMPLED = "sampled"
    """The gradient at entries that the rule names: ``WeightView.gradient_at``."""
    GUIDED = "guided"
    """The same, and sums over a layer's inputs and outputs: ``WeightView.marginals``."""
    DENSE = "dense"
    """The gradient of every entry: ``WeightView.gradient_tiles``."""
    EMA_DENSE = "ema_dense"
    """The optimizer's average of dense gradients, ``WeightView.momentum``; the reparametrisation hands them out at
    every step."""
    TOPOLOGY = "topology"
    """No gradient, but the masks of the layers before and after: ``WeightView.feeds``."""

    @property
    def collects(self) -> bool:
        """Whether a probe step has to leave gradients behind."""
        return self in (Probe.SAMPLED, Probe.GUIDED, Probe.DENSE)


Signs = Callable[[Tensor], Tensor]
"""Numbers of the terms that a weight gradient is the sum of, int64 -> +1 or -1 for each."""

MaskFunction = Callable[..., Tensor]
"""(weight, mask, *extras, *numbers) -> effective weight, differentiable; defined at module level."""


@dataclass(frozen=True)
class Extra:
    """A tensor beside every sparse weight, ``<weight>_<name>`` in the state dict and nowhere in the dense one."""

    name: str
    start: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    """(weight, mask, generator) -> its first value; in the weight's own layout where it has the weight's shape."""
    learned: bool = False
    """A Parameter that the optimizer trains; else a buffer, which the update rule may write."""
    lr: float = 1.0
    """Learning rate in multiples of the weights', in ``SparseModule.parameter_groups``."""
    weight_decay: float = 0.0


class Reparam(Protocol):
    """How the stored weight becomes the effective weight, and how its gradient flows back."""

    @property
    def exact_zeros(self) -> bool:
        """Pruned entries are kept at exactly 0 in storage, and grown ones start there; only then may storage be
        compact.  Otherwise nothing is zeroed: an entry that comes back still has its value and state.
        """
        ...

    @property
    def probe(self) -> Probe:
        """What the weight gradient of *every* step needs beyond the active entries (FLOPs are counted by it)."""
        ...

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        """What a pass puts in the graph: the function, and its arguments after (weight, mask, *extras)."""
        ...

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        """The weight the op sees, differentiable; on a probe step `dense_grad` unmasks the gradient."""
        ...

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        """The effective weight as a plain tensor, for inference and ``to_dense``."""
        ...


def extras_of(reparam: Reparam) -> tuple[Extra, ...]:
    """The tensors beside a weight that a reparametrisation computes with: its attribute ``extras``, if any."""
    return getattr(reparam, "extras", ())


def _unknown() -> Tensor:
    raise InvariantError("an update rule reads what its Probe does not ask for")


@dataclass(frozen=True)
class WeightView:
    """One weight as an update rule sees it, the same for masked and compact storage."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    nnz: int
    """Entries the weight has to have after this update, unless the method's nnz varies."""
    budget: int
    """Entries that the allocation gave the weight; the pattern may have rounded `nnz` below it."""
    step: int
    drop_fraction: float
    active: Tensor
    """Flat positions of the stored entries, int64 [nnz], ascending."""
    values: Tensor
    """Their weights, [nnz]."""
    weight: Callable[[], Tensor]
    """The dense weight, hidden values included; masked storage only."""
    gradient_tiles: Callable[[], Iterator[tuple[int, Tensor]]]
    """Row tiles of the signed dense gradient with respect to the effective weight, in ascending row order:
    (first row, [rows, fan_in]); only with Probe.DENSE.  Each call reads them again, in row tiles that the rule
    must not write to."""
    gradient_at: Callable[[Tensor], Tensor]
    """The signed gradient at flat positions (int64 [n], ascending), [n]; only with Probe.SAMPLED and GUIDED.  In
    compact storage it is computed for these entries and no others."""
    marginals: Callable[[Signs | None], tuple[Tensor, Tensor] | None]
    """What ``fxsparse.observed.marginals`` says of the backwards that this update goes by: of magnitudes, or with
    the given signs.  None where no op that reads the whole weight was seen.  Only with Probe.GUIDED."""
    generator: torch.Generator
    """``fxsparse.rng.generator_for(seed, weight name, step)``, so that all ranks draw the same numbers."""
    ablates: bool = False
    """Whether whole neurons (rows) may go."""
    final: int = 0
    """Entries that the weight is to have when training ends."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's `Extra` tensors by name, detached, in the logical layout."""
    active_gradient: Callable[[], Tensor] = _unknown
    """The gradient that the optimizer has just seen at the active entries, [nnz]; no probe is needed for it."""
    momentum: Callable[[], Tensor] = _unknown
    """The optimizer's average of gradients for every entry, of the weight's shape; only with Probe.EMA_DENSE."""
    channels: tuple[int, ...] = ()
    """For each row a number; rows of all weights that have the same are one channel, as a residual adds them.  Only
    for a `GlobalRule` of a method that ablates, with example inputs."""
    feeds: tuple[str, ...] = ()
    """Weights whose columns are exactly this weight's rows, elementwise ops between; only with Probe.TOPOLOGY."""


@dataclass(frozen=True)
class Choice:
    """What a rule decides for one weight beyond its active entries."""

    entries: Tensor
    """Flat positions of the active entries (int64, ascending), or a bool mask of the weight's logical shape."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of the method's `Extra` buffers, in the logical layout."""
    forget: bool = False
    """The optimizer's state of the whole weight starts at 0 again, and so does its count of steps."""


class UpdateRule(Protocol):
    """Chooses the entries that are active after an update."""

    @property
    def probe(self) -> Probe:
        """What an update needs; between updates nothing beyond the active entries is computed for it."""
        ...

    def __call__(self, view: WeightView) -> "Tensor | Choice":
        """Flat positions of the entries to be active, int64, ascending; or a Choice, which can say more."""
        ...


@runtime_checkable
class GlobalRule(UpdateRule, Protocol):
    """A rule that sees all weights at once: global thresholds, redistribution.  Storage is masked.

    ``__call__`` is the choice of a weight alone, as `check_method` asks for it.  Where each weight keeps its own count,
    ``own_counts = True`` says so, and plans may give each another sparsity.
    """

    def choose_all(self, views: Sequence[WeightView], total: int) -> Sequence["Tensor | Choice"]:
        """For every view what is to be active, `total` entries in all: the method's nnz of all these weights."""
        ...


@dataclass(frozen=True)
class Proposal:
    """What one weight brings to a choice that ranks the entries of all weights together."""

    name: str
    active: Tensor
    """Flat positions of the stored entries, int64, ascending."""
    keep: Tensor
    """Their scores; the smallest go first."""
    candidates: Tensor
    """Flat positions of entries that could be grown, none of them active: int64, ascending."""
    grow: Tensor
    """Their scores; the largest come first."""


@runtime_checkable
class JointRule(UpdateRule, Protocol):
    """A rule that may move entries from one weight to another: only their total stays as it is.

    ``__call__`` is the choice of a weight alone.
    """

    def propose(self, view: WeightView) -> Proposal: ...

    def choose(self, proposals: Sequence[Proposal], drop_fraction: float) -> list[Tensor]:
        """For every proposal the flat positions to be active, int64, ascending."""
        ...


@runtime_checkable
class SampledRule(UpdateRule, Protocol):
    """A rule with ``Probe.SAMPLED`` or ``GUIDED``: it asks for the gradient at pairs that it draws."""

    @property
    def candidates(self) -> float:
        """Pairs drawn per active entry (gamma of GSE, arXiv:2401.06898); FLOPs are counted by it."""
        ...


@runtime_checkable
class WholeRule(UpdateRule, Protocol):
    """A rule that reads nothing but the whole weight, so that it needs no positions and no view.

    Where pruned entries keep their values there is nothing to move but the mask.  Writing it at once makes an
    update at 2:4 of a 768 x 3072 weight six times cheaper (36 ms against 212 by positions, one core), which
    counts for SR-STE: it has one at every step.
    """

    def mask(self, weight: Tensor, pattern: Pattern, nnz: int) -> Tensor:
        """Bool mask of the weight's shape: what ``__call__`` gives as positions."""
        ...


@dataclass(frozen=True)
class Held:
    """One weight as a penalty sees it, detached and in the user's layout."""

    name: str
    weight: Tensor
    mask: Tensor
    extras: Mapping[str, Tensor]
    final: int = 0
    """Entries that the weight is to have when training ends; all of them, where the plan keeps it dense."""


class Penalty(Protocol):
    """A regulariser by its gradient, added to ``.grad`` right before every optimizer step, after any clipping."""

    def __call__(self, weights: Sequence[Held], step: int) -> Sequence[Mapping[str, Tensor]]:
        """For every weight what is added to its gradient, under "weight", and to those of its learned extras.

        `step` counts the optimizer steps before this one.  The same on all ranks, which hold the same weights.
        """
        ...


class Score(Protocol):
    """The initial mask's score: larger is kept first."""

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor: ...


class OneShot(Protocol):
    """Prunes a trained weight by what its op read on calibration batches, without training: `fxsparse.prune`."""

    products: ClassVar[bool]
    """Whether it needs the products of all pairs of input columns; else the squares of each."""

    def __call__(self, matrix: Tensor, moments: Tensor, pattern: Pattern, nnz: int) -> tuple[Tensor, str]:
        """The pruned matrix, and what the report should say of it, mostly nothing.

        `matrix` is [rows, fan-in] in at least float32, the input channels of a kernel position next to each other;
        `moments` the mean over inputs of squares [fan-in] or products [fan-in, fan-in].
        """
        ...


class WeightInit(Protocol):
    """Values that the active entries of a weight start from."""

    def __call__(self, fan_in: Tensor, generator: torch.Generator) -> Tensor:
        """float32 [nnz]; `fan_in` has for every active entry the number of them in its row, float32 [nnz]."""
        ...


@dataclass(frozen=True)
class Method:
    """A sparse-training method as a value."""

    name: str
    reparam: Reparam
    init: Score
    source: str
    rule: UpdateRule | None = None
    schedule: Schedule | None = None
    pattern: Pattern | None = None
    """What its masks look like: a plan's default, and any other kind is refused.  None: any pattern."""
    allocation: str | None = None
    """The policy of its paper: a plan's default; None: ERK."""
    weight_init: WeightInit | None = None
    """Draws the selected weights anew; None leaves them as they come."""
    never_ablate: tuple[str, ...] | None = None
    """The rule ablates neurons, yet none of the weights that these globs name; None: it ablates none at all."""
    varying_nnz: bool = False
    """An update may leave any number of entries up to the weight's budget; else it leaves exactly nnz."""
    one_shot: OneShot | None = None
    """Prunes a trained model by calibration batches; such a method does not train."""
    learned_nnz: bool = False
    """Training decides how many entries there are, from none to all, and every weight starts with all of them; the
    plan's sparsity is only what the report compares with."""
    initial_sparsity: float | None = None
    """Of all weights together before the first update, shared by the plan's allocation; None: by the ramp."""
    state: tuple[Extra, ...] = ()
    """What the rule keeps beside every weight, apart from the extras of the reparametrisation."""
    penalty: Penalty | None = None
    keeps_state: bool = False
    """The optimizer's state of entries that are pruned or grown stays as it is."""
    freezes_weights: bool = False
    """The selected weights do not learn (``requires_grad`` is False in the compiled model, which shares them)."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The keyword arguments it was built from, without those at their default: what ``to_dict`` writes."""

    @property
    def is_joint(self) -> bool:
        """Whether an update may move entries from one weight to another."""
        return isinstance(self.rule, JointRule | GlobalRule) or getattr(self.rule, "together", False)

    @property
    def extras(self) -> tuple[Extra, ...]:
        """All tensors beside a weight: those of the reparametrisation first, in the order in which it takes them."""
        return (*extras_of(self.reparam), *self.state)

    def nnz(self, step: int, final: int, numel: int) -> int:
        """Entries of a weight after `step` optimizer steps, on the way to `final`.

        Step -1 asks for the initial mask.  ``pattern.feasible`` rounds what comes out.
        """
        if self.learned_nnz:
            return numel
        if self.schedule is None or self.schedule.ramp is None:
            return final
        return self.schedule.ramp(self.schedule.last_update(step), final, numel)

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., option: value, ...}`` for `from_dict`; options at their default are left out."""
        _constructor(self.name)
        return {"name": self.name, **self.options}


P = ParamSpec("P")
_METHODS: dict[str, Callable[..., Method]] = {}


def register(build: Callable[P, Method]) -> Callable[P, Method]:
    """Make a constructor known to `from_dict` under its function name, and record the options it is given.

    Its parameters are the method's options; each has a default that a TOML file could hold, or None.
    """
    name = build.__name__.rstrip("_")
    if (known := _METHODS.get(name)) is not None and known.__module__ != build.__module__:
        raise PlanError(f"method {name!r} is registered by {known.__module__} already. Choose another name.")
    check_defaults(name, signature := inspect.signature(build))

    @functools.wraps(build)
    def constructor(*args: P.args, **kwargs: P.kwargs) -> Method:
        given = signature.bind(*args, **kwargs).arguments
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        options = {key: value for key, value in given.items() if value != signature.parameters[key].default}
        built = build(*args, **kwargs)
        check_is(f"what {build.__module__}.{build.__qualname__} returns", built, Method)
        return replace(built, name=name, options=options)

    _METHODS[name] = constructor
    return constructor


def from_dict(fields: Mapping[str, Any]) -> Method:
    """The inverse of ``Method.to_dict``; PlanError for an unknown name or option, or a value out of range."""
    options = dict(fields)
    constructor = _constructor(options.pop("name", None))
    known = inspect.signature(constructor).parameters
    if unknown := [key for key in options if key not in known]:
        raise PlanError(f"method {fields['name']!r} has no option {unknown[0]!r}. It has {', '.join(known)}.")
    return constructor(**options)


def _constructor(name: object) -> Callable[..., Method]:
    constructor = _METHODS.get(name) if isinstance(name, str) else None
    if constructor is None:
        raise PlanError(
            f"expected the name of a registered method, got {name!r}. Known: {', '.join(sorted(_METHODS))}. "
            "Import the package that registers it; @fxsparse.method.register adds one."
        )
    return constructor
