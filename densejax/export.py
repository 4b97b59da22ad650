"""Writes a trained network as one file: python -m densejax.export --workdir=DIR --output=FILE.

The file is a serialised StableHLO function of `jax.export`. It holds the weights and the
normalisation, takes any number of images and runs where JAX is, without this package:

    function = jax.export.deserialize(open(FILE, "rb").read())
    logits = function.call(images)  # uint8 [batch, height, width, channels] -> float32
"""

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from densejax import classifier, command_line, formats, parallel
from densejax.config import UserError

ALLOWED = ("cpu", "cuda", "rocm", "tpu")
# An override lets the tests import several commands into one process.
WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory, or one of weights.", allow_override=True
)
OUTPUT = flags.DEFINE_string("output", None, "The file to write.")
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], f"Where it has to run, of {', '.join(ALLOWED)}."
)


def export(network: classifier.Classifier, platforms: tuple[str, ...]) -> bytes:
    """A trained network as a serialised function of uint8 images to float32 logits.

    The devices of `platforms` need not be there.
    """

    def function(images):
        return network.logits(network.variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.uint8)
    return bytes(jax.export.export(jax.jit(function), platforms=platforms)(images).serialize())


def main() -> int:
    """Does what the flags say; returns the exit code."""
    for flag in (WORKDIR, OUTPUT):
        if not flag.value:
            raise UserError(f"--{flag.name}: give a value; --help explains it")
    if set(PLATFORMS.value) - set(ALLOWED):
        given = ",".join(PLATFORMS.value)
        raise UserError(f"--platforms={given}: allowed are {', '.join(ALLOWED)}")
    parallel.start()
    network = classifier.load(WORKDIR.value)
    content = export(network, tuple(PLATFORMS.value))
    try:
        epath.Path(OUTPUT.value).write_bytes(content)
    except OSError as error:
        raise UserError(f"--output={OUTPUT.value}: {error.strerror}") from error
    shape = ", ".join(map(str, network.image_shape))
    print(
        f"{OUTPUT.value}: {formats.si(len(content))}B, uint8 [batch, {shape}] -> "
        f"float32 [batch, {len(network.class_names)}], for {', '.join(PLATFORMS.value)}"
    )
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused")
