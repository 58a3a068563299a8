"""Remove what no longer does anything."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.graph import eliminate_dead_code
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class Cleanup:
    """Erase unread nodes that are known to be pure; in-place and random ones stay (fx's own sweep drops
    them).
    """

    name: ClassVar[str] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ()
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of erased nodes."""
        return eliminate_dead_code(gm.graph)
