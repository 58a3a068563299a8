import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsparse.kernels import top_of_rows
from fxsparse.topk import top_mask

FEW = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 0.5, 1.0, torch.inf, 1e-42, -1e-42])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 40)])
def test_equals_the_selection_on_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = FEW[torch.randint(len(FEW), shape, generator=generator)].to(dtype)
    for n in (0, 1, 7, shape[1], shape[1] + 2):
        mask, has_nan = torch.ops.fxsparse.top_of_rows(scores, torch.tensor(n))
        assert mask.shape == shape
        for row, chosen in zip(scores, mask, strict=True):
            assert torch.equal(chosen, top_mask(row, n))
        assert has_nan.tolist() == [0]


def test_nan_is_told_on_the_device_and_infinity_is_none() -> None:
    scores = torch.tensor([[1.0, torch.inf], [-torch.inf, torch.nan]])
    assert top_of_rows(scores, torch.tensor(1))[1].item() > 0
    assert top_of_rows(scores[:1], torch.tensor(1))[1].item() == 0


def test_the_op_passes_the_checks_of_torch_and_asks_nothing_of_the_host() -> None:
    torch.library.opcheck(torch.ops.fxsparse.top_of_rows, (torch.randn(3, 20), torch.tensor(4)))
    with FakeTensorMode():  # which raises where a number is read
        for run in (torch.ops.fxsparse.top_of_rows, top_of_rows):
            scores = torch.randn(3, 20, device="cuda")
            mask, has_nan = run(scores, torch.zeros((), dtype=torch.int64, device="cuda"))
            assert (mask.dtype, mask.shape, mask.device.type) == (torch.bool, (3, 20), "cuda")
            assert (has_nan.dtype, has_nan.shape) == (torch.int32, (1,))
