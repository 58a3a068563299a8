"""What the modules of an inference artefact say of themselves where passes changed them; only reprs read it."""

from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxsparse.graph import owner
from fxsparse.pipeline import PassContext, WeightSpec


def show_what_is_left(gm: GraphModule, ctx: PassContext) -> None:
    """Let the modules of a captured graph's tree tell the sizes that neurons left, in place.

    A batch norm that was folded becomes an Identity: it holds no tensor, and neither it nor a child (the activation of
    timm's BatchNormAct2d) is called.
    """
    for spec in ctx.weights.values():
        for name in (spec.name, *spec.aliases):
            _resize(owner(gm, name)[0], spec)
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    for path, module in list(gm.named_modules(remove_duplicate=False)):
        tensors = [*module._parameters.values(), *module._buffers.values()]
        is_called = any(target == path or target.startswith(f"{path}.") for target in called)
        if isinstance(module, _NormBase) and not is_called and all(t is None for t in tensors):
            holder, leaf = owner(gm, path)
            holder._modules[leaf] = nn.Identity()


def _resize(module: nn.Module, spec: WeightSpec) -> None:
    if isinstance(module, nn.Linear) and spec.op == "linear" and not spec.transposed:
        module.out_features, module.in_features = spec.shape
    elif isinstance(module, _ConvNd) and spec.op != "linear":
        first, second = spec.shape[:2]
        channels = (first, second * spec.groups)  # a transposed one stores input channels first
        inputs_first = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = channels if inputs_first else channels[::-1]
        module.groups = spec.groups
