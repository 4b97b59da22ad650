"""Draws which earlier layers a trained network reads: python -m densejax.reuse --workdir=DIR."""

import numpy as np
from absl import flags

from densejax import command_line
from densejax.analysis import reuse
from densejax.inference import classifier
from densejax.runs import files
from densejax.training import parallel

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory (latest: the newest), or one of weights."
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for reuse.npz and reuse.png; default: workdir."
)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR)
    directory = command_line.run_directory(WORKDIR)
    from densejax.analysis import plots  # matplotlib may be missing

    parallel.start()
    model, variables = classifier.network(directory)
    maps = reuse.heat_maps(model, variables["params"], variables.get("batch_stats"))
    folder = files.path_of("--output", OUTPUT.value or directory)
    arrays = {f"{one.block}/{key}": array for one in maps for key, array in vars(one).items()}
    with files.writing(f"--output={folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        plots.save(plots.heat_maps(maps), folder / "reuse.png")
        with (folder / "reuse.npz").open("wb") as file:
            np.savez(file, **arrays)
    print(f"{folder}/reuse.png shows {len(maps)} blocks; {folder}/reuse.npz has the numbers")
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused")
