"""requirements.lock is what `make lock` wrote for the dependencies that pyproject.toml has now."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCKED = ("viz", "data", "test")  # extras, as in the Makefile


def locked():
    """Version and number of hashes by package."""
    entries = re.split(r"\n(?=[a-zA-Z])", (ROOT / "requirements.lock").read_text())
    found = {}
    for entry in entries:
        if match := re.match(r"([\w.-]+)==(\S+)", entry):
            found[match[1].lower().replace("_", "-")] = match[2], entry.count("--hash=sha256:")
    return found


def test_every_dependency_is_locked_at_a_version_that_fits():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in LOCKED for r in project["optional-dependencies"][extra])]
    versions = locked()
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name == "torch":  # whose build is chosen by the device
            assert name not in versions
            continue
        assert name in versions, f"{text} is not locked: make lock"
        assert requirement.specifier.contains(versions[name][0]), f"{text} is locked at {versions[name][0]}: make lock"


def test_every_file_has_a_hash_and_no_place_is_named():
    assert all(count for _, count in locked().values())
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links", (ROOT / "requirements.lock").read_text())
