"""Classifies images: python -m densejax.predict --workdir=latest image.png folder."""

import json
import sys

from absl import flags

from densejax import command_line
from densejax.config import UserError, printable
from densejax.inference import classifier, prediction
from densejax.runs import formats, screen
from densejax.training import parallel

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory (latest: the newest), or one of weights."
)
TOP = flags.DEFINE_integer("top", 5, "Classes to name for each image.", lower_bound=1)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "How to print.")


def main(*paths: str) -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR)
    directory = command_line.run_directory(WORKDIR)
    if not paths:
        raise UserError("name at least one image file, or a folder")
    files = prediction.image_files(paths)
    parallel.start()
    results = prediction.predict(classifier.load(directory), files, TOP.value, screen.show)
    screen.show()
    errors = [result["error"] for result in results if "error" in result]
    for error in errors:
        screen.say(f"densejax: {error}")
    for result in results:
        for difference in result["unlike"]:
            text = f"{result['image']} is unlike the training images, its class may be wrong"
            print(f"densejax: {printable(text)}: {difference}", file=sys.stderr)
    if FORMAT.value == "json":
        print(json.dumps(results, indent=2))
    for result in results if FORMAT.value == "table" else ():
        rows = [
            ("", formats.percent(found["probability"]), printable(found["name"]))
            for found in result["classes"]
        ]
        if rows:
            print(printable(result["image"]), formats.table(rows), sep="\n")
    return UserError.exit_code if errors else 0


if __name__ == "__main__":
    command_line.run(main, config="unused", arguments=True)
