"""Takes a trained network elsewhere: python -m densejax.export --workdir=DIR --output=PATH.

With --names=torchvision, or timm, the output is a new folder: weights in that project's names as
safetensors, the class names, and a model card that says how to load them. Without, it is a file: a
serialised StableHLO function of `jax.export` with the weights and the normalisation in it. It takes
any number of images and needs JAX, but not this package:

    function = jax.export.deserialize(open(FILE, "rb").read())
    logits = function.call(images)  # uint8 [batch, height, width, channels] -> float32
"""

from absl import flags
from etils import epath

from densejax import command_line
from densejax.config import UserError
from densejax.inference import classifier, portable
from densejax.runs import files, formats
from densejax.training import parallel

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory (latest: the newest), or one of weights."
)
OUTPUT = flags.DEFINE_string("output", None, "The file or folder to write.")
NAMES = flags.DEFINE_string(
    "names",
    None,
    "Writes weights with the names of another project, such as torchvision, timm or authors; "
    "without this flag, a program in StableHLO.",
)
ALLOWED = ("cpu", "cuda", "rocm", "tpu")
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], f"Where it must run; any of {', '.join(ALLOWED)}."
)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR, OUTPUT)
    directory = command_line.run_directory(WORKDIR)
    if NAMES.value and PLATFORMS.present:
        raise UserError(
            f"--names={NAMES.value}: weights are for any platform; leave out --platforms"
        )
    if set(PLATFORMS.value) - set(ALLOWED):
        given = ",".join(PLATFORMS.value)
        raise UserError(f"--platforms={given}: allowed are {', '.join(ALLOWED)}")
    parallel.start()
    network = classifier.load(directory)
    if NAMES.value:
        peer = portable.write(network, epath.Path(directory), NAMES.value, OUTPUT.value)
        said = peer or "names; no network of theirs is known to compute the same"
        print(f"{OUTPUT.value}: {NAMES.value} {said}, {len(network.class_names)} classes")
        return 0
    content = network.serialised(tuple(PLATFORMS.value))
    with files.writing(f"--output={OUTPUT.value}", "name another file"):
        files.path_of("--output", OUTPUT.value).write_bytes(content)
    shape = ", ".join(map(str, network.image_shape))
    print(
        f"{OUTPUT.value}: {formats.si(len(content))}B, uint8 [batch, {shape}] -> "
        f"float32 [batch, {len(network.class_names)}], for {', '.join(PLATFORMS.value)}"
    )
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused")
