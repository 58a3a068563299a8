"""``compile(mode="infer")``: fold, pick the fastest kernel of every weight, and never be slower than dense."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.artefact import emit
from fxsparse.dense_copies import numel_of
from fxsparse.errors import InvariantError, PlanError
from fxsparse.exported_program import is_exported, opened
from fxsparse.formats import narrow
from fxsparse.graph import attribute_nodes
from fxsparse.inputs import has_meta
from fxsparse.kernel import FOR_ALL_ENTRIES
from fxsparse.module import SparseModule
from fxsparse.passes import RemoveDeadNeurons, SelectKernels, inference_pipeline
from fxsparse.passes.select_entry_kernels import why_not_dense
from fxsparse.passes.select_kernels import ADVANTAGE
from fxsparse.pipeline import Pass, PassContext, Program, run_passes
from fxsparse.plain_weights import with_plain_weights
from fxsparse.plans import Plan
from fxsparse.raised import raised
from fxsparse.report import Report
from fxsparse.skeleton import bind, copy_structure, substituted
from fxsparse.storage import MaskedWeight
from fxsparse.trace import capture
from fxsparse.verify import compare, copied_inputs, largest_error, observe

NEVER_SLOWER = 0.95
"""Least allowed speed of the artefact relative to the dense model: the median over interleaved pairs."""
PAIRS = 15
LONG_SECONDS = 10.0
CLEAR_GAIN = 0.5
"""Of the artefact's time: gains by kernel that add up to more are not lost in a whole model."""
WITHOUT = f"sparse kernels gain less than {100 * (1 - ADVANTAGE):.0f} % of the whole model's time"
_SAMPLE_SECONDS = 0.0005


@dataclass(frozen=True)
class Speed:
    """The artefact beside the dense model."""

    dense_us: float
    sparse_us: float
    ratio: float
    """Median over pairs of dense time / artefact time."""


@dataclass(frozen=True)
class _Lowered:
    """One run of the passes, and what it made."""

    ctx: PassContext
    sparse: SparseModule


def compile_for_inference(
    model: nn.Module, example_inputs: Any = None, *, strict: bool = False, values: str | None = None
) -> SparseModule:
    """The evaluation graph of `model` with every weight on the kernel that measured fastest; `model` is untouched.

    `model`: a training SparseModule, or any module whose weights have zeros.  With `example_inputs` the result is
    compared with the model and timed against its dense form; where it is below `NEVER_SLOWER`, the least profitable
    kernels are given up, with a note.  Without them nothing can be measured and every weight stays dense.  What cannot
    be captured as a graph runs by its own forward and is not timed.

    Where compact weights together would take more than ``module.MAX_DENSE_BYTES`` as dense ones, no tensor of a dense
    weight's size is made: kernels pack the nonzeros, and the result is compared with the training module in evaluation
    mode and timed against that, with a note.

    With `values` ("int8" or "bfloat16") nonzeros are stored so where that measured faster, and the report has the
    largest error, relative to the largest output.

    Raises:
        PlanError: a model compiled for inference already, or inputs on meta.
        InvariantError: the result computes something else than the model (a bug).
    """
    _check(model, example_inputs)
    model, folded = (model, []) if isinstance(model, SparseModule) else with_plain_weights(opened(model))
    source, plan = _capture(model, example_inputs, strict)
    source.notes[:0] = folded
    made = infer_program(model, source, plan, example_inputs, values)
    made.report.notes += _unfinished(model)
    return made


def _unfinished(model: nn.Module) -> list[str]:
    """Notes on a training that never moved its masks, or left more nonzeros than the plan gives."""
    updates = model._emitted.updates if isinstance(model, SparseModule) else None
    if updates is None:
        return []
    notes = []
    if updates.method.rule is not None and updates.step == 0:
        notes.append("no step of training was counted, so no mask has moved: attach(optimizer) counts them")
    wanted = sum(target.nnz for target in updates.targets.values())
    weights = [weight for _, weight in updates.weights()]
    kept = sum(int(w.mask.sum()) if isinstance(w, MaskedWeight) else w.values.numel() for w in weights)
    if kept > wanted:
        numel = sum(map(numel_of, weights))
        learns = updates.method.learned_nnz
        why = "the method learns how many" if learns else f"training ended at step {updates.step}"
        zeros = f"{1 - kept / numel:.1%} of the weights are zeros, {1 - wanted / numel:.1%} in the plan"
        notes.append(f"{zeros}: {why}")
    return notes


