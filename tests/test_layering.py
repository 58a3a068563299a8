"""The one-way law of imports, read from the sources, and an import that asks nothing of the machine."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxsparse"

LAYERS = (
    {"errors", "options", "report", "selection", "topk", "timing", "topology", "machine", "figure", "rng"},
    {"pattern", "blocks", "graph", "method", "reparam", "schedule", "kernel"},
    {"kernels", "everything that is not named here"},
    {"passes"},
    {"transformation", "compiler", "inference", "backend", "saving", "scoring", "pretrained"},
    {"", "cli", "demo", "integrations", "__main__"},  # "" is fxsparse/__init__.py, which re-exports
)
MIDDLE = 2
FILLS_ITSELF = ("kernel", "kernels")  # the registry imports what registers itself there, at first use
KERNELS_MAY_IMPORT = {"kernels", "kernel", "formats", "pattern", "errors", "selection", "topk", "machine"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    # Path.rglob does not follow links before Python 3.13, so the two linked folders are walked by name.
    folders = [PACKAGE, PACKAGE / "passes", PACKAGE / "kernels"]
    return {module_name(path): path for folder in folders for path in sorted(folder.rglob("*.py"))}


SOURCES = sources()


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names that the import statements among `nodes` bring in."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from fxsparse import topk` means the module, `from fxsparse.plans import Plan` its file.
            found = [name for name in submodules if name in SOURCES]
            yield from found
            if len(found) < len(submodules):
                yield node.module


def imports_of(module: str) -> set[str]:
    return set(imported(ast.walk(ast.parse(SOURCES[module].read_text()))))


def imports_at_load(module: str) -> set[str]:
    """Only what importing `module` runs: nothing from inside its functions."""
    return set(imported(ast.parse(SOURCES[module].read_text()).body))


def part(module: str) -> str:
    """The unit of the law: ``fxsparse.methods.rigl`` is "methods", ``fxsparse`` itself is ""."""
    return module.partition(".")[2].partition(".")[0]


def layer(module: str) -> int:
    return next((level for level, names in enumerate(LAYERS) if part(module) in names), MIDDLE)


def breaches(module: str, targets: set[str]) -> list[str]:
    """What `module` may not import, with the reason."""
    found = []
    for target in sorted(name for name in targets if name.split(".")[0] == "fxsparse"):
        if (part(module), part(target)) == FILLS_ITSELF:
            continue
        if layer(target) > layer(module):
            found.append(f"{module} imports {target}, which lies above it")
        elif part(module) == "kernels" and part(target) not in KERNELS_MAY_IMPORT:
            found.append(f"{module} imports {target}; kernels know only {sorted(KERNELS_MAY_IMPORT)}")
        elif part(module) == "passes" and part(target) == "kernels":
            found.append(f"{module} imports {target}; passes reach kernels through fxsparse.kernel")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards(module: str) -> None:
    assert breaches(module, imports_of(module)) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("fxsparse.errors", "fxsparse.plans"),
        ("fxsparse.methods.rigl", "fxsparse.passes.clean_up"),
        ("fxsparse.passes.clean_up", "fxsparse.compiler"),
        ("fxsparse.compiler", "fxsparse"),
        ("fxsparse.kernels.csr.linear", "fxsparse.methods"),
        ("fxsparse.passes.lower_kernels", "fxsparse.kernels.csr.linear"),
    ],
)
def test_the_law_sees_an_upward_import(module: str, target: str) -> None:
    assert len(breaches(module, {target})) == 1


def test_no_import_cycles() -> None:
    edges = [(m, t) for m in SOURCES for t in imports_at_load(m) if t in SOURCES and t != m]
    assert list(networkx.simple_cycles(networkx.DiGraph(edges))) == []


def test_passes_and_kernels_are_never_imported_by_their_bare_names() -> None:
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    bare = {
        f"{path}: {name}"
        for path in files
        for name in imported(ast.walk(ast.parse(path.read_text())))
        if name.split(".")[0] in ("passes", "kernels")
    }
    assert bare == set()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_import_is_silent_and_needs_no_compiler_gpu_or_optional_library() -> None:
    # Blocked, not only unwanted: torch itself imports triton where it finds it.
    code = """
import sys
optional = ("triton", "matplotlib", "scipy", "sklearn", "torchvision", "transformers", "lightning", "accelerate")
for name in (*optional, "passes", "kernels"):
    sys.modules[name] = None
import torch, fxsparse
assert not torch.cuda.is_initialized()
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
"""
    run = run_python(code, PATH="", CUDA_VISIBLE_DEVICES="", CXX="")
    said = [line for line in run.stderr.splitlines() if "triton not found" not in line]  # torch's own words
    assert (run.returncode, run.stdout, said) == (0, "", [])


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_top_level_folders_are_the_package_not_a_second_copy(folder: str) -> None:
    assert (PACKAGE / folder).is_symlink()
    assert (PACKAGE / folder).resolve() == ROOT / folder
