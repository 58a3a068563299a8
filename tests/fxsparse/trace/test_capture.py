"""Which front end captures which model, that it leaves the model alone, and why it steps down."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import TraceError
from fxsparse.passes import CollectWeights, Functionalize
from fxsparse.pipeline import PassContext, Program, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture

SYMBOLIC = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "vgg11_bn",
    "vit_b_32",
]
TIMM = {"resnet18": "symbolic", "mobilenetv3_small_050": "symbolic"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def pinned(model: nn.Module, inputs: Any, tier: str) -> Program:
    """The tier is as expected, and every parameter is selected or has a reason, exactly once."""
    before = copy.deepcopy(model.state_dict())
    program = capture(model, inputs)
    assert program.tier == tier, program.notes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    ctx = PassContext(None, "train", program, Report())
    run_passes((Functionalize(), CollectWeights()), ctx)
    decided = [*ctx.weights, *ctx.untouched]
    assert sorted(decided) == sorted(name for name, _ in model.named_parameters())
    hidden = [name for name, reason in ctx.untouched.items() if reason.startswith("hidden")]
    assert hidden == []
    return program


@pytest.mark.parametrize("name", SYMBOLIC)
def test_tier_of_torchvision(name: str) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options)
    # On meta the whole zoo is quick; the committed benchmark compares numbers.
    size = {"vit_b_32": 224, "inception_v3": 299}.get(name, 96)
    program = capture(model, torch.randn(2, 3, size, size, device="meta"))
    assert program.tier == "symbolic", program.notes
    assert program.notes == ["verified shapes only, as tensors are on meta"]


def test_a_small_swin_is_exported_as_its_attention_hides_weights() -> None:
    model = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [1, 2], [4, 4], num_classes=3)
    program = pinned(model, torch.randn(2, 3, 32, 32), "export")
    assert "out of reach" in program.notes[0]
    assert "its op is shifted_window_attention" in program.notes[0]


@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf"])
def test_torchvision_is_verified_on_numbers(name: str) -> None:
    pinned(torchvision.models.get_model(name), torch.randn(2, 3, 64, 64), "symbolic")


@pytest.mark.parametrize("name", TIMM)
def test_tier_of_timm(name: str) -> None:
    pinned(timm.create_model(name), torch.randn(2, 3, 64, 64), TIMM[name])


def language(kind: str, config: Any, *more: str) -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = torch.randint(0, 50, (2, 7))
    return getattr(transformers, kind)(config), dict.fromkeys(("input_ids", *more), tokens)


HF = {
    "bert": lambda: language(
        "BertForSequenceClassification", transformers.BertConfig(vocab_size=50, **SIZES)
    ),
    "gpt2": lambda: language(
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=50, use_cache=False, bos_token_id=0, eos_token_id=0
        ),
    ),
    "llama": lambda: language(
        "LlamaForCausalLM", transformers.LlamaConfig(vocab_size=50, use_cache=False, **SIZES)
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "t5": lambda: language(
        "T5ForConditionalGeneration",
        transformers.T5Config(
            d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=50, use_cache=False
        ),
        "decoder_input_ids",
    ),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face_models_are_exported(name: str) -> None:
    model, inputs = HF[name]()
    pinned(model.train(), inputs, "export")


class Liar(nn.Module):
    """Fools the symbolic trace: an attribute decides, and a proxy has every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * 2 if hasattr(x, "is_a_proxy") else self.lin(x)


def test_a_wrong_trace_is_found_by_running_it() -> None:
    program = capture(Liar(), torch.randn(2, 4))
    assert program.tier == "export"
    assert program.notes[0].startswith(
        "symbolic: its train graph differs from the model: output 0 differs by"
    )


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(4, 4), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.sum().item() > 0 else self.conv(self.lin(x)[:, None])[:, 0]


def test_the_walk_takes_what_nothing_else_can() -> None:
    program = capture(Stubborn(), torch.randn(2, 4))
    assert program.tier == "walk"
    assert [note.split(":")[0] for note in program.notes] == ["symbolic", "export"]
    with pytest.raises(TraceError, match="strict=True refuses the walk"):
        capture(Stubborn(), torch.randn(2, 4), strict=True)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.vmap(self.a)(x))


def test_layers_inside_of_vmap_are_not_taken_for_a_graphs() -> None:
    model, x = Mapped().eval(), torch.randn(3, 4)
    program = capture(model, x)
    assert program.tier == "walk"
    assert program.notes[1].startswith("export: the forward calls torch.vmap")
    compact = fxsparse.compile(model, Plan(sparsity=0.0, storage="compact"), example_inputs=x).eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    for made in (compact, fast):
        torch.testing.assert_close(made(x), model(x).detach())
    assert fxsparse.count_flops(model, x).uncounted


def test_a_graph_that_fails_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, state: tuple[Tensor | None, ...] = (None, None)) -> Tensor:
            return self.layer(x) if state[0] is None else self.layer(x) + state[0]

    program = capture(State(), torch.randn(2, 4))
    assert program.tier == "export"
    assert "its train graph raises TypeError" in program.notes[0]
    assert capsys.readouterr() == ("", "")


def test_a_tensor_without_values_in_an_export_is_no_constant() -> None:
    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda v: (v @ self.weight).sum())(self.layer(x))

    program = capture(Gradient(), torch.randn(2, 4))
    assert program.tier == "walk"
    assert program.notes[1].startswith("export: ")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, r"must be a tensor, a dict, or a tuple .* got int"),
        ((torch.randn(2, 4), torch.randn(2, 4)), r"do not fit Liar.forward.*too many positional arguments"),
        ((torch.randn(2, 4), {"mask": 1}), "got an unexpected keyword argument 'mask'"),
        (torch.randn(2, 5), "the model itself fails on example_inputs in eval mode: RuntimeError"),
    ],
)
def test_bad_inputs_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        capture(Liar(), inputs)


def test_lazy_modules_are_named() -> None:
    with pytest.raises(TraceError, match=r"'0.weight' of a lazy module has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(3)))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    capture(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
