"""The old name of `_inputs`."""

from focal_jax._inputs import *  # noqa: F403
from focal_jax._inputs import aligned as aligned, keep as keep, mask as mask, option as option
