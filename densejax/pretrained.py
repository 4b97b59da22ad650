"""Makes a directory of weights from another project's file; a run starts from it.

python -m densejax.pretrained --model=densenet121 --weights=densenet121.safetensors --output=DIR

From Python: `convert_file` is this command, `load` opens what it made; see densejax.weights.store.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from densejax.config import UserError
from densejax.weights.conversion import from_keras, from_torch, to_torch
from densejax.weights.files import HUB, READERS
from densejax.weights.store import convert_file, digest, load, save

__all__ = ["convert_file", "digest", "from_keras", "from_torch", "load", "save", "to_torch"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _Parser("densejax.pretrained", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a name of densejax.models.MODELS")
    parser.add_argument("--weights", required=True, help=f"{', '.join(READERS)} or {HUB}owner/name")
    parser.add_argument("--output", required=True, help="a new directory")
    parser.add_argument("--num_classes", type=int, help="default: as the weights have")
    parser.add_argument(
        "--in_channels", type=int, help="of the images; default: as the weights have"
    )
    parser.add_argument("--adapt", action="store_true", help="new classifier, other image channels")
    parser.add_argument("--seed", type=int, default=0, help="of a new classifier")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="changes nothing: no file is executed"
    )
    parser.add_argument(
        "--shortcut", default="", help="of a ResNet without projections: identity, identity_middle"
    )
    try:
        options = vars(parser.parse_args(arguments))
        del options["allow_pickle"]
        made = convert_file(**options)
    except UserError as error:
        print(f"densejax: {error}", file=sys.stderr)
        return 2
    print(f"{options['output']}: {made['name']}, {made['num_classes']} classes, "
          f"{made['image_channels']} image channels")  # fmt: skip
    for line in made["assumed"]:
        print(f"assumed: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
