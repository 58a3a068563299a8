"""Which front end captures which model, and how much of it: all torchvision classifiers, HF and timm models.

``python -m benchmarks.coverage`` goes on where an interrupted run was; ``--quick`` takes a dozen torchvision
representatives.  A row is verified: eval outputs, and one train step (outputs, gradients, buffers) where the model has
fewer than 100 M parameters.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from tabulate import tabulate
from torch import nn

from benchmarks.cells import environments, parser, run_cells
from fxsparse.passes import Cleanup, CollectWeights, Functionalize
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture

QUICK = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "vgg11_bn",
    "vit_b_16",
]
TIMM = [
    "resnet18",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "mixer_s32_224",
    "convnext_atto",
    "resmlp_12_224",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "mobilevit_xxs",
    "nfnet_l0",
]
TRAIN_STEP_LIMIT = 100_000_000
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main() -> None:
    """Run what is missing, then print the table."""
    options = parser(__doc__, output="coverage.json").parse_args()
    torch.set_num_threads(options.threads)
    built = models(options.quick)
    grid = [{"model": name} for name in built]
    cells = run_cells(grid, lambda settings: measure(*built[settings["model"]]()), options.output)
    rows = [cell.settings | {k: v for k, v in cell.result.items() if k != "notes"} for cell in cells]
    print(tabulate(rows, headers="keys"))
    tiers = Counter(row["tier"] for row in rows)
    print(f"{dict(sorted(tiers.items()))} of {len(rows)}\n{environments(cells)}")


def models(quick: bool) -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """{name: function that builds the model and its example inputs}."""
    names = QUICK if quick else torchvision.models.list_models(module=torchvision.models)
    made: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        f"torchvision:{name}": lambda name=name: torchvision_model(name) for name in names
    }
    if not quick:
        made |= {f"hf:{name}": build for name, build in HF.items()}
        made |= {f"timm:{name}": lambda name=name: timm_model(name) for name in TIMM}
    return made


def measure(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Capture a model and collect its weights; the row of the table, without the model's name."""
    parameters = sum(p.numel() for p in model.parameters())
    modes = ("train", "eval") if parameters < TRAIN_STEP_LIMIT else ("eval",)
    start = time.perf_counter()
    program = capture(model, inputs, modes=modes)
    seconds = time.perf_counter() - start
    ctx = PassContext(None, "train", program, Report(), inputs)
    run_passes((Functionalize(), CollectWeights(), Cleanup()), ctx)
    wide = {name for name, p in model.named_parameters() if p.dim() > 1}
    return {
        "tier": program.tier,
        "parameters_M": round(parameters / 1e6, 2),
        "weights": len(ctx.weights),
        "covered_percent": round(100 * sum(w.numel for w in ctx.weights.values()) / parameters, 2),
        "refused": len(wide - ctx.weights.keys()),
        "eval": "not run" if program.tier == "walk" else "equal",
        "train_step": "equal" if len(modes) == 2 and program.tier != "walk" else "not run",
        "seconds": round(seconds, 2),
        "notes": program.notes,
    }


def torchvision_model(name: str) -> tuple[nn.Module, Any]:
    """A torchvision classifier with random weights, at a resolution that its architecture still allows."""
    options: dict[str, Any] = {}
    size = 224 if name.startswith("maxvit") else 299 if name == "inception_v3" else 96
    if name.startswith("vit"):
        size = options["image_size"] = 56 if "14" in name else 64
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options), torch.randn(2, 3, size, size)


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """A timm model with random weights at its own resolution."""
    return timm.create_model(name), torch.randn(2, 3, 224, 224)


def _language(kind: str, config: Any, **inputs: Any) -> tuple[nn.Module, Any]:
    tokens = torch.randint(0, 50, (2, 7))
    return getattr(transformers, kind)(config), {
        "input_ids": tokens,
        **{k: v or tokens for k, v in inputs.items()},
    }


HF: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bert": lambda: _language(
        "BertForSequenceClassification", transformers.BertConfig(vocab_size=50, **_SIZES)
    ),
    "gpt2": lambda: _language(
        "GPT2LMHeadModel",
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, use_cache=False),
    ),
    "llama": lambda: _language(
        "LlamaForCausalLM", transformers.LlamaConfig(vocab_size=50, use_cache=False, **_SIZES)
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **_SIZES)),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "t5": lambda: _language(
        "T5ForConditionalGeneration",
        transformers.T5Config(
            d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=50, use_cache=False
        ),
        decoder_input_ids=None,
    ),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