def infer_program(
    model: nn.Module, source: Program, plan: Plan | None, example_inputs: Any, values: str | None = None
) -> SparseModule:
    """The rest of `compile_for_inference`, for a `model` that was captured as `source`."""

    def lower(keep_dense: Mapping[str, str]) -> _Lowered:
        ctx = PassContext(plan, "infer", _copied(source), Report(), example_inputs)
        ctx.values_dtype = None if values is None else narrow.DTYPES[values]
        run_passes(_pipeline(keep_dense), ctx)
        return _Lowered(ctx, emit(model, ctx))

    made = lower({})
    if example_inputs is None or has_meta(example_inputs):
        return made.sparse
    if made.ctx.entries:
        return _beside_training(_copied(source).graphs["eval"], made)
    dense = _dense_form(model)
    if made.ctx.program.tier == "walk":
        _compare(dense, made)
        made.sparse.report.notes.append(
            "the model's own forward runs, since no graph of it could be captured"
        )
        return made.sparse
    made, speed = _never_slower(dense, made, lower)
    own_forward = not is_exported(model)  # that of a program is the same graph, unchecked
    if speed.ratio < NEVER_SLOWER and own_forward:
        ctx = _unshrunk(source, made.ctx, example_inputs) if made.ctx.shrunk else made.ctx
        return _as_it_came(model, dense, ctx)
    made.sparse.report.notes.append(_told(speed))
    return made.sparse


def compile_again(sparse: SparseModule, example_inputs: Any, why: str) -> SparseModule:
    """The same inference module with its kernels measured again, on these inputs and this machine.

    `why`: what a note says of it.
    """
    recipe: Any = sparse._emitted.recipe
    source = raised(sparse)
    dense = source.graphs["eval"]

    def lower(keep_dense: Mapping[str, str]) -> _Lowered:
        ctx = PassContext(None, "infer", _copied(source), Report(), example_inputs)
        ctx.values_dtype = recipe.source.values_dtype
        run_passes(_pipeline(keep_dense), ctx)
        return _Lowered(ctx, emit(dense, ctx, recipe.source))

    made, speed = _never_slower(dense, lower({}), lower)
    made.sparse.report.notes.append(f"kernels were measured again after loading: {why}; {_told(speed)}")
    return made.sparse.train(sparse.training)


def speed_of(
    dense: Callable[..., Any], sparse: Callable[..., Any], example_inputs: Any, pairs: int = PAIRS
) -> Speed:
    """Time two callables in turns on the same inputs, warm, without gradients.

    Where `pairs` take longer than `LONG_SECONDS` they end once the others could not change whether their median is
    below `NEVER_SLOWER`.
    """
    args, kwargs = copied_inputs(example_inputs)
    taken: list[tuple[float, float]] = []
    with torch.no_grad():
        repeats = max(1, math.ceil(_SAMPLE_SECONDS / max(1e-7, _seconds(dense, args, kwargs, 2))))
        began = time.perf_counter()
        for turn in range(pairs + 2):
            pair = (_seconds(dense, args, kwargs, repeats), _seconds(sparse, args, kwargs, repeats))
            taken += [pair] if turn >= 2 else []
            if time.perf_counter() - began > LONG_SECONDS and _is_decided(taken, pairs):
                break
    dense_s, sparse_s = (statistics.median(column) for column in zip(*taken, strict=True))
    return Speed(dense_s * 1e6, sparse_s * 1e6, statistics.median(a / b for a, b in taken))


def _is_decided(taken: Sequence[tuple[float, float]], pairs: int) -> bool:
    """Whether more than half of `pairs` are on one side of `NEVER_SLOWER` already."""
    fast = sum(dense >= NEVER_SLOWER * sparse for dense, sparse in taken)
    return 2 * max(fast, len(taken) - fast) > pairs


