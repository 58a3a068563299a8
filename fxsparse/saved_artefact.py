"""An inference module as named tensors and JSON values, and back: nothing is traced, measured or run.

Weights are saved as their nonzeros and packed again for the kernel that was chosen; so files do not depend on layouts,
and no index of a file reaches a kernel unchecked.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import entries_of, graph_json, kernel, machine, saved_checks, saved_modules
from fxsparse.artefact import InferenceRecipe, Source, assembled, classes_of
from fxsparse.choosing import kernel_versions
from fxsparse.direct_reads import read_directly
from fxsparse.entries_of import Stored
from fxsparse.errors import CheckpointError
from fxsparse.graph import owner
from fxsparse.module import SparseModule
from fxsparse.packed import PackedWeight
from fxsparse.report import Report
from fxsparse.saved_calls import check_calls

WEIGHT, PARAMETER, BUFFER, MORE = "weight/", "parameter/", "buffer/", "more/"
_REPORT = ("passes", "layers", "untouched", "totals", "environment", "notes")


def describe(module: SparseModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of an inference module.

    Raises:
        CheckpointError: its graph calls what a file cannot name, or a weight is not as it was compiled.
    """
    recipe: Any = module._emitted.recipe
    skeleton, source = module._emitted.program.skeleton, recipe.source
    graph = None if recipe.tier == "walk" else module.forward_graph.graph
    tensors, weights = dict(_plain_tensors(skeleton)), {}
    for packed, names in _packed(skeleton).items():
        held = entries_of.stored(packed)
        tensors |= {f"{WEIGHT}{names[0]}.{part}": tensor for part, tensor in held.tensors().items()}
        lanes = None if packed.lanes is None else graph_json.plain(dict(packed.lanes), names[0])
        weights[names[0]] = {
            "kernel": packed.kernel, "shape": list(packed.shape), "lanes": lanes, "names": names,
        }  # fmt: skip
    report = module.report.to_dict()
    return tensors, {
        "kind": "inference",
        "model": source.model,
        "shapes": {name: list(shape) for name, shape in source.shapes.items()},
        "classes": dict(source.classes),
        "transformed": source.transformed,
        "example_inputs": source.inputs,
        "values": None if source.values_dtype is None else str(source.values_dtype).removeprefix("torch."),
        "machine": environment(),
        "device": str(next(iter(tensors.values())).device) if tensors else "cpu",
        "training": module.training,
        "tier": recipe.tier,
        "graph": None if graph is None else graph_json.to_json(graph),
        "regions": saved_modules.regions(skeleton),
        "modules": saved_modules.settings(skeleton, graph),
        "weights": weights,
        "accepts": {mode: saved_checks.to_json(check) for mode, check in recipe.accepts.items()},
        "report": {part: report[part] for part in _REPORT},
    }


def environment() -> list[str]:
    """What the times of kernels depend on here."""
    return [machine.processor(), torch.__version__, *kernel_versions()]


def what_differs(header: Mapping[str, Any], place: torch.device) -> str | None:
    """Why the times that a file goes by do not hold here; None where they do."""
    saved, here = list(header["machine"]), environment()
    if torch.device(header["device"]).type != place.type:
        return f"it was saved on {header['device']}"
    if saved == here:
        return None
    pairs = [(one, other) for one, other in zip(saved, here, strict=False) if one != other]
    one, other = pairs[0] if pairs else (f"{len(saved)} kernels", f"{len(here)}")
    return f"it was measured with {one}, here is {other}"


def restore(header: Mapping[str, Any], tensors: Mapping[str, Tensor], shell: nn.Module) -> SparseModule:
    """The module that `describe` was given, on `shell`, a copy of the user's model without values, which is changed.

    Raises:
        CheckpointError: another model, or one of ``checkpoint.MALFORMED`` for a header of something else.
    """
    _check_model(header, shell)
    graph = None if header["graph"] is None else graph_json.from_json(header["graph"])
    if (graph is None) != (header["tier"] == "walk") or header["tier"] not in ("symbolic", "export", "walk"):
        raise ValueError(f"the front end {header['tier']!r} goes with another graph")
    weights = {name: _weight(name, row, tensors, shell) for name, row in header["weights"].items()}
    saved_modules.put_settings(header["modules"], shell)
    _put_tensors(tensors, shell)
    for packed, names in weights.values():
        for name in names:
            module, leaf = owner(shell, name)
            module._parameters.pop(leaf, None)  # a module may have two names
            module.add_module(leaf, packed)
    saved_modules.put_regions(header["regions"], shell)
    report = Report(**{part: header["report"][part] for part in _REPORT})
    accepts = saved_checks.of_header(header)
    recipe = InferenceRecipe(shell, header["tier"], graph, report, accepts, _source(header))
    sparse = assembled(recipe)
    if graph is not None:
        gm = sparse._emitted.program.graphs["eval"]
        gm.graph.lint()
        check_calls(gm.graph, shell, lambda node: str(node.target) if node.op == "get_attr" else None)
        saved_modules.check_region_calls(gm.graph, shell)
        read_directly(gm)
    return sparse.train(bool(header["training"]))


