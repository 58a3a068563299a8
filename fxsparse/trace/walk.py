"""Front end M: the layers of a model without their order, which always works."""

from torch import fx, nn

from fxsparse.graph import SITE_OPS, canonical_names
from fxsparse.trace.modules import (
    eligible_parameters,
    functional_arguments,
    is_transposed_linear,
    runs_its_op_alone,
)

_CALLS = {op: call for call, op in SITE_OPS.items()}


def walk(root: nn.Module) -> fx.Graph:
    """A graph that is never run: one site for each eligible weight of the tree, on a placeholder of its own.

    The placeholder's ``meta["module"]`` is the path of the layer.  Layers that compute more than their op, or whose
    weight an attention reads past them, have no site.
    """
    graph, names, found = fx.Graph(), canonical_names(root), []
    for path, module in root.named_modules():
        if not runs_its_op_alone(module):
            continue
        prefix = f"{path}." if path else ""
        for name, op in eligible_parameters(module).items():
            with graph.inserting_before(found[0] if found else None):
                x = graph.placeholder(f"input_of_{prefix}{name}".replace(".", "_"))
            x.meta["module"] = path
            weight = found_weight = graph.get_attr(names[prefix + name])
            bias_name = f"{name.removesuffix('weight')}bias"
            bias = (
                graph.get_attr(names[prefix + bias_name])
                if module._parameters.get(bias_name) is not None
                else None
            )
            if is_transposed_linear(module):
                weight = graph.call_method("t", (weight,))
            options = {} if op == "linear" else functional_arguments(module)
            graph.call_function(_CALLS[op], (x, weight, bias), options)
            found.append(found_weight)
    graph.output(tuple(node for node in graph.nodes if node.target in SITE_OPS))
    return graph
