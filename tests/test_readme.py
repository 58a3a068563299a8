"""What the README shows runs as it is written."""

import re
from pathlib import Path

import pytest
import torch

from fxsparse.cli import parser
from fxsparse.demo import models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_screen_has_two_commands_that_set_everything_up() -> None:
    first, second, *_ = blocks("bash")
    assert first.startswith("python3 -m venv")
    assert first.endswith("&& fxsparse demo\n")
    assert second.endswith("&& python -m pytest -n auto\n")


def test_the_example_trains_and_compiles() -> None:
    (example,) = blocks("python")
    x = torch.randn(8, 1, 8, 8)
    names = {"model": models.ViT(width=32, depth=1), "x": x, "loader": [(x, torch.arange(8))]}
    exec(example.replace("print(fast.report)", "pass"), names)
    assert names["fast"](x).shape == (8, 10)
    assert str(names["fast"].report)


@pytest.mark.parametrize(
    "line", [b for b in "".join(blocks("bash")).splitlines() if b.startswith("fxsparse")]
)
def test_commands_parse(line: str) -> None:
    parser().parse_args(line.partition("#")[0].split()[1:])
