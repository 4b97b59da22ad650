"""DenseNet-BC on Fashion-MNIST at 14x14: the base of sweeps.

Network:   blocks of 1, 3 and 4 layers, k = 12: 60,352 parameters, 2.7M multiply-adds an image.
Data:      60,000 training images and 10,000 test images, read once, after the last epoch. The step
           resizes them from 28x28 to 14x14 (bilinear and antialiased).
Command:   python -m densejax.main --config=configs/fashion_mnist_small.py \
               --config.data.manual_dir=/usr/share/datasets/fashion-mnist
Sweeps:    python experiments/run.py --sweep=connectivity --root=runs/laboratory \
               --config=configs/fashion_mnist_small.py --config.train.epochs=2
Hardware:  2 CPU cores.
Time:      about a minute for two epochs.
Expected:  test accuracy 87.4 % (three seeds, standard deviation 0.25 %, an earlier version of the
           code) after two epochs with --config.train.epochs=2 --config.optimizer.learning_rate=0.4.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant, depth, growth_rate and connect."""
    args = schema.parse_arg(arg, model="", **models.CHANGES)
    config = schema.default()
    config.name = "fashion_mnist_small"
    blocks = {} if args.model else {"depth": None, "blocks": (1, 3, 4)}
    name = args.model or "densenet_bc_40_12"
    config.model = models.fields(name, **blocks | models.changes(args))
    config.data.name = "fashion_mnist"
    config.data.image_size = 14
    config.augmentation.shift = 2  # of 28 pixels
    config.train.epochs = 4
    config.train.batch_size = 128
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.5
    config.evaluate.every_epochs = 0
    config.evaluate.train_images = 10000
    return config
