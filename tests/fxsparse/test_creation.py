"""A model on meta gets the values that its own modules would draw, and tensors that nobody initialises are refused."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from fxsparse.creation import create_tensors
from fxsparse.errors import PlanError

CPU = torch.device("cpu")


def on_meta(make):
    with torch.device("meta"):
        return make()


def create(make, compact=(), seed=0):
    model = on_meta(make)
    return model, create_tensors(model, CPU, seed, compact)


def drawn(draws, name, count=200_000):
    return draws[name].values(count, torch.float32, CPU, torch.Generator().manual_seed(0))


def test_a_linear_weight_is_drawn_like_one_of_the_dense_fan_in():
    model, draws = create(lambda: nn.Linear(400, 30), ["weight"])
    values, bound = drawn(draws, "weight"), 1 / math.sqrt(400)
    assert model.weight.is_meta
    assert not model.bias.is_meta
    assert 0.99 * bound < values.abs().max() <= bound
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.01
    assert 0 < model.bias.abs().max() <= bound


def test_attention_projections_are_drawn_by_the_attention():
    model, draws = create(lambda: nn.MultiheadAttention(64, 4), ["in_proj_weight", "out_proj.weight"])
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert 0.99 * bound < drawn(draws, "in_proj_weight").abs().max() <= bound
    assert 0.99 / 8 < drawn(draws, "out_proj.weight").abs().max() <= 1 / 8
    assert model.in_proj_bias.count_nonzero() == model.out_proj.bias.count_nonzero() == 0


def test_a_transformers_model_is_drawn_by_its_own_rule():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    name = "encoder.layer.0.intermediate.dense.weight"
    model, draws = create(lambda: transformers.BertModel(config), [name])
    assert abs(drawn(draws, name).std() / config.initializer_range - 1) < 0.01
    assert abs(model.embeddings.word_embeddings.weight.std() / config.initializer_range - 1) < 0.05
    assert model.encoder.layer[0].output.LayerNorm.weight.eq(1).all()
    assert model.embeddings.position_ids.flatten().tolist() == list(range(config.max_position_embeddings))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.norm, self.rnn = nn.BatchNorm1d(8), nn.LSTM(8, 8)
        self.out.weight = self.table.weight


def test_everything_else_is_what_its_module_resets_it_to_and_stays_tied():
    model, _ = create(Mixed)
    assert model.out.weight is model.table.weight
    assert 0.9 < model.table.weight.std() < 1.1  # the first name's: N(0, 1), as where the weight came from
    assert model.norm.running_var.eq(1).all()
    assert model.norm.num_batches_tracked == 0
    model.rnn(torch.randn(2, 3, 8))[0].sum().backward()
    assert model.rnn.weight_ih_l0.grad.abs().sum() > 0


def test_values_depend_on_the_seed_and_the_name_alone():
    first, again, other = (create(Mixed, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["table.weight"], other["table.weight"])
    before = torch.get_rng_state()
    create(Mixed)
    assert torch.equal(before, torch.get_rng_state())


class Partly(nn.Module):
    """Its constructor initialises its children, as nn.Transformer's does."""

    def __init__(self):
        super().__init__()
        self.new = nn.Linear(4, 4)
        self.trained = nn.Linear(4, 4, device="cpu")
        self.gain = nn.Parameter(torch.empty(4))

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.constant_(parameter, 3.0)


def test_real_tensors_keep_their_values():
    model = on_meta(Partly)
    before = model.trained.weight.clone()
    create_tensors(model, CPU, 0, [])
    assert torch.equal(model.trained.weight, before)
    assert model.gain.eq(3).all()
    assert model.new.weight.eq(3).all()


class Free(nn.Module):
    def __init__(self, reset=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 4))
        if reset is not None:
            self.reset_parameters = lambda: reset(self.weight)


def copy_identity(weight):
    with torch.no_grad():
        weight.copy_(torch.eye(8, 4, device=weight.device))


def half(weight):
    nn.init.normal_(weight[:4])


@pytest.mark.parametrize(
    ("reset", "compact", "message"),
    [
        (None, [], r"'weight' is on the meta device .* Free has no reset_parameters\(\) that writes it"),
        (None, ["weight"], r"Free has no reset_parameters\(\) that writes it"),
        (
            nn.init.orthogonal_,
            ["weight"],
            r"no reset_parameters\(\) that writes it|copy_.default initialises it",
        ),
        (copy_identity, ["weight"], r"aten.copy_.default initialises it from other tensors"),
        (half, ["weight"], r"aten.normal_.default initialises a part of it"),
        (lambda weight: weight.sum().item(), ["weight"], r"its initialisation fails there: RuntimeError"),
    ],
    ids=["nothing", "nothing compact", "orthogonal", "copied", "in parts", "by values"],
)
def test_what_nobody_can_initialise_is_refused(reset, compact, message):
    with pytest.raises(PlanError, match=message):
        create(lambda: Free(reset), compact)


class Classifier(nn.Module):
    """As torchvision's VisionTransformer and timm's ConvNeXt: small tensors of the root and of its blocks."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, 64))
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.register_buffer("scale", torch.empty((), dtype=torch.float64))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.fc = nn.Parameter(torch.empty(4)), nn.Linear(4, 4)


def test_what_the_message_says_to_assign_is_what_works():
    model, said = on_meta(Classifier), []
    for _ in range(5):
        with pytest.raises(PlanError) as error:
            create_tensors(copy.deepcopy(model), CPU, 0, ["blocks.0.fc.weight"])
        said.append(str(error.value))
        exec(said[-1].split("`")[1], {"model": model, "nn": nn, "torch": torch})
    create_tensors(model, CPU, 0, ["blocks.0.fc.weight"])
    assert "'class_token' is on the meta device" in said[0]
    assert "(so are 'blocks.0.gamma', 'blocks.1.gamma', 'blocks.2.gamma', 'scale')" in said[0]
    assert "`model.class_token = nn.Parameter(torch.zeros(1, 1, 64))`" in said[0]
    assert "`model.get_submodule('blocks.0').gamma = nn.Parameter(torch.zeros(4))`" in said[1]
    assert "`model.scale = torch.zeros((), dtype=torch.float64)`" in said[-1]
    assert model.class_token.eq(0).all()
    assert model.blocks[2].fc.weight.std() > 0


def test_what_works_where_the_initialisation_of_the_root_fails():
    def broken():
        model = Free(lambda weight: weight.sum().item())
        model.fc = nn.Linear(4, 4)
        return model

    with pytest.raises(PlanError, match=r"`model\.weight = nn\.Parameter\(torch\.zeros\(8, 4\)\)`"):
        create(broken)
    model = on_meta(broken)
    model.weight = nn.Parameter(torch.zeros(8, 4))
    create_tensors(model, CPU, 0, [])
    assert not model.fc.weight.is_meta


def test_a_dense_weight_may_be_initialised_in_any_way():
    model, _ = create(lambda: Free(copy_identity))
    assert torch.equal(model.weight, torch.eye(8, 4))
