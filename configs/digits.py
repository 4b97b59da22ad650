"""DenseNet-BC on scikit-learn's digits: a whole run within a minute, to see that all works.

Data:      1,797 grey images of 8x8, permuted in a fixed way: 360 for the test, 1,437 for training.
Command:   python -m densejax.main --config=configs/digits.py
Hardware:  2 CPU cores.
Expected:  test accuracy above 0.98.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant, depth, growth_rate and connect."""
    args = schema.parse_arg(arg, model="", **models.CHANGES)
    config = schema.default()
    config.name = "digits"
    depth = {} if args.model else {"depth": 22}
    name = args.model or "densenet_bc_40_12"
    config.model = models.fields(name, **depth | models.changes(args))
    config.data.name = "digits"
    config.augmentation.shift = 1
    config.augmentation.flip = False
    config.train.epochs = 30
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 2.0
    config.evaluate.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
