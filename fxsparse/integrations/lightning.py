"""Lightning: ``Trainer(callbacks=[SparseCallback()])`` moves the masks of a LightningModule's sparse models."""

from fxsparse.errors import UnsupportedError
from fxsparse.integrations.attachment import attach_all, trained_modules

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise UnsupportedError(
        f"the callback for Lightning needs the package lightning, and {error.name!r} is not installed: "
        "pip install lightning (pytorch_lightning alone has other classes)"
    ) from error


class SparseCallback(Callback):
    """Attaches every model in the LightningModule that `fxsparse.compile` made to the optimizer that holds it.

    At the end of each epoch it logs ``sparsity/<path of the model>``.  Lightning's checkpoints hold masks and step
    with the weights, so the callback keeps nothing, and one serves any number of ``fit`` calls.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attach_all(pl_module, trainer.optimizers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for path, module in trained_modules(pl_module).items():
            pl_module.log(f"sparsity/{path}", module.sparsity()["total"])
