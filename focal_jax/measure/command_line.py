"""The commands `focal-jax compare`, `focal-jax plot` and `focal-jax doctor`."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from focal_jax import catalogue
from focal_jax._version import __version__
from focal_jax.engine.arguments import InputError
from focal_jax.engine.options import Option
from focal_jax.measure import curves
from focal_jax.measure.compare import DTYPES, compare_gradients
from focal_jax.measure.extras import require_extra
from focal_jax.measure.report import REGIMES, GradientComparison, GradientError, Table

LIMIT = 1e-5  # `doctor` requires smaller errors of float32 gradients


def _json(report: GradientComparison) -> str:
    """Return the report as JSON, with null for NaN, which JSON does not have."""
    text = json.dumps(dataclasses.asdict(report))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2, allow_nan=False)


def _check_format(path: Path) -> None:
    """Raise before a measurement if matplotlib cannot write the format of a figure."""
    known = require_extra("matplotlib.backend_bases").FigureCanvasBase.filetypes
    if path.suffix[1:].lower() not in known:
        raise InputError(f"{path}: got the format {path.suffix[1:]!r}, wanted one of {list(known)}")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    print(f"{path} written", file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], object]]:
    """Yield a function that shows the current step, if the output is a terminal."""
    try:
        console = require_extra("rich.console").Console(stderr=True)
        status = require_extra("rich.status").Status("", console=console)
    except ImportError:  # `compare --json` does not need rich
        yield lambda _: None
        return
    with status:
        yield status.update


# ---------------------------------------------------------------- commands


def _compare(json_file: str | None = None, plot: Path | None = None, **arguments: Any) -> None:
    needed = ["mpmath"] + ["rich.table"] * (json_file != "-") + ["matplotlib.figure"] * bool(plot)
    for module in needed:  # a missing module is an error before the measurement
        require_extra(module)
    if plot is not None:
        _check_format(plot)
    for name, value in arguments.items():  # an option with one number is not per class
        if name != "shape" and isinstance(value, list) and len(value) == 1:
            arguments[name] = value[0]
    with _progress() as progress:
        report = compare_gradients(progress=progress, **arguments)
    if json_file == "-":
        print(_json(report))
    else:
        require_extra("rich").print(report)
        if json_file is not None:
            Path(json_file).write_text(_json(report) + "\n", encoding="utf-8")
    if plot is not None:
        _save(report.plot(), plot)


def _plot(out: Path, gamma: Sequence[float], family: bool = False) -> None:
    if any(not 0 <= g < math.inf for g in gamma):
        raise InputError(f"gamma: got {list(gamma)}, wanted finite numbers >= 0")
    require_extra("matplotlib.figure")
    _check_format(out)
    _save(curves.family_figure() if family else curves.gammas_figure(gamma), out)


def _doctor() -> None:
    console = require_extra("rich.console").Console()
    require_extra("mpmath")
    print(f"focal_jax {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    for package in ("jax", "jaxlib", "flax", "optax", "chex"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is missing: pip install {package}")
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    print(f"devices: {jax.device_count()} ({kinds}); process {jax.process_index()}")
    print(f"jax_enable_x64: {jax.config.read('jax_enable_x64')}")

    errors = {}
    with _progress() as progress:
        for name in catalogue.LOSSES:
            progress(name)
            errors[name] = _largest_error(name)
    failed = [name for name, error in errors.items() if not error < LIMIT]
    rows = [(x, f"{e:.0e}", "FAILED" if x in failed else "passed") for x, e in errors.items()]
    caption = f"Errors of float32 gradients, against 60 digits. The limit is {LIMIT:.0e}."
    console.print(Table(("loss", "error", "result"), 1, rows, caption))
    if failed:
        raise SystemExit(f"The gradient is wrong on this device: {', '.join(failed)}")
    print("All gradients are correct on this device.")


def _largest_error(name: str) -> float:
    """Return the largest relative error; absolute for a loss with entries that may cancel."""
    report = compare_gradients(name, shape=(24, 5), repeats=1)
    errors: list[GradientError] = [getattr(report.focal_jax, regime) for regime in REGIMES]
    if any(error.nans or error.infinities for error in errors):
        return math.inf
    cancels = catalogue.LOSSES[name].kind in ("interval", "region")
    return max(error.absolute if cancels else error.relative for error in errors)


# ---------------------------------------------------------------- arguments


def _file(name: str) -> str:
    """Return the name of a file that the command can write."""
    path = Path(name)
    missing = "an existing folder" if not path.parent.is_dir() else "a file, not a folder"
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {name!r}, wanted {missing}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {name!r}, wanted a file that can be written")
    return name


def _figure_file(name: str) -> Path:
    """Return the path. Without a suffix, matplotlib would write to another path."""
    path = Path(name)
    if not path.suffix.strip("."):
        wanted = f"a name that ends with a format, such as {path.name}.png"
        raise argparse.ArgumentTypeError(f"got {name!r}, wanted {wanted}")
    return Path(_file(name))


class _Parser(argparse.ArgumentParser):
    """A parser with error messages of one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    about = "Measure, draw and check the focal losses of focal_jax."
    parser = _Parser(prog="focal-jax", description=about)
    parser.add_argument("--version", action="version", version=f"focal_jax {__version__}")
    parser.set_defaults(run=parser.print_help)
    commands = parser.add_subparsers(metavar="COMMAND")
    common: dict[str, Any] = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    common |= {"argument_default": argparse.SUPPRESS}

    about = "compare the gradient of a loss with plain JAX: errors, NaN, time, memory"
    command = commands.add_parser("compare", help=about, **common)
    command.set_defaults(run=_compare)
    integer: dict[str, Any] = {"type": int, "metavar": "N"}
    settings: dict[str, dict[str, Any]] = {
        "loss": {"help": "the name of the loss", "metavar": "NAME"},
        "shape": {"help": "the shape of the logits", "nargs": "+"} | integer,
        "axis": {"help": "the class axis of the logits"} | integer,
        "dtype": {"help": "the dtype of the logits", "choices": DTYPES},
        "seed": {"help": "the seed of the random logits and labels"} | integer,
        "repeats": {"help": "the number of timed calls in each regime"} | integer,
    }
    for name, keywords in settings.items():
        default = inspect.signature(compare_gradients).parameters[name].default
        command.add_argument(f"--{name}", default=default, **keywords)
    options: dict[str, list[Option]] = {}
    for loss in catalogue.LOSSES.values():
        for name, option in loss.options.items():
            options.setdefault(name, []).append(option)
    number: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "X"}
    flag: dict[str, Any] = {"action": "store_true"}
    for name, found in options.items():
        per_class = " (or one number per class)" * any(option.per_class for option in found)
        defaults = " or ".join(sorted({str(option.default) for option in found}))
        text = f"option of the loss{per_class}; default: {defaults}"
        if found[0].kind != "mask":
            keywords = flag if found[0].kind == "flag" else number
            command.add_argument(f"--{name.replace('_', '-')}", help=text, **keywords)
    text = "write JSON to FILE; without FILE, print JSON and no tables"
    file: dict[str, Any] = {"metavar": "FILE", "type": _file}
    command.add_argument("--json", dest="json_file", nargs="?", const="-", help=text, **file)
    file |= {"type": _figure_file}
    command.add_argument("--plot", help="draw the result to FILE, such as errors.png", **file)

    about = "draw the focal loss and its gradient for several values of gamma, or all losses"
    command = commands.add_parser("plot", help=about, **common)
    command.set_defaults(run=_plot)
    command.add_argument("--out", help="the file to write", default="focal_loss.png", **file)
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--gamma", help="focusing exponents", default=curves.GAMMAS, **number)
    choice.add_argument("--family", help="draw every loss", action="store_true")

    about = "show versions and devices, and check the gradient of every loss on this device"
    commands.add_parser("doctor", help=about, **common).set_defaults(run=_doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An invalid argument ends the program with a message and exit code 2."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    try:
        options.pop("run")(**options)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "focal-jax: interrupted\n")
    except ImportError as error:
        raise SystemExit(str(error)) from error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXH" not in str(error):
            raise
        raise SystemExit(f"out of memory: {error}; use a smaller --shape") from error
