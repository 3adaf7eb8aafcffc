"""The commands of `focal-jax`: compare, plot and doctor. `focal_jax.__main__` parses them."""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from focal_jax import catalogue, reference
from focal_jax._version import __version__
from focal_jax.engine.arguments import InputError
from focal_jax.measure import compare, curves
from focal_jax.measure.compare import compare_gradients
from focal_jax.measure.extras import require_extra
from focal_jax.measure.report import REGIMES, GradientComparison, GradientError

LIMIT = 1e-5  # `doctor` requires smaller errors of float32 gradients


def _json(report: GradientComparison) -> str:
    """Return the report as JSON, with null for NaN, which JSON does not have."""
    text = json.dumps(dataclasses.asdict(report))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2, allow_nan=False)


def _check_format(path: Path) -> None:
    """Raise before a measurement if matplotlib cannot write the format of a figure."""
    types = require_extra("matplotlib.backend_bases").FigureCanvasBase.filetypes
    known = [name for name in types if name != "pgf"]  # requires LaTeX
    if path.suffix[1:].lower() not in known:
        raise InputError(f"{path}: got the format {path.suffix[1:]!r}, wanted one of {known}")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    print(f"{path} written", file=sys.stderr)


def _compare(json_file: Path | None = None, plot: Path | None = None, **arguments: Any) -> None:
    modules = {"mpmath": True, "rich.table": json_file != Path("-"), "matplotlib.figure": plot}
    for module in filter(modules.get, modules):  # a missing module is an error at the start
        require_extra(module)
    if plot is not None:
        _check_format(plot)
    for name, value in arguments.items():  # an option with one number is not per class
        if name != "shape" and isinstance(value, list) and len(value) == 1:
            arguments[name] = value[0]
    progress = functools.partial(print, file=sys.stderr) if sys.stderr.isatty() else None
    report = compare_gradients(progress=progress, **arguments)
    if json_file == Path("-"):
        print(_json(report))
    else:
        require_extra("rich").print(report)
        if json_file is not None:
            json_file.write_text(_json(report) + "\n", encoding="utf-8")
    if plot is not None:
        _save(report.plot(), plot)


def _plot(out: Path, gamma: Sequence[float] = curves.GAMMAS, family: bool = False) -> None:
    if any(not 0 <= g <= 1000 for g in gamma):
        raise InputError(f"gamma: got {list(gamma)}, wanted numbers in [0, 1000]")
    require_extra("matplotlib.figure")
    _check_format(out)
    _save(curves.family_figure() if family else curves.gammas_figure(gamma), out)


def _doctor() -> None:
    print(f"focal_jax {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    for package in ("jax", "jaxlib", "flax", "optax", "chex"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is missing: pip install {package}")
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    print(f"devices: {jax.device_count()} ({kinds}); process {jax.process_index()}")
    print(f"jax_enable_x64: {jax.config.read('jax_enable_x64')}")

    try:
        require_extra("mpmath")
        compared = "60 digits"
    except ImportError as error:
        print(f"Saturated logits are not checked: {error}")
        compared = "float64"
    print(f"Errors of float32 gradients against {compared}, at most {LIMIT:.0e}:")
    failed = []
    for name, loss in catalogue.LOSSES.items():
        errors = _errors(name) if compared == "60 digits" else _errors_without_mpmath(loss)
        error = _largest(errors)
        failed += [] if error < LIMIT else [name]
        print(f"{error:.0e} {'passed' if error < LIMIT else 'FAILED'} {name}", flush=True)
    if failed:
        raise SystemExit(f"The gradient is wrong on this device: {', '.join(failed)}")
    print("All gradients are correct on this device.")


def _errors(name: str) -> list[GradientError]:
    report = compare_gradients(name, shape=(24, 5), repeats=1)
    return [getattr(report.focal_jax, regime) for regime in REGIMES]


def _errors_without_mpmath(loss: catalogue.Loss) -> list[GradientError]:
    """Return the errors for easy and hard logits, where plain JAX in float64 is accurate."""
    cases = compare._cases(loss, (24, 5), -1, "float32", np.random.default_rng(0))[:2]
    call = compare._compile(loss.function, {}, *cases[0])
    found = [call(*case) for case in cases]
    with jax.enable_x64(True):
        cases = [[x.astype(float) if x.dtype == np.float32 else x for x in case] for case in cases]
        plain = compare._compile(getattr(reference, loss.name), {}, *cases[0])
        exact = [np.asarray(plain(*case)[1]) for case in cases]
    cancels = -1 if loss.kind in ("interval", "region") else None
    return [compare._error(x, y, cancels) for x, y in zip(found, exact)]


def _largest(errors: list[GradientError]) -> float:
    """Return the largest relative error, infinite for NaN."""
    if any(error.nans or error.infinities for error in errors):
        return math.inf
    return max(error.relative for error in errors)


COMMANDS = {"compare": _compare, "plot": _plot, "doctor": _doctor}


def run(parser: argparse.ArgumentParser, command: str, options: dict[str, Any]) -> None:
    """Run a command. Errors of arguments and files end the program with one line and code 2."""
    try:
        COMMANDS[command](**options)
    except BrokenPipeError:  # such as `focal-jax doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (InputError, OSError) as error:
        parser.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXH" in str(error):
            raise SystemExit(f"out of memory: {error}; use a smaller --shape") from error
        if "backend" not in str(error):
            raise
        parser.error(str(error).partition("\n")[0])  # such as a wrong JAX_PLATFORMS
