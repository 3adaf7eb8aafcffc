"""MkDocs hooks: mathematics, the API reference, the table of losses, pages from other folders.

TeX becomes MathML at build time, so that a browser needs no script. The font for it is part of the
site.
"""

import html
import importlib.util
import inspect
import io
import json
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

# The API reference imports `focal_jax.compat.keras`.
os.environ["KERAS_BACKEND"] = "jax"

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
    """Let a long name break after punctuation, so that it fits a narrow screen.

    Short code, numbers such as 0.5 and command-line options stay on one line.
    """
    if found[0].startswith("<pre>"):
        return found[0]
    tags_and_texts = re.split(r"(<[^>]*>)", found[0])
    if found[0].startswith("<code>") and " " in found[0] and len(found[0]) < 28:
        tags_and_texts[1] = '<code class="nowrap">'
        return "".join(tags_and_texts)
    for i, text in enumerate(tags_and_texts[::2]):
        text = re.sub(r"([_(,/]|=(?!\d)|(?<!\d)\.|\.(?!\d))(?=[\w\[])", r"\1<wbr>", text)
        text = re.sub(r"(?<![\w-])--?[A-Za-z][\w-]*", r'<span class="nowrap">\g<0></span>', text)
        tags_and_texts[2 * i] = text
    return "".join(tags_and_texts)


# A cell of a table with a number, a deviation or an interval: -8.1 (-13.2 to -3.0), 0 of 5.
_CELL = re.compile(
    r"(<td[^>]*)>((?:<strong>)?[+±≥≤-]*\s?[\d.,]+[-+\d.,e ±\u00d7x()%]*"
    r"(?:(?:to|of) [-+\d.,e ±()%]+)?)(?=</)"
)
# Parts of a text that do not break: 1e-7, 400,000 x 20
_NUMBER = re.compile(r"(?<![\w.-])-?\d[\d.]*e-\d+|\d[\d,]*(?: [x\u00d7] \d[\d,]*)+")


def _unbroken(content: str) -> str:
    """Keep numbers on one line, and all of a cell that holds numbers only."""
    content = _CELL.sub(r'\1 class="nowrap">\2', content)
    tags_and_texts = re.split(
        r"(<pre\b.*?</pre>|<math\b.*?</math>|<[^>]*>)", content, flags=re.DOTALL
    )
    for i, text in enumerate(tags_and_texts[::2]):
        tags_and_texts[2 * i] = _NUMBER.sub(r'<span class="nowrap">\g<0></span>', text)
    return "".join(tags_and_texts)


def on_config(config):
    """Show the version of the package in the header."""
    config.extra["release"] = focal_jax.__version__
    return config


