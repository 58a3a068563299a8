"""House rules that no linter knows: sizes, names, and that one new file means one export and one test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("fxsparse", "passes", "kernels", "benchmarks")
SOURCES = sorted(
    path
    for folder in SOURCE_FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h") and not path.parent.is_symlink()
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
BANNED_NAMES = re.compile("utils?|helpers?|manager|base|common|misc|data|info|process|handle")

# {folder: folder of its tests}; a file that a folder does not export is tested through those that it does.
ONE_FILE_ONE_TEST = {
    "passes": "tests/passes",
    "kernels": "tests/kernels",
    "fxsparse/methods": "tests/fxsparse/methods",
    "fxsparse/allocation": "tests/fxsparse/allocation",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_native(path: Path) -> bool:
    return path.suffix != ".py" or path.name.endswith("_triton.py")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= (600 if is_native(path) else 400)
    if path.suffix != ".py":
        return
    limit = 150 if is_native(path) else 60
    functions = (
        n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > limit} == {}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_names_say_what_is_inside(path: Path) -> None:
    assert not BANNED_NAMES.fullmatch(path.stem.strip("_"))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sources_hold_no_notes_to_self(path: Path) -> None:
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text()) == []


@pytest.mark.parametrize("path", [p for p in PYTHON if p.name == "__init__.py"], ids=relative)
def test_init_files_only_export(path: Path) -> None:
    allowed: tuple[type[ast.stmt], ...] = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    if relative(path) == "passes/__init__.py":
        allowed += (ast.FunctionDef,)  # default_pipeline: the one place that states an order
    body = ast.parse(path.read_text()).body
    docstring = body[:1] if ast.get_docstring(ast.Module(body, [])) else []
    assert [ast.unparse(n) for n in body[len(docstring) :] if not isinstance(n, allowed)] == []


def imports_inside(path: Path, package: str) -> set[str]:
    """Modules of `package`, relative to it, that the file at `path` imports from."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {str(node.module) for node in imports}
    names |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    return {name.removeprefix(package + ".") for name in names if name.startswith(package + ".")}


def package_of(folder: str) -> str:
    return "fxsparse." + folder.removeprefix("fxsparse/")


def modules_in(folder: str) -> dict[str, Path]:
    """{dotted name inside the folder: file}"""
    files = sorted((ROOT / folder).rglob("*.py"))
    names = (path.relative_to(ROOT / folder).with_suffix("").parts for path in files)
    return {".".join(n).removesuffix(".__init__"): p for n, p in zip(names, files, strict=True)}


@pytest.mark.parametrize("folder", ONE_FILE_ONE_TEST)
def test_every_exported_part_has_a_test_of_its_name(folder: str) -> None:
    exported = imports_inside(ROOT / folder / "__init__.py", package_of(folder)) & modules_in(folder).keys()
    tests = ROOT / ONE_FILE_ONE_TEST[folder]
    expected = {f"test_{module.replace('.', '_')}.py" for module in exported}
    assert expected - {path.name for path in tests.glob("*.py")} == set()


@pytest.mark.parametrize("folder", ONE_FILE_ONE_TEST)
def test_every_part_is_exported_or_used_by_one_that_is(folder: str) -> None:
    modules = modules_in(folder)
    reached, ahead = set(), ["__init__"]
    while ahead:
        name = ahead.pop()
        if name in modules and name not in reached:
            reached.add(name)
            ahead += imports_inside(modules[name], package_of(folder))
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert modules.keys() - reached - packages == set()
