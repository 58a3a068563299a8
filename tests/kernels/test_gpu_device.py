"""What launches ask of PyTorch, and what they are given."""

import subprocess
import sys

import pytest
import torch

from fxsparse.kernels import library

SETTINGS = {
    "": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.set_float32_matmul_precision('high')": "tf32",
}


def test_the_precision_of_products_is_that_of_pytorch_however_it_was_set():
    code = (
        "import sys, torch; from fxsparse.kernels.gpu import precision; exec(sys.argv[1]); print(precision())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, s], stdout=subprocess.PIPE, text=True) for s in SETTINGS
    ]
    assert [run.communicate()[0].split()[-1] for run in runs] == list(SETTINGS.values())


def test_tensors_that_kernels_read_without_strides_are_laid_out_for_them():
    strided = torch.arange(12).view(3, 4).t()
    one, rest, number, none = library.in_order([strided, strided[0].expand(2, 3), 5, None])
    assert one.is_contiguous()
    assert rest.is_contiguous()
    assert torch.equal(one, strided)
    assert (number, none) == (5, None)


def test_what_is_added_has_to_fit_the_result():
    y, bias = torch.empty(7, 5), torch.zeros(5)
    library.check_added(y, 5, bias, torch.zeros(7, 5))
    library.check_added(y, 5, None, None)
    for wrong in (torch.zeros(4), torch.zeros(1, 5), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"expected bias \[5\], got"):
            library.check_added(y, 5, wrong, None)
    for wrong in (torch.zeros(5), torch.zeros(7, 4), torch.zeros(7, 5, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="expected a residual of the output's shape, with 5 features"):
            library.check_added(y, 5, None, wrong)
