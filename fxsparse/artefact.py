"""The inference artefact: what it holds, its report rows, and how it pickles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from fxsparse.direct_reads import read_directly
from fxsparse.graph import fetch, strided_parts
from fxsparse.graph_pickle import picklable, restored
from fxsparse.input_check import InputCheck
from fxsparse.inputs import to_json
from fxsparse.layer_sizes import show_what_is_left
from fxsparse.module import Emitted, SparseModule
from fxsparse.packed import PackedWeight
from fxsparse.pipeline import PassContext, Program
from fxsparse.report import Report
from fxsparse.saved_training import origin_of
from fxsparse.skeleton import bind, copy_structure
from fxsparse.summary import summarize


@dataclass(frozen=True)
class Source:
    """What an inference module was compiled from, as far as a file has to know it again."""

    model: str
    """The class of the user's model."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters and buffers."""
    classes: Mapping[str, str]
    """Of the modules in it, by path."""
    transformed: Any
    """What transforms the user's model again, where it was."""
    inputs: Any
    """The example inputs, as ``inputs.to_json`` has them; None without any."""
    values_dtype: torch.dtype | None
    """What values were allowed to be stored in, too."""


@dataclass(frozen=True)
class InferenceRecipe:
    """What an inference module is made of apart from its state: nothing is traced or measured again."""

    shell: nn.Module
    """The live skeleton; a pickle holds it with its saved tensors on meta."""
    tier: str
    graph: Graph | None
    report: Report
    accepts: Mapping[str, InputCheck]
    source: Source
    plan: None = None

    def __reduce__(self) -> tuple[Any, ...]:
        graph = None if self.graph is None else picklable(self.graph)
        return type(self), (
            _without_state(self.shell),
            self.tier,
            graph,
            self.report,
            self.accepts,
            self.source,
        )


def emit(model: nn.Module, ctx: PassContext, source: Source | None = None) -> SparseModule:
    """The module that runs what the passes left in `ctx`; it shares no tensor with `model` and wants no gradients.

    `source`: what `model` was compiled from, where it is not the user's.
    """
    program = ctx.program
    _own_tensors(program.skeleton, model)
    program.graphs["train"] = program.graphs["eval"]
    if "eval" in program.accepts:
        program.accepts["train"] = program.accepts["eval"]
    read_directly(program.graphs["eval"])
    if program.tier != "walk":
        show_what_is_left(program.graphs["eval"], ctx)
    _summarize(ctx)
    graph = None if program.tier == "walk" else program.graphs["eval"].graph
    source = source or _source(model, ctx)
    recipe = InferenceRecipe(program.skeleton, program.tier, graph, ctx.report, program.accepts, source)
    return SparseModule(Emitted(program, ctx.report, (), {}, recipe, rebuild))  # type: ignore[arg-type]


def rebuild(recipe: InferenceRecipe, state: Mapping[str, Tensor], training: bool) -> SparseModule:
    """The inference module that was pickled."""
    flat: Any = recipe.graph  # as __reduce__ left it
    graph = None if flat is None else restored(flat)
    sparse = assembled(replace(recipe, graph=graph))
    sparse.load_state_dict(state, assign=True)
    return sparse.train(training)


def assembled(recipe: InferenceRecipe) -> SparseModule:
    """The module that runs the graph of a recipe on its shell."""
    skeleton, graphs = recipe.shell, {}
    if recipe.graph is not None:
        bound = bind(recipe.graph, skeleton)
        graphs, recipe = {"eval": bound, "train": bound}, replace(recipe, graph=bound.graph)
    accepts = dict(recipe.accepts)
    program = Program(recipe.tier, skeleton, graphs, list(recipe.report.notes), accepts=accepts)
    return SparseModule(Emitted(program, recipe.report, (), {}, recipe, rebuild))  # type: ignore[arg-type]


def _source(model: nn.Module, ctx: PassContext) -> Source:
    theirs = model._emitted.recipe.shell if isinstance(model, SparseModule) else model
    named = (
        *theirs.named_parameters(remove_duplicate=False),
        *theirs.named_buffers(remove_duplicate=False),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in named}
    inputs = None if ctx.example_inputs is None else to_json(ctx.example_inputs)
    return Source(
        type(theirs).__qualname__, shapes, classes_of(theirs), origin_of(theirs), inputs, ctx.values_dtype
    )


def classes_of(model: nn.Module) -> dict[str, str]:
    """{path: class} of the modules of a model."""
    return {path: type(m).__qualname__ for path, m in model.named_modules(remove_duplicate=False) if path}


def _own_tensors(skeleton: nn.Module, model: nn.Module) -> None:
    theirs = set[int]().union(*map(_places, (*model.parameters(), *model.buffers())))

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if _places(tensor) & theirs else tensor

    _replace_tensors(skeleton, own)


def _places(tensor: Tensor) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in strided_parts(tensor).values()}


def _without_state(skeleton: nn.Module) -> nn.Module:
    """A copy whose saved tensors are on meta; buffers that a state dict leaves out are kept."""
    shell, saved = copy_structure(skeleton), {id(t) for t in skeleton.state_dict(keep_vars=True).values()}
    _replace_tensors(shell, lambda tensor: tensor.to("meta"), saved)
    return shell


def _replace_tensors(
    root: nn.Module, change: Callable[[Tensor], Tensor], only: set[int] | None = None
) -> None:
    """Put ``change(t)``, detached, in the place of every tensor of the tree (or of those with an id in `only`)."""
    made: dict[int, Any] = {}
    for module in root.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or (only is not None and id(tensor) not in only):
                    continue
                if id(tensor) not in made:
                    new = change(tensor.detach())
                    made[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
                held[name] = made[id(tensor)]


# -- report ------------------------------------------------------------------------------------------------


def _summarize(ctx: PassContext) -> None:
    """The rows of training, with what inference measured and what it stores."""
    summarize(ctx)
    for row in ctx.report.layers:
        decision = ctx.decisions[row["name"]]
        taken = decision.dense_us if decision.format == "dense" else decision.sparse_us
        measured = {
            "dense_us": decision.dense_us,
            "sparse_us": decision.sparse_us,
            "limit_us": decision.limit_us,
            "limit_share": decision.limit_us / taken if decision.limit_us and taken else None,
        }
        row |= {"format": decision.format, "sparsity_target": None, **measured}
        if ctx.values_dtype is not None:
            kept = decision.values_dtype or ctx.weights[row["name"]].dtype
            row |= {"values": str(kept).removeprefix("torch."), "values_error": decision.values_error}
        if row["name"] in ctx.shrunk:
            row["neurons_removed"] = ctx.shrunk[row["name"]].neurons
        if decision.nnz == row["numel"]:
            row["pattern"] = "no zeros"
    stored = sum(_bytes(fetch(ctx.program.skeleton, name)) for name in ctx.weights)
    ctx.report.totals |= {"bytes_sparse": stored, "train_flops_ratio": None}
    if ctx.shrunk:
        ctx.report.totals["neurons_removed"] = sum(weight.neurons for weight in ctx.shrunk.values())


def _bytes(weight: Tensor | PackedWeight) -> int:
    return (
        sum(buffer.nbytes for buffer in weight.buffers())
        if isinstance(weight, PackedWeight)
        else weight.nbytes
    )
