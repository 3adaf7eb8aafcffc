"""The command line `focal-jax`, also `python -m focal_jax`."""

from focal_jax.measure.command_line import main as main

if __name__ == "__main__":
    main()
