"""MkDocs hooks: mathematics, the API reference, the table of losses, pages from other folders.

TeX becomes MathML at build time, so that a browser needs no script. The font for it is part of the
site.
"""

import html
import importlib.util
import inspect
import io
import os
import re
import textwrap
from pathlib import Path

import griffe
import loss_table  # MkDocs puts this folder on the path while it loads this file
import math_core
from fontTools import subset
from mkdocs.structure.files import File

import focal_jax

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- mathematics

_TEX = math_core.LatexToMathML()
_MATHEMATICS = re.compile(r'(class="arithmatex">)(?:\\\((.*?)\\\)|\\\[(.*?)\\\])(?=</)', re.DOTALL)


def _mathml(found: re.Match) -> str:
    is_inline = found[2] is not None
    tex = html.unescape(found[2] if is_inline else found[3]).strip()
    return found[1] + _TEX.convert_with_local_state(tex, displaystyle=not is_inline)


# Headings and inline code. Blocks of code match first and are left alone.
_NAMES = re.compile(r"<pre>.*?</pre>|<(h[1-4])\b.*?</\1>|<code>[^<]*</code>", re.DOTALL)


def _breakable(found: re.Match) -> str:
    """Let a long name break after punctuation, so that it fits a narrow screen."""
    if found[0].startswith("<pre>"):
        return found[0]
    tags_and_texts = re.split(r"(<[^>]*>)", found[0])
    tags_and_texts[::2] = (
        re.sub(r"([_=(,./])(?=[\w\[])", r"\1<wbr>", x) for x in tags_and_texts[::2]
    )
    return "".join(tags_and_texts)


def on_page_markdown(markdown: str, **_) -> str:
    """Insert the table of losses where a page has the markers of `loss_table`."""
    return loss_table.with_table(markdown, loss_table.section)


def on_page_content(content: str, **_) -> str:
    """Convert TeX to MathML and let long names break. Invalid TeX stops the build."""
    return _NAMES.sub(_breakable, _MATHEMATICS.sub(_mathml, content))


def _font() -> bytes:
    """Return the glyphs of STIX Two Math that formulas need, as a web font."""
    package = importlib.util.find_spec("ziamath")
    (path,) = Path(package.submodule_search_locations[0]).rglob("STIXTwoMath-Regular.ttf")
    options = subset.Options(flavor="woff", layout_features=["kern", "ssty", "dtls", "flac"])
    font = subset.load_font(str(path), options)
    subsetter = subset.Subsetter(options)
    codepoints = [*range(0x20, 0x180), *range(0x391, 0x3FF), *range(0x1D400, 0x1D468)]
    codepoints += [*range(0x1D6A8, 0x1D71C), *range(0x2010, 0x2040), *range(0x2100, 0x2150)]
    codepoints += [*range(0x2190, 0x2300), *range(0x27E8, 0x27EC)]
    subsetter.populate(unicodes=codepoints)
    subsetter.subset(font)
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- the API reference

# Each page: its title, and the modules whose public names it documents.
API = {
    "losses": ("Losses and reduction", ["focal_jax"]),
    "modules": ("Flax modules", ["focal_jax.nnx", "focal_jax.linen"]),
    "engine": ("Engine and catalogue", ["focal_jax.engine", "focal_jax.catalogue"]),
    "training": ("Training", ["focal_jax.training"]),
    "detection": ("Detection", ["focal_jax.detection"]),
    "compat": (
        "Compatibility",
        ["focal_jax.compat", "focal_jax.compat.caffe", "focal_jax.compat.mindspore",
         "focal_jax.compat.pytorch_retinanet"],
    ),
    "reference": (
        "Reference formulas and measurements",
        ["focal_jax.reference", "focal_jax.measure"],
    ),
}  # fmt: skip


def api_page(title: str, modules: list[str]) -> str:
    """Return the Markdown of an API page, with one mkdocstrings directive per public name."""
    parts = [f"# {title}"]
    for name in modules:
        module = importlib.import_module(name)
        heading = f"## `{name}`" if len(modules) > 1 else f"`{name}`"
        parts += [heading, inspect.getdoc(module) or ""]
        for public in module.__all__:
            value = getattr(module, public)
            if inspect.ismodule(value):
                continue
            # Constants and type aliases are shown although they have no docstring.
            has_docstring = inspect.isclass(value) or inspect.isroutine(value)
            options = f"      show_if_no_docstring: {str(not has_docstring).lower()}"
            level = 3 if len(modules) > 1 else 2
            parts.append(
                f"::: {name}.{public}\n    options:\n{options}\n      heading_level: {level}"
            )
    return "\n\n".join(parts) + "\n"


