import gc
import os

# Before JAX starts its backend: eight devices, so that sharding is tested in every run.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax
import matplotlib
import pytest

from focal_jax import _cpu

_ONE_DEVICE = _cpu._ONE_DEVICE

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("agg")
# What the tests hold on to are programs, by the hundred thousand objects: looking through them
# again and again for what could be freed takes a tenth of the time.
gc.set_threshold(100_000, 20, 100)

hypothesis.settings.register_profile(
    # Every new shape compiles: no deadline, and no minutes of shrinking.
    "focal_jax",
    deadline=None,
    max_examples=30,
    phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.shrink],
    print_blob=True,
)
hypothesis.settings.load_profile("focal_jax")


@pytest.fixture(autouse=True)
def _compilation(request):
    """Spare a test that is marked `quick` what makes a program fast and long to compile.

    These are most of XLA's optimizations, and `_cpu.py`. They change no formula: they are there
    where the losses and their gradients are held to 60 digits, and in all that is said of the
    compiled programs, so that both are tested as they are run. But with them a program takes four
    times as long to compile, or more, and derivatives of a higher order have many.
    """
    import helpers  # here: it reads the catalogue, to which a plugin may add a loss first

    marker = request.node.get_closest_marker("quick")
    helpers.quick = marker is not None and (not marker.args or marker.args[0])
    wanted = None if helpers.quick else _ONE_DEVICE
    if _cpu._ONE_DEVICE is not wanted:
        _cpu._ONE_DEVICE = wanted
        jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """Leave the runs of whole programs to the end: what is quick to know is known first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
