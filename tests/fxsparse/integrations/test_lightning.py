"""Lightning trains a sparse model on digits through the callback: masks, counts, checkpoints, averages."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxsparse
from fxsparse import Plan
from fxsparse.demo.digits import load_digits
from fxsparse.errors import PlanError
from fxsparse.integrations.lightning import SparseCallback
from fxsparse.methods import rigl, srigl

pytestmark = [
    # Lightning's own: it reads torch's pytrees by a deprecated name, and advises on loaders, folders and loggers.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '[a-z_]+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

DIGITS = load_digits()


class Classifier(pl.LightningModule):
    def __init__(self, storage="masked", method=None):
        super().__init__()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        plan = Plan(sparsity=0.8, method=method or rigl(every=4, stop=100), storage=storage)
        self.model = fxsparse.compile(model, plan, example_inputs=(DIGITS.train_images[:4],))

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(module, folder, epochs=2, resume=None, callbacks=(), **options):
    """Train on 192 digits in batches of 16, of which two make a step; a checkpoint for each epoch."""
    kept = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        callbacks=[SparseCallback(), kept, *callbacks],
        **options,
    )
    data = TensorDataset(DIGITS.train_images[:192], DIGITS.train_labels[:192])
    trainer.fit(module, DataLoader(data, batch_size=16), ckpt_path=resume)
    return trainer


def counts(sparse):
    return {name: int(mask.sum()) for name, mask in sparse.masks().items()}


@pytest.mark.parametrize(
    ("storage", "method", "precision"),
    [
        ("masked", rigl(every=4, stop=100), "32-true"),
        ("compact", rigl(every=4, stop=100), "bf16-mixed"),
        ("masked", srigl(every=4, stop=100), "bf16-mixed"),
    ],
    ids=["rigl-masked", "rigl-compact-bf16", "srigl-masked-bf16"],
)
def test_masks_move_counts_stay_and_a_resumed_run_is_bit_equal(storage, method, precision, tmp_path):
    module = Classifier(storage, method)
    before, first = module.model.masks(), counts(module.model)
    trainer = fit(module, tmp_path, precision=precision, gradient_clip_val=1.0)

    sparse = module.model
    assert int(sparse.get_buffer("fxsparse_step")) == 12  # 24 batches
    assert all(not torch.equal(mask, before[name]) for name, mask in sparse.masks().items())
    if storage == "compact" or method.rule != srigl().rule:
        assert counts(sparse) == first
    assert trainer.callback_metrics["sparsity/model"].item() == pytest.approx(sparse.sparsity()["total"])

    resumed = Classifier(storage, method)
    fit(resumed, tmp_path, precision=precision, gradient_clip_val=1.0, resume=tmp_path / "epoch=0.ckpt")
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())

    dense = sparse.eval().to_dense()
    assert [type(part) for part in dense] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert not any(dense.get_parameter(name)[~mask].any() for name, mask in sparse.masks().items())
    torch.testing.assert_close(dense(DIGITS.test_images), sparse(DIGITS.test_images))


def test_one_callback_follows_the_optimizer_of_every_fit(tmp_path):
    module, callback = Classifier(), SparseCallback()
    for folder in ("first", "second"):
        fit(module, tmp_path / folder, epochs=1, callbacks=(callback,))
    assert int(module.model.get_buffer("fxsparse_step")) == 12  # once for each step, with two callbacks too


def test_averages_and_copies_keep_the_zeros(tmp_path):
    module = Classifier()
    averaging = StochasticWeightAveraging(swa_lrs=3e-3, swa_epoch_start=1, annealing_epochs=1)
    fit(module, tmp_path, epochs=3, callbacks=(averaging,))
    sparse = copy.deepcopy(module.model)
    dense = sparse.to_dense()
    for name, mask in sparse.masks().items():
        assert not dense.get_parameter(name)[~mask].any()
        assert torch.equal(mask, module.model.masks()[name])


def test_a_module_without_a_plan_is_named(tmp_path):
    module = Classifier()
    module.model = module.model.to_dense()
    with pytest.raises(PlanError, match="compiled with a plan inside Classifier, got none"):
        fit(module, tmp_path)


def test_the_example_of_the_documentation_runs(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    (block,) = examples["Lightning"]
    exec(block, names)
    assert int(names["classifier"].model.get_buffer("fxsparse_step")) == 60  # 5 epochs of 23 batches
    assert names["dense"](DIGITS.test_images).argmax(1).eq(DIGITS.test_labels).float().mean() > 0.8
