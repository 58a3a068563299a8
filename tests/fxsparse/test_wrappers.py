import functools

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError

WRAPPED = {
    "torch.compile": functools.partial(
        torch.compile, backend="eager"
    ),  # another imports Inductor, which warns
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_model_that_is_wrapped_already_is_refused_with_the_way(wrapper, inside):
    model = WRAPPED[wrapper](nn.Linear(8, 8))
    where = r"its submodule '0'" if inside else "the model"
    model = nn.Sequential(model) if inside else model
    for plan, mode in ((Plan(sparsity=0.5), "train"), (None, "infer")):
        with pytest.raises(
            PlanError, match=rf"{where} is wrapped in {wrapper}: .*compile it first, then wrap"
        ):
            fxsparse.compile(model, plan, mode=mode)


def test_a_compiled_module_that_is_wrapped_says_the_same():
    sparse = fxsparse.compile(nn.Sequential(nn.Linear(8, 8)), Plan(sparsity=0.5))
    with pytest.raises(PlanError, match=r"Take what it wraps \(\._orig_mod\)"):
        fxsparse.compile(torch.compile(sparse, backend="eager"), mode="infer")