# A section that Google's style does not have: its heading, the text beside it, indented lines.
_SECTION = re.compile(r"^(Differentiation|References):[ ]*(.*\n?)((?:[ ]+.*\n?|\n(?=[ ]))*)", re.M)


def _paragraph(found: re.Match) -> str:
    heading, beside, below = found.groups()
    return f"**{heading}:** {beside}{textwrap.dedent(below)}"


class Docstrings(griffe.Extension):
    """Correct the docstrings and signatures that griffe reads from the source."""

    def on_function_instance(self, *, func: griffe.Function, **_) -> None:
        """Give a decorated function of `focal_jax.reference` its signature and docstring."""
        if func.path.startswith("focal_jax.reference.") and func.name in focal_jax.catalogue.LOSSES:
            function = getattr(focal_jax.reference, func.name)
            func.docstring = griffe.Docstring(function.__doc__, parent=func)
            func.parameters = griffe.Parameters(
                *(
                    griffe.Parameter(
                        x.name,
                        kind=griffe.ParameterKind(x.kind.description),
                        default=None if x.default is x.empty else repr(x.default),
                    )
                    for x in inspect.signature(function).parameters.values()
                )
            )

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite docstring sections that griffe's parser of Google style does not know."""
        if obj.docstring is not None:
            text = re.sub("^Example:", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _SECTION.sub(_paragraph, text)


# ---------------------------------------------------------------- pages from other folders

# Files outside this folder, and the pages of the site that are made from them.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/retinanet_digits/README.md": "detector.md",
}
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


class _ExtraFiles:
    """Files that are added to the site: generated pages, and files that pages link to."""

    def __init__(self, config):
        self.config = config
        self.files: dict[str, File] = {}

    def add(self, uri: str, **source) -> None:
        """Add a file once."""
        self.files.setdefault(uri, File.generated(self.config, uri, **source))

    def add_page(self, path: str, uri: str) -> None:
        """Add a file of the repository as a page of the site."""
        text = (ROOT / path).read_text(encoding="utf-8")
        self.add(uri, content=self.with_links_to_copies(text, path, uri))

    def with_links_to_copies(self, text: str, path: str, uri: str) -> str:
        """Return the text of a page whose links lead to the site's copies of files.

        Args:
          text: the Markdown of the page.
          path: the page's file, from the root of the repository.
          uri: the page on the site.
        """

        def relink(found: re.Match) -> str:
            target = os.path.normpath(os.path.join(os.path.dirname(path), found[2]))
            if target.startswith("docs/"):
                copy = target.removeprefix("docs/")
            elif target in ELSEWHERE:
                copy = ELSEWHERE[target]
            elif not (ROOT / target).is_file():
                return found[0]  # the strict build reports it
            elif target.endswith((".py", ".sh", ".yml", ".toml")):
                copy = f"source/{target}.md"
                code = (ROOT / target).read_text(encoding="utf-8")
                self.add(copy, content=f"# `{target}`\n\n````python\n{code}\n````\n")
            else:
                copy = f"source/{target}"
                self.add(copy, abs_src_path=str(ROOT / target))
            link = os.path.relpath(copy, os.path.dirname(uri) or ".")
            return f"{found[1]}{link}{found[3] or ''})"

        return _LINK.sub(relink, text)


def on_files(files, config):
    """Add the generated pages, the font, and the files that pages link to."""
    extra = _ExtraFiles(config)
    extra.add("assets/math.woff", content=_font())
    for page, (title, modules) in API.items():
        extra.add(f"api/{page}.md", content=api_page(title, modules))
    for path, uri in ELSEWHERE.items():
        extra.add_page(path, uri)
    for file in files.documentation_pages():
        path = f"docs/{file.src_uri}"
        file.content_string = extra.with_links_to_copies(file.content_string, path, file.src_uri)
    for file in extra.files.values():
        files.append(file)
    return files
