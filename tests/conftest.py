import gc
import os

# Set before JAX starts its backend: eight devices, so that every run tests sharding.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["KERAS_BACKEND"] = "jax"

import hypothesis
import jax
import matplotlib
import pytest

from focal_jax.engine import cpu, platform

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
    formulas. JAX traces the form for CPUs only, except in tests that are marked `every_form`. The
    tests of values and gradients against 60 digits and the tests of compiled programs are not
    marked `quick`, so that they test the programs that users run. With the optimizations a program
    takes at least four times as long to compile.
    """
    import helpers  # imported late: it reads the catalogue, to which a pytest plugin may add losses

    marker = request.node.get_closest_marker("quick")
    quick = marker is not None and (not marker.args or marker.args[0])
    only_cpu = quick and request.node.get_closest_marker("every_form") is None
    form = platform._forced if platform._forced in ("accelerator", "tpu") else None
    wanted = None if quick else _SINGLE_DEVICE, "cpu" if only_cpu else form
    if (cpu.single_device_primitive, platform._forced) != wanted:
        helpers.compiler_options = helpers.quick_options() if quick else {}
        cpu.single_device_primitive, platform._forced = wanted
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


@pytest.hookimpl(tryfirst=True)  # before pytest selects the tests by their marks
def pytest_collection_modifyitems(items):
    """Mark cases of `one_in` and `each_kind` as `slow`, and run the slow tests last."""
    import helpers

    for item in items:
        one_in, each_kind = (item.get_closest_marker(x) for x in ("one_in", "each_kind"))
        if one_in is not None and sum(item.callspec.indices.values()) % one_in.args[0]:
            item.add_marker("slow")
        if each_kind is not None and item.callspec.params["row"] not in helpers.KINDS:
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
