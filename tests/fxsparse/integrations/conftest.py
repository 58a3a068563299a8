"""The examples of docs/trainers.md, which the tests of each trainer run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "trainers.md"


@pytest.fixture(scope="session")
def examples():
    """{heading: the Python blocks below it}"""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = zip(parts[::2], parts[1::2], strict=True)
    return {heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, text in found}
