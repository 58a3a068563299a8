"""The models of benchmarks.inference, with random weights: what a user prunes, and the layers that stay dense."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from fxsparse.globs import matches

TOKENS = 128
"""The sequence of the two language models."""


@dataclass(frozen=True)
class Published:
    """A model, a batch for it, and the globs of the weights that are never pruned."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    dense: tuple[str, ...] = ()

    @torch.no_grad()
    def pruned(self, sparsity: float) -> nn.Module:
        """The model in evaluation mode, in every other weight that share of the smallest entries zero."""
        model = self.build()
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not any(matches(glob, name) for glob in self.dense):
                zeros = round(sparsity * weight.numel())
                weight.view(-1)[weight.abs().flatten().topk(zeros, largest=False).indices] = 0
        _settle(model, self.inputs(2))
        return model.eval()


class Classifier(nn.Module):
    """BERT-base that classifies sequences: int64 [batch, tokens] in, logits [batch, 2] out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.model = BertForSequenceClassification(BertConfig())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, return_dict=False)[0]


class NextToken(nn.Module):
    """GPT-2 small on a prompt: int64 [batch, tokens] in, logits [batch, 1, 50257] of what comes next out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(GPT2Config(use_cache=False))

    def forward(self, x: Tensor) -> Tensor:
        # Without a mask it looks for packed sequences with torch.diff, which no opset has.
        mask = torch.ones_like(x) if torch.onnx.is_in_onnx_export() else None
        return self.model(input_ids=x, attention_mask=mask, logits_to_keep=1, return_dict=False)[0]


def _settle(model: nn.Module, x: Tensor) -> None:
    """Fill the statistics of batch norms, without which the activations of sparse layers fade to nothing."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(x)


def vit_b_16() -> nn.Module:
    """ViT-B/16; torchvision starts its head at zero, which would hide every error."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def images(batch: int) -> Tensor:
    """fp32 [batch, 3, 224, 224]."""
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> Tensor:
    """int64 [batch, TOKENS]."""
    return torch.randint(1000, 30_000, (batch, TOKENS))


def linear(in_features: int, out_features: int) -> Published:
    """One linear layer on a batch of rows."""
    return Published(
        lambda: nn.Linear(in_features, out_features), lambda batch: torch.randn(batch, in_features)
    )


WHOLE = {
    "ResNet-18": Published(torchvision.models.resnet18, images, ("conv1", "fc")),
    "ResNet-50": Published(torchvision.models.resnet50, images, ("conv1", "fc")),
    # Depthwise convolutions stay dense, as in RigL (arXiv:1911.11134): they hold 2 % of the weights.
    "MobileNetV2": Published(
        torchvision.models.mobilenet_v2,
        images,
        ("features.0.0", "features.1.conv.0.0", "features.*.conv.1.0", "classifier"),
    ),
    "ViT-B/16": Published(vit_b_16, images, ("conv_proj", "heads", "class_token", "encoder.pos_embedding")),
    "BERT-base": Published(
        Classifier, tokens, ("model.bert.embeddings", "model.bert.pooler", "model.classifier")
    ),
    "GPT-2": Published(NextToken, tokens, ("model.transformer.wte", "model.transformer.wpe")),
}
LINEAR = {
    f"{in_features}x{out_features}": linear(in_features, out_features)
    for in_features, out_features in ((768, 3072), (3072, 768), (4096, 4096))
}
MODELS = LINEAR | WHOLE
