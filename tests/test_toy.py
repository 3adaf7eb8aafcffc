"""What a new loss costs: one short module, one formula, one entry, and every property holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROPERTIES = [
    "values",
    "gradients",
    "extremes",
    "transforms",
    "dtypes",
    "errors",
    "lowering",
    "sharding",
    "cpu",
    "public_api",
]

pytestmark = pytest.mark.slow


def test_the_module_is_short():
    assert len((HERE / "toy" / "_tempered.py").read_text().splitlines()) < 60


def test_a_loss_that_is_added_has_every_property():
    files = [str(HERE / f"test_{name}.py") for name in PROPERTIES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "toy", "-k", "tempered", *files]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 100, done.stdout[-500:]
