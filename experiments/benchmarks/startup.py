"""Seconds from a process's start to the end of its first training step, cold and warm.

Command: python experiments/benchmarks/startup.py --model=densenet_40_12 [--format=json]

Every try is a process of its own that imports, reads the data (digits resized to 32x32), builds,
draws the parameters and takes one step; run directory and logs are left out. Cold: an empty
compilation cache. Warm: the cache that the cold try before it has left.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from densejax.config import UserError
from experiments import script


def child(model: str, batch_size: int) -> None:
    """Takes one step of a network and prints the time of its end."""
    import jax

    from densejax import config as schema
    from densejax import models
    from densejax.training import experiment, parallel, step

    config = schema.default()
    config.name = config.data.name = "digits"
    config.data.image_size = 32
    config.train.batch_size = batch_size
    config.model = models.fields(model)
    parallel.start()
    built = experiment.build(config)
    take_step = built.map(step.train_step, donate=True)
    jax.block_until_ready(take_step(built.init(), built.data.train.batch(0)))
    print(time.time())


def measure(model: str, batch_size: int, cache: str) -> float:
    """Runs one process with a compilation cache and returns its seconds to the first step."""
    command = [sys.executable, __file__, "--child", f"--model={model}"]
    command.append(f"--batch_size={batch_size}")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.splitlines()[-1:] or ["a try said nothing"]
        raise UserError(said[0].removeprefix("densejax: "))
    return float(done.stdout.split()[-1]) - start


def main() -> None:
    """Prints the medians over `--tries` pairs of a cold and a warm start."""
    parser = script.Parser(__doc__)
    parser.add_argument("--model", default="densenet_40_12", help="the network's name")
    parser.add_argument("--batch_size", type=script.positive, default=64, help="images of a step")
    parser.add_argument(
        "--tries", type=script.positive, default=5, help="pairs of a cold and a warm start"
    )
    parser.add_argument("--format", choices=["text", "json"], default="text", help="how to print")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.batch_size)
        return
    seconds = {"cold": [], "warm": []}
    for _ in range(options.tries):
        with tempfile.TemporaryDirectory() as cache:
            for name in seconds:
                seconds[name].append(measure(options.model, options.batch_size, cache))
    import jax

    from densejax.models.convolution import cores

    result = {
        "model": options.model,
        "batch_size": options.batch_size,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {cores()} cores",
        "jax": jax.__version__,
        "seconds_to_first_step": {
            name: {"median": statistics.median(tries), "all": tries}
            for name, tries in seconds.items()
        },
    }
    if options.format == "json":
        print(json.dumps(result, indent=2))
        return
    print(f"{options.model}, batch {options.batch_size}, {result['device']}, jax {jax.__version__}")
    for name, tries in seconds.items():
        spread = f"{min(tries):.1f} to {max(tries):.1f}"
        median = statistics.median(tries)
        print(f"{name}: {median:.1f} s to the first step (n = {len(tries)}, {spread})")


if __name__ == "__main__":
    script.run(main)
