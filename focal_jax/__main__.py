"""The command line: `focal-jax`, or `python -m focal_jax`.

Presentation only: what is shown is measured by `focal_jax.compare_gradients`, and the
curves are drawn from the library's own losses and gradients.
"""

import argparse
import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from focal_jax import _catalogue, _compare, _curves
from focal_jax._checks import InputError
from focal_jax._comparison import GradientComparison, Table
from focal_jax._extras import extra
from focal_jax._version import __version__

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(_compare.compare_gradients).parameters.items()
}
# The options of all losses, each with the losses that have it.
_OPTIONS: dict[str, list[_catalogue.Loss]] = {}
for _loss in _catalogue.LOSSES:
    for _option in _loss.options:
        _OPTIONS.setdefault(_option, []).append(_loss)


def _json(report: GradientComparison) -> str:
    """Return the report as JSON, which has no NaN: null stands for it."""

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(dataclasses.asdict(report)), indent=2, allow_nan=False)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder; no such format
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {reason}") from error
    print(f"{path} written", file=sys.stderr)


# ---------------------------------------------------------------- the commands


def _with_a_bar(steps: int, work: Callable[[Callable[[str], object]], Any]) -> Any:
    """Return what `work` returns, and show a terminal on the way what it does next."""
    try:
        progress = extra("rich.progress")
    except ImportError:  # the work needs it not
        return work(lambda _: None)
    columns = (
        progress.BarColumn(bar_width=16),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
    )
    console = extra("rich.console").Console(stderr=True)
    with progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        return work(lambda what: bar.update(task, advance=1, description=what))


def _compare_command(
    json_file: str | None = None, plot: Path | None = None, **question: Any
) -> None:
    table, figure = json_file != "-", plot is not None
    for module in ["mpmath"] + ["rich.table"] * table + ["matplotlib.figure"] * figure:
        extra(module)  # before the measurement, not after it
    for name in _OPTIONS.keys() & question.keys():
        if len(question[name]) == 1:  # one number, not one a class
            (question[name],) = question[name]
    report = _with_a_bar(
        _compare.STEPS, lambda say: _compare.compare_gradients(progress=say, **question)
    )
    if json_file == "-":
        print(_json(report))
    else:
        extra("rich").print(report)
        if json_file is not None:
            Path(json_file).write_text(_json(report) + "\n", encoding="utf-8")
    if plot is not None:
        _save(report.plot(), plot)


def _plot_command(out: Path, gamma: Sequence[float] = _curves.GAMMAS, family: bool = False) -> None:
    if any(not 0 <= g < math.inf for g in gamma):
        raise InputError(f"gamma: got {list(gamma)}, wanted finite numbers >= 0")
    _save(_curves.family_figure() if family else _curves.gammas_figure(gamma), out)


def _doctor_command() -> None:
    console = extra("rich.console").Console()
    extra("mpmath")
    print(f"focal_jax {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    for package in ("jax", "jaxlib", "flax", "optax", "chex"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is missing: pip install {package}")
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    print(f"devices: {jax.device_count()} ({devices}); process {jax.process_index()}")
    print(
        f"64-bit numbers (jax_enable_x64): {'on' if jax.config.read('jax_enable_x64') else 'off'}"
    )

    found = _with_a_bar(
        len(_catalogue.LOSSES),
        lambda say: {
            loss.name: (say(loss.name), _compare.check(loss))[1] for loss in _catalogue.LOSSES
        },
    )
    rows = [
        (name, f"{error:.0e}", "right" if error < _compare.LIMIT else "WRONG")
        for name, error in found.items()
    ]
    caption = f"float32 gradients against 60 digits; right: below {_compare.LIMIT:.0e}."
    console.print(Table(("loss", "error", ""), 1, rows, caption))
    wrong = [name for name, error in found.items() if not error < _compare.LIMIT]
    if wrong:
        raise SystemExit(f"not right on this machine: {', '.join(wrong)}")
    print("All gradients are right on this machine and device.")


# ---------------------------------------------------------------- the arguments


def _figure_file(name: str) -> Path:
    """Return the path, whose suffix says which format; without one another file is written."""
    path = Path(name)
    if not path.suffix.strip("."):
        raise argparse.ArgumentTypeError(
            f"got {name!r}, wanted a name that ends as a format does, such as {path.name}.png"
        )
    return path


def _name(given: str) -> str:
    if given not in _compare.NAMES:
        raise argparse.ArgumentTypeError(
            f"got {given!r}, wanted one of: {', '.join(_compare.NAMES)}"
        )
    return given


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="focal-jax",
        description="Focal losses for JAX: look at them, check them, compare them.",
    )
    parser.add_argument("--version", action="version", version=f"focal_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="the hand-derived gradient against autodiff's: errors, NaNs, time, memory",
        description="Compare the gradient of a loss with what JAX makes of its plain formula: how "
        "many digits are right, how many NaNs, how long it takes, how much memory it needs.",
        argument_default=argparse.SUPPRESS,
    )
    compare.set_defaults(run=_compare_command)

    def add(name: str, what: str, **how: Any) -> None:
        """Add an argument of `compare_gradients`, with its default."""
        default = _DEFAULTS[name]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        compare.add_argument(f"--{name}", help=f"{what} (default: {shown})", **how)

    add("loss", "which loss, by the name of its function", type=_name, metavar="NAME")
    add("shape", "the shape of the logits", type=int, nargs="+", metavar="N")
    add("axis", "which axis of the logits has the classes", type=int, metavar="N")
    add("dtype", "the dtype of the logits", choices=_compare.DTYPES)
    for name, losses in _OPTIONS.items():
        found = [loss.options[name] for loss in losses]
        several = ", or one for each class" if any(x.per_class for x in found) else ""
        defaults = {x.default for x in found}
        default = defaults.pop() if len(defaults) == 1 else "the loss's own"
        compare.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=float,
            nargs="+",
            metavar="X",
            help=f"an option of the loss{several} (default: {default})",
        )
    add("seed", "of the random logits and labels", type=int, metavar="N")
    add("repeats", "how often each kind of logits is timed", type=int, metavar="N")
    compare.add_argument(
        "--json",
        dest="json_file",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or without FILE to the terminal in place of the table",
    )
    compare.add_argument(
        "--plot", type=_figure_file, metavar="FILE", help="draw the result, such as errors.png"
    )

    plot = commands.add_parser(
        "plot",
        help="draw the losses and their gradients",
        description="Draw the focal loss and its gradient against the probability of the true "
        "class, or every loss of the package against the logit.",
    )
    plot.set_defaults(run=_plot_command)
    plot.add_argument(
        "--out",
        type=_figure_file,
        metavar="FILE",
        default="focal_loss.png",
        help="the file to write (default: %(default)s)",
    )
    which = plot.add_mutually_exclusive_group()
    which.add_argument(
        "--gamma",
        type=float,
        nargs="+",
        metavar="X",
        default=_curves.GAMMAS,
        help=f"focusing exponents (default: {' '.join(f'{g:g}' for g in _curves.GAMMAS)})",
    )
    which.add_argument("--family", action="store_true", help="every loss of the package instead")

    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, and whether the gradients are right on this machine",
        description="Show versions and devices, and check the gradient of every loss on this "
        "machine and device. It takes some ten seconds.",
    )
    doctor.set_defaults(run=_doctor_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a bad argument ends it with a message and exit code 2."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    try:
        options.pop("run")(**options)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        raise SystemExit(str(error)) from error
    except MemoryError as error:
        raise SystemExit(f"out of memory: {error}; a smaller --shape needs less") from error


if __name__ == "__main__":
    main()
