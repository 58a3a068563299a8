"""One op that costs FLOPs, as far as counting goes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from sympy import Expr, Integer, Symbol, sympify

BATCH = Symbol("batch", integer=True, positive=True)
SEQUENCE = Symbol("sequence", integer=True, positive=True)

ZERO, ONE = Integer(0), Integer(1)

Shape = tuple[Expr, ...]


@dataclass(frozen=True)
class CallSite:
    """Shapes of one call; sizes are sympy expressions in `BATCH` and `SEQUENCE`, or integers.

    `op` is "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d" (weight sites), "matmul",
    "attention" (products of activations), or "batch_norm", "layer_norm", "max_pool", "adaptive_avg_pool".
    """

    name: str
    op: str
    operands: tuple[Shape, ...]
    """Activations that go in: the input; both factors of "matmul"; query, key and value of "attention"."""
    output: Shape
    weight: str | None = None
    """Name of the parameter; None where the op has no weight, or one that is computed."""
    weight_shape: tuple[int, ...] = ()
    """What the op sees of the weight, [out, in, ...]."""
    fraction: Expr = ONE
    """Share of the parameter that the op reads, such as a third of a packed projection."""
    bias: bool = False
    """Adds a bias; of a norm, has weight and bias."""
    stride: tuple[int, ...] = ()
    groups: int = 1
    kernel: tuple[int, ...] = ()
    """Window of a pool."""
    products: Expr = ZERO
    """Multiply-adds of an op without a weight."""
    grad_products: Expr = ZERO
    """Those of the gradients of its factors."""
    grad_input: int = 0
    """How many times the FLOPs of the forward the gradients of the inputs of other ops take."""
    grad_weight: bool = False
    """The weight needs a gradient."""

    @property
    def uses(self) -> Expr:
        """Multiply-adds per weight entry in one forward."""
        if self.op == "linear":
            return prod(self.output[:-1], start=ONE)
        spatial = len(self.weight_shape) - 2
        shape = self.operands[0] if self.op.startswith("conv_transpose") else self.output
        return self.batch * prod(shape[-spatial:], start=ONE)

    @property
    def batch(self) -> Expr:
        """Samples in the call; 1 where a convolution gets no batch dimension."""
        unbatched = self.is_weight_site and len(self.operands[0]) < len(self.weight_shape)
        return ONE if unbatched else self.operands[0][0]

    @property
    def numel(self) -> int:
        """Entries that the op reads of its weight."""
        return prod(self.weight_shape)

    @property
    def is_weight_site(self) -> bool:
        """Whether the op multiplies with a weight."""
        return self.op == "linear" or self.op.startswith("conv")

    @property
    def is_product(self) -> bool:
        """Whether the op multiplies activations."""
        return self.op in ("matmul", "attention")

    def at(self, sizes: Mapping[Symbol, int]) -> "CallSite":
        """The same call with these symbols replaced."""
        values = {symbol: Integer(size) for symbol, size in sizes.items()}
        return replace(
            self,
            operands=tuple(tuple(with_sizes(size, values) for size in shape) for shape in self.operands),
            output=tuple(with_sizes(size, values) for size in self.output),
            products=with_sizes(self.products, values),
            grad_products=with_sizes(self.grad_products, values),
        )


def with_sizes(expression: Any, values: Mapping[Symbol, Expr]) -> Expr:
    """The sympy expression with these symbols replaced."""
    return sympify(expression).xreplace(dict(values))
