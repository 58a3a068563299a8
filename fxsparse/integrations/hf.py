"""Hugging Face: ``Trainer(model=sparse, callbacks=[SparseCallback()])`` moves the masks of a compiled model."""

from typing import Any

from torch import Tensor, nn

from fxsparse.errors import PlanError, UnsupportedError
from fxsparse.integrations.attachment import attach_all, trained_modules

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise UnsupportedError(
        f"the callback for Trainer needs transformers, and {error.name!r} is not installed: "
        "pip install transformers accelerate"
    ) from error


class SparseCallback(TrainerCallback):
    """Attaches a model that `fxsparse.compile` made to Trainer's optimizer, and logs its sparsity with the loss.

    From then on ``state_dict`` of the model copies tied tensors, as Trainer saves with safetensors, which refuses
    shared memory; loading ties them again.

    Raises:
        PlanError: Trainer would drop every input of the model, or no model was compiled with a plan.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.remove_unused_columns:
            raise PlanError(
                "SparseCallback: expected TrainingArguments(remove_unused_columns=False), got True. Trainer keeps only "
                "columns that forward names, and a compiled model's forward takes any: set it to False, give the "
                "model's inputs alone in the data, and name its labels (label_names=['labels'])."
            )
        for module in trained_modules(kwargs["model"]).values():
            module.register_state_dict_post_hook(_copy_tied)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        attach_all(kwargs["model"], [kwargs["optimizer"]])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for path, module in trained_modules(kwargs["model"]).items():
            entry = {f"sparsity/{path}" if path else "sparsity": module.sparsity()["total"]}
            state.log_history[-1].update(entry)
            kwargs["logs"].update(entry)


def _copy_tied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give every entry of `state` memory of its own, in place; the first of several keeps its own."""
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        if value.untyped_storage().data_ptr() in seen:
            state[name] = value.detach().clone()
        seen.add(value.untyped_storage().data_ptr())
