import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.kernels import cpu
from fxsparse.kernels.csr import topology


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    cpu.load()


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def draw(numel, nnz, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:nnz].sort().values


def blank(rows, columns, capacity, transposed=True):
    """Index tensors that hold nothing sensible."""
    slots = capacity * transposed
    sizes = ((2, capacity), (rows + 1,), (columns + 1,), (slots,), (slots,))
    return [torch.full(size, 99, dtype=torch.int32) for size in sizes]


def check_move(rows, columns, flat, capacity):
    for transposed in (True, False):
        got, expected = (blank(rows, columns, capacity, transposed) for _ in range(2))
        assert torch.ops.fxsparse.csr_move_(flat, *got)
        assert topology.move_(flat, *expected)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 144), st.integers(0, 5), st.integers(0, 1000))
def test_a_move_equals_its_reference(rows, columns, nnz, spare, seed):
    nnz = min(nnz, rows * columns)
    check_move(rows, columns, draw(rows * columns, nnz, seed), nnz + spare)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "columns"), [(700, 900), (3, 200_000), (200_000, 3), (1, 1)])
def test_a_move_of_many_entries_equals_its_reference_on_any_number_of_threads(rows, columns):
    for nnz in (rows * columns // 2, rows * columns, 70_000):
        nnz = min(nnz, rows * columns)
        check_move(rows, columns, draw(rows * columns, nnz, nnz), nnz + 10)


def test_a_weight_without_rows_or_columns_has_no_entries():
    check_move(0, 5, torch.empty(0, dtype=torch.int64), 0)
    check_move(5, 0, torch.empty(0, dtype=torch.int64), 2)


@pytest.mark.parametrize("flat", [[3, 1], [1, 1], [1, 12], [-1, 2], [0, 2, 2]])
def test_malformed_positions_are_refused_and_nothing_is_written(flat):
    for move in (torch.ops.fxsparse.csr_move_, topology.move_):
        index = blank(3, 4, 5)
        assert not move(torch.tensor(flat), *index)
        assert all((tensor == 99).all() for tensor in index)


def test_one_repeat_among_many_is_seen_on_every_thread_s_share():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    for at in (1, 66_666, 100_000, 199_999):
        flat = torch.arange(200_000)
        flat[at] -= 1
        assert not torch.ops.fxsparse.csr_move_(flat, *blank(1000, 1000, 200_000))
    torch.set_num_threads(before)


def check_change(old, new):
    got, expected = torch.ops.fxsparse.position_change(old, new), topology.position_change(old, new)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)


sets = st.sets(st.integers(0, 30))


@given(sets, sets)
def test_a_change_equals_its_reference(old, new):
    check_change(torch.tensor(sorted(old), dtype=torch.int64), torch.tensor(sorted(new), dtype=torch.int64))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("old", "new"), [(150_000, 150_000), (2, 150_000), (150_000, 2), (0, 150_000), (150_000, 0)]
)
def test_a_change_of_many_positions_equals_its_reference_on_any_number_of_threads(old, new):
    check_change(draw(300_000, old, 1), draw(300_000, new, 2))
    check_change(draw(300_000, old, 1) + 300_000, draw(300_000, new, 2))
    check_change(draw(300_000, old, 1), draw(300_000, old, 1))


def test_ops_pass_opcheck():
    flat = draw(12, 4, 0)
    opcheck(torch.ops.fxsparse.csr_move_.default, (flat, *blank(3, 4, 6)))
    opcheck(torch.ops.fxsparse.position_change.default, (flat, draw(12, 5, 1)))


def test_other_layouts_are_refused():
    if cpu.availability() is not None:
        pytest.skip("the reference takes any integers")
    index, flat = blank(3, 4, 6), draw(12, 4, 0)
    with pytest.raises(RuntimeError, match="expected positions as contiguous int64"):
        torch.ops.fxsparse.csr_move_(flat.int(), *index)
    with pytest.raises(RuntimeError, match="expected indices int32, contiguous, with 12 elements"):
        torch.ops.fxsparse.csr_move_(flat, index[0].t(), *index[1:])
    with pytest.raises(RuntimeError, match="expected at most 6 positions"):
        torch.ops.fxsparse.csr_move_(draw(12, 7, 0), *index)
    with pytest.raises(RuntimeError, match="expected new positions as contiguous int64"):
        torch.ops.fxsparse.position_change(flat, flat[::2])


class Reads(TorchDispatchMode):
    """Counts ops that make the host wait for numbers of a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            by_positions = func is torch.ops.aten.index.Tensor and all(
                i.dtype == torch.int64 for i in args[1]
            )
            self.found += [] if by_positions else [str(func)]
        return func(*args, **(kwargs or {}))


def test_a_move_reads_nothing_and_a_change_one_number():
    flat = draw(12, 4, 0)
    with Reads() as reads:
        topology.move_(flat, *blank(3, 4, 6))
        topology.move_(flat, *blank(3, 4, 6, transposed=False))
    assert reads.found == []
    with Reads() as reads:
        topology.position_change(flat, draw(12, 5, 1))
    assert reads.found == ["aten._local_scalar_dense.default"]
