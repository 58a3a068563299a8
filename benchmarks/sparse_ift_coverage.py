"""Sparse-IFT on published models: what every transformation makes of them, and what it refuses.

For each model, transformation and sparsity: shapes and names of the transformed model, FLOPs of its transformed layers
and of all of it.  Models of at most 30 M parameters are built on the CPU and run forward and backward once; larger ones
are moved to the meta device, where shapes alone are computed.  ``python -m benchmarks.sparse_ift_coverage`` goes on
where an interrupted run was; ``--quick`` takes one model of each family.
"""

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torchvision
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from benchmarks.coverage.models import torchvision_model
from fxsparse import Plan
from fxsparse.errors import FxSparseError
from fxsparse.inputs import split_inputs
from fxsparse.pipeline import Program
from fxsparse.skeleton import bind, copy_structure
from fxsparse.trace import capture
from fxsparse.transformation import transform_program
from fxsparse.transforms import TRANSFORMS

REAL_LIMIT = 30_000_000
OUTPUT = "benchmarks/results/sparse_ift_coverage.json"
PREFIXES = {
    "ResNet": ("resnet", "wide_resnet", "resnext"),
    "VGG": ("vgg",),
    "DenseNet": ("densenet",),
    "MobileNetV2": ("mobilenet_v2",),
    "ViT": ("vit",),
    "MobileNetV3": ("mobilenet_v3",),
    "EfficientNet": ("efficientnet",),
    "ConvNeXt": ("convnext",),
    "Swin": ("swin",),
    "RegNet": ("regnet",),
}
QUICK = (
    *("resnet18", "vgg11", "densenet121", "mobilenet_v2", "vit_b_16", "hf:bert-small", "hf:gpt2-small"),
    *("hf:vit-small", "hf:llama-small", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t"),
    "regnet_x_400mf",
)


def main() -> None:
    """Run what is missing, then print the tables."""
    options = parser(__doc__, output=OUTPUT).parse_args()
    torch.set_num_threads(options.threads)
    rest = [name for names in families().values() for name in names if name not in QUICK]
    grid = [
        {"model": model, "transform": transform, "sparsity": sparsity}
        for model in (QUICK if options.quick else (*QUICK, *rest))
        for transform in TRANSFORMS
        for sparsity in (0.5, 0.75, 0.9)
    ]
    cells = run_cells(grid, measure, options.output)
    print(table(cells))
    print(refusals(cells))
    print(environments(cells))


def families() -> dict[str, list[str]]:
    """{family: names of its models}, the transformers' last."""
    known = torchvision.models.list_models(module=torchvision.models)
    found = {family: [name for name in known if name.startswith(p)] for family, p in PREFIXES.items()}
    for name in HF:
        found.setdefault(name.partition("-")[0].upper(), []).append(f"hf:{name}")
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """One cell: what the transformation came to, or why it was refused."""
    program, inputs, real = captured(settings["model"])
    before = {name: p.numel() for name, p in program.skeleton.named_parameters()}
    plan = Plan(transform=TRANSFORMS[settings["transform"]](), sparsity=settings["sparsity"])
    try:
        model = transform_program(copied(program), plan, inputs)
    except FxSparseError as error:
        return {"outcome": "refused", "reason": f"{type(error).__name__}: {error}"}
    balance, dense = model.origin.balance, model.origin.dense
    ratio = balance.layers_ratio(balance.sparsity)
    names = list(dict(model.named_parameters()))
    return {
        "outcome": "done",
        "run": forward_and_backward(model, inputs) if real else "meta",
        "within_1_percent": abs(ratio - 1) <= 0.01,
        "sensible_names": all(is_sensible(name, before) for name in names),
        "sparsity": round(balance.sparsity, 6),
        "nominal_layers_ratio": round(balance.layers_ratio(balance.nominal), 4),
        "layers_ratio": round(ratio, 4),
        "model_ratio": round(balance.model_ratio(balance.sparsity), 4),
        "parameters_M": round(sum(before.values()) / 1e6, 2),
        "transformed_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "dense": dict(Counter(reason(why) for why in dense.values())),
        "tier": program.tier,
    }


@lru_cache(maxsize=1)
def captured(name: str) -> tuple[Program, Any, bool]:
    """(program of a model in training, example inputs, whether it has values); that of the last model is kept."""
    model, inputs = HF[name.removeprefix("hf:")]() if name.startswith("hf:") else torchvision_model(name)
    real = sum(p.numel() for p in model.parameters()) <= REAL_LIMIT
    if not real:
        model, inputs = model.to("meta"), pytree.tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    program = capture(model, inputs, modes=("train",))
    program.graphs["eval"] = program.graphs["train"]
    return program, inputs, real


def copied(program: Program) -> Program:
    """The same program on a structural copy of its tree."""
    skeleton = copy_structure(program.skeleton)
    made = {id(gm): bind(copy.deepcopy(gm.graph), skeleton) for _, gm in program.distinct_graphs()}
    graphs = {mode: made[id(gm)] for mode, gm in program.graphs.items()}
    return Program(program.tier, skeleton, graphs, list(program.notes), dict(program.hidden))


def forward_and_backward(model: nn.Module, inputs: Any) -> str:
    """Run a training step's forward and backward; says what it found."""
    args, kwargs = split_inputs(inputs)
    start = time.perf_counter()
    outputs = pytree.tree_leaves(model.train()(*args, **kwargs))
    loss = torch.stack([out.float().square().mean() for out in outputs if isinstance(out, Tensor)]).sum()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not bool(loss.isfinite()):
        return "the loss is not finite"
    return f"no gradient: {without[0]}" if without else f"{time.perf_counter() - start:.2f} s"


def is_sensible(name: str, before: dict[str, int]) -> bool:
    """Whether a parameter has a name of the model as it came, or one below a layer of it."""
    parts = name.split(".")
    above = [".".join(parts[:k]) for k in range(1, len(parts))]
    return name in before or any(known.startswith(path) for path in above for known in before)


def reason(why: str) -> str:
    """What the table says of a layer that stays dense."""
    return why.partition(": ")[2].partition(":")[0]


def table(cells: Sequence[Cell]) -> str:
    """A row for each family and transformation."""
    rows = []
    for family, names in families().items():
        for transform in TRANSFORMS:
            found = [
                c for c in cells if c.settings["model"] in names and c.settings["transform"] == transform
            ]
            done = [c.result for c in found if c.result["outcome"] == "done"]
            if not found:
                continue
            rows.append(
                {
                    "family": family,
                    "transformation": transform,
                    "cells": len(found),
                    "refused": len(found) - len(done),
                    "layers within 1 %": sum(r["within_1_percent"] for r in done),
                    "sensible names": sum(r["sensible_names"] for r in done),
                    "ran": sum(r["run"].endswith(" s") for r in done),
                    "meta": sum(r["run"] == "meta" for r in done),
                    "model FLOPs": _span([r["model_ratio"] for r in done]),
                }
            )
    return tabulate(rows, headers="keys", tablefmt="github")


def refusals(cells: Sequence[Cell]) -> str:
    """A line for each reason, with the cells it stopped; and what did not run as it should."""
    found: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        title = " ".join(map(str, cell.settings.values()))
        if cell.result["outcome"] != "done":
            found[cell.result["reason"]].append(title)
        elif cell.result["run"] != "meta" and not cell.result["run"].endswith(" s"):
            found[cell.result["run"]].append(title)
    return "\n".join(f"{why}: {', '.join(titles)}" for why, titles in found.items()) or "no refusals"


def _span(values: Sequence[float]) -> str:
    return f"x{min(values):.3f} to x{max(values):.3f}" if values else ""


def _text(kind: str, config: Any) -> tuple[nn.Module, Any]:
    return getattr(transformers, kind)(config), {"input_ids": torch.randint(0, 50, (2, 16))}


def _image(config: Any) -> tuple[nn.Module, Any]:
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels}


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HF: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bert-small": lambda: _text(
        "BertForSequenceClassification", transformers.BertConfig(vocab_size=1000, **_SMALL)
    ),
    "bert-base": lambda: _text("BertForSequenceClassification", transformers.BertConfig()),
    "gpt2-small": lambda: _text(
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0, use_cache=False
        ),
    ),
    "gpt2-base": lambda: _text("GPT2LMHeadModel", transformers.GPT2Config(use_cache=False)),
    "llama-small": lambda: _text(
        "LlamaForCausalLM", transformers.LlamaConfig(vocab_size=1000, use_cache=False, **_SMALL)
    ),
    "llama-base": lambda: _text(
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            use_cache=False,
        ),
    ),
    "vit-small": lambda: _image(transformers.ViTConfig(image_size=64, **_SMALL)),
    "vit-base": lambda: _image(transformers.ViTConfig(image_size=64)),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
