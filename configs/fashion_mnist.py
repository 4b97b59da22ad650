"""placeholder"""

from densejax import config as schema
from densejax import models


def get_config(arg: str | None = None):
    """The card; `arg` may set depth, growth_rate."""
    args = schema.parse_arg(arg, depth=40, growth_rate=12)
    config = schema.default()
    config.name = "fashion_mnist"
    config.model = models.fields(
        "densenet_bc_40_12", depth=args.depth, growth_rate=args.growth_rate
    )
    config.data.name = "fashion_mnist"
    config.data.manual_dir = ""
    return config
