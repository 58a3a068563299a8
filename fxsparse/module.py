"""SparseModule: what ``fxsparse.compile`` returns, an nn.Module with the user's names."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from fxsparse import dense_copies, plain_weights, sharding
from fxsparse.dense_copies import check_bytes, chosen, copied_model, fill, mask_of, numel_of, versioned
from fxsparse.errors import CheckpointError, FxSparseError, PlanError, TraceError
from fxsparse.graph import owner
from fxsparse.input_check import InputCheck, refuse_another_value
from fxsparse.own_code import own_code_each
from fxsparse.parameter_groups import extras_held, parameter_groups
from fxsparse.pipeline import Decision, Program
from fxsparse.plans import Plan
from fxsparse.probe_variant import PROBES, probe_graphs
from fxsparse.ranks import verify_same
from fxsparse.report import Report
from fxsparse.sharding import refuse_sharded_parts, release_sharded, whole
from fxsparse.skeleton import SHARED_DICTS, bind, copy_graphs
from fxsparse.soft_updates import refuse_averaged
from fxsparse.state_dicts import after_loading, before_loading, before_reading, rehearse
from fxsparse.storage import CompactWeight, MaskedWeight, read_weights
from fxsparse.update_mask import Target
from fxsparse.updates import MaskUpdates

MAX_DENSE_BYTES = 2**33
"""Dense copies above this are refused unless asked for: always-sparse networks may not fit."""


@dataclass(frozen=True)
class Recipe:
    """What compiling the same module again needs, apart from its state."""

    shell: nn.Module
    """The user's model class over the same tensors, compact weights on meta: what ``to_dense`` fills."""
    plan: Plan | None
    example_inputs: Any
    decisions: dict[str, Decision]
    tier: str
    """The front end that captured the model."""
    accepts: Mapping[str, InputCheck]
    """{mode: what its graph asks of a call}."""


@dataclass(frozen=True)
class Emitted:
    """Everything a SparseModule is made of; built by the compiler, copied by deepcopy."""

    program: Program
    report: Report
    user_keys: tuple[str, ...]
    """The state-dict keys of the model as it came."""
    targets: dict[str, Target]
    """The sparse weights by name."""
    recipe: Recipe
    rebuild: Callable[..., "SparseModule"]
    """Called on unpickling with the recipe, the state, the mode and, if masks move, the history of their updates."""
    updates: MaskUpdates | None = None
    """None for inference."""


