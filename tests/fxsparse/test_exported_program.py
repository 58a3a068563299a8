"""The module of an exported program is compiled for inference and counted, for the sizes that it is for."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torchvision import models

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError, TraceError
from fxsparse.exported_program import opened

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Mean(nn.Module):
    """Divides by the batch, which a program of one batch size has as a number; and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(16, 8), torch.arange(8.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": self.layer(x).sum(0) / x.shape[0] + self.shift}


def sparse_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(torch.rand_like(weight) < 0.2)
    return model.eval()


def reloaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


# PyTorch 2.11 warns of how it reads its own files.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("change", [lambda p: p, reloaded, lambda p: p.run_decompositions()])
def test_a_program_is_compiled_and_stays_as_it_was(change, tmp_path: Path) -> None:
    model = sparse_weights(Mean())
    program = change(export(model, (X,)))
    module = program.module()
    before = {**vars(module)}
    fast = fxsparse.compile(module, mode="infer", example_inputs=X)
    assert vars(module) == before
    assert [row["name"] for row in fast.report.layers] == ["layer.weight"]
    want = fast(X)["mean"]
    torch.testing.assert_close(want, model(X)["mean"])
    with pytest.raises(TraceError, match=r"expected a tensor \[4, 16\] as 'x', got a tensor \[5, 16\]"):
        fast(torch.randn(5, 16))
    fxsparse.save(fast, tmp_path / "model.fxs")
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", module)(X)["mean"], want)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(X)["mean"], want)
    assert torch.equal(copy.deepcopy(fast)(X)["mean"], want)


def test_a_free_batch_stays_free_within_its_bounds() -> None:
    model = sparse_weights(Mean())
    module = export(model, (X,), dynamic_shapes=({0: Dim("batch", min=3, max=6)},)).module()
    fast = fxsparse.compile(module, mode="infer", example_inputs=X)
    for batch in (3, 6):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(fast(x)["mean"], model(x)["mean"])
    for batch in (2, 7):
        with pytest.raises(TraceError, match=f"got s[0-9]+={batch}: "):
            fast(torch.randn(batch, 16))


@pytest.mark.parametrize("decomposed", [False, True])
def test_convolutions_of_a_program_are_measured_and_counted(decomposed: bool) -> None:
    model, x = sparse_weights(models.resnet18(num_classes=10)), torch.randn(2, 3, 32, 32)
    program = export(model, (x,))
    module = (program.run_decompositions() if decomposed else program).module()
    fast = fxsparse.compile(module, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), model(x))
    assert len(fast.report.layers) == 21
    assert all(row["dense_us"] is not None for row in fast.report.layers)
    counts = [fxsparse.count_flops(either, x) for either in (module, model)]
    assert counts[0].dense == counts[1].dense
    assert counts[0].uncounted == counts[1].uncounted == ()


def test_a_program_without_inputs_that_it_accepts_is_refused() -> None:
    module = export(Mean(), (X,)).module()
    with pytest.raises(TraceError, match="expected example_inputs that the exported program accepts"):
        fxsparse.compile(module, mode="infer")
    with pytest.raises(TraceError, match=r"got a tensor \[3, 16\]"):
        fxsparse.compile(module, mode="infer", example_inputs=torch.randn(3, 16))


def test_a_program_does_not_train() -> None:
    module = export(Mean(), (X,)).module()
    for call in (fxsparse.compile, fxsparse.prune, fxsparse.allocate):
        with pytest.raises(TraceError, match="expected a model that trains and evaluates"):
            call(module, Plan(sparsity=0.5))


def test_a_program_itself_says_to_pass_its_module() -> None:
    with pytest.raises(PlanError, match=r"got ExportedProgram; pass its module\(\)"):
        fxsparse.compile(export(Mean(), (X,)), mode="infer", example_inputs=X)


def test_sizes_that_are_computed_are_refused() -> None:
    module = export(Mean(), (X,), dynamic_shapes=({0: 2 * Dim("half")},)).module()
    with pytest.raises(TraceError, match=r"input sizes are numbers or symbols, got \[2\*s\d+, 16\] as 'x'"):
        opened(module)