def _never_slower(
    dense: nn.Module, made: _Lowered, lower: Callable[[Mapping[str, str]], _Lowered]
) -> tuple[_Lowered, Speed]:
    """`made`, with the least profitable kernels given up until it is not slower than `dense`, and its speed.

    Where all weights are dense and it is slower even so, `Speed.ratio` says it.
    """
    keep_dense: dict[str, str] = {}
    while True:
        _compare(dense, made)
        speed = _speed(dense, made.sparse, made.ctx.example_inputs)
        if speed.ratio >= NEVER_SLOWER:
            return _unless_as_fast_without(dense, made, speed, keep_dense, lower)
        given_up = _least_profitable(made.ctx, speed)
        if not given_up:
            return made, speed
        keep_dense |= given_up
        made = lower(keep_dense)


def _unless_as_fast_without(
    dense: nn.Module,
    made: _Lowered,
    speed: Speed,
    keep_dense: Mapping[str, str],
    lower: Callable[[Mapping[str, str]], _Lowered],
) -> tuple[_Lowered, Speed]:
    """`made`, or the same graph without sparse kernels where those gain little, by themselves and altogether.

    What a kernel gains by itself, copies between layouts and the caches of a whole model may take again.  Where narrow
    values were asked for, they stay: they are smaller, too.
    """
    decisions = made.ctx.decisions
    gains = {n: us for n, us in _gains(made.ctx).items() if decisions[n].format not in FOR_ALL_ENTRIES}
    is_clear = sum(gains.values()) > CLEAR_GAIN * speed.sparse_us
    if not gains or is_clear or made.ctx.values_dtype is not None:
        return made, speed
    inputs = made.ctx.example_inputs
    without = lower({**keep_dense, **dict.fromkeys(gains, WITHOUT)})
    beside = _speed(without.sparse, made.sparse, inputs)
    if ADVANTAGE * beside.ratio >= 1:
        return made, speed
    _compare(dense, without)
    again = _speed(dense, without.sparse, inputs)
    if again.ratio < NEVER_SLOWER:
        return made, speed
    without.sparse.report.notes.append(
        f"no sparse kernel is taken, though {len(gains)} were faster by themselves: with them the whole model runs "
        f"at {beside.ratio:.2f}x of what it does without"
    )
    return without, again


def _told(speed: Speed) -> str:
    return f"dense {speed.dense_us:.1f} us, this {speed.sparse_us:.1f} us: {speed.ratio:.2f}x"


def _pipeline(keep_dense: Mapping[str, str]) -> list[Pass]:
    return [
        replace(p, keep_dense=dict(keep_dense)) if isinstance(p, SelectKernels) else p
        for p in inference_pipeline
    ]


def _check(model: nn.Module, example_inputs: Any) -> None:
    if has_meta(example_inputs):
        raise PlanError(
            "compile: example_inputs on the meta device have no values to measure kernels with; expected real ones."
        )
    if isinstance(model, SparseModule) and model.plan is None:
        raise PlanError(
            "compile: this model is compiled for inference already; compile the model it was made from."
        )
    if isinstance(model, SparseModule):
        model.check_masks()


def _capture(model: nn.Module, example_inputs: Any, strict: bool) -> tuple[Program, Plan | None]:
    if not isinstance(model, SparseModule):
        return capture(model, example_inputs, modes=("eval",), strict=strict), None
    program = model._emitted.program
    if program.tier == "walk":
        return capture(model.to_dense(), example_inputs, modes=("eval",), strict=strict), None
    return program, model.plan


def _copied(program: Program) -> Program:
    """The evaluation half of a program on a skeleton of its own, in evaluation mode; Parameters are shared."""
    skeleton = copy_structure(program.skeleton).eval()
    graph = bind(copy.deepcopy(program.graphs["eval"].graph), skeleton)
    for name in ("fxsparse_step", "fxsparse_rng"):
        if not attribute_nodes(graph.graph, name):  # fold-masks drops what a backward's random numbers go by
            skeleton._buffers.pop(name, None)
    notes, accepts = list(program.notes), dict(program.accepts)
    return Program(program.tier, skeleton, {"eval": graph}, notes, dict(program.hidden), accepts=accepts)


def _dense_form(model: nn.Module) -> nn.Module:
    """What the artefact is compared with: the dense model in evaluation mode, run by its own forward."""
    return (model.to_dense() if isinstance(model, SparseModule) else copy_structure(model)).eval()


