import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks import models
from fxsparse.allocation import POLICIES, Target, target_densities
from fxsparse.flops import Stored
from fxsparse.passes import Functionalize
from fxsparse.pipeline import PassContext, WeightSpec, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


@pytest.fixture(scope="session")
def paper_models():
    return models


def shaped(model, *inputs, dynamic=1):
    """The model in normal form with fake values; the first `dynamic` sizes of each input are symbolic."""
    program = capture(model, inputs)
    run_passes([Functionalize()], PassContext(None, "train", program, Report()))
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(x):
        sizes = [DimDynamic.DYNAMIC if i < dynamic else DimDynamic.STATIC for i in range(x.dim())]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    gm = program.graphs["train"]
    with enable_python_dispatcher():  # as InferShapes: torch 2.11's matmul turns symbols into numbers
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*map(fake, inputs))
    return gm


@pytest.fixture(scope="session")
def shape_graph():
    return shaped


@pytest.fixture(scope="session")
def traced_on_meta():
    """(graph, weight specs) of a model built without memory, for one input shape; each traced once."""
    known = {}

    def trace(build, *size):
        if (build, size) not in known:
            with torch.device("meta"):
                model = build()
                known[build, size] = (shaped(model, torch.zeros(size)), specs_of(model))
        return known[build, size]

    return trace


def specs_of(model):
    return [
        WeightSpec(name, "linear" if p.dim() == 2 else f"conv{p.dim() - 2}d", tuple(p.shape), p.dtype)
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith(("class_token", "pos_embedding"))
    ]


@pytest.fixture(scope="session")
def stored():
    """{weight: how it is held} under a policy."""

    def hold(specs, policy, sparsity, **options):
        target = Target(sparsity, **options)
        counts, densities = POLICIES[policy](specs, target), target_densities(policy, specs, target)
        return {s.name: Stored(counts[s.name], s.numel, density=densities[s.name]) for s in specs}

    return hold
