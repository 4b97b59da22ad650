"""Draws a run's learning curve: python experiments/curve.py --workdir=DIR --output=FILE.png."""

import script
from etils import epath

from densejax.analysis import plots
from densejax.config import UserError


def draw(workdir: epath.Path, output: epath.Path) -> None:
    """Writes a PNG: loss and error over epochs, and the result where the run is finished."""
    records = script.read_json(workdir / "metrics.jsonl", lines=True)
    config, summary = (script.read_json(workdir / f"{name}.json") for name in ("config", "summary"))
    if not (records and config):
        raise UserError(f"--workdir={workdir}: it is no run that has taken steps")
    augmentation = config["augmentation"]
    parts = ("shift", "flip", "cutout", "erasing", "mixup", "cutmix", "jitter", "lighting")
    augmented = any(map(augmentation.get, parts)) or augmentation.get("policy", "none") != "none"
    training = "training" + (", augmented" if augmented else "")
    training += ", smoothed labels" if config["train"]["label_smoothing"] else ""
    figure, panels = plots.figure(2, width=4.5, height=3.6)
    for axes, quantity in zip(panels, ("loss", "error"), strict=True):
        key = "loss" if quantity == "loss" else "accuracy"
        for number, split in enumerate(("train", "validation", "test")):
            points = [(r["epoch"], r[f"{split}_{key}"]) for r in records if f"{split}_{key}" in r]
            if points:
                epochs, values = zip(*points, strict=True)
                values = [100 * (1 - value) for value in values] if quantity == "error" else values
                look = plots.style(number) | ({} if len(points) < 50 else {"marker": ""})
                axes.plot(epochs, values, label=training if split == "train" else split, **look)
            if split != "train" and summary and f"{split}_{quantity}" in summary:
                value = summary[f"{split}_{quantity}"] * (100 if quantity == "error" else 1)
                shown = f"{value:.2f} %" if quantity == "error" else f"{value:.3f}"
                label = f"{split}, result: {shown}"
                axes.plot([records[-1]["epoch"]], [value], "rD", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy (nats)" if quantity == "loss" else "error (%)")
        axes.set_ylim(bottom=0)
        axes.legend()
    if summary:
        config = summary["config"]
        figure.suptitle(f"{config['name']}: {summary['parameters']:,} parameters", fontsize=11)
    plots.save(figure, output)


def main() -> None:
    """Draws what the flags say."""
    parser = script.Parser(__doc__)
    parser.add_argument("--workdir", type=script.path, required=True, help="the run's directory")
    parser.add_argument("--output", type=script.path, required=True, help="the picture to write")
    options = parser.parse_args()
    draw(options.workdir, options.output)


if __name__ == "__main__":
    script.run(main)
