"""SynFlow: synaptic flow, without data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import NumericsError, PlanError
from fxsparse.inputs import split_inputs
from fxsparse.saliencies.rounds import in_rounds
from fxsparse.scores import Scoring, register_saliency


@register_saliency
def synflow(scoring: Scoring, rounds: int = 100) -> dict[str, Tensor]:
    """``|w| dR/d|w|``, R the sum of what a net of magnitudes makes of ones: Tanaka et al. 2020, arXiv:2006.05467,
    algorithm 1.

    No loss and no batch: ``saliency(..., example_inputs=...)`` gives the shapes, ones take the place of its floats.
    The copy is in float64 and in eval mode, every parameter its magnitude; biases and running means are 0, as R is the
    product of the weights alone, so that what flows into a neuron flows out of it.  The authors' code keeps their
    magnitudes.  That holds for linear layers, ReLU, pooling, batch norm and sums of branches.  Nothing is rescaled from
    layer to layer, which would change what branches are worth against each other.

    Raises:
        PlanError: no example inputs, none with floats, or the net does not conserve the flow (softmax, GELU).
        NumericsError: R is 0, inf or NaN.
    """
    model = scoring.model.eval().double()
    _take_magnitudes(model)
    inputs = _ones(scoring)
    _check_conserved(model, inputs)
    return in_rounds(scoring, rounds, lambda before: _flow(scoring, inputs, before))


def _take_magnitudes(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
            elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.abs_()


def _ones(scoring: Scoring) -> Any:
    device = next(iter(scoring.weights().values())).device

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.ones(leaf.shape, dtype=torch.float64, device=device, requires_grad=True)

    inputs = pytree.tree_map(one, split_inputs(() if scoring.inputs is None else scoring.inputs))
    if not _live(inputs):
        raise PlanError(
            "saliency 'synflow' sends ones through the model: expected example_inputs with a tensor of floats, got "
            f"{'none' if scoring.inputs is None else 'no such tensor'}. Pass saliency(..., example_inputs=...)."
        )
    return inputs


def _live(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _total(model: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = inputs
    leaves = pytree.tree_leaves(model(*args, **kwargs))
    parts = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    total = torch.stack(parts).sum() if parts else torch.zeros(())
    if not total.isfinite() or total == 0 or not total.requires_grad:
        raise NumericsError(
            f"saliency 'synflow': expected a flow above 0 through the model, got {float(total.detach()):g}. 0: no path "
            "is left at so few entries; inf or NaN: the net is too deep or too wide for float64."
        )
    return total


def _check_conserved(model: nn.Module, inputs: Any) -> None:
    """A net that conserves the flow is homogeneous of degree 1, so that <x, dR/dx> = R (Euler)."""
    total = _total(model, inputs)
    slopes = torch.autograd.grad(total, _live(inputs), allow_unused=True)
    along = sum(float(slope.sum()) for slope in slopes if slope is not None)
    if abs(along - float(total.detach())) > 1e-6 * float(total.detach()):
        raise PlanError(
            "saliency 'synflow': expected a model whose output grows as its input does, as linear layers, ReLU and "
            f"pooling make it, got {along / float(total.detach()):.4g} times the output for the derivative along the "
            "input: softmax, layer norm, GELU or an added constant breaks the conservation that it goes by. Use "
            "snip, force or grasp."
        )


def _flow(scoring: Scoring, inputs: Any, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = scoring.weights()
    found = torch.autograd.grad(
        _total(scoring.model, inputs), list(weights.values()), allow_unused=True, materialize_grads=True
    )
    return {
        name: weight.detach() * slope for (name, weight), slope in zip(weights.items(), found, strict=True)
    }
