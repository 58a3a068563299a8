import pytest
import torch

from fxsparse.link_prediction import cht_scores

LINKS = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])


def test_node_scores_are_the_golden_ones():
    for kind, worth in (("ch3", 2.0), ("ch2", 4.0)):
        found = cht_scores(LINKS != 0, kind)
        assert [float(found[at]) for at in ((0, 2), (1, 0), (1, 3), (2, 1))] == [worth] * 4
        assert [float(found[at]) for at in ((0, 3), (2, 0))] == [0, 0]


@pytest.mark.parametrize("kind", ["ch3", "ch2"])
def test_node_scores_are_their_definition_link_by_link(kind):
    b = (torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.3).double()

    def phi(rows, i, j):
        common = float((rows[i] * rows[j]).sum())
        external = max(float(rows[j].sum()) - common - 1, 0)
        return (1 + common if kind == "ch2" else 1) / (1 + external) if common else 0.0

    expected = torch.tensor(
        [
            [
                sum(phi(b, o, p) * float(b[p, i]) for p in range(7))
                + sum(phi(b.t(), i, k) * float(b[o, k]) for k in range(9))
                for i in range(9)
            ]
            for o in range(7)
        ]
    )
    torch.testing.assert_close(cht_scores(b, kind), expected)