def _beside_training(trained: nn.Module, made: _Lowered) -> SparseModule:
    """Compare and time an artefact whose weights do not fit as dense ones with the training graph in evaluation."""
    _compare(trained, made)
    speed = _speed(trained, made.sparse, made.ctx.example_inputs)
    made.sparse.report.notes.append(
        f"the training module {speed.dense_us:.1f} us, this {speed.sparse_us:.1f} us: {speed.ratio:.2f}x; "
        f"{why_not_dense(made.ctx)}"
    )
    return made.sparse


def _compare(dense: nn.Module, made: _Lowered) -> None:
    """InvariantError where the two differ; where values were rounded their difference goes to the report instead."""
    sparse, ctx = made.sparse, made.ctx
    want = observe(dense, dense, ctx.example_inputs, training=False)
    # A forward of the user's own may keep Python attributes, which a comparison should not move.
    root = copy_structure(ctx.program.skeleton) if ctx.program.tier == "walk" else sparse
    got = observe(root, root, ctx.example_inputs, training=False)
    rounded = [name for name, decision in ctx.decisions.items() if decision.values_dtype is not None]
    error = largest_error(want, got)
    if (not rounded or error == math.inf) and (difference := compare(want, got, ctx.program.graphs["eval"])):
        raise InvariantError(f"compile: the inference module differs from the model: {difference}")
    if ctx.values_dtype is not None:
        sparse.report.totals["values_error"] = error
        sparse.report.notes.append(
            f"values are {str(ctx.values_dtype)[6:]} in {len(rounded)} of {len(ctx.decisions)} weights: the largest "
            f"error of an output is {error:.1e} of the largest output"
        )


def _speed(dense: nn.Module, sparse: SparseModule, example_inputs: Any) -> Speed:
    """Measured again, longer, where the first time is below the limit: one disturbance should cost no kernel.

    Both run on copies of their buffers, which a forward may write.
    """
    with substituted(dense, buffer=Tensor.clone), substituted(sparse, buffer=Tensor.clone):
        speed = speed_of(dense, sparse, example_inputs)
        return speed if speed.ratio >= NEVER_SLOWER else speed_of(dense, sparse, example_inputs, 2 * PAIRS)


def _least_profitable(ctx: PassContext, speed: Speed) -> dict[str, str]:
    """{weight: reason} of the half of the lowered weights that gain least; empty if none is lowered."""
    gains = _gains(ctx)
    worst = sorted(gains, key=gains.__getitem__)[: math.ceil(len(gains) / 2)]
    reason = f"given up: with it the whole model ran at {speed.ratio:.2f}x of dense"
    return {name: f"{ctx.decisions[name].kernel} {reason}" for name in worst}


def _gains(ctx: PassContext) -> dict[str, float]:
    """{lowered weight: microseconds that its kernel gained by itself}."""
    return {
        name: (decision.dense_us or 0.0) - (decision.sparse_us or 0.0)
        for name, decision in ctx.decisions.items()
        if decision.format != "dense"
    }


def _unshrunk(source: Program, shrunk: PassContext, example_inputs: Any) -> PassContext:
    """What the passes say of the model with all its neurons and every weight dense."""
    ctx = PassContext(shrunk.plan, "infer", _copied(source), Report(), example_inputs)
    keep_dense = {name: decision.reason or "dense" for name, decision in shrunk.decisions.items()}
    run_passes([p for p in _pipeline(keep_dense) if not isinstance(p, RemoveDeadNeurons)], ctx)
    ctx.report.notes += [*shrunk.report.notes, "no neuron is removed from the model's own forward"]
    return ctx


def _as_it_came(model: nn.Module, dense: nn.Module, ctx: PassContext) -> SparseModule:
    """The model's own forward: its graph is slower even with every weight dense."""
    notes = [*ctx.report.notes, "the model's own forward runs, without a graph, which was slower"]
    ctx.program = Program("walk", copy_structure(dense).eval(), dict(ctx.program.graphs), notes)
    ctx.untouched = {name: "norm" if why.startswith("folded") else why for name, why in ctx.untouched.items()}
    return emit(model, ctx)


def _seconds(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int) -> float:
    """Seconds of one call, over `repeats` of them."""
    start = time.perf_counter()
    for _ in range(repeats):
        call(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
