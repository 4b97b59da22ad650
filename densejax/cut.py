"""Measures which connections a trained network needs: python -m densejax.cut --workdir=DIR."""

import contextlib

import numpy as np
from absl import flags
from etils import epath

from densejax import command_line
from densejax.analysis import cuts, reuse
from densejax.data.memory import permutation
from densejax.inference import classifier
from densejax.runs import files, formats
from densejax.training import parallel
from densejax.training.experiment import Experiment

WORKDIR = flags.DEFINE_string("workdir", None, "A run's directory; latest: the newest.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for cut.json and cut.png; default: workdir.")
IMAGES = flags.DEFINE_integer("images", 2000, "How many images at most.", lower_bound=1)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR)
    from densejax.analysis import plots  # matplotlib may be missing

    parallel.start()
    path = epath.Path(command_line.run_directory(WORKDIR))
    experiment, network = classifier.experiment_of(path), classifier.load(path)
    params = network.variables["params"]
    connections = cuts.connections(network.model, params)
    folder = files.path_of("--output", OUTPUT.value or path)
    with files.writing(f"--output={folder}", "name another folder"):  # before the measurement
        folder.mkdir(parents=True, exist_ok=True)
    split, images, labels = held_out(experiment, path, IMAGES.value)
    size, loss = experiment.config.evaluate.batch_size, experiment.task.evaluation_loss
    uncut, results = cuts.measure(network, loss, images, labels, size)
    damages = [result["loss"] - uncut["loss"] for result in results]
    correlation = cuts.rank_correlation(connections, damages)
    maps = reuse.heat_maps(network.model, params)
    names = {one.block: one.sources for one in maps}
    records = [
        {"block": one.block, "target": one.target, "source": names[one.block][one.source]}
        | {"weight": one.weight, "loss_increase": damage, **result}
        for one, damage, result in zip(connections, damages, results, strict=True)
    ]
    outcome = {"split": split, "images": len(images), "uncut": uncut}
    outcome |= {"rank_correlation": correlation, "connections": records}
    figure = plots.heat_maps(maps, cuts.heat_maps(maps, connections, damages))
    with files.writing(f"--output={folder}", "name another folder"):
        files.write_json(folder / "cut.json", outcome)
        plots.save(figure, folder / "cut.png")
    worst = max(records, key=lambda record: record["loss_increase"])
    print(
        f"{formats.plural(len(images), f'{split} image')}: accuracy "
        f"{formats.percent(uncut['accuracy'])}; of {len(records)} connections the most "
        f"harmful to cut is {worst['block']}'s {worst['source']} to {worst['target']}: "
        f"{formats.percent(worst['accuracy'])}"
    )
    if interval := correlation["interval"]:
        print(
            f"rank correlation of weight and damage within a target: {correlation['mean']:.2f}, "
            f"95 % from {interval[0]:.2f} to {interval[1]:.2f} ({correlation['targets']} targets)"
        )
    print(f"{folder}/cut.png shows both; {folder}/cut.json has the numbers")
    return 0


def held_out(
    experiment: Experiment, path: epath.Path, number: int
) -> tuple[str, np.ndarray, np.ndarray]:
    """(split, images, labels): at most `number` images of those that the run did not train on.

    They are held-out training images where there are some, else test images; drawn once, since a
    set may be in the order of its classes.
    """
    with contextlib.closing(classifier.data_of(experiment, path)) as data:
        split = "validation" if "validation" in data.evaluation else "test"
        source = data.evaluation[split]
        chosen = np.flatnonzero(permutation(seed=0, epoch=0, size=source.size) < number)
        images, labels, _ = zip(*source.examples(chosen.tolist()), strict=True)
    return split, np.stack(images), np.array(labels, np.int32)


if __name__ == "__main__":
    command_line.run(main, config="unused")
