"""Drop-ins for the systems that users come from: the same options, inputs and numbers.

Each module holds the translation of its system's options and none of the mathematics. They
load when they are first named: `caffe` needs protobuf, the others nothing more.
"""

import importlib
from typing import TYPE_CHECKING

__all__ = ["caffe", "mindspore", "pytorch_retinanet"]

if TYPE_CHECKING:
    from focal_jax.compat import caffe, mindspore, pytorch_retinanet
else:

    def __getattr__(name):
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