@own_code_each
class SparseModule(nn.Module):
    """A compiled model.  Parameter names, ``state_dict`` keys, train/eval, ``to``, deepcopy and pickle are the user's.

    Calling it runs the graph of the current mode.  In masked storage its Parameters are the very objects of the model
    it was made from.
    """

    accepts_loss_kwargs = False
    """Read by the Trainer of transformers: a graph has no argument for the number of items in a batch."""

    def __init__(self, emitted: Emitted) -> None:
        super().__init__()
        for name in SHARED_DICTS:
            self.__dict__[name] = getattr(emitted.program.skeleton, name)
        self.training = emitted.program.skeleton.training
        self._version = emitted.program.skeleton._version  # of the state dict's form, for models that ask
        self._emitted = emitted
        self.register_state_dict_pre_hook(before_reading)
        self.register_load_state_dict_pre_hook(before_loading)
        self.register_load_state_dict_post_hook(after_loading)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check = self._emitted.program.accepts.get("train" if self.training else "eval")
        if check is not None:
            check(args, kwargs)
        updates = self._emitted.updates
        if updates is not None and updates.switch.on and torch.is_grad_enabled():
            updates.switch.ran = True
        active = self._active()
        if torch.compiler.is_compiling():
            return active(*args, **kwargs)
        if updates is not None:
            before_reading(self)
        # A call of a GraphModule goes through five frames first, a tenth of a short product after a long one.
        run = active if self._emitted.program.tier == "walk" else active.forward
        try:
            return run(*args, **kwargs)
        except AssertionError as error:
            refuse_another_value(error)
            raise
        except RuntimeError as error:
            refuse_sharded_parts(self, self._emitted.program.tier, error)
            raise

    def train(self, mode: bool = True) -> "SparseModule":
        super().train(mode)
        self._emitted.program.skeleton.training = mode
        return self

    def attach(self, optimizer: Optimizer) -> None:
        """Update masks around every step that `optimizer` takes from now on; idempotent."""
        self._training().attach(optimizer)
        release_sharded(self._emitted.recipe.shell, self)

    def attach_average(self, averaged: nn.Module) -> None:
        """Let a fresh copy that averages this module's weights (``AveragedModel``, any EMA) follow its masks.

        Compact storage needs it wherever masks move; under masks the copy of the mask is enough.  Entries that are
        grown start at 0 in the average, and those that are pruned leave it.

        Raises:
            PlanError: no copy of this module.
        """
        copies = [m for m in averaged.modules() if isinstance(m, SparseModule)]
        if len(copies) != 1 or copies[0] is self or copies[0]._emitted.targets != self._emitted.targets:
            raise PlanError(
                f"attach_average: expected AveragedModel(sparse) or another copy, got {type(averaged).__name__}."
            )
        self._training().attach_average(copies[0]._training())

    def update_masks(self, optimizer: Optimizer) -> bool:
        """Call once after each ``optimizer.step()`` instead of `attach`; returns whether masks moved in that step.

        The first call attaches the optimizer, so a step counts once however often this is called.  A method whose
        update takes the place of the optimizer's step (RigL's default) can only do so from the second step on.
        """
        return self._training().count_step(optimizer)

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Backwards inside the block tell the next mask update where to grow, and change nothing else.

        Afterwards every ``.grad``, buffer (BatchNorm's statistics) and random number generator of torch is as before;
        several blocks add up.  The next update goes by them alone: the batch of its own step collects nothing, and the
        optimizer takes that step as any other, also where the update would take its place (RigL's and GSE's papers).
        What was explored is no part of ``state_dict``: after loading one, explore again.

        Raises:
            PlanError: the method looks at no gradients, the module is in eval mode, or no backward reached a sparse
                weight.
            NumericsError: the gradients hold inf or NaN, as those of a loss that a GradScaler scaled too far.
        """
        updates = self._training()
        if not self.training:
            raise PlanError(
                "exploring(): expected a module in train mode, got one in eval mode: call .train()."
            )
        with updates.exploring():
            yield

    def verify_sync(self) -> None:
        """Raise InvariantError if ranks hold different masks.  Call on all ranks; without a process group, a no-op."""
        verify_same(self.weights())

    def parameter_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Groups for an optimizer: the model's parameters at `lr` with these options, and what the method learns beside
        its weights (scores, thresholds) at the learning rate and weight decay that the method gives it.
        """
        held = extras_held(self.weights(), self._training().method.extras)
        return parameter_groups(self, held, lr, options)

    @property
    def penalty_norm(self) -> float | None:
        """Of what the method's penalty added to the gradients of the last step; None where it adds nothing."""
        norm = self._training().penalty_norm
        return None if norm is None else float(norm)

    @property
    def report(self) -> Report:
        """What was done to every parameter, pass and call site."""
        return self._emitted.report

    @property
    def plan(self) -> Plan | None:
        """The plan it was compiled with; None for inference."""
        return self._emitted.recipe.plan

    @property
    def forward_graph(self) -> GraphModule:
        """The graph of the current mode; FLOPs per call site are in ``node.meta["flops"]``."""
        if self._emitted.program.tier == "walk":
            raise TraceError(
                "the module-walk tier has no forward graph: " + " ".join(self._emitted.program.notes)
            )
        return self._emitted.program.graphs[self._mode()]

    @property
    def update_graph(self) -> GraphModule:
        """The graph that moves the masks, one ``update_mask`` node per weight."""
        return self._training().graph

    def weights(self) -> Iterator[tuple[str, CompactWeight | MaskedWeight]]:
        """(name, storage) of every sparse weight, as it is now."""
        transposed = {name: target.transposed for name, target in self._emitted.targets.items()}
        extras = () if self._emitted.updates is None else self._emitted.updates.method.extras
        return read_weights(self._emitted.program.skeleton, transposed, extras)

    def track_itop(self) -> None:
        """Count from now on which entries were ever active, for the ITOP rate in the report; costs at most a bit each.

        The report says from which step on.  See `fxsparse.topology.TopologyHistory.track_itop`.
        """
        updates = self._training()
        updates.history.track_itop(updates.step)

    def masks(
        self, names: Iterable[str] | None = None, max_bytes: int = MAX_DENSE_BYTES
    ) -> dict[str, Tensor]:
        """{weight name: bool tensor in the dense shape}, copies."""
        self._training()
        weights = self._chosen(names)
        check_bytes(sum(numel_of(weight) for weight in weights.values()), max_bytes, "masks")
        return {name: mask_of(weight) for name, weight in weights.items()}

    def coordinates(self, names: Iterable[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """{weight name: (rows, columns)} of the active entries in [out, fan-in], int64, row-major."""
        self._training()
        found = {}
        for name, weight in self._chosen(names).items():
            active, fan_in = weight.active(), numel_of(weight) // weight.shape[0]
            found[name] = (active // fan_in, active % fan_in)
        return found

    def sparsity(self) -> dict[str, float]:
        """{weight name: fraction of zeros}, and "total" over all of them."""
        counts = {name: (weight.active().numel(), numel_of(weight)) for name, weight in self.weights()}
        if self._emitted.updates is None:
            counts = {row["name"]: (row["nnz"], row["numel"]) for row in self.report.layers}
        found = {name: 1 - nnz / numel for name, (nnz, numel) in counts.items()}
        total = sum(numel for _, numel in counts.values())
        found["total"] = 1 - sum(nnz for nnz, _ in counts.values()) / total if total else 0.0
        return found

    def dense_state_dict(
        self, names: Iterable[str] | None = None, max_bytes: int = MAX_DENSE_BYTES
    ) -> dict[str, Tensor]:
        """The user's keys with the masks folded in and zeros filled in; `names` limits it to some keys."""
        self.check_masks()
        sharding.reshard(self)
        keys = chosen(names, self._emitted.user_keys, "entry of the model's state dict")
        weights = dense_copies.under_every_name(dict(self.weights()), self._emitted.recipe.shell)
        check_bytes(sum(self._dense_bytes(key, weights) for key in keys), max_bytes, "dense_state_dict")
        state = self.state_dict()
        dense = {
            key: self._folded(key, weights) if key in weights else whole(state[key]).clone() for key in keys
        }
        return versioned(dense, self._emitted.recipe.shell)

    def to_dense(self, names: Iterable[str] | None = None, max_bytes: int = MAX_DENSE_BYTES) -> nn.Module:
        """A copy of the user's model with the masks folded into its weights.

        With `names` only these sparse weights are filled in; the other compact ones stay on the meta device.
        """
        self.check_masks()
        sharding.reshard(self)
        weights = dense_copies.under_every_name(dict(self.weights()), self._emitted.recipe.shell)
        filled = self._chosen(names)
        check_bytes(sum(self._dense_bytes(key, weights) for key in filled), max_bytes, "to_dense")
        dense = copied_model(self._emitted.recipe.shell, "to_dense")
        state = self.state_dict()
        others = {key: state[key] for key in self._emitted.user_keys if key not in weights}
        values = {key: whole(value) if isinstance(value, Tensor) else value for key, value in others.items()}
        fill(dense, values | {name: self._folded(name, weights) for name in filled})
        for path, buffer in self._user_buffers():
            module, leaf = owner(dense, path)
            module._buffers[leaf] = buffer.clone()
        return dense.train(self.training)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a sparse or a dense state dict.  A dense one keeps the masks and is cut by them.

        Raises:
            CheckpointError: keys or shapes that do not belong to this model; nothing was changed.
        """
        try:
            rehearse(self, state_dict, strict)
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if isinstance(error, FxSparseError):
                raise
            stored = any(f'{end}"' in str(error) for end in (".values", ".indices", "_mask"))
            advice = " (between masked and compact storage, load the dense_state_dict() of the other one)"
            raise CheckpointError(
                f"this state dict does not fit the model{advice if stored else ''}. {error}"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseModule":
        before_reading(self)
        emitted = self._emitted
        skeleton = dense_copies.deep_copied(emitted.program.skeleton, memo)
        switch = copy.deepcopy(emitted.program.switch, memo)
        graphs = copy_graphs(emitted.program.graphs, skeleton)
        updates, report = emitted.updates, copy.deepcopy(emitted.report)
        if updates is not None:
            if "probe" in graphs:
                graphs |= probe_graphs(graphs, updates.method, switch, skeleton)
            update_graph = bind(copy.deepcopy(updates.graph.graph), skeleton)
            updates = updates.copy_onto(update_graph, switch, report.topology)
        return SparseModule(
            replace(
                emitted,
                program=replace(emitted.program, skeleton=skeleton, graphs=graphs, switch=switch),
                updates=updates,
                recipe=replace(emitted.recipe, shell=dense_copies.deep_copied(emitted.recipe.shell, memo)),
                report=report,
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        sharding.refuse_shards(self, "pickle")
        plain_weights.refuse_parametrizations(self)
        arguments: tuple[Any, ...] = (self._emitted.recipe, self.state_dict(), self.training)
        if self._emitted.updates is not None:
            arguments = (*arguments, self._emitted.updates.history.state_dict())
        return self._emitted.rebuild, arguments

    def check_masks(self) -> None:
        """Raise CheckpointError where masks that share a budget keep more than it, as averaged masks do."""
        updates = self._training()
        updates.copied.check(dict(self.weights()))
        method = updates.method
        masks = {name: weight.mask for name, weight in self.weights() if isinstance(weight, MaskedWeight)}
        refuse_averaged(method, int(self.get_buffer("fxsparse_step")), self._emitted.targets, masks)

    def _active(self) -> nn.Module:
        program = self._emitted.program
        return program.skeleton if program.tier == "walk" else program.graphs[self._mode()]

    def _mode(self) -> str:
        mode, updates = "train" if self.training else "eval", self._emitted.updates
        if updates is None or not updates.switch.on or not (self.training or torch.is_grad_enabled()):
            return mode
        return PROBES[mode]

    def _training(self) -> MaskUpdates:
        if self._emitted.updates is None:
            raise PlanError(
                "this module was compiled for inference, where masks and dense weights are gone; expected a module "
                "compiled with a plan. Keep that one, or compile the model with a plan."
            )
        return self._emitted.updates

    def _chosen(self, names: Iterable[str] | None) -> dict[str, CompactWeight | MaskedWeight]:
        weights = dict(self.weights())
        return {name: weights[name] for name in chosen(names, weights, "sparse weight")}

    def _folded(self, name: str, weights: dict[str, CompactWeight | MaskedWeight]) -> Tensor:
        weight = weights[name]
        if isinstance(weight, CompactWeight):
            return weight.dense()
        if self.plan is None:
            return whole(weight.parameter).clone()
        return weight.folded(self.plan.method.reparam)

    def _dense_bytes(self, key: str, weights: dict[str, CompactWeight | MaskedWeight]) -> int:
        weight = weights.get(key)
        if weight is None:
            return 0
        values = weight.values if isinstance(weight, CompactWeight) else weight.parameter
        return numel_of(weight) * values.element_size()

    def _user_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """Buffers that the user's model has too, by path."""
        theirs = {path for path, _ in self._emitted.recipe.shell.named_buffers()}
        return ((path, buffer) for path, buffer in self.named_buffers() if path in theirs)
