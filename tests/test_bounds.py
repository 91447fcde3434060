"""`make test-oldest` uses the lowest releases that pyproject.toml allows, and no others."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def releases(file, mark):
    """Release by package, of lines such as `name>=1.2` or `"name>=1.2,<2",`."""
    lines = (ROOT / file).read_text().splitlines()
    found = (re.fullmatch(rf'\s*"?([\w.-]+){mark}([\w.]+)(,<[\w.]+)?"?,?', line) for line in lines)
    return {normal(match[1]): match[2] for match in found if match}


def test_oldest_are_the_lower_bounds():
    bounds = releases("pyproject.toml", ">=")
    pins = releases("constraints-oldest.txt", "==")
    assert {"lm-eval", "transformers", "numpy", "pytest"} < bounds.keys()
    del bounds["torch"]  # the one exception; constraints-oldest.txt says why
    for name, bound in bounds.items():
        assert Version(pins[name]) == Version(bound), name


def test_the_newest_releases_are_within_the_bounds():
    """Those of constraints.txt; and the next lm-eval is not, nor are its pre-releases."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bounds = [Requirement(line.strip(' ,"')) for line in lines if re.match(r'\s*"[\w-]+>=', line)]
    pins = releases("constraints.txt", "==")
    for bound in bounds:
        if (pin := pins.get(normal(bound.name))) is not None:
            assert bound.specifier.contains(pin, prereleases=True), bound
    (lm_eval,) = (bound.specifier for bound in bounds if bound.name == "lm-eval")
    for release, allowed in (("0.4.13", True), ("0.5.0.dev1", False), ("0.5.0", False)):
        assert lm_eval.contains(release, prereleases=True) == allowed
