"""DenseNet on Street View House Numbers by the paper's recipe; DenseNet-BC, L = 100, k = 12.

Paper:     Huang et al. 2017, "Densely Connected Convolutional Networks", section 4 (SVHN).
Data:      73,257 + 531,131 training images, of which 6,000 of the first part are held out;
           26,032 test images, read once, by the model with the lowest held-out error.
Command:   python -m densejax.main --config=configs/svhn.py
           ... --config=configs/svhn.py:variant=plain,depth=100,growth_rate=24
Hardware:  one accelerator with 4 GiB free for the images; 40 epochs.
Time:      not measured; --config.log.every_steps=10 shows images/s within a minute.
Expected:  test error 1.59 % for variant=plain,depth=100,growth_rate=24 (arXiv v1, abstract).
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant (plain, b, c, bc), depth, growth_rate, connect."""
    args = schema.parse_arg(arg, model="densenet_bc_100_12", **models.CHANGES)
    config = schema.default()
    config.name = "svhn"
    config.model = models.fields(args.model, **models.changes(args))
    if config.model.family == "densenet":
        config.model.dropout_rate = 0.2
    config.data.name = "svhn"
    config.data.train_split = "train+extra"
    config.data.validation_size = 6000
    config.data.normalization = "scale"
    config.augmentation.shift = 0
    config.augmentation.flip = False
    config.train.epochs = 40
    config.evaluate.split = "validation"
    config.checkpoint.select = "best"
    return config
