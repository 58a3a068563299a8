import pytest
import torch

from fxsparse.einsum import einsum_call, labels


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhqd, bhkd -> bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...d,de->...e", [(2, 3, 4), (4, 5)]),
        ("a...b,...bc->...ac", [(2, 7, 8, 3), (8, 3, 4)]),
        ("ba,cb", [(2, 3), (4, 2)]),
        ("...i,...i", [(2, 3), (2, 3)]),
        ("ii", [(3, 3)]),
        ("ii->i", [(3, 3)]),
    ],
)
def test_labels_give_the_sizes_of_the_result(equation, shapes):
    read, made = labels(equation, [len(shape) for shape in shapes])
    sizes = {
        label: n for of, shape in zip(read, shapes, strict=True) for label, n in zip(of, shape, strict=True)
    }
    want = torch.einsum(equation, *(torch.zeros(shape) for shape in shapes)).shape
    assert tuple(sizes[label] for label in made) == want


@pytest.mark.parametrize("result", [[], [[..., 2, 40]]])
def test_lists_of_subscripts_are_an_equation(result):
    a, b = torch.randn(3, 2, 4), torch.randn(4, 5)
    given = (a, [..., 40, 1], b, [1, 2], *result)
    equation, operands = einsum_call(given)
    assert operands[0] is a
    assert operands[1] is b
    assert torch.equal(torch.einsum(equation, operands), torch.einsum(*given))
    assert einsum_call(("ij,jk", [a, b])) == einsum_call(("ij,jk", a, b)) == ("ij,jk", [a, b])