def _source(header: Mapping[str, Any]) -> Source:
    values = header["values"]
    dtypes = {None: None, "int8": torch.int8, "bfloat16": torch.bfloat16}
    shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
    classes = {path: str(name) for path, name in header["classes"].items()}
    return Source(
        str(header["model"]), shapes, classes, header["transformed"], header["example_inputs"], dtypes[values]
    )


def has_names(header: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether the tensors of a model have the names of those that the saved one was compiled from."""
    return dict(_named(model)).keys() == header["shapes"].keys()


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _check_model(header: Mapping[str, Any], shell: nn.Module) -> None:
    known = {name: list(tensor.shape) for name, tensor in _named(shell)}
    for name in (*header["shapes"], *known):
        wanted, got = header["shapes"].get(name), known.get(name)
        if wanted != got:
            raise CheckpointError(
                f"expected a {header['model']} whose {name!r} has shape {wanted or 'none'}, got "
                f"{got or 'no tensor of that name'} in {type(shell).__name__}; pass the model that was compiled."
            )
    wanted, here = header["classes"], classes_of(shell)
    for path in (*wanted, *here):
        if wanted.get(path) != here.get(path):
            raise CheckpointError(
                f"expected a {wanted.get(path, 'model without one')} as {path!r}, got "
                f"{here.get(path, 'none')}; pass the model that was compiled."
            )


def _weight(
    name: str, row: Mapping[str, Any], tensors: Mapping[str, Tensor], shell: nn.Module
) -> tuple[PackedWeight, list[str]]:
    """A weight packed again, and its names."""
    shape, names = tuple(map(int, row["shape"])), [str(other) for other in row["names"]]
    sizes = {prod(header_shape) for header_shape in [shell.get_parameter(other).shape for other in names]}
    if min(shape) < 0 or any(prod(shape) > size for size in sizes) or name not in names:
        raise ValueError(f"{name!r} has the shape {list(shape)}, and the model's one {sizes} entries")
    parts = (tensors.get(f"{WEIGHT}{name}.{part}") for part in ("values", "counts", "columns", "scales"))
    weight = Stored(*parts)  # type: ignore[arg-type]
    entries_of.check(shape, weight)
    lanes = None if row["lanes"] is None else graph_json.value(row["lanes"], {})
    if row["kernel"] not in kernel.registered():
        raise CheckpointError(
            f"{name!r} is packed for the kernel {row['kernel']!r}, which is not registered here; import the package "
            "that registers it first."
        )
    packed = PackedWeight(row["kernel"], shape, entries_of.repacked(row["kernel"], shape, weight, lanes))
    packed.lanes = lanes
    return packed, names


def _plain_tensors(skeleton: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of all that is not packed, under every name."""
    for path, module in skeleton.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeight):
            continue
        dot = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{PARAMETER}{dot}{name}", parameter.detach()
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = MORE if name in module._non_persistent_buffers_set else BUFFER
                yield f"{kind}{dot}{name}", buffer


def _packed(skeleton: nn.Module) -> dict[PackedWeight, list[str]]:
    found: dict[PackedWeight, list[str]] = {}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeight):
            found.setdefault(module, []).append(path)
    return found


def _put_tensors(tensors: Mapping[str, Tensor], shell: nn.Module) -> None:
    """Let the tree hold these tensors and no others; what is one tensor in the file is one in the tree."""
    for module in shell.modules():
        for held in (module._parameters, module._buffers):
            for name in held:
                held[name] = None
    made: dict[int, nn.Parameter] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if f"{kind}/" == WEIGHT:
            continue
        module, leaf = owner(shell, name)
        if f"{kind}/" == PARAMETER:
            value = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            if leaf in module._parameters:
                setattr(module, leaf, value)  # not into the dict: RNNs keep a second list of their weights
            else:
                module.register_parameter(leaf, value)
        elif f"{kind}/" not in (BUFFER, MORE):
            raise ValueError(f"there is no place for the tensor {key!r}")
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module.register_buffer(leaf, tensor, persistent=f"{kind}/" == BUFFER)
