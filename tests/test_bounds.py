"""`make test-oldest` has the lowest releases that pyproject.toml allows, and no others."""

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def releases(file, mark):
    """Release by package, of lines such as `name>=1.2` or `"name>=1.2",`."""
    lines = (ROOT / file).read_text().splitlines()
    found = (re.fullmatch(rf'\s*"?([\w.-]+){mark}([\w.]+)"?,?', line) for line in lines)
    return {normal(match[1]): match[2] for match in found if match}


def test_oldest_are_the_lower_bounds():
    bounds = releases("pyproject.toml", ">=")
    pins = releases("constraints-oldest.txt", "==")
    assert {"lm-eval", "transformers", "numpy", "pytest"} < bounds.keys()
    del bounds["torch"]  # the one exception; constraints-oldest.txt says why
    for name, bound in bounds.items():
        assert Version(pins[name]) == Version(bound), name
