"""DenseNet-BC on Fashion-MNIST: at most 200,000 parameters, an hour on two CPU cores.

Network:   blocks of 3, 6 and 11 layers, k = 12: few layers where feature maps are large, since
           that is where the time goes. 199,798 parameters, 34.0M multiply-adds an image.
Data:      60,000 training images and 10,000 test images, read once, after the last epoch.
Command:   python -m densejax.main --config=configs/fashion_mnist.py \
               --config.data.manual_dir=/usr/share/datasets/fashion-mnist
Hardware:  2 CPU cores.
Time:      53 minutes beside other programs, with the settings in experiments/results/fashion_mnist.
Expected:  test accuracy 94.25 % (seed 0; experiments/results/fashion_mnist has the run).
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant, depth, growth_rate, connect and tune (on held-out
    images).
    """
    args = schema.parse_arg(arg, model="", tune=False, **models.CHANGES)
    config = schema.default()
    config.name = "fashion_mnist"
    blocks = {} if args.model else {"depth": None, "blocks": (3, 6, 11)}
    name = args.model or "densenet_bc_40_12"
    config.model = models.fields(name, **blocks | models.changes(args))
    config.data.name = "fashion_mnist"
    config.augmentation.shift = 2
    config.train.epochs = 20
    config.train.batch_size = 128
    config.train.label_smoothing = 0.1
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1.0
    config.evaluate.every_epochs = 0
    if args.tune:  # test images are not read
        config.data.validation_size = 5000
        config.evaluate.every_epochs = 1
        config.evaluate.split = "validation"
        config.evaluate.final_split = "validation"
    return config
