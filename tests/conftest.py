import gc
import os

# Set before JAX starts its backend: eight devices, so that every run tests sharding.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["KERAS_BACKEND"] = "jax"

import hypothesis
import jax
import matplotlib
import pytest

from focal_jax.engine import cpu

_SINGLE_DEVICE = cpu.single_device_primitive

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("agg")
# The tests keep compiled programs, which are hundreds of thousands of Python objects. With the
# default thresholds the garbage collector takes a tenth of the time.
gc.set_threshold(100_000, 20, 100)

hypothesis.settings.register_profile(
    # Every new shape compiles a program, so there is no deadline and no shrinking.
    "focal_jax",
    deadline=None,
    max_examples=30,
    phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.shrink],
    print_blob=True,
)
hypothesis.settings.load_profile("focal_jax")


@pytest.fixture(autouse=True)
def _compilation(request):
    """Compile the programs of tests that are marked `quick` without optimizations.

    This turns off most optimizations of XLA and `focal_jax.engine.cpu`. They do not change the
    formulas. The tests of values and gradients against 60 digits and the tests of compiled programs
    are not marked `quick`, so that they test the programs that users run. With the optimizations a
    program takes at least four times as long to compile.
    """
    import helpers  # imported late: it reads the catalogue, to which a pytest plugin may add losses

    marker = request.node.get_closest_marker("quick")
    helpers.quick = marker is not None and (not marker.args or marker.args[0])
    wanted = None if helpers.quick else _SINGLE_DEVICE
    if cpu.single_device_primitive is not wanted:
        cpu.single_device_primitive = wanted
        jax.clear_caches()


@pytest.fixture(name="jax_defaults")
def _jax_defaults():
    import pages

    with pages.jax_defaults():
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """Run the tests that are marked `slow` last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
