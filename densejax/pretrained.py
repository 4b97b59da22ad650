"""Makes a directory of weights from another project's file; a run starts from it.

python -m densejax.pretrained --model=densenet121 --weights=densenet121.safetensors --output=DIR

From Python: `convert_file` does the same, `load` reads the directory; see densejax.weights.store.
"""

from absl import flags

from densejax import command_line
from densejax.weights.conversion import from_keras, from_torch, to_torch
from densejax.weights.files import HUB, READERS
from densejax.weights.store import convert_file, digest, load, save

__all__ = ["convert_file", "digest", "from_keras", "from_torch", "load", "save", "to_torch"]

# An override lets programs that import this module define such flags of their own.
MODEL = flags.DEFINE_string("model", None, "A network's name.", allow_override=True)
WEIGHTS = flags.DEFINE_string("weights", None, f"{', '.join(READERS)} or {HUB}owner/name.")
OUTPUT = flags.DEFINE_string(
    "output", None, "A new directory for the weights.", allow_override=True
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "The number of classes. 0: no classifier. Default: that of the weights.",
    lower_bound=0,
    allow_override=True,
)
IN_CHANNELS = flags.DEFINE_integer(
    "in_channels",
    None,
    "The number of channels of an image. Default: that of the weights.",
    lower_bound=1,
)
ADAPT = flags.DEFINE_bool("adapt", False, "Fit the weights to --num_classes and --in_channels.")
SEED = flags.DEFINE_integer("seed", 0, "The random seed of a new classifier.", allow_override=True)
SHORTCUT = flags.DEFINE_string(
    "shortcut",
    "",
    "For a ResNet without projections: where shortcuts add channels, identity or identity_middle.",
)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(MODEL, WEIGHTS, OUTPUT)
    made = convert_file(
        MODEL.value,
        WEIGHTS.value,
        OUTPUT.value,
        num_classes=NUM_CLASSES.value,
        in_channels=IN_CHANNELS.value,
        adapt=ADAPT.value,
        seed=SEED.value,
        shortcut=SHORTCUT.value,
    )
    print(
        f"{OUTPUT.value}: {made['name']}, {made['num_classes']} classes, "
        f"{made['image_channels']} image channels"
    )
    for line in made["assumed"]:
        print(f"assumed: {line}")
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused")
