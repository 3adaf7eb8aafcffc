"""Tests of the distributions: contents of the sdist, links of the package page, dependencies."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import focal_jax

ROOT = Path(focal_jax.__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = SETTINGS["optional-dependencies"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build the source distribution and return the folder of its files."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_has_all_files_to_build_and_test_it(sdist):
    for path in (
        "Makefile",
        ".ci/run",
        "pyproject.toml",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
    ):
        assert (sdist / path).is_file(), path
    for folder in ("focal_jax", "tests", "examples", "benchmarks", "docs"):
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert {path.relative_to(sdist) for path in (sdist / folder).rglob("*.py")} == files
    assert not list(sdist.rglob("__pycache__"))


def test_links_of_the_package_page_are_absolute_and_have_targets(sdist):
    metadata = email.message_from_string((sdist / "PKG-INFO").read_text())
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    repository = SETTINGS["urls"]["Homepage"].removeprefix("https://github.com/")
    for link in links:
        file = re.fullmatch(rf"https://[^/]+/{repository}/(?:blob/)?main/([^#]*)(#.*)?", link)
        assert file is None or (ROOT / file[1]).exists(), link
    assert metadata["Version"] == focal_jax.__version__


def test_extras_for_users_have_no_development_tools():
    def packages(extra):
        found = {re.match(r"[\w-]+", requirement)[0] for requirement in EXTRAS[extra]}
        inner = re.findall(r"focal_jax\[([\w,]+)\]", " ".join(EXTRAS[extra]))
        for other in ",".join(inner).split(","):
            found |= packages(other) if other else set()
        return found

    tools = {"pyright", "pytest", "ruff", "hypothesis", "hatchling"}
    assert not packages("all") & tools
    assert packages("dev") > tools | packages("all") - {"focal_jax"}


def test_ruff_and_pyright_are_pinned_in_one_place():
    pinned = [r for r in EXTRAS["dev"] if r.startswith(("ruff", "pyright"))]
    assert len(pinned) == 2
    assert all("==" in requirement for requirement in pinned)
    hooks = ROOT / ".pre-commit-config.yaml"
    if hooks.exists():  # a source distribution does not have this file
        assert "rev:" not in hooks.read_text()


def test_citation_and_templates():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == focal_jax.__version__
    assert citation["license"] == SETTINGS["license"]
    assert citation["repository-code"] == SETTINGS["urls"]["Homepage"]
    for path in (ROOT / ".github").rglob("*.yml"):  # a source distribution has none
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_command_line_script():
    assert SETTINGS["scripts"] == {"focal-jax": "focal_jax.__main__:main"}
