"""A weight's nonzeros as a bipartite graph, inputs on the left and outputs on the right, and its singular values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxsparse.errors import NumericsError, PatternError, UnsupportedError

DENSE_SIDE = 512
"""Up to so many nodes on the smaller side all eigenvalues of the Gram matrix are faster than Lanczos iterations."""
DENSE_NUMEL = 2**24
"""No dense copy has more entries."""


@dataclass(frozen=True)
class Bipartite:
    """A graph without isolated nodes.  Edges are the nonzeros, on the CPU."""

    outputs: Tensor
    """[nnz] int64: the node that an edge ends at."""
    inputs: Tensor
    """[nnz] int64: where it starts."""
    values: Tensor | None
    """[nnz] float64, not negative: absolute weights of the edges, where they are known."""
    shape: tuple[int, int]
    """Nodes that have an edge: (outputs, inputs)."""

    @staticmethod
    def of(outputs: Tensor, inputs: Tensor, values: Tensor | None) -> "Bipartite":
        """From the coordinates of the nonzeros; nodes are numbered anew and those without an edge left out.

        Raises:
            NumericsError: a value is inf or NaN.
        """
        if values is not None:
            exact = torch.complex128 if values.is_complex() else torch.float64
            values = values.detach().to("cpu", exact).abs()
        if values is not None and not bool(values.isfinite().all()):
            raise NumericsError(
                "spectral: expected finite weights at the mask's entries, got inf or NaN: training has diverged."
            )
        (outputs, rows), (inputs, columns) = _renumbered(outputs.cpu()), _renumbered(inputs.cpu())
        return Bipartite(outputs, inputs, values, (rows, columns))

    @property
    def nnz(self) -> int:
        """Edges."""
        return len(self.inputs)

    @property
    def degrees(self) -> tuple[float, float]:
        """Mean edges of an input and of an output; 0 in a graph without edges."""
        rows, columns = self.shape
        return (self.nnz / columns, self.nnz / rows) if self.nnz else (0.0, 0.0)

    def degree_classes(self, least: int) -> Iterator["Bipartite"]:
        """The subgraph of all inputs of one degree, for every degree that at least so many inputs have."""
        degree = torch.bincount(self.inputs, minlength=self.shape[1])
        of_edge = degree[self.inputs]
        order = of_edge.argsort(stable=True)
        kept = [int(n) for n in torch.bincount(of_edge)]
        for found, edges in enumerate(order.split(kept)):
            if found and len(edges) // found >= least:
                values = None if self.values is None else self.values[edges]
                yield Bipartite.of(self.outputs[edges], self.inputs[edges], values)

    def two_largest(self, weighted: bool = False) -> tuple[float, float]:
        """The largest and second largest singular value of the [outputs, inputs] matrix of ones, or of the values.

        Exact to about 1e-7 of the largest: all eigenvalues of the Gram matrix where a side is small, else Lanczos
        iterations on the sparse matrix (ARPACK).  The second one of a matrix with one row or column is 0.

        Raises:
            UnsupportedError: the graph is large and scipy is not installed.
        """
        if not self.nnz:
            return 0.0, 0.0
        values = self.values if weighted and self.values is not None else torch.ones(self.nnz)
        small = min(self.shape) <= DENSE_SIDE and prod(self.shape) <= DENSE_NUMEL
        first, second = (_by_gram if small else _by_lanczos)(self, values)
        return first, second


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: hundreds of small products gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_mask(mask: Tensor, weight: Tensor | None) -> None:
    """Raise PatternError unless the mask has at least two dimensions, holds 0 and 1, and the weight its shape.

    Both have to be tensors with a value in memory for every entry.
    """
    _check_tensor(mask, "mask")
    if weight is not None:
        _check_tensor(weight, "weight")
    if mask.dim() < 2:
        raise PatternError(
            f"spectral: expected a mask [outputs, inputs, ...], got the shape {tuple(mask.shape)}. Pass the mask of a "
            "linear or convolution weight, or reshape it."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise PatternError(
            f"spectral: expected a mask of 0 and 1, got other {mask.dtype} values. Pass the weight as weight= and "
            "weight != 0 as the mask."
        )
    if weight is not None and weight.shape != mask.shape:
        raise PatternError(
            f"spectral: expected a weight of the mask's shape {tuple(mask.shape)}, got {tuple(weight.shape)}."
        )


def _check_tensor(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        got = f"{type(value).__name__}: torch.as_tensor makes one of arrays and lists"
    elif value.is_meta:
        got = "one on the meta device, which has no values"
    elif value.is_nested or value.layout != torch.strided:
        got = f"one of layout {'nested' if value.is_nested else value.layout}: pass value.to_dense()"
    elif value.is_quantized:
        got = f"one of {value.dtype}: pass value.dequantize()"
    else:
        return
    raise PatternError(f"spectral: expected the {what} as a dense tensor with values, got {got}.")


def _renumbered(nodes: Tensor) -> tuple[Tensor, int]:
    """Node numbers without gaps, in the same order, and how many there are."""
    if not nodes.numel():
        return nodes, 0
    used = torch.zeros(int(nodes.max()) + 1, dtype=torch.bool)
    used[nodes] = True
    number = used.cumsum(0) - 1
    return number[nodes], int(number[-1]) + 1


def _by_gram(graph: Bipartite, values: Tensor) -> tuple[float, float]:
    dense = values.new_zeros(graph.shape)
    dense[graph.outputs, graph.inputs] = values
    wide = graph.shape[0] <= graph.shape[1]
    gram = dense @ dense.T if wide else dense.T @ dense  # counts are exact in float32 up to 2**24
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    rounding = torch.finfo(torch.float64).eps * len(eigenvalues) * eigenvalues.max()
    squares = torch.nn.functional.pad(eigenvalues.where(eigenvalues > rounding, 0), (2, 0))[-2:]
    second, first = squares.sqrt().tolist()
    return first, second


def _by_lanczos(graph: Bipartite, values: Tensor) -> tuple[float, float]:
    try:
        import numpy as np
        from scipy.sparse import csr_matrix
        from scipy.sparse.linalg import ArpackNoConvergence, svds
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"spectral: a graph of {graph.shape[0]} outputs and {graph.shape[1]} inputs needs scipy's sparse solver, "
            f"and {error.name!r} is not installed: pip install 'fxsparse[analysis]'"
        ) from error
    matrix = csr_matrix((values.double().numpy(), (graph.outputs.numpy(), graph.inputs.numpy())), graph.shape)
    start = np.random.default_rng(0).standard_normal(min(graph.shape))
    try:
        found = svds(matrix, k=2, v0=start, return_singular_vectors=False)
    except ArpackNoConvergence as error:
        raise NumericsError(
            f"spectral: the two largest singular values of {graph.shape[0]} x {graph.shape[1]} with {graph.nnz} "
            "nonzeros did not converge. Leave this weight out by names=."
        ) from error
    return float(max(found)), float(min(found))
