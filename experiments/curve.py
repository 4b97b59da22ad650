"""Draws a run's learning curve: python experiments/curve.py --workdir=DIR --output=FILE.png."""

import matplotlib
import script
from etils import epath

from densejax.config import UserError

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(workdir: epath.Path, output: epath.Path) -> None:
    """Writes a PNG: loss and error over epochs, and the result where the run is finished."""
    records = script.read_json(workdir / "metrics.jsonl", lines=True)
    config, summary = (script.read_json(workdir / f"{name}.json") for name in ("config", "summary"))
    if not (records and config):
        raise UserError(f"--workdir={workdir}: it is no run that has taken steps")
    augmented = config["augmentation"]["shift"] or config["augmentation"]["flip"]
    training = "training" + (", augmented" if augmented else "")
    training += ", smoothed labels" if config["train"]["label_smoothing"] else ""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "error"), strict=True):
        colors = {"train": "tab:blue", "validation": "tab:orange", "test": "tab:red"}
        for split, color in colors.items():
            key = f"{split}_loss" if quantity == "loss" else f"{split}_accuracy"
            points = [(record["epoch"], record[key]) for record in records if key in record]
            if not points:
                continue
            epochs, values = zip(*points, strict=True)
            if quantity == "error":
                values = [100 * (1 - value) for value in values]
            label = training if split == "train" else split
            marker = "." if len(points) < 50 else ""
            axis.plot(epochs, values, color=color, marker=marker, label=label)
        for split in ("validation", "test"):
            if summary and f"{split}_{quantity}" in summary:
                value = summary[f"{split}_{quantity}"] * (100 if quantity == "error" else 1)
                shown = f"{value:.2f} %" if quantity == "error" else f"{value:.3f}"
                label = f"{split}, result: {shown}"
                axis.plot([records[-1]["epoch"]], [value], "rD", label=label)
        axis.set_xlabel("epoch")
        axis.set_ylabel("cross-entropy (nats)" if quantity == "loss" else "error (%)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    if summary:
        config = summary["config"]
        figure.suptitle(f"{config['name']}: {summary['parameters']:,} parameters", fontsize=11)
    figure.savefig(output, dpi=150, format="png")


def main() -> None:
    """Draws what the flags say."""
    parser = script.Parser(__doc__)
    parser.add_argument("--workdir", type=script.path, required=True)
    parser.add_argument("--output", type=script.path, required=True)
    options = parser.parse_args()
    draw(options.workdir, options.output)


if __name__ == "__main__":
    script.run(main)
