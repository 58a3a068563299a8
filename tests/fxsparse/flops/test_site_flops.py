import pytest
from sympy import Integer

from fxsparse.flops import CONVENTIONS, CallSite, Stored
from fxsparse.flops.site import BATCH, with_sizes
from fxsparse.flops.site_flops import site_flops
from fxsparse.methods import rigl, set_, sr_ste

MAC2 = CONVENTIONS["mac2"]
SITE = CallSite(
    "linear",
    "linear",
    ((BATCH, Integer(10)),),
    (BATCH, Integer(10)),
    "w",
    (10, 10),
    grad_input=1,
    grad_weight=True,
)


def test_three_products_of_a_step():
    dense = site_flops(SITE, MAC2).dense
    assert (dense.forward, dense.grad_input, dense.grad_weight, dense.update) == (200 * BATCH,) * 3 + (0,)
    assert dense.total == 600 * BATCH


@pytest.mark.parametrize(
    ("method", "update"),
    [
        (set_(every=9, stop=90), 0),
        (
            rigl(every=9, stop=90),
            180 * BATCH / 10,
        ),  # a dense gradient instead of a sparse one, every tenth batch
        (sr_ste(), 180 * BATCH),
    ],
)
def test_updates_are_spread_over_the_steps(method, update):
    flops = site_flops(SITE, MAC2, Stored(10, 100), method)
    assert flops.sparse.update == update
    assert flops.sparse.total == 60 * BATCH + update


def test_masked_storage_executes_dense_ops_and_compact_what_it_stores():
    masked = site_flops(SITE, MAC2, Stored(10, 100), rigl())
    compact = site_flops(SITE, MAC2, Stored(10, 100, compact=True), rigl())
    assert masked.executed == masked.dense
    assert compact.executed == compact.sparse


def test_a_packed_weight_is_read_in_part():
    third = CallSite(
        "linear", "linear", ((BATCH, Integer(4)),), (BATCH, Integer(2)), "w", (2, 4), Integer(1) / 3
    )
    assert site_flops(third, MAC2, Stored(10, 24)).sparse.forward == 2 * 3 * BATCH


def test_a_nominal_convention_counts_the_density_that_was_aimed_at():
    held = Stored(10, 100, density=0.105)
    flops = site_flops(SITE, CONVENTIONS["rigl"], held).sparse.forward
    assert float(with_sizes(flops, {BATCH: Integer(2)})) == 42
    assert site_flops(SITE, MAC2, held).sparse.forward == 20 * BATCH
