"""What is handed out: a source distribution that builds and tests itself, and honest metadata."""

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
def unpacked(tmp_path_factory):
    """The source distribution, built and unpacked."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_has_what_builds_and_tests_it(unpacked):
    for path in ("Makefile", ".ci/run", "pyproject.toml", "LICENSE", "CHANGELOG.md"):
        assert (unpacked / path).is_file(), path
    for folder in ("focal_jax", "tests", "examples", "benchmarks", "docs"):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")}
        assert {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*.py")} == here
    assert not list(unpacked.rglob("__pycache__"))


def test_the_links_of_a_package_page_lead_somewhere(unpacked):
    metadata = email.message_from_string((unpacked / "PKG-INFO").read_text())
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    base = SETTINGS["urls"]["Homepage"].removeprefix("https://github.com/")
    for link in links:  # those into the repository, to files that there are
        inside = re.fullmatch(rf"https://[^/]+/{base}/(?:blob/)?main/([^#]*)(#.*)?", link)
        assert inside is None or (ROOT / inside[1]).exists(), link
    assert metadata["Version"] == focal_jax.__version__


def test_users_get_no_developers_tools():
    def names(extra):
        found = {re.match(r"[\w-]+", requirement)[0] for requirement in EXTRAS[extra]}
        inner = re.findall(r"focal_jax\[([\w,]+)\]", " ".join(EXTRAS[extra]))
        for other in ",".join(inner).split(","):
            found |= names(other) if other else set()
        return found

    tools = {"pyright", "pytest", "ruff", "hypothesis", "hatchling"}
    assert not names("all") & tools
    assert names("dev") > tools | names("all") - {"focal_jax"}


def test_what_checks_the_style_is_pinned_once():
    pinned = [r for r in EXTRAS["dev"] if r.startswith(("ruff", "pyright"))]
    assert len(pinned) == 2
    assert all("==" in requirement for requirement in pinned)
    hooks = ROOT / ".pre-commit-config.yaml"
    if hooks.exists():  # not in a source distribution, which has no repository
        assert "rev:" not in hooks.read_text()


def test_the_command_is_a_script():
    assert SETTINGS["scripts"] == {"focal-jax": "focal_jax.__main__:main"}
