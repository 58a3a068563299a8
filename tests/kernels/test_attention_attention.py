import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxsparse.errors import UnsupportedError
from fxsparse.kernels import cpu
from fxsparse.kernels.attention.attention import reference, scaled_dot_product_attention
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS


def tensors(queries=5, keys=7, features=3, value_features=4, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, features), (keys, features), (keys, value_features)
    return [torch.randn(batch, heads, *shape, generator=generator) for shape in shapes]


@given(
    st.tuples(st.integers(1, 80), st.integers(1, 150), st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(["none", "causal", "bool", "added", "row", "scalar"]),
    st.sampled_from(INSTRUCTION_SETS),
    st.integers(0, 99),
)
def test_it_is_torchs_attention(sizes, mask, instructions, seed):
    queries, keys, *_ = sizes
    q, k, v = tensors(*sizes, seed=seed)
    shape = {"row": (1, keys), "scalar": (2, 1, 1, 1)}.get(mask, (1, 3, queries, keys))
    generator = torch.Generator().manual_seed(seed)
    given = {} if mask == "none" else {"attn_mask": torch.randn(shape, generator=generator)}
    if mask == "bool":
        given["attn_mask"] = given["attn_mask"] > -0.5
    if mask == "causal":
        given = {"is_causal": True, "scale": 0.3}
    expected = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), **_wide(given))
    before = cpu.instruction_set()
    cpu.instruction_set(instructions)
    try:
        got = scaled_dot_product_attention(q, k, v, **given)
    finally:
        if before != "reference":
            cpu.instruction_set(before)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def _wide(given):
    mask = given.get("attn_mask")
    return given if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.double()}


def test_layouts_and_threads_give_the_same():
    packed = torch.randn(2, 300, 3 * 4 * 16)
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in packed.chunk(3, -1))
    expected = scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(expected, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)
    got = scaled_dot_product_attention(q, k, v)
    assert torch.equal(got, expected)
    assert got.stride() == F.scaled_dot_product_attention(q, k, v).stride() != expected.stride()
    apart = [t.mT.contiguous().mT for t in (q, k, v)]
    torch.testing.assert_close(scaled_dot_product_attention(*apart), expected)
    torch.set_num_threads(2)
    try:
        assert torch.equal(scaled_dot_product_attention(q, k, v), expected)
    finally:
        torch.set_num_threads(1)


def test_a_query_that_sees_no_key_gets_zeros():
    q, k, v = tensors()
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    y = scaled_dot_product_attention(q, k, v, seen)
    assert not y[:, :, 2].any()
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, seen))


def test_large_scores_infinity_and_nan():
    q, k, v = tensors()
    torch.testing.assert_close(
        scaled_dot_product_attention(q * 1e4, k, v), F.scaled_dot_product_attention(q * 1e4, k, v)
    )
    q[0, 0, 1, 0], v[1, 0, 3, 2] = math.nan, math.inf
    y = scaled_dot_product_attention(q, k, v)
    assert y[0, 0, 1].isnan().all()
    assert y[1, 0, :, 2].isinf().all()
    assert not y[0, 0, 0].isnan().any()
    only_nan = torch.full((5, 7), -math.inf)
    only_nan[1, 6] = 0.0
    y = scaled_dot_product_attention(q, k, v, only_nan)
    assert y[0, 0, 1].isnan().all()
    assert not y[0, 0, 0].any()


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_empty_tensors(empty):
    q, k, v = tensors(**{empty: 0})
    assert scaled_dot_product_attention(q, k, v).shape == (*q.shape[:3], 4)
    assert not scaled_dot_product_attention(q, k, v).any()


def test_what_it_does_not_serve_is_torchs():
    q, k, v = (t.bfloat16() for t in tensors())
    assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    q, k, v = (t[0] for t in tensors())
    assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(*tensors()).dtype == torch.bfloat16


def test_the_reference_is_the_same():
    q, k, v = tensors()
    mask = torch.randn(5, 7) > 0
    for rest in ((None, False, 0.5, True), (mask, False, 0.5, False), (torch.randn(5, 7), True, 0.5, True)):
        expected = reference(q, k, v, *rest)
        torch.testing.assert_close(torch.ops.fxsparse.attention(q, k, v, *rest), expected)


def test_wrong_shapes_are_named():
    q, k, v = tensors()
    if not cpu.load():
        pytest.skip("no C++ kernels")
    with pytest.raises(RuntimeError, match="as many values as keys"):
        torch.ops.fxsparse.attention(q, k, v[:, :, :3], None, False, 1.0, True)
    with pytest.raises(RuntimeError, match="a mask that broadcasts"):
        torch.ops.fxsparse.attention(q, k, v, torch.zeros(4, 7), False, 1.0, True)


def test_it_has_no_gradient_and_says_so():
    q, k, v = tensors()
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        scaled_dot_product_attention(q, k.requires_grad_(), v)


def test_it_compiles_in_one_graph():
    q, k, v = tensors()
    compiled = torch.compile(
        lambda *t: scaled_dot_product_attention(*t).transpose(1, 2).flatten(2) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + 1
    torch.testing.assert_close(compiled(q, k, v), expected)
