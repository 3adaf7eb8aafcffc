"""Settings for the tests with other projects, which run in an environment of their own."""

import pytest


@pytest.fixture(autouse=True)
def _promotion_of_the_projects(jax_defaults):
    """Use JAX's default promotion, which the projects rely on."""


def pytest_collection_modifyitems(items):
    """Allow the warnings of the projects, which the settings of pytest turn into errors."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
