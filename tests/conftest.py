import os

# Before JAX starts its backend: eight devices, so that sharding is tested in every run.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax
import matplotlib
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("agg")

hypothesis.settings.register_profile(
    # Every new shape compiles: no deadline, and no minutes of shrinking.
    "focal_jax",
    deadline=None,
    max_examples=30,
    phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.shrink],
    print_blob=True,
)
hypothesis.settings.load_profile("focal_jax")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """Leave the runs of whole programs to the end: what is quick to know is known first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
