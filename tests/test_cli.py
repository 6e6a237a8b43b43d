"""What all command lines share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from train import cli
if sys.argv[1] == "keep":
    cli._keep_freed_memory()
step = jax.jit(lambda x: jnp.sin(x) @ jnp.ones((2048, 2048)))
x = jnp.ones((8192, 2048))  # temporaries of 64 MiB
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[2:]))  # the heap may grow once more; giving back costs faults in every step
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_a_cpu_keeps_what_a_step_frees_for_the_next():
    root = Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(root)}

    def page_faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    # A thread that a library has started before may have a part of the heap of its own: then it is not all kept.
    assert min(page_faults("keep") for _ in range(4)) < 1000 < page_faults("give back")


def test_a_command_line_that_lacks_something_says_how_to_get_help():
    done = subprocess.run([sys.executable, "-m", "train.sample"], capture_output=True, text=True)
    assert done.returncode == 2 and "python -m train.sample --help" in done.stderr
