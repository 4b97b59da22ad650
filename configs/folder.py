"""Your own images, from a folder of folders; DenseNet-121 without arguments.

Data:      FOLDER/class/image.jpg: a fifth of each class is held out for the test, always the same
           images. Or FOLDER/train/class/image.jpg and the same in test, val or both; if there are
           both, val is for --config.evaluate.split=validation. A folder is a split, never a class,
           if its name is train, training, val, valid, validation, test or testing. Images may have
           any size; JPEG, PNG, TIFF, WebP, BMP, GIF, PPM, PGM. If they need at most
           --config.data.memory_gigabytes=1 (about 7,000 images of 224x224), they lie on the device.
           Otherwise they are streamed; this needs `make imagenet`.
Command:   python -m densejax.main --config=configs/folder.py --config.data.manual_dir=FOLDER
           ... --config=configs/folder.py:model=densenet_bc_40_12,image_size=32  (small images)
           ... --config.train.weights=FILE --config.train.new_classifier \
               --config.data.normalization=weights                       (fine-tuning)
           ... --config.optimizer.learning_rate=0.1                      (from random weights)
           ... --config.data.channels=1                                          (grey)
           python -m densejax.predict --workdir=runs/folder-... photo.jpg
Hardware:  one accelerator for 224x224; two CPU cores for a few thousand images of 32x32.
Expected:  it depends on the images; the first lines of a run say how they were understood.
"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set model and image_size."""
    args = schema.parse_arg(arg, model="densenet121", image_size=224)
    config = schema.default()
    config.name = "folder"
    config.model = models.fields(args.model)
    config.data.name = "folder"
    config.data.storage = "auto"
    config.data.image_size = args.image_size
    config.data.workers = 2
    config.augmentation.shift = args.image_size // 8
    config.augmentation.crop_area = 0.35  # of a stream's images, closer to what a shift leaves
    config.train.epochs = 30
    config.train.batch_size = 32
    config.train.label_smoothing = 0.1
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1.0
    config.evaluate.batch_size = 64
    return config
