"""Folders as Hugging Face has them: the dense weights for everybody, and beside them the sparse module."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from fxsparse.destination import destination
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.module import SparseModule
from fxsparse.raised import raised
from fxsparse.saving import load, save

SPARSE, DENSE = "fxsparse.safetensors", "model.safetensors"


def save_pretrained(module: SparseModule, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `load_pretrained` reads, and ``AutoModel.from_pretrained`` or `safetensors`, too.

    ``model.safetensors`` has the user's names, with zeros filled in; ``config.json`` and whatever else belongs to a
    model of transformers is written by its own ``save_pretrained``.  ``fxsparse.safetensors`` is the file of `save`.
    Files of the folder that have other names stay.

    Raises:
        PlanError: no compiled module, or one whose layers no longer have the shapes of the user's model.
        CheckpointError: the folder cannot be written, or as for `save`.
    """
    if not isinstance(module, SparseModule):
        raise PlanError(
            f"save_pretrained: expected what fxsparse.compile returned, got {type(module).__name__}."
        )
    dense, place = _dense(module), Path(folder)
    own: Any = getattr(dense, "save_pretrained", None)
    try:
        with _folder(place), tempfile.TemporaryDirectory(dir=place, prefix=".writing-") as made:
            if callable(own):
                own(made)
            else:
                save_model(dense, os.path.join(made, DENSE))
            save(module, os.path.join(made, SPARSE))
            files = sorted(Path(made).iterdir(), key=lambda file: file.name == SPARSE)
            for file, end in [(file, destination(place / file.name)) for file in files]:
                os.replace(file, end)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place}: expected a folder that may be written, with room for the model, got {error}."
        ) from error


@contextmanager
def _folder(place: Path) -> Iterator[None]:
    """The folder, made if it has to be; what was made and is empty at the end is removed again."""
    new = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def load_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> SparseModule:
    """The sparse module of a folder of `save_pretrained`.

    Args:
        folder: on this machine.
        model: the user's own model; by default what ``config.json`` names, a class of transformers.
        device, options: as for `fxsparse.load`.

    Raises:
        CheckpointError: as for `load`, or no model is given and ``config.json`` names none.
    """
    place = Path(folder)
    return load(place / SPARSE, _configured(place) if model is None else model, device=device, **options)


def _dense(module: SparseModule) -> nn.Module:
    """The user's model with the zeros filled in."""
    if module.plan is not None:
        return module.to_dense()
    program = module._emitted.program
    skeleton = program.skeleton if program.tier == "walk" else raised(module).skeleton
    recipe: Any = module._emitted.recipe
    named = (
        *skeleton.named_parameters(remove_duplicate=False),
        *skeleton.named_buffers(remove_duplicate=False),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in named}
    wanted = recipe.source.shapes
    changed = next((name for name in wanted if shapes.get(name) != wanted[name]), None)
    if changed is not None:
        raise PlanError(
            f"save_pretrained: expected {changed!r} with the shape {list(wanted[changed])} of the model that was "
            f"compiled, got {list(shapes[changed]) if changed in shapes else 'none'}, since inference folded it or "
            "removed neurons. Save the training module, or use fxsparse.save for this one."
        )
    return skeleton


def _configured(place: Path) -> nn.Module:
    """A model on meta of the class that ``config.json`` names; nothing but transformers' own classes is looked up."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            place, trust_remote_code=False, local_files_only=True
        )
        name = json.loads((place / "config.json").read_text())["architectures"][0]
        cls = getattr(transformers, name)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise TypeError(f"transformers.{name} is no model")
    except (ImportError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: expected a config.json that names a model of transformers, got {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. Pass the model: "
            "load_pretrained(folder, model)."
        ) from error
    with torch.device("meta"):
        return cls(config)
