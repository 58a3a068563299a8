"""The wheel and the sdist: real files in place of the links, native sources inside, nothing at top level."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, tree: Path, out: Path) -> Path:
    out.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(out)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("fxsparse", "passes", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel") / "dist")


def packaged(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def wanted(folder: Path) -> set[str]:
    """Names inside `folder` of what a wheel has to carry."""
    kinds = (".py", ".cpp", ".h", ".toml", ".html", ".typed")
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in kinds and p.is_file()}


def test_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    folders = {"fxsparse": "fxsparse", "passes": "fxsparse/passes", "kernels": "fxsparse/kernels"}
    assert packaged(wheel) == {
        f"{home}/{f}" for folder, home in folders.items() for f in wanted(ROOT / folder)
    }


def test_sdist_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        assert [m.name for m in archive.getmembers() if m.issym() or m.islnk()] == []
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("fxsparse-*")
    assert packaged(build("wheel", unpacked, tmp_path / "wheel")) == packaged(wheel)


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import fxsparse.cli, fxsparse.passes, fxsparse.kernels; print(fxsparse.passes.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == tmp_path / "site" / "fxsparse" / "passes" / "__init__.py"


def test_wheel_declares_the_console_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "fxsparse = fxsparse.cli:main" in archive.read(name).decode()
