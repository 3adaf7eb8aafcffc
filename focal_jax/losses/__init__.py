"""The losses: one file each, with the value, its slopes, the declared options and the docstring.

`import focal_jax` imports the files; each enters its losses in `focal_jax.catalogue`.
"""
