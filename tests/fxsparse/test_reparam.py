import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from fxsparse.errors import PlanError
from fxsparse.method import Probe
from fxsparse.reparam import HardMask, HiddenMask, StraightThrough

REPARAMS = [HardMask(), HiddenMask(), StraightThrough(0.25)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

MASK = torch.tensor([[True, False, True], [False, True, False]])
WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, -6.0]])
UPSTREAM = torch.tensor([[0.5, 0.25, -1.0], [2.0, -4.0, 8.0]])


def gradient(reparam, dense_grad, dtype=torch.float32, weight=WEIGHT, upstream=UPSTREAM):
    leaf = weight.detach().to(dtype, copy=True).requires_grad_()
    effective = reparam.effective(leaf, MASK, dense_grad)
    assert effective.dtype == dtype
    effective.backward(upstream.to(dtype))
    assert leaf.grad is not None
    return effective.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("reparam", REPARAMS, ids=str)
def test_forward_is_the_weight_where_the_mask_is_and_plus_zero_elsewhere(reparam, dense_grad, dtype):
    effective, _ = gradient(reparam, dense_grad, dtype)
    assert effective.tolist() == [[1.0, 0.0, 3.0], [0.0, -5.0, 0.0]]
    assert not effective[~MASK].signbit().any()
    assert torch.equal(reparam.fold(WEIGHT.to(dtype), MASK), effective)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reparam", [HardMask(), HiddenMask()], ids=str)
def test_masked_gradient_on_a_plain_step_and_dense_on_a_probe_step(reparam, dtype):
    _, plain = gradient(reparam, False, dtype)
    assert plain.tolist() == [[0.5, 0.0, -1.0], [0.0, -4.0, 0.0]]
    _, probe = gradient(reparam, True, dtype)
    assert torch.equal(probe, UPSTREAM.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_gradient_pulls_masked_weights_to_zero(dtype):
    # g + 0.25 * (~m) * w: 0.25 + 0.25 * -2 = -0.25;  2 + 0.25 * 4 = 3;  8 + 0.25 * -6 = 6.5.
    for dense_grad in (False, True):
        _, grad = gradient(StraightThrough(0.25), dense_grad, dtype)
        assert grad.tolist() == [[0.5, -0.25, -1.0], [3.0, -4.0, 6.5]]


def test_decay_zero_is_the_plain_straight_through_estimator():
    _, grad = gradient(StraightThrough(0.0), False)
    assert torch.equal(grad, UPSTREAM)


def test_the_probe_gradient_is_with_respect_to_the_effective_weight():
    x = torch.tensor([[1.0, 2.0, -1.0]])
    weight = WEIGHT.clone().requires_grad_()
    loss = F.linear(x, HardMask().effective(weight, MASK, True)).square().sum()
    loss.backward()
    # y = W_eff x = (1 - 3, -10) = (-2, -10) and dL/dW = 2 y x^T; the stored weight would give y = (-6, 0).
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-4.0, -8.0, 4.0], [-20.0, -40.0, 20.0]]


def test_nothing_outside_the_mask_reaches_the_result_or_its_gradient():
    weight = torch.where(MASK, WEIGHT, torch.nan)
    upstream = torch.where(MASK, UPSTREAM, torch.inf)
    effective, grad = gradient(HardMask(), False, weight=weight, upstream=upstream)
    assert torch.equal(effective, WEIGHT.where(MASK, torch.tensor(0.0)))
    assert torch.equal(grad, UPSTREAM.where(MASK, torch.tensor(0.0)))


def graph_of(reparam, dense_grad) -> GraphModule:
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(WEIGHT.clone())
    root.register_buffer("mask", MASK.clone())
    graph = Graph()
    x, weight, mask = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("mask")
    function, arguments = reparam.function(dense_grad)
    effective = graph.call_function(function, (weight, mask, *arguments))
    graph.output(graph.call_function(F.linear, (x, effective)))
    return GraphModule(root, graph)


def weight_gradient(module, inner) -> torch.Tensor:
    inner.weight.grad = None
    module(torch.ones(2, 3)).square().sum().backward()
    assert inner.weight.grad is not None
    return inner.weight.grad


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("reparam", REPARAMS, ids=str)
def test_gradient_rule_survives_pickle_copy_and_retracing_of_a_graph(reparam, dense_grad):
    module = graph_of(reparam, dense_grad)
    expected = weight_gradient(module, module)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.fx.symbolic_trace(module)):
        assert torch.equal(weight_gradient(twin, twin), expected)
        assert reparam.function(dense_grad)[0] in {node.target for node in twin.graph.nodes}


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("reparam", REPARAMS, ids=str)
def test_compiles_without_a_graph_break(reparam, dense_grad):
    torch.compiler.reset()
    module = graph_of(reparam, dense_grad)
    expected = weight_gradient(module, module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(weight_gradient(compiled, module), expected)


def test_what_storage_and_flop_accounting_read():
    assert [r.exact_zeros for r in REPARAMS] == [True, False, False]
    assert [r.probe for r in REPARAMS] == [Probe.NONE, Probe.NONE, Probe.DENSE]


@pytest.mark.parametrize("decay", [-1e-4, float("inf"), float("nan"), "2e-4", True])
def test_impossible_decay_is_refused(decay):
    with pytest.raises(PlanError, match="decay as a number >= 0, got"):
        StraightThrough(decay)
