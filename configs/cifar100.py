"""DenseNet on CIFAR-100 by the paper's recipe; without arguments DenseNet-BC, L = 100, k = 12.

Paper:     Huang et al. 2017, "Densely Connected Convolutional Networks", Table 2 (C100+).
Data:      50,000 training images, all used; 10,000 test images, read once, after the last epoch.
Command:   python -m densejax.main --config=configs/cifar100.py
           ... --config=configs/cifar100.py:variant=plain,depth=40   (error 24.42 %, 1.1M)
           ... --config=configs/cifar100.py:augment=False            (column C100: dropout 0.2)
Hardware:  one accelerator; 800,032 parameters and 288M multiply-adds an image, 300 epochs.
Time:      not measured; --config.log.every_steps=10 shows images/s within a minute.
Expected:  test error 22.27 % (paper); its authors saw up to 1 % between runs.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant (plain, b, c, bc), depth, growth_rate,
    connect and augment.
    """
    args = schema.parse_arg(arg, model="densenet_bc_100_12", augment=True, **models.CHANGES)
    config = schema.default()  # its defaults are the paper's CIFAR recipe
    config.name = "cifar100"
    config.model = models.fields(args.model, **models.changes(args))
    config.data.name = "cifar100"
    if not args.augment:
        config.augmentation.shift = 0
        config.augmentation.flip = False
        if config.model.family == "densenet":
            config.model.dropout_rate = 0.2
    config.evaluate.every_epochs = 0
    return config
