"""The command line `focal-jax`, also `python -m focal_jax`. Only the commands import JAX."""

import argparse
import ast
import difflib
import functools
import importlib
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focal_jax._version import __version__

_EXAMPLES = """examples:
  focal-jax compare --loss varifocal_loss --gamma 0.5 --plot errors.png
  focal-jax plot --family --out losses.png
"""
_INTERRUPTED = b"focal-jax: interrupted\n"
# Arguments of losses that are not options of `focal-jax compare`.
_OTHERS = {"axis", "axis_name", "bias", "chunk_size", "class_axis_name", "ignore_label"}
_OTHERS |= {"label_smoothing", "logit_softcap", "positive", "return_logsumexp", "temperature"}
_OTHERS |= {"mesh", "transpose_kernel", "where"}


def _losses() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return summary and options of every loss, from the source: an import would import JAX."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("losses/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            decorators = [ast.unparse(x) for x in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.FunctionDef) and "declare(" in str(decorators):
                summary, _, _ = (ast.get_docstring(node) or "").partition("\n")
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults)
                options = {x.arg: ast.unparse(y) for x, y in pairs if y is not None}
                found[node.name] = summary, {k: options[k] for k in options if k not in _OTHERS}
    return found


def _help(losses: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """Return examples and the list of the losses, with their options and defaults."""
    width = max(20, shutil.get_terminal_size().columns - 6)
    lines = [_EXAMPLES, "losses, with their options and defaults:"]
    for name, (summary, options) in losses.items():
        lines.append(f"  {name}")
        for text in (summary, " ".join(f"{k}={v}" for k, v in options.items())):
            lines += [f"    {line}" for line in textwrap.wrap(text, width)]
    return "\n".join(lines)


def _file(name: str, is_figure: bool = False) -> Path:
    """Return the path of a file that the command can write."""
    path, exists = Path(name), os.path.exists(name)
    if is_figure and not path.suffix.strip("."):  # matplotlib would write to another path
        wanted = f"a name that ends with a format, such as {path.name}.png"
        raise argparse.ArgumentTypeError(f"got {name!r}, wanted {wanted}")
    try:
        if not exists or path.is_file() or path.is_dir():  # a pipe would be closed
            path.open("ab").close()
        if not exists:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character
        wanted = f"a file that can be written: {getattr(error, 'strerror', error)}"
        raise argparse.ArgumentTypeError(f"got {name!r}, wanted {wanted}") from error
    return path


def _near(word: str, known: Sequence[str]) -> str:
    """Return a hint if a known word contains the word or is similar to it."""
    near = sorted((x for x in known if word in x), key=len)
    near = near or difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """A parser with error messages of one line, which suggest a known word for an unknown one."""

    options: Sequence[str] = ()

    def error(self, message: str):
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = _near(found[1], re.findall(r"[\w-]+", found[2]))
            message = message[: found.end(1) + 1] + near if near else message
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += _near(found[1], self.options)
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser() -> _Parser:
    losses = _losses()
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    layout |= {"argument_default": argparse.SUPPRESS, "epilog": _help(losses)}
    about = "Measure, draw and check the focal losses of focal_jax."
    parser = _Parser(prog="focal-jax", description=about, **layout)
    parser.add_argument("--version", action="version", version=f"focal_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    about = "compare the gradient of a loss with plain JAX: errors, NaN, time, memory"
    compare = commands.add_parser("compare", help=about, **layout)
    integer: dict[str, Any] = {"type": int, "metavar": "N"}
    file: dict[str, Any] = {"type": _file, "metavar": "FILE"}
    figure: dict[str, Any] = file | {"type": functools.partial(_file, is_figure=True)}
    default = "softmax_focal_loss_with_integer_labels"
    dtypes = ("float16", "bfloat16", "float32", "float64")
    settings = (
        ("loss", f"name (default: {default})", {"choices": losses, "metavar": "NAME"}),
        ("shape", "shape of the logits (default: 100000 21)", {"nargs": "+"} | integer),
        ("axis", "class axis of the logits (default: -1)", integer),
        ("dtype", "dtype of the logits (default: float32)", {"choices": dtypes}),
        ("seed", "seed of the random logits and labels (default: 0)", integer),
        ("repeats", "number of timed calls in each regime (default: 10)", integer),
        ("plot", "draw the result to FILE, such as errors.png", figure),
    )
    keywords: dict[str, Any]
    for name, text, keywords in settings:
        compare.add_argument(f"--{name}", help=text, **keywords)
    text = "write JSON to FILE; without FILE, print JSON and no tables"
    stdout = Path("-")
    compare.add_argument("--json", dest="json_file", nargs="?", const=stdout, help=text, **file)
    number: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "X"}
    group = compare.add_argument_group(
        "options of a loss", "One number; of class weights also one per class."
    )
    options = {name: value for _, found in losses.values() for name, value in found.items()}
    flag: dict[str, Any] = {"action": "store_true"}
    for name, value in sorted(options.items()):
        keywords = flag if value == "False" else number
        group.add_argument(f"--{name.replace('_', '-')}", **keywords)

    about = "draw the focal loss and its gradient for several values of gamma, or all losses"
    layout["epilog"] = ""
    plot = commands.add_parser("plot", help=about, **layout)
    text, default = "file to write (default: focal_loss.png)", "focal_loss.png"
    plot.add_argument("--out", help=text, default=default, **figure)
    choice = plot.add_mutually_exclusive_group()
    choice.add_argument("--gamma", help="exponents (default: 0 0.5 1 2 5)", **number)
    choice.add_argument("--family", help="draw every loss", action="store_true")

    about = "show versions and devices, and check the gradient of every loss on this device"
    commands.add_parser("doctor", help=about)
    parser.options = [*compare._option_string_actions, *plot._option_string_actions]
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An invalid argument ends the program with a message and exit code 2."""
    if arguments is None:  # as a program: a callback of JAX may swallow KeyboardInterrupt
        signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, _INTERRUPTED) and 130))
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack characters of the tables
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if (command := options.pop("command", None)) is None:
        parser.print_help()
        return
    try:
        importlib.import_module("focal_jax.measure.command_line").run(parser, command, options)
    except KeyboardInterrupt:
        parser.exit(130, _INTERRUPTED.decode())
    except ImportError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
