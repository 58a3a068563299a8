from fxsparse.methods import static
from fxsparse.reparam import HardMask
from fxsparse.scores import magnitude, random


def test_masks_never_move():
    assert static().rule is None
    assert static().schedule is None
    assert static().reparam == HardMask()
    assert static().nnz(1_000, final=10, numel=100) == 10


def test_initial_mask_is_random_or_by_magnitude():
    assert static().init is random
    assert static("magnitude").init is magnitude
