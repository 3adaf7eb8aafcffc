"""Drop-ins for the systems that users come from: the same options, inputs and numbers.

Each module holds the translation of its system's options and none of the mathematics. They
load when they are first named: `caffe` needs protobuf, the others nothing more.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focal_jax.compat import (
        caffe as caffe,
        mindspore as mindspore,
        pytorch_retinanet as pytorch_retinanet,
    )

_SUBMODULES = ("caffe", "mindspore", "pytorch_retinanet")


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
