"""What the site has besides the pages of this folder: mathematics, the API, pages from elsewhere.

Everything is made here, when the site is built: TeX becomes MathML, which browsers draw
without a script, in a font that is shipped with it.
"""

import ast
import html
import importlib.util
import io
import os
import re
import textwrap
from pathlib import Path

import griffe
import math_core
from fontTools import subset
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- mathematics

_TEX = math_core.LatexToMathML()
_MATHEMATICS = re.compile(r'(class="arithmatex">)(?:\\\((.*?)\\\)|\\\[(.*?)\\\])(?=</)', re.DOTALL)


def _mathml(found: re.Match) -> str:
    inline = found[2] is not None
    tex = html.unescape(found[2] if inline else found[3]).strip()
    return found[1] + _TEX.convert_with_local_state(tex, displaystyle=not inline)


# Headings and short code, where a long name may break after an underscore and not within a word.
_NAMES = re.compile(r"<pre>.*?</pre>|<(h[1-4])\b.*?</\1>|<code>[^<]*</code>", re.DOTALL)


def _breakable(found: re.Match) -> str:
    if found[0].startswith("<pre>"):
        return found[0]
    tags_and_texts = re.split(r"(<[^>]*>)", found[0])
    tags_and_texts[::2] = (
        re.sub(r"([_=(,./])(?=[\w\[])", r"\1<wbr>", x) for x in tags_and_texts[::2]
    )
    return "".join(tags_and_texts)


def on_page_content(content: str, **_) -> str:
    """Turn TeX into MathML, and let long names break; TeX that cannot be read stops the build."""
    return _NAMES.sub(_breakable, _MATHEMATICS.sub(_mathml, content))


def _font() -> bytes:
    """Return the part of STIX Two Math that formulas need, as a web font."""
    package = importlib.util.find_spec("ziamath")
    (path,) = Path(package.submodule_search_locations[0]).rglob("STIXTwoMath-Regular.ttf")
    options = subset.Options(flavor="woff", layout_features=["kern", "ssty", "dtls", "flac"])
    font = subset.load_font(str(path), options)
    cutter = subset.Subsetter(options)
    letters = [*range(0x20, 0x180), *range(0x391, 0x3FF), *range(0x1D400, 0x1D468)]
    letters += [*range(0x1D6A8, 0x1D71C), *range(0x2010, 0x2040), *range(0x2100, 0x2150)]
    cutter.populate(unicodes=[*letters, *range(0x2190, 0x2300), *range(0x27E8, 0x27EC)])
    cutter.subset(font)
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- the API

# A page each: its title, and the modules whose public names it describes.
API = {
    "losses": ("Losses and reduction", ["focal_jax"]),
    "modules": ("Flax modules", ["focal_jax.nnx", "focal_jax.linen"]),
    "training": ("Training", ["focal_jax.training"]),
    "detection": ("Detection", ["focal_jax.detection"]),
    "compat": (
        "Drop-ins for other systems",
        ["focal_jax.compat", "focal_jax.compat.caffe", "focal_jax.compat.mindspore",
         "focal_jax.compat.pytorch_retinanet"],
    ),
    "reference": ("The plain formulas", ["focal_jax.reference"]),
}  # fmt: skip


def _module(name: str) -> ast.Module:
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def public_names(module: str) -> list[str]:
    """Return the full names of what a module calls public, its modules left out."""
    for node in _module(module).body:
        if isinstance(node, ast.Assign) and [ast.unparse(x) for x in node.targets] == ["__all__"]:
            names = [f"{module}.{name}" for name in ast.literal_eval(node.value)]
            return [name for name in names if not _is_module(name)]
    raise ValueError(f"{module}: no __all__")


def api_page(title: str, modules: list[str]) -> str:
    """Return a page of the API, in mkdocstrings' words."""
    parts = [f"# {title}"]
    for module in modules:
        about = ast.get_docstring(_module(module)) or ""
        parts += [f"## `{module}`" if len(modules) > 1 else f"`{module}`", about]
        for name in public_names(module):
            # A constant has no docstring; of everything else, what has none is not shown.
            options = f"      show_if_no_docstring: {name.rpartition('.')[2].isupper()}".lower()
            level = 3 if len(modules) > 1 else 2
            parts.append(f"::: {name}\n    options:\n{options}\n      heading_level: {level}")
    return "\n\n".join(parts) + "\n"


# A heading of the house's docstrings, the text beside it, and the lines that are indented below.
_SECTION = re.compile(r"^(Differentiation|References):[ ]*(.*\n?)((?:[ ]+.*\n?|\n(?=[ ]))*)", re.M)


def _paragraph(found: re.Match) -> str:
    heading, beside, below = found.groups()
    return f"**{heading}:** {beside}{textwrap.dedent(below)}"


class Docstrings(griffe.Extension):
    """Let the parser of Google's style read the sections that it does not know."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = re.sub("^Example:", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _SECTION.sub(_paragraph, text)


# ---------------------------------------------------------------- pages from elsewhere

# Files of the project that are pages of the site too.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/retinanet_digits/README.md": "detector.md",
}
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _from_root(path: str, link: str) -> str:
    """Return where a link leads that a file of the project holds, from the project's root."""
    return os.path.normpath(os.path.join(os.path.dirname(path), link))


class _Gathered:
    """The pages and pictures from elsewhere, as the pages link to them."""

    def __init__(self, config):
        self.config = config
        self.files: dict[str, File] = {}

    def add(self, place: str, **source) -> None:
        self.files.setdefault(place, File.generated(self.config, place, **source))

    def page(self, path: str, place: str) -> None:
        text = (ROOT / path).read_text(encoding="utf-8")
        self.add(place, content=self.relinked(text, path, place))

    def relinked(self, text: str, path: str, place: str) -> str:
        """Return a page's text with links that lead to the site's own copies of files."""

        def relink(found: re.Match) -> str:
            target = _from_root(path, found[2])
            if target.startswith("docs/"):
                there = target.removeprefix("docs/")
            elif target in ELSEWHERE:
                there = ELSEWHERE[target]
            elif (ROOT / target).is_dir() or not (ROOT / target).exists():
                return found[0]  # for the build to complain about
            elif target.endswith((".py", ".sh", ".yml", ".toml")):
                there = f"source/{target}.md"
                code = (ROOT / target).read_text(encoding="utf-8")
                self.add(there, content=f"# `{target}`\n\n````python\n{code}\n````\n")
            else:
                there = f"source/{target}"
                self.add(there, abs_src_path=str(ROOT / target))
            link = os.path.relpath(there, os.path.dirname(place) or ".")
            return f"{found[1]}{link}{found[3] or ''})"

        return _LINK.sub(relink, text)


def on_files(files, config):
    """Add what is not in this folder."""
    gathered = _Gathered(config)
    gathered.add("assets/math.woff", content=_font())
    for page, (title, modules) in API.items():
        gathered.add(f"api/{page}.md", content=api_page(title, modules))
    for path, place in ELSEWHERE.items():
        gathered.page(path, place)
    for file in files.documentation_pages():
        path = f"docs/{file.src_uri}"
        file.content_string = gathered.relinked(file.content_string, path, file.src_uri)
    for file in gathered.files.values():
        files.append(file)
    return files
