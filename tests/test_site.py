"""The documentation: its code runs, its links lead somewhere, it names all there is."""

import importlib
import importlib.util
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pages import run

import focal_jax
from focal_jax import _catalogue

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "retinanet_digits" / "README.md",
    *PAGES,
]
# These run on eight devices, or row by row: each has tests of its own.
APART = {"porting.md", "scaling.md", "vocabularies.md"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in APART], ids=_name)
def test_code_runs_and_prints_what_it_says(page):
    run(page)


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r" +", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(
        r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")
    ):
        target = page.parent / link if link else page
        if link.startswith("api/"):  # made when the site is built
            assert Path(link).stem in _hooks("API"), link
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), f"{link}#{anchor}"


# ---------------------------------------------------------------- the navigation and the API


def _hooks(name: str):
    """Return a constant of docs/hooks.py, whose imports the tests do not need."""
    return importlib.import_module("ast").literal_eval(
        re.search(rf"^{name} = (\{{.*?^\}})", (DOCS / "hooks.py").read_text(), re.M | re.S)[1]
    )


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"(?:- |: )(\S+\.md)$", navigation, re.MULTILINE))
    made = {f"api/{page}.md" for page in _hooks("API")} | set(_hooks("ELSEWHERE").values())
    assert named == {page.name for page in PAGES} | made


def test_the_home_page_leads_to_what_is_asked_most():
    home = (DOCS / "index.md").read_text(encoding="utf-8")
    for page, answer in {
        "masks.md": "void",
        "nan.md": "## Labels outside the classes",
        "porting.md": "## torchvision",
        "recipes.md": "## torchvision's RetinaNet",
        "choosing.md": "detector",
    }.items():
        assert f"({page})" in home
        assert answer in (DOCS / page).read_text(encoding="utf-8")


def test_the_api_has_every_public_module():
    described = {module for _, modules in _hooks("API").values() for module in modules}
    modules = {name for name in focal_jax.__all__ if type(getattr(focal_jax, name)) is type(pytest)}
    public = {"focal_jax", *(f"focal_jax.{name}" for name in modules)}
    public |= {f"focal_jax.compat.{name}" for name in focal_jax.compat.__all__}
    assert described == public


# ---------------------------------------------------------------- the family, and the figures


def test_the_gallery_has_every_loss():
    text = (DOCS / "family.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sorted(headings) == sorted(loss.name for loss in _catalogue.LOSSES)
    for name in headings:
        assert f"| [`{name}`](#{name}) |" in text
        assert f"![{name}](figures/{name}.svg)" in text


def _figures():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_made_by_the_script():
    made = {f"{name}.svg" for name in _figures().FIGURE_OF}
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} == made
    shown = {
        Path(link).name
        for page in TEXTS
        for link in re.findall(r"\(([^)]*figures/[^)]*\.svg)\)", page.read_text())
    }
    assert shown == made


def _curves(path: Path) -> list[np.ndarray]:
    """Return the points of the curves that a figure has: long paths that are cut at the axes."""
    paths = re.findall(r'<path d="([^"]*)" clip-path', path.read_text())
    curves = [np.array(re.findall(r"[ML] (\S+) (\S+)", d), float) for d in paths]
    return [points for points in curves if len(points) > 10]


@pytest.mark.parametrize("name", ["loss", "varifocal_loss", "focal_tversky_loss"])
def test_a_figure_is_what_the_losses_give(name, tmp_path):
    _figures().main(["--only", name, "--out", str(tmp_path)])
    drawn, kept = (_curves(folder / f"{name}.svg") for folder in (tmp_path, DOCS / "figures"))
    assert len(drawn) == len(kept) >= 2
    for now, then in zip(drawn, kept):
        x = np.linspace(max(now[0, 0], then[0, 0]), min(now[-1, 0], then[-1, 0]), 50)
        # A panel is 130 points high, and moves by a point or two with the fonts.
        np.testing.assert_allclose(np.interp(x, *now.T), np.interp(x, *then.T), atol=4)


def test_the_numbers_of_the_numerics_page():
    def cells(text):
        rows = re.findall(r"^\| [\d.]+ \|.*$", text, re.MULTILINE)
        return {tuple(row.split(" | ")[:2]): row.strip("| ").split(" | ")[2:] for row in rows}

    page = (DOCS / "numerics.md").read_text()
    stated = cells(page.partition("<!-- numbers:")[2].partition("<!-- end of numbers -->")[0])
    found = cells(_figures().numbers())
    assert stated.keys() == found.keys()
    for key, row in stated.items():
        for said, is_now in zip(row, found[key]):
            # Roundings differ from processor to processor, and optax from version to version.
            least = 5e-6 if "optax" in key[1] else 0
            assert (said == "NaN") == (is_now == "NaN"), key
            if said != "NaN" and max(float(said), float(is_now)) > least:
                assert 1 / 3 <= float(said) / float(is_now) <= 3, key


# ---------------------------------------------------------------- the site as built


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("math_core")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Loaded(HTMLParser):
    """What a browser loads by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next", "sitemap"):
            return
        for name in {"link": ["href"], "a": []}.get(tag, ["src", "srcset", "poster", "data"]):
            if given.get(name):
                self.urls.append(given[name])


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere_or_is_heavy(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        size = page.stat().st_size
        for url in loaded.urls:
            assert not re.match(r"(\w+:)?//", url), f"{page.name}: {url}"
            if not url.startswith("data:"):
                folder = site if url.startswith("/") else page.parent
                size += (folder / url.lstrip("/").split("?")[0]).stat().st_size
        size += sum(font.stat().st_size for font in site.rglob("*.woff*"))
        assert size < 1.5e6, f"{page.name}: {size / 1e6:.2f} MB"
    for style in site.rglob("*.css"):
        for url in re.findall(r"url\(([^)]*)\)", style.read_text(encoding="utf-8")):
            assert not re.match(r"[\"']?(https?:)?//", url), f"{style.name}: {url}"


@pytest.mark.slow
def test_the_built_api_has_every_public_name(site):
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    described = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    for module in (module for _, modules in _hooks("API").values() for module in modules):
        names = set(importlib.import_module(module).__all__)
        for name in names - {"compat", "detection", "linen", "nnx", "reference", "training"}:
            if not (module == "focal_jax.compat" and f"{module}.{name}" in described | MODULES):
                assert f"{module}.{name}" in described


MODULES = {f"focal_jax.compat.{name}" for name in ("caffe", "mindspore", "pytorch_retinanet")}


@pytest.mark.slow
def test_mathematics_is_drawn_without_a_script(site):
    text = (site / "derivation.html").read_text(encoding="utf-8")
    assert text.count("<math") > 30
    assert not re.search(r"\\\(|\\\[|\\frac", text)
    assert (site / "assets" / "math.woff").stat().st_size > 50_000
