"""Where a file is to be written: checked before anything is, since a rename would replace what is no file."""

import os
import stat
from pathlib import Path

from fxsparse.errors import CheckpointError


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that `path` names, through links; it may not exist yet.

    Raises:
        CheckpointError: no path, or one where something else lies than a file: a folder, a pipe, a device.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(
            f"path: expected the name of a file as text or pathlib.Path, without null characters, got {path!r}."
        )
    place = Path(text)
    try:
        place = Path(os.path.realpath(text))
        mode = place.stat().st_mode
    except FileNotFoundError:
        return place
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{os.fspath(place)!r}: expected a file in a folder that may be written, got {error}."
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{place}: expected a file or no file yet, got {_kind(mode)}, which writing would replace; choose another "
            "name."
        )
    return place


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
