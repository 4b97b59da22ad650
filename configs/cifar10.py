"""DenseNet on CIFAR-10 by the paper's recipe; without arguments DenseNet-BC, L = 100, k = 12.

Paper:     Huang et al. 2017, "Densely Connected Convolutional Networks", Table 2 (C10+).
Data:      50,000 training images, all used; 10,000 test images, read once, after the last epoch.
Command:   python -m densejax.main --config=configs/cifar10.py
           ... --config=configs/cifar10.py:variant=plain,depth=40   (error 5.24 %, 1.0M)
           ... --config=configs/cifar10.py:augment=False            (column C10: dropout 0.2)
           ... --config=configs/cifar10.py:model=rdnet_cifar        (AdamW, as RDNet's authors)
Hardware:  one accelerator; 769,162 parameters and 288M multiply-adds an image, 300 epochs.
Time:      not measured; --config.log.every_steps=10 shows images/s within a minute.
Expected:  test error 4.51 % (paper); 4.77 % and 4.69 % in two independent reproductions.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model, variant (plain, b, c, bc), depth, growth_rate,
    connect and augment.
    """
    args = schema.parse_arg(arg, model="densenet_bc_100_12", augment=True, **models.CHANGES)
    config = schema.default()  # its defaults are the paper's CIFAR recipe
    config.name = "cifar10"
    config.model = models.fields(args.model, **models.changes(args))
    config.data.name = "cifar10"
    if not args.augment:
        config.augmentation.shift = 0
        config.augmentation.flip = False
        if config.model.family == "densenet":
            config.model.dropout_rate = 0.2
    if config.model.family == "rdnet":  # of its ImageNet recipe, not tuned for these images
        config.train.update(batch_size=512, label_smoothing=0.1)
        config.optimizer.update(name="adamw", nesterov=False, decay_all=False, weight_decay=0.05)
        config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_epochs=20.0)
    config.evaluate.every_epochs = 0
    return config
