"""Drop-in replacements for other systems' focal losses: same options, inputs and values.

Each module loads on first use. `caffe` needs protobuf, `keras` needs Keras. Invalid options and
arguments raise `focal_jax.InputError`; an option that is invalid for every input does so at
construction.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

__all__ = ["caffe", "keras", "mindspore", "pytorch_retinanet"]

if TYPE_CHECKING:
    from focal_jax.compat import caffe, keras, mindspore, pytorch_retinanet
else:

    def __getattr__(name):
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # `help` imports every name. Only Keras on its JAX backend can be imported.
    usable = os.environ.get("KERAS_BACKEND") == "jax" and importlib.util.find_spec("keras")
    return [name for name in __all__ if name != "keras" or usable]
