"""What a graph in a file may call has a name."""

from types import BuiltinFunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

from fxsparse import callees

NO_MODEL_CALLS = {
    *("assert_int_or_pair", "boolean_dispatch", "handle_torch_function", "Optional"),
    *(
        "grouped_mm",
        "scaled_addmm",
        "scaled_addmm_",
        "scaled_grouped_mm",
        "scaled_mm",
    ),  # of low precision, new
}


def test_all_public_functions_of_the_functional_module_have_a_name():
    left = [
        name
        for name, function in vars(F).items()
        if callable(function) and not isinstance(function, type) and not name.startswith(("_", "has_torch"))
        if callees.name_of(function) is None
    ]
    assert set(left) <= NO_MODEL_CALLS
    for function in (F.logsigmoid, F.max_pool2d, torch.unique):
        assert callees.function_of(callees.name_of(function) or {}) is function


@pytest.mark.parametrize("module", [torch.fft, torch.linalg, torch.special])
def test_functions_that_c_names_otherwise_have_the_name_of_their_module(module):
    public = [function for name, function in vars(module).items() if not name.startswith("_")]
    builtin = [function for function in public if isinstance(function, BuiltinFunctionType)]
    missing = [function for function in builtin if callees.name_of(function) is None]
    assert len(builtin) > 15
    assert {function.__name__ for function in missing} <= {"fft_fftfreq", "fft_rfftfreq"}  # take no tensor


def test_products_with_a_sparse_tensor_have_a_name():
    assert callees.name_of(torch.sparse.mm) == {"function": "torch.sparse.mm"}


def test_all_activations_trace_to_functions_that_have_a_name():
    others = ("MultiheadAttention", "Softmax2d", "Threshold")
    names = [name for name in nn.modules.activation.__all__ if name not in others]
    missing = {}
    for cls in (getattr(nn, name) for name in names):
        graph = symbolic_trace(Forward(cls())).graph
        for node in graph.nodes:
            if node.op == "call_function" and callees.name_of(node.target) is None:
                missing[cls.__name__] = node.target
    assert not missing


class Forward(nn.Module):
    """Runs the forward of a module of torch.nn, which a tracer would take for a leaf."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return type(self.inner).forward(self.inner, torch.relu(x))


@torch.library.custom_op("fxsparse_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_ops_of_pytorch_have_a_name_unless_they_read_files():
    einsum = torch.ops.aten.einsum.default  # it has an argument `path`, which is no file's
    assert callees.function_of(callees.name_of(einsum) or {}) is einsum
    for left_out in (torch.ops.aten.from_file.default, torch.ops.fxsparse_tests.twice.default):
        assert callees.name_of(left_out) is None
