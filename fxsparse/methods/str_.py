"""STR: a soft threshold for every layer, learned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.options import is_number
from fxsparse.pattern import Unstructured
from fxsparse.reparam import Filled, ValueMap, one_node
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named
from fxsparse.topk import refuse_nan


@one_node
def str_map(weight: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """``sign(w) relu(|w| - sigmoid(s))``, differentiable in w and in the number s of the layer."""
    del mask
    return weight.sign() * torch.relu(weight.abs() - torch.sigmoid(threshold).to(weight.dtype))


@dataclass(frozen=True)
class AboveThreshold:
    """The mask says which entries the threshold leaves; it decides nothing."""

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        weight = view.weight()
        refuse_nan(weight)
        return Choice(weight.abs() > torch.sigmoid(view.extras["threshold"]).to(weight.dtype))


@register
def str_(initial: float = -3200.0, weight_decay: float = 2.251757813e-5) -> Method:
    """Train ``sign(w) relu(|w| - sigmoid(s))``, one s for each weight tensor: Kusupati et al. 2020, arXiv:2002.03231.

    Training decides how sparse each layer becomes, and the plan's sparsity is only what the report compares with: s
    starts at `initial` and rises as `weight_decay` pulls it to 0, so that the outcome goes by weight decay x learning
    rate x steps.  The defaults are the paper's for ResNet-50 at 90 % (lr 0.256, momentum 0.875, batch 256, 100 epochs
    of ImageNet), where nothing is 0 before epoch 20 or so; shorter runs need an `initial` near -100 or more decay.
    Make the optimizer from ``sparse.parameter_groups(lr, ...)``, which gives s its own weight decay.
    """
    for name, value in (("initial", initial), ("weight_decay", weight_decay)):
        if not is_number(value) or (name == "weight_decay" and value < 0):
            raise PlanError(f"expected {name} as a finite number, weight_decay >= 0, got {value!r}.")
    threshold = Extra("threshold", Filled(float(initial)), learned=True, weight_decay=float(weight_decay))
    return Method(
        name="str",
        reparam=ValueMap(str_map, extras=(threshold,)),
        init=score_named("magnitude"),
        rule=AboveThreshold(),
        schedule=Schedule(every=1, start=1),
        source="arXiv:2002.03231",
        pattern=Unstructured(),
        learned_nnz=True,
    )
