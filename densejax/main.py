"""Trains, resumes or evaluates: python -m densejax.main --config=configs/cifar10.py."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from densejax import parallel, train, workdir
from densejax.config import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A card of configs/, with arguments after a colon: configs/cifar10.py:depth=40"
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default: runs/<card>-<digest>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a checkpoint.")
RESUME = flags.DEFINE_enum(
    "resume", "same", ["same", "force"], "force: go on in the directory of another configuration."
)


def parse(argv: list[str]) -> list[str]:
    """Parses flags; whatever is wrong with them or with the config is one line and exit code 2."""
    try:
        left = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise UserError("--config: name a card, such as --config=configs/digits.py")
        if left[1:]:
            raise UserError(f"{left[1]!r} is no flag; flags look like --config=configs/digits.py")
        return left
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        stop(error)


def stop(error: Exception):
    """Ends the process with a bad input's line and exit code 2."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"densejax: {text}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    config = CONFIG.value
    logging.set_verbosity(logging.WARNING)  # orbax tells a story about every save
    try:
        parallel.start()
        directory = WORKDIR.value or workdir.default(config.name, config)
        sys.exit(train.run(config, directory, MODE.value, RESUME.value == "force"))
    except UserError as error:
        stop(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
