"""The losses: one file each, with the value, its slopes, the declared options and the docstring.

`import focal_jax` imports them; each enters itself in `focal_jax.catalogue`.
"""
