"""Tests of the documentation: code, links, navigation, figures, numbers and the built site."""

import ast
import html
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pages import run

import focal_jax
from focal_jax.catalogue import LOSSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "method.md",
    ROOT / "benchmarks" / "results.md",
    ROOT / "examples" / "retinanet_digits" / "README.md",
    ROOT / "examples" / "retinanet_digits" / "results.md",
    *PAGES,
]
# The code of these pages has tests of its own: test_porting.py, test_detection_transformers.py,
# test_recipes.py, test_scaling_docs.py (eight devices) and test_vocabulary_docs.py (three pages).
TESTED_ELSEWHERE = {
    "detection-transformers.md",
    "language-models.md",
    "many-labels.md",
    "porting.md",
    "recipes.md",
    "scaling.md",
    "vocabularies.md",
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _hooks_constant(name: str):
    """Return a constant of docs/hooks.py without importing it: its imports may be missing."""
    text = (DOCS / "hooks.py").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{name} = (\{{.*?^\}})", text, re.M | re.S)[1])


API_PAGES = _hooks_constant("API")
API_MODULES = [module for _, modules in API_PAGES.values() for module in modules]


# ---------------------------------------------------------------- code and links


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TESTED_ELSEWHERE], ids=_name)
def test_code_blocks_run_and_sessions_print_the_stated_output(page):
    run(page)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs make from the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r" +", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_links_have_targets(page):
    for link, anchor in re.findall(
        r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")
    ):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), f"{link}#{anchor}"


# ---------------------------------------------------------------- navigation and API


def test_navigation_lists_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"(?:- |: )(\S+\.md)$", navigation, re.MULTILINE))
    generated = {f"api/{page}.md" for page in API_PAGES}
    generated |= set(_hooks_constant("ELSEWHERE").values())
    assert listed == {page.name for page in PAGES} | generated


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("masks.md", "void"),
        ("nan.md", "## Invalid labels"),
        ("porting.md", "## torchvision"),
        ("recipes.md", "## torchvision's RetinaNet"),
        ("choosing.md", "detector"),
        ("equinox-haiku.md", "## Haiku"),
        ("llm-trainers.md", "## tunix"),
        ("scenic-big-vision.md", "## big_vision"),
        ("detection-transformers.md", "## Denoising queries"),
        ("porting.md", "## Keras"),
        ("vocabularies.md", "## Token statistics"),
        ("language-models.md", "## DPO"),
        ("masks.md", "-100"),
        ("write-your-own-loss.md", "## A loss of one logit"),
        ("which-head.md", "tokamax"),
        ("verification.md", "## Not checked"),
        ("glossary.md", "| margin |"),
        ("stability.md", "SPEC 0"),
    ],
)
def test_home_page_links_to_frequent_questions(page, text):
    assert f"({page})" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert text in (DOCS / page.partition("#")[0]).read_text(encoding="utf-8")


def test_api_documents_every_public_module():
    modules = {name for name in focal_jax.__all__ if type(getattr(focal_jax, name)) is type(pytest)}
    public = {"focal_jax", *(f"focal_jax.{name}" for name in modules)}
    public |= {f"focal_jax.compat.{name}" for name in focal_jax.compat.__all__}
    assert set(API_MODULES) == public


def test_every_public_name_has_a_task():
    listed = [name for names in _hooks_constant("TASKS").values() for name in names]
    public = {n for n in focal_jax.__all__ if not inspect.ismodule(getattr(focal_jax, n))}
    assert len(listed) == len(set(listed) & public)
    kinds = {LOSSES[name].kind for name in public - set(listed)}  # under detectors
    assert kinds == {"elementwise", "interval"}


# ---------------------------------------------------------------- gallery, figures, numbers


