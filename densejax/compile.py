"""Estimates the memory and time of a run's steps on devices that you do not have.

python -m densejax.compile --config=configs/cifar10.py --topology=h100:8
"""

import json

from absl import flags

from densejax import command_line
from densejax.topology import compiled

TOPOLOGY = flags.DEFINE_string("topology", "", "The devices, such as cpu:8, h100:8 or v5e:16x16.")
LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Estimate the largest batch that fits, by more compilations."
)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "How to print.")


def main() -> int:
    """Does what the flags say; returns the exit code."""
    result = compiled.report(command_line.CONFIG.value, TOPOLOGY.value, LARGEST.value)
    print(json.dumps(result, indent=2) if FORMAT.value == "json" else compiled.table(result))
    return 0


if __name__ == "__main__":
    command_line.run(main)
