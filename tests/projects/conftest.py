"""Settings for the tests with other projects, which run in an environment of their own."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _defaults_of_jax():
    """Turn off the strict promotion of the other tests: the projects rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(items):
    """Allow the warnings of the projects, which the settings of pytest turn into errors."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
