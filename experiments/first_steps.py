"""First steps, in under a minute: python experiments/first_steps.py --output=DIR.

Builds a DenseNet, looks at it, trains it on scikit-learn's digits (1,437 images of 8x8) and draws
which earlier layers each of its layers reads. Read it from top to bottom; change a number and run
it again: a run of other settings has a folder of its own.
"""

import script

from densejax import config, models
from densejax.analysis import plots, reuse
from densejax.inference import classifier
from densejax.models import counts
from densejax.runs import formats, workdir
from densejax.training import loop, parallel


def main() -> None:
    """All four steps."""
    parser = script.Parser(__doc__)
    parser.add_argument("--output", type=script.path, required=True, help="folder for all of it")
    parser.add_argument("--epochs", type=script.positive, default=10, help="epochs of the run")
    options = parser.parse_args()
    parallel.start()  # remembers compiled programs: the second start is faster

    # 1. Build. A network is a name and the fields that you change in it. Here: three blocks of four
    # layers each. A layer reads all feature maps before it in its block and adds k = 8 new ones.
    network = models.fields("densenet_bc_40_12", depth=None, blocks=(4, 4, 4), growth_rate=8)
    model = models.create(network, num_classes=10)

    # 2. Look. Each block ends with its input and 4 x 8 more feature maps; a transition halves them.
    # Only shapes are computed here.
    rows = [("layer", "output", "parameters", "multiply-adds")]
    for layer in counts.layers(model, image_shape=(8, 8, 1), depth=1):
        shape = "x".join(map(str, layer.output_shape))
        rows.append((layer.name, shape, f"{layer.parameters:,}", f"{layer.multiply_adds:,}"))
    print(formats.table(rows, right=2))
    parameters, _ = counts.of_network(model, (8, 8, 1))
    print(f"{parameters:,} parameters in all\n")

    # 3. Train. A run is a configuration and a directory. densejax/config.py lists every key.
    settings = config.default()
    settings.name = "first_steps"
    settings.model = network
    settings.data.name = "digits"
    settings.augmentation.shift = 1  # pixels, at random
    settings.augmentation.flip = False  # a mirrored 2 is no 2
    settings.train.epochs = options.epochs
    settings.optimizer.schedule = "cosine"
    settings.checkpoint.every_epochs = options.epochs
    settings.log.every_steps = 10
    run = options.output / f"run-{workdir.digest(settings)[:8]}"
    loop.run(settings, str(run), mode="train")

    # 4. Use. The directory has all that is needed to classify images (see densejax.predict). The
    # weights say how much each layer reads from each source: the mean |weight| of its first
    # convolution for that source. The classifier's column is the last of block 3: does it read
    # the newest maps most?
    trained = classifier.load(run)
    maps = reuse.heat_maps(trained.model, trained.variables["params"])
    plots.save(plots.heat_maps(maps), options.output / "reuse.png")
    print(f"\nWhat the classifier reads, mean |weight| of each ({options.output}/reuse.png):")
    for source, weight in zip(maps[-1].sources, maps[-1].weights[:, -1], strict=True):
        print(f"{source:7} {weight:.3f} {'#' * round(50 * weight)}")


if __name__ == "__main__":
    script.run(main)