def _description(markdown: str) -> str:
    """Return the first paragraph of a page as plain text of at most 160 characters."""
    paragraphs = re.split(r"\n\s*\n", markdown)
    text = next((x for x in paragraphs if re.match(r"[A-Za-z`]", x)), "")
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[`*$]|\s+", lambda found: " " if found[0].isspace() else "", text)
    return textwrap.shorten(text, 160, placeholder=" ...")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Describe the page for search engines; insert the table of losses at its markers."""
    page.meta.setdefault("description", _description(markdown))
    return loss_table.with_table(markdown, loss_table.section)


# Code, headings, links and inline code. Only inline code outside of the others is a link.
_LINKABLE = re.compile(
    r"<(pre|a|h[1-6]|figure)\b.*?</\1>|<code>([A-Za-z_][\w.]*)</code>", re.DOTALL
)
# The text and the figure of a loss in the gallery.
_GALLERY = re.compile(r"</h2>((?:(?!</?h2).)*<img (?:(?!</?h2).)*</p>)", re.DOTALL)
# A paragraph of links on the home page.
_BUTTONS = re.compile(r"<p>((?:<a href=\"[^\"]*\">[^<]*</a>(?: · )?){2,})</p>")


def on_page_content(content: str, page, **_) -> str:
    """Convert TeX to MathML, link the names of functions, and let long names break."""

    def link(found: re.Match) -> str:
        uri = PAGE_OF.get(found[2] or "")
        if uri is None or uri == page.file.src_uri:
            return found[0]
        folder = os.path.dirname(page.file.src_uri) or "."
        return f'<a href="{os.path.relpath(uri, folder)[:-3]}.html">{found[0]}</a>'

    def buttons(found: re.Match) -> str:
        links = found[1].replace(" · ", " ").replace("<a ", '<a class="md-button" ')
        return f"<p>{links}</p>"

    content = _MATHEMATICS.sub(_mathml, content)
    if page.file.src_uri == "index.md":
        content = _BUTTONS.sub(buttons, content)
    if page.file.src_uri == "family.md":
        # On a wide screen, the figure of a loss is beside its formula.
        content = _GALLERY.sub(r'</h2><div class="gallery">\1</div>', content)
        content = content.replace("<img ", '<img loading="lazy" ')
    return _unbroken(_NAMES.sub(_breakable, _LINKABLE.sub(link, content)))


def _font() -> bytes:
    """Return the glyphs of STIX Two Math that formulas need, as a web font."""
    package = importlib.util.find_spec("ziamath")
    (path,) = Path(package.submodule_search_locations[0]).rglob("STIXTwoMath-Regular.ttf")
    options = subset.Options(
        flavor="woff", hinting=False, layout_features=["kern", "ssty", "dtls", "flac"]
    )
    font = subset.load_font(str(path), options)
    subsetter = subset.Subsetter(options)
    codepoints = [*range(0x20, 0x180), *range(0x391, 0x3FF), *range(0x1D434, 0x1D468)]
    codepoints += [*range(0x1D6E2, 0x1D71C), *range(0x2010, 0x2040), *range(0x2100, 0x2150)]
    codepoints += [*range(0x2190, 0x2196), *range(0x2200, 0x2270), 0x22C5, *range(0x2308, 0x230C)]
    codepoints += range(0x27E8, 0x27EC)
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
        ["focal_jax.compat", "focal_jax.compat.caffe", "focal_jax.compat.keras",
         "focal_jax.compat.mindspore", "focal_jax.compat.pytorch_retinanet"],
    ),
    "reference": (
        "Reference formulas and measurements",
        ["focal_jax.reference", "focal_jax.measure"],
    ),
}  # fmt: skip
# The table of the page on losses: every task, and the functions for it. The first task gets the
# names that no other task lists.
TASKS = {
    "Detectors and heat maps": [],
    "Classifiers and segmenters": [
        "softmax_focal_loss_with_integer_labels", "softmax_focal_loss", "focal_tversky_loss",
        "dual_focal_loss_with_integer_labels", "softmax_poly_focal_loss_with_integer_labels",
    ],
    "Many labels": ["linear_sigmoid_focal_loss", "asymmetric_loss", "linear_asymmetric_loss"],
    "Language models and large vocabularies": [
        "linear_softmax_focal_loss_with_integer_labels", "linear_token_statistics",
        "linear_softmax_focal_loss_with_sparse_labels", "token_statistics", "TokenStatistics",
        "softmax_focal_loss_with_sparse_labels",
        "softmax_probability_weighted_loss_with_integer_labels",
    ],
    "Reduction, errors and checks": ["reduce_loss", "InputError", "compare_gradients"],
}  # fmt: skip


def _public(module: str) -> list[str]:
    """Return the public names of a module that are not modules."""
    found = importlib.import_module(module)
    return [name for name in found.__all__ if not inspect.ismodule(getattr(found, name))]


def _page_of(module: str, name: str) -> str:
    """Return the page that documents a name, in the folder `api`."""
    return f"{module}.{name}".removeprefix("focal_jax.") + ".md"


_named = {name for names in TASKS.values() for name in names}
TASKS["Detectors and heat maps"] += [x for x in _public("focal_jax") if x not in _named]

# The page of every name. A name without its module is one of `focal_jax`, `training`, `detection`.
PAGE_OF: dict[str, str] = {}
for _page, (_, _modules) in API.items():
    for _module in _modules:
        PAGE_OF[_module] = f"api/{_page}.md"
        for _name in _public(_module):
            PAGE_OF[f"{_module}.{_name}"] = f"api/{_page_of(_module, _name)}"
            if _page in ("losses", "training", "detection"):
                PAGE_OF[_name] = f"api/{_page_of(_module, _name)}"
# Where pages link to the source of a module, the site links to the page on the module.
SOURCE_PAGE = {
    os.path.relpath(importlib.import_module(module).__file__, ROOT): f"api/{page}.md"
    for page, (_, modules) in reversed(API.items())
    for module in modules
}


def _directive(module: str, name: str) -> str:
    """Return the mkdocstrings directive of a public name."""
    value = getattr(importlib.import_module(module), name)
    # Constants and type aliases are shown although they have no docstring, and so are the fields
    # of a named tuple. The source of a reference is its formula.
    is_tuple = hasattr(value, "_fields")
    has_docstring = inspect.isclass(value) or inspect.isroutine(value)
    options = {
        "show_if_no_docstring": is_tuple or not has_docstring,
        "show_source": module == "focal_jax.reference",
        "heading_level": 1,
    }
    if module in ("focal_jax.nnx", "focal_jax.linen"):
        options["inherited_members"] = options["show_if_no_docstring"] = True
        options["members"] = ["__init__", "__call__"]
        options["filters"] = []
    lines = [f"      {key}: {json.dumps(x)}" for key, x in options.items()]
    return "\n".join([f"::: {module}.{name}", "    options:", *lines])


def _summary(module: str, name: str) -> str:
    """Return the first line of a docstring."""
    value = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return f"`{value!r}`" if isinstance(value, int) else ""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _table(module: str, names: list[str]) -> str:
    """Return a table with a link and a summary for every name."""
    rows = ["| name | summary |", "| --- | --- |"]
    rows += [f"| [`{x}`]({_page_of(module, x)}) | {_summary(module, x)} |" for x in names]
    return "\n".join(rows)


def api_page(page: str) -> str:
    """Return the Markdown of an API page: the tables of its names, and the module docstrings."""
    title, modules = API[page]
    parts = [f"# {title}"]
    for module in modules:
        names = _public(module)
        if len(modules) > 1:
            parts.append(f"## `{module}`")
        if page == "losses":
            parts += [f"## {task}\n\n{_table(module, each)}" for task, each in TASKS.items()]
            parts.append("## Conventions")
        elif names:
            parts.append(_table(module, names))
        parts.append(inspect.getdoc(importlib.import_module(module)) or "")
    return "\n\n".join(parts) + "\n"


def name_page(page: str, module: str, name: str) -> str:
    """Return the Markdown of the page of one name: formula, figure, documentation, see also."""
    title, _ = API[page]
    summary = _summary(module, name).replace("`", "") or f"{module}.{name}"
    short = _page_of(module, name).removesuffix(".md")
    # The search ranks a loss before its reference, which has the same name, and before losses whose
    # names begin with its name.
    is_prefix = any(x != name and x.startswith(name) for x in _public(module))
    boost = 0.1 if module == "focal_jax.reference" else 2 if is_prefix else 1
    lines = [
        f"title: {short}",
        f"description: {json.dumps(summary)}",
        f"search: {{boost: {boost}}}",
    ]
    meta = "\n".join(["---", *lines, "---"])
    parts = [meta, _directive(module, name)]
    loss = focal_jax.catalogue.LOSSES.get(name) if module == "focal_jax" else None
    if loss is not None:
        gallery = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", gallery, re.M | re.S)[1].strip()
        parts.append("## Formula\n\n" + re.sub(r"\]\((?!\w+:|#)", "](../", section))
    tasks = TASKS.values() if module == "focal_jax" else ()
    others = next((x for x in tasks if name in x), _public(module))
    links = [f"[`{x}`]({_page_of(module, x)})" for x in others if x != name]
    parts.append("## See also\n\n" + ", ".join(links))
    parts.append(f"[{title}]({page}.md) · [Conventions](../conventions.md)")
    return "\n\n".join(parts) + "\n"


# A section that Google's style does not have: its heading, the text beside it, indented lines.
_SECTION = re.compile(r"^(Differentiation|References):[ ]*(.*\n?)((?:[ ]+.*\n?|\n(?=[ ]))*)", re.M)

_RESULT = re.compile(r"^(Returns:\n[^\n:]*`[^\n:]*): ", re.M)


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
            # The text of a result is not its type, which the signature has.
            text = _RESULT.sub(r"\1&#58; ", text)
            obj.docstring.value = _SECTION.sub(_paragraph, text)


# ---------------------------------------------------------------- pages from other folders

# Files outside this folder, and the pages of the site that are made from them.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/method.md": "benchmark-method.md",
    "benchmarks/results.md": "benchmark-results.md",
    "SECURITY.md": "security.md",
    "examples/retinanet_digits/README.md": "detector.md",
    "examples/retinanet_digits/results.md": "detector-results.md",
}
# The search does not read source listings, tables of measurements and the changelog.
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
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
        text = self.with_links_to_copies(text, path, uri)
        self.add(uri, content=(_UNSEARCHED if uri != "contributing.md" else "") + text)

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
            elif target in SOURCE_PAGE:
                copy = SOURCE_PAGE[target]
            elif target in ELSEWHERE:
                copy = ELSEWHERE[target]
            elif not (ROOT / target).is_file():
                return found[0]  # the strict build reports it
            elif target.endswith((".py", ".sh", ".yml", ".toml")):
                copy = f"source/{target}.md"
                code = (ROOT / target).read_text(encoding="utf-8")
                self.add(copy, content=f"{_UNSEARCHED}# `{target}`\n\n````python\n{code}\n````\n")
            elif target.endswith(".md"):
                copy = f"source/{target}"
                self.add(copy, content=_UNSEARCHED + (ROOT / target).read_text(encoding="utf-8"))
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
    for page, (_, modules) in API.items():
        extra.add(f"api/{page}.md", content=api_page(page))
        for module in modules:
            for name in _public(module):
                uri = PAGE_OF[f"{module}.{name}"]
                extra.add(uri, content=name_page(page, module, name))
    for path, uri in ELSEWHERE.items():
        extra.add_page(path, uri)
    for file in files.documentation_pages():
        path = f"docs/{file.src_uri}"
        file.content_string = extra.with_links_to_copies(file.content_string, path, file.src_uri)
    for file in extra.files.values():
        files.append(file)
    return files
