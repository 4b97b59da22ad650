"""The DenseNet of the textbook "Dive into Deep Learning" by the recipe of its first edition.

Network:   7x7 stem of 64 channels, 4 blocks of 4 plain BN-ReLU-3x3 layers, k = 32, transitions
           that halve the channels (192 -> 96, 224 -> 112, 240 -> 120), convolutions with biases.
Data:      Fashion-MNIST resized to 96x96, pixels / 255; 60,000 training and 10,000 test images.
Command:   python -m densejax.main --config=configs/d2l_fashion_mnist.py
Hardware:  one accelerator; a CPU is slow. 10 epochs of batch 256 at learning rate 0.1.
Differs:   parameters are drawn as for all our networks (He, fan-out); the book draws them by
           Xavier's rule. Its later editions train with batch 128 at learning rate 0.01.
Expected:  the book prints a curve and no figure.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; it takes no arguments."""
    schema.parse_arg(arg)
    config = schema.default()
    config.name = "d2l_fashion_mnist"
    config.model = models.fields("densenet_d2l")
    config.data.name = "fashion_mnist"
    config.data.normalization = "scale"
    config.data.image_size = 96
    config.augmentation.shift = 0
    config.augmentation.flip = False
    config.train.epochs = 10
    config.train.batch_size = 256
    config.optimizer.momentum = 0.0
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "constant"
    return config
