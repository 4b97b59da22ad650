"""Draws a run's learning curve: python experiments/curve.py --workdir=DIR --output=FILE.png."""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Writes a PNG: loss and accuracy over epochs, and the result where the run is finished."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    summary_file = workdir / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    config = json.loads((workdir / "config.json").read_text())
    augmented = config["augmentation"]["shift"] or config["augmentation"]["flip"]
    training = "training" + (", augmented" if augmented else "")
    training += ", smoothed labels" if config["train"]["label_smoothing"] else ""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "error"), strict=True):
        for split, color in (
            ("train", "tab:blue"),
            ("validation", "tab:orange"),
            ("test", "tab:red"),
        ):
            key = f"{split}_loss" if quantity == "loss" else f"{split}_accuracy"
            points = [(record["epoch"], record[key]) for record in records if key in record]
            if not points:
                continue
            epochs, values = zip(*points, strict=True)
            if quantity == "error":
                values = [100 * (1 - value) for value in values]
            label = training if split == "train" else split
            axis.plot(
                epochs, values, color=color, marker="." if len(points) < 50 else "", label=label
            )
        for split in ("validation", "test"):
            if f"{split}_{quantity}" in summary:
                value = summary[f"{split}_{quantity}"]
                value, text = (
                    (100 * value, "{:.2f} %") if quantity == "error" else (value, "{:.3f}")
                )
                label = f"{split}, result: {text.format(value)}"
                axis.plot([summary["config"]["train"]["epochs"]], [value], "rD", label=label)
        axis.set_xlabel("epoch")
        axis.set_ylabel("cross-entropy (nats)" if quantity == "loss" else "error (%)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    if summary:
        config = summary["config"]
        figure.suptitle(f"{config['name']}: {summary['parameters']:,} parameters", fontsize=11)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    draw(options.workdir, options.output)
