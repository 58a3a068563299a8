"""What a backward saw: sums of the two factors of a weight gradient, for every op and in any batch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fxsparse.kernels import probe
from fxsparse.observed import Evidence, Observed, ProbeSwitch, marginals

CASES = {
    "linear": (F.linear, (6, 5), (2, 3, 5), {}),
    "conv1d": (F.conv1d, (4, 3, 3), (2, 3, 9), {"stride": (2,), "padding": (1,)}),
    "conv2d": (F.conv2d, (4, 3, 3, 2), (2, 3, 7, 6), {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)}),
    "unbatched": (F.conv2d, (4, 3, 3, 2), (3, 7, 6), {}),
    "same": (F.conv2d, (4, 3, 3, 3), (2, 3, 5, 6), {"padding": "same"}),
    "grouped": (F.conv2d, (4, 3, 3, 3), (2, 6, 7, 6), {"groups": 2, "padding": (1, 1)}),
    "conv3d": (F.conv3d, (2, 3, 1, 2, 2), (2, 3, 2, 4, 3), {}),
    "transposed": (F.conv_transpose2d, (3, 4, 3, 2), (2, 3, 4, 5), {"stride": (2, 2), "padding": (1, 0)}),
    "transposed, grouped": (
        F.conv_transpose2d, (4, 3, 3, 2), (2, 4, 3, 5), {"groups": 2, "output_padding": (1, 0), "stride": 2},
    ),
}  # fmt: skip


def observe(op, shape, inputs, arguments):
    x, weight = torch.randn(inputs, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight.requires_grad_()
    y = op(x, weight, None, **arguments)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, weight, upstream)
    return Observed(x, upstream, op, arguments), gradient


@pytest.mark.parametrize(("op", "shape", "inputs", "arguments"), CASES.values(), ids=CASES)
def test_one_term_alone_gives_the_gradient_as_a_product_of_its_sums(op, shape, inputs, arguments):
    seen, gradient = observe(op, shape, inputs, arguments)
    groups, total = arguments.get("groups", 1), 0
    for term in torch.eye(seen.terms, dtype=torch.float64):
        columns, rows = seen.sums(shape, term)
        assert columns.shape == (groups, gradient[0].numel())
        total = total + rows.unsqueeze(1) * columns.repeat_interleave(len(rows) // groups, 0)
    torch.testing.assert_close(total, gradient.flatten(1))


@pytest.mark.parametrize(("op", "shape", "inputs", "arguments"), CASES.values(), ids=CASES)
def test_sums_of_magnitudes_add_up_the_magnitudes_of_the_terms(op, shape, inputs, arguments):
    seen, gradient = observe(op, shape, inputs, arguments)
    single = [seen.sums(shape, term) for term in torch.eye(seen.terms, dtype=torch.float64)]
    columns, rows = seen.sums(shape)
    torch.testing.assert_close(columns, sum(c.abs() for c, _ in single))
    torch.testing.assert_close(rows, sum(r.abs() for _, r in single))
    assert (
        rows.unsqueeze(1) * columns.repeat_interleave(len(rows) // len(columns), 0)
        >= gradient.flatten(1).abs() - 1e-12
    ).all()


def test_the_signs_of_a_convolution_go_by_sample_and_position():
    seen, _ = observe(F.conv2d, (4, 3, 2, 2), (2, 3, 4, 5), {"stride": (1, 2)})
    patches = F.unfold(seen.inputs, (2, 2), stride=(1, 2))  # [2, 12, positions], positions row-major
    signs = torch.randint(2, (seen.terms,)).double() * 2 - 1
    columns, rows = seen.sums((4, 3, 2, 2), signs)
    by_sample = signs.view(2, 1, -1)
    torch.testing.assert_close(columns[0], (patches * by_sample).sum((0, 2)))
    torch.testing.assert_close(rows, (seen.gradients.flatten(2) * by_sample).sum((0, 2)))


def test_marginals_number_the_terms_on_over_micro_batches():
    whole, _ = observe(F.linear, (6, 5), (8, 5), {})
    halves = [
        Observed(x, grad) for x, grad in zip(whole.inputs.split(3), whole.gradients.split(3), strict=True)
    ]
    table = torch.randint(2, (8,)).double() * 2 - 1
    for signs in (None, lambda terms: table[terms]):
        for one, other in zip(
            marginals([whole], (6, 5), signs), marginals(halves, (6, 5), signs), strict=True
        ):
            torch.testing.assert_close(one, other)
    columns, rows = marginals(halves, (6, 5), lambda terms: table[terms])
    torch.testing.assert_close((columns[0], rows), (table @ whole.inputs, table @ whole.gradients))
    assert marginals([], (6, 5)) is None


def test_half_precision_is_summed_in_fp32():
    columns, rows = Observed(torch.ones(3000, 2).bfloat16(), torch.ones(3000, 1).bfloat16()).sums((1, 2))
    assert (columns.dtype, rows.dtype) == (torch.float32, torch.float32)
    assert columns.tolist() == [[3000, 3000]]


def test_a_copied_switch_watches_the_same_under_other_keys():
    switch = ProbeSwitch()
    first = switch.watch("w", F.conv2d, {"stride": (1, 1)})
    assert switch.watch("w", F.conv2d, {"stride": (1, 1)}) is first
    assert switch.watch("w", F.conv2d, {"stride": (2, 2)}) is not first
    site, copied = copy.deepcopy((first, switch))
    assert copied.watched[0] is site
    assert copied.watched == switch.watched
    assert not {*copied.keys("w")} & {*switch.keys("w")}
    probe.PROBES[first.key] = [(torch.ones(1), torch.zeros(1))]
    try:
        (seen,) = switch.observed("w")
        assert (seen.op, seen.arguments) == (F.conv2d, {"stride": (1, 1)})
        assert copied.observed("w") == []
    finally:
        probe.clear(first.key)


def test_evidence_adds_up():
    x, grad = torch.ones(2, 3), torch.ones(2, 4)
    both = Evidence({"a": grad}, {"b": [Observed(x, grad)]}) + Evidence(
        {"a": grad, "c": x}, {"b": [Observed(x, grad)]}
    )
    assert both.gradients["a"].tolist() == (2 * grad).tolist()
    assert {name: len(seen) for name, seen in both.observed.items()} == {"b": 2}
    assert [name for name, _ in both.tensors()] == ["a", "c", "b", "b", "b", "b"]
