"""Networks on ImageNet by DenseNet's recipe, RDNet's or a modern one; default DenseNet-121.

Paper:     Huang et al. 2017, "Densely Connected Convolutional Networks", section 4.1 and Table 3;
           crops, jitter and lighting as its code (facebook's fb.resnet.torch) has them.
Data:      1,281,167 training images; the 50,000 of the validation set are what a run calls test;
           prepared by TFDS as ArrayRecord, or --config.data.manual_dir=FOLDER with
           train/class/image.JPEG and val/class/image.JPEG.
Command:   python -m densejax.main --config=configs/imagenet.py
           ... --config=configs/imagenet.py:model=resnet50,recipe=modern
           ... --config=configs/imagenet.py:model=rdnet_tiny,recipe=rdnet
           ... --config.evaluate.crop_size=224 --mode=eval     (ten crops)
Hardware:  one accelerator or many; recipe=modern scales the rate with --config.train.batch_size.
           --config.data.workers is per host: as many as it has cores.
Differs:   BatchNorm's statistics are over the whole batch, the paper's over 64 images. The shorter
           side is resized to 256 by a bilinear antialiased filter; the paper uses a bicubic one.
           recipe=rdnet fills erased rectangles with the mean colour; its authors use noise.
Expected:  top-1 error, one crop / ten (paper): 121 25.02 / 23.61 %, 169 23.80 / 22.08 %,
           201 22.58 / 21.46 %, 264 22.15 / 20.80 %; RDNet-T, S, B, L 17.2, 16.3, 15.6, 15.2 %.
           Not yet run here.
"""

from densejax import config as schema
from densejax import models

DROP_PATH = {"rdnet_tiny": 0.15, "rdnet_small": 0.35, "rdnet_base": 0.4, "rdnet_large": 0.5}


def get_config(arg: str | None = None):
    """The card; `arg` may set model and recipe (paper, modern, rdnet)."""
    args = schema.parse_arg(arg, model="densenet121", recipe="paper")
    config = schema.default()
    config.name = "imagenet"
    config.model = models.fields(args.model)
    config.data.name = "imagenet2012"
    config.data.storage = "stream"
    config.data.image_size = 224
    config.data.workers = 16
    config.augmentation.shift = 0
    config.evaluate.batch_size = 256
    config.train.epochs = 90
    config.train.batch_size = 256
    if args.recipe == "paper":
        config.augmentation.jitter = 0.4
        config.augmentation.lighting = 0.1
        config.optimizer.drop_at = (1 / 3, 2 / 3)  # after 30 and 60 epochs
    elif args.recipe == "modern":
        config.train.update(batch_size=1024, label_smoothing=0.1, dtype="bfloat16")
        config.optimizer.update(reference_batch_size=256, decay_all=False)
        config.optimizer.update(schedule="cosine", warmup_epochs=5.0)
    elif args.recipe == "rdnet" and args.model in DROP_PATH:  # their train_configs/rdnet.yaml
        config.model.drop_path = DROP_PATH[args.model]
        config.train.update(epochs=300, batch_size=512, label_smoothing=0.1, dtype="bfloat16")
        config.optimizer.update(name="adamw", nesterov=False, decay_all=False, weight_decay=0.05)
        config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_epochs=20.0)
        config.augmentation.update(policy="randaugment", erasing=0.25, mixup=0.8, cutmix=1.0)
        config.evaluate.resize_size = 248
    else:
        recipes = f"paper, modern, and rdnet for {', '.join(DROP_PATH)}"
        raise schema.UserError(f"recipe = {args.recipe}: allowed are {recipes}")
    return config
