"""How a plan names weights: globs of full weight names, or of a module above them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(glob: str, name: str) -> bool:
    """Whether `glob` names this weight: ``layer4.*.weight``, or a module above it (``head``)."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")


def unmatched(globs: Iterable[str], names: Iterable[str]) -> list[str]:
    """The globs that name none of `names`, in their order."""
    names = list(names)
    return [glob for glob in globs if not any(matches(glob, name) for name in names)]