def _docs_script(name: str):
    """Import a script of the folder docs."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _figures_module():
    pytest.importorskip("matplotlib")
    return _docs_script("figures")


def test_gallery_shows_every_loss():
    text = (DOCS / "family.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sorted(headings) == sorted(LOSSES)
    loss_table = _docs_script("loss_table")
    with_table = loss_table.with_table(text, loss_table.section)
    for name in headings:
        assert f"| [`{name}`](#{name}) |" in with_table
        assert f"![{name}](figures/{name}.svg)" in text


def test_every_figure_has_a_script_and_a_page():
    scripted = {f"{name}.svg" for name in _figures_module().FIGURE_OF}
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} == scripted
    shown = {
        Path(link).name
        for page in TEXTS
        for link in re.findall(r"\(([^)]*figures/[^)]*\.svg)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == scripted


def _curves(path: Path) -> list[np.ndarray]:
    """Return the points of the curves of an SVG figure: the long paths with a clip path."""
    paths = re.findall(r'<path d="([^"]*)" clip-path', path.read_text())
    curves = [np.array(re.findall(r"[ML] (\S+) (\S+)", d), float) for d in paths]
    return [points for points in curves if len(points) > 10]


@pytest.mark.parametrize("name", ["loss", "varifocal_loss", "focal_tversky_loss"])
def test_figure_shows_the_current_losses(name, tmp_path):
    _figures_module().main(["--only", name, "--out", str(tmp_path)])
    new, stored = (_curves(folder / f"{name}.svg") for folder in (tmp_path, DOCS / "figures"))
    assert len(new) == len(stored) >= 2
    for a, b in zip(new, stored):
        x = np.linspace(max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0]), 50)
        # A panel is 130 points high. Other fonts move it by one or two points.
        np.testing.assert_allclose(np.interp(x, *a.T), np.interp(x, *b.T), atol=4)


@pytest.mark.quick
def test_gallery_states_the_inputs_of_the_figures():
    curves = importlib.import_module("focal_jax.measure.curves").curves
    text = (DOCS / "family.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w, ]*) \| `(.*)` \| (`.*`) \|$", text, re.MULTILINE)
    stated = {kind: row[1:] for row in rows for kind in row[0].split(", ")}
    x = np.array([-1.5, 2.0])
    for loss in {loss.kind: loss for loss in [*LOSSES.values()][::-1]}.values():
        logits, labels = stated.pop(loss.kind)
        labels = [eval(label) for label in re.findall("`(.*?)`", labels)]
        kernel = [jnp.eye(3)] if loss.kind == "linear" else []
        dtype = jnp.int32 if "integer" in loss.labels else jnp.float32
        for curve, label in zip(curves(loss, x), labels, strict=True):
            for at, drawn in zip(x, curve.losses):
                z = jnp.asarray(eval(logits, {"x": at}), jnp.float32)
                losses = loss.function(z, *kernel, jnp.asarray(label, dtype))
                np.testing.assert_allclose(drawn, jnp.sum(losses), rtol=1e-5)
    assert not stated


def test_clips_are_at_the_edges_of_the_table_of_errors():
    figures = _figures_module()
    edges = sorted({edge for each in figures.RANGES.values() for edge in each})
    for epsilon in (1e-7, 1e-4):
        margin = np.log(epsilon / (1 - epsilon))
        below = max(edge for edge in edges if edge < margin)
        above = min(edge for edge in edges if edge > margin)
        assert above - below < 0.2
    errors = figures.largest_errors(2.0)
    columns = list(figures.RANGES)
    for name, first in (("Keras's clipping, 1e-7", 1), ("pytorch-retinanet's clipping, 1e-4", 2)):
        assert errors[name][first - 1] == pytest.approx(1), columns[first - 1]
        assert errors[name][first] < 1e-4, columns[first]


def test_numerics_page_states_the_measured_errors():
    def cells(text):
        rows = re.findall(r"^\| [\d.]+ \|.*$", text, re.MULTILINE)
        return {tuple(row.split(" | ")[:2]): row.strip("| ").split(" | ")[2:] for row in rows}

    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    stated = cells(page.partition("<!-- numbers:")[2].partition("<!-- end of numbers -->")[0])
    measured = cells(_figures_module().numbers())
    assert stated.keys() == measured.keys()
    for key, row in stated.items():
        for cell, current in zip(row, measured[key]):
            # Rounding errors differ between processors, and between versions of optax.
            smallest = 5e-6 if "optax" in key[1] else 0
            assert (cell == "NaN") == (current == "NaN"), key
            if cell != "NaN" and max(float(cell), float(current)) > smallest:
                assert 1 / 3 <= float(cell) / float(current) <= 3, key


# ---------------------------------------------------------------- the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if "BUILT_SITE" in os.environ:  # `make docs` builds the site before it tests the site
        return ROOT / os.environ["BUILT_SITE"]
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


class _Resources(HTMLParser):
    """Collect the URLs that a browser loads when it opens a page."""

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
def test_pages_load_only_local_files_and_are_small(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        resources = _Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        size = page.stat().st_size
        for url in resources.urls:
            assert not re.match(r"(\w+:)?//", url), f"{page.name}: {url}"
            if not url.startswith("data:"):
                # The page 404 has absolute URLs, because it replaces pages of every folder.
                folder = site if url.startswith("/focal_jax/") else page.parent
                file = url.removeprefix("/focal_jax/").split("?")[0]
                size += (folder / file).stat().st_size
        size += sum(font.stat().st_size for font in site.rglob("*.woff*"))
        assert size < 1.5e6, f"{page.name}: {size / 1e6:.2f} MB"
    for style in site.rglob("*.css"):
        for url in re.findall(r"url\(([^)]*)\)", style.read_text(encoding="utf-8")):
            assert not re.match(r"[\"']?(https?:)?//", url), f"{style.name}: {url}"


@pytest.mark.slow
def test_built_api_documents_every_public_name(site):
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    documented = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    for name in API_MODULES:
        module = importlib.import_module(name)
        public = {f"{name}.{each}" for each in module.__all__} - set(API_MODULES)
        assert public - {"focal_jax.compat"} <= documented


@pytest.mark.slow
def test_every_public_function_has_a_page(site):
    for page, (_, modules) in API_PAGES.items():
        listed = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        for name in modules:
            module, prefix = importlib.import_module(name), f"{name}.".removeprefix("focal_jax.")
            for public in module.__all__:
                value = getattr(module, public)
                if inspect.ismodule(value):
                    continue
                assert f'href="{prefix}{public}.html"' in listed, public
                text = (site / "api" / f"{prefix}{public}.html").read_text(encoding="utf-8")
                assert f'id="{name}.{public}"' in text
                assert "See also" in text
                assert "`" not in re.sub(r"<(pre|script).*?</\1>", "", text, flags=re.S), public
                if not inspect.isfunction(value) or name == "focal_jax.reference":
                    continue
                plain = html.unescape(re.sub(r"<[^>]*>", "", text))
                for parameter in inspect.signature(value).parameters.values():
                    assert re.search(rf"{parameter.name}: \S", plain), parameter


@pytest.mark.slow
def test_pages_describe_themselves_and_make_no_requests(site):
    descriptions = {}
    for page in sorted(site.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        # The theme's link to the repository would ask the code host for stars.
        assert 'data-md-component="source"' not in text
        if page.name == "404.html":
            assert 'href="/focal_jax/nan.html"' in text
            continue
        name = page.relative_to(site).as_posix()
        assert f'rel="canonical" href="https://focal-jax.github.io/focal_jax/{name}"' in text
        (descriptions[name],) = re.findall(r'name="description" content="([^"]*)"', text)
        assert descriptions[name], name
        assert focal_jax.__version__ in text
    first = [text for name, text in descriptions.items() if "/" not in name]
    assert len(set(first)) == len(first)
    home = (site / "index.html").read_text(encoding="utf-8")
    assert home.count('<a class="md-button"') == 3
    assert 'href="api/reduce_loss.html"><code>' in home


SEARCHES = {
    "quickstart": "tutorial.html",
    "cite": "faq.html",
    "DPO": "language-models.html",
    "log-probability": "faq.html",
    "Haiku": "equinox-haiku.html",
    "Equinox": "equinox-haiku.html",
    "Keras": "keras.html",
    "maxtext": "llm-trainers.html",
    "D-FINE": "detection-transformers.html",
    "scenic": "scenic-big-vision.html",
    "NCHW": "faq.html",
    "-100": "faq.html",
    "tensor parallel": "vocabularies.html",
    "gradient accumulation": "reductions.html",
    "mixed precision": "faq.html",
    "void": "masks.html",
    "NaN": "nan.html",
}


@pytest.mark.slow
@pytest.mark.parametrize(("term", "page"), SEARCHES.items())
def test_search_finds_a_heading(site, term, page):
    # The search of the theme ranks titles first.
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = [x["location"] for x in index["docs"] if term.lower() in x["title"].lower()]
    assert any(location.startswith(page) for location in found), found
    assert not any(x["location"].startswith(("source/", "benchmarks")) for x in index["docs"])


@pytest.mark.slow
def test_formulas_are_mathml(site):
    text = (site / "derivation.html").read_text(encoding="utf-8")
    assert text.count("<math") > 30
    assert not re.search(r"\\\(|\\\[|\\frac", text)
    assert (site / "assets" / "math.woff").stat().st_size > 50_000
