"""The rewritten forwards of torch's attention modules compute what the modules compute."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from fxsparse.trace import capture
from fxsparse.trace.attention import attention_forward, refuses_attention
from fxsparse.verify import compare, observe

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "float": {"attn_mask": torch.randn(5, 5)},
    "per_head": {"attn_mask": torch.randn(6, 5, 5)},  # batch 3 * heads 2
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
}


@pytest.mark.parametrize(
    ("batch_first", "need_weights", "mask"), list(itertools.product([False, True], [False, True], MASKS))
)
def test_attention_equals_the_module_with_dropout_and_gradients(
    batch_first: bool, need_weights: bool, mask: str
) -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=batch_first)
    x = torch.randn((3, 5, 8) if batch_first else (5, 3, 8))
    inputs = (x, x, x, {"need_weights": need_weights, **MASKS[mask]})
    for training in (True, False):
        expected = observe(module, lambda q, k, v, **o: module(q, q, q, **o), inputs, training=training)
        got = observe(
            module, lambda q, k, v, **o: attention_forward(module, q, q, q, **o), inputs, training=training
        )
        assert compare(expected, got) is None


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_and_unbatched_inputs(bias: bool) -> None:
    module = nn.MultiheadAttention(8, 2, bias=bias)
    query, memory = torch.randn(4, 8), torch.randn(6, 8)
    for average in (True, False):
        expected, weights = module(query, memory, memory, average_attn_weights=average)
        got, ours = attention_forward(module, query, memory, memory, average_attn_weights=average)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ours, weights)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 4}, "kdim or vdim differ from embed_dim"),
        ({"add_bias_kv": True}, "add_bias_kv and add_zero_attn lengthen the sequence"),
        ({"add_zero_attn": True}, "add_bias_kv and add_zero_attn lengthen the sequence"),
    ],
)
def test_refuses_variants_with_the_reason(options: dict[str, bool], reason: str) -> None:
    assert refuses_attention(nn.MultiheadAttention(8, 2, **options)) == reason


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_show_all_their_weights(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False))
    program = capture(model, torch.randn(3, 5, 8))
    assert (program.tier, program.hidden) == ("symbolic", {}), program.notes


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.2)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(tgt, memory)


def test_decoder_layers_show_all_their_weights() -> None:
    program = capture(Pair(), (torch.randn(4, 3, 8), torch.randn(6, 3, 8)))
    assert (program.tier, program.hidden) == ("symbolic", {}), program.notes
