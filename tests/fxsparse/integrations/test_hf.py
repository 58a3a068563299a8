"""Trainer trains a tiny GPT-2 with tied embeddings on Python source through the callback, saves it and resumes."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from fxsparse.errors import PlanError
from fxsparse.integrations.hf import SparseCallback

# Torch 2.11's own: copies of what it exported make pytrees by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def page(examples):
    """The names that the documentation's first block leaves: a compiled GPT-2, the data and an example of it."""
    torch.manual_seed(0)
    names = {"__name__": "example"}
    exec(examples["Hugging Face"][0], names)
    return names


def trainer_of(model, data, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_steps=6,
        logging_steps=6,
        learning_rate=3e-3,
        max_steps=12,
        **{"remove_unused_columns": False, "label_names": ["labels"], **options},
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[SparseCallback()])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_masks_move_counts_stay_and_a_resumed_run_is_bit_equal(page, bf16, tmp_path):
    compiled, data = page["sparse"], page["data"]
    sparse, again = copy.deepcopy(compiled), copy.deepcopy(compiled)
    trainer = trainer_of(sparse, data, tmp_path, bf16=bf16)
    trainer.train()
    assert int(sparse.get_buffer("fxsparse_step")) == 12  # 24 batches
    before = compiled.masks()
    for name, mask in sparse.masks().items():
        assert mask.sum() == before[name].sum()
        assert not torch.equal(mask, before[name])
    first, last = (trainer.state.log_history[entry] for entry in (0, 1))
    assert last["loss"] < first["loss"]
    assert first["sparsity"] == sparse.sparsity()["total"]

    trainer_of(again, data, tmp_path, bf16=bf16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    expected = sparse.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())

    assert trainer.evaluate()["eval_loss"] < first["loss"]
    trainer.save_model(str(tmp_path / "sparse"))
    assert (tmp_path / "sparse" / "model.safetensors").exists()
    sparse.to_dense().save_pretrained(tmp_path / "dense")
    dense = GPT2LMHeadModel.from_pretrained(tmp_path / "dense").eval()
    assert not any(dense.get_parameter(name)[~mask].any() for name, mask in sparse.masks().items())
    assert dense.lm_head.weight is dense.transformer.wte.weight
    plain = copy.deepcopy(sparse).eval()  # without the autocast that Accelerate leaves around forward
    with torch.no_grad():
        torch.testing.assert_close(dense(**page["example"]).logits, plain(**page["example"]).logits)


def test_tied_tensors_are_saved_as_copies_and_stay_tied(page, tmp_path):
    sparse = copy.deepcopy(page["sparse"])
    trainer_of(sparse, page["data"], tmp_path)
    state = sparse.state_dict()
    head, embedding = state["lm_head.weight"], state["transformer.wte.weight"]
    assert head.data_ptr() != embedding.data_ptr()
    assert torch.equal(head, embedding)
    sparse.load_state_dict(state)
    assert sparse.get_parameter("lm_head.weight") is sparse.get_parameter("transformer.wte.weight")


def test_what_trainer_would_drop_or_has_not_is_named(page, tmp_path):
    with pytest.raises(
        PlanError, match=r"expected TrainingArguments\(remove_unused_columns=False\), got True"
    ):
        trainer_of(page["sparse"], page["data"], tmp_path, remove_unused_columns=True)
    with pytest.raises(PlanError, match="compiled with a plan inside Linear, got none"):
        trainer_of(nn.Linear(2, 2), page["data"], tmp_path)


def test_the_example_of_the_documentation_runs(page, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(examples["Hugging Face"][1], names := {**page, "sparse": copy.deepcopy(page["sparse"])})
    assert names["trainer"].state.log_history[-1]["sparsity"] == page["sparse"].sparsity()["total"]
    assert (tmp_path / "dense" / "model.safetensors").exists()
