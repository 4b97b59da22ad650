"""Writes a trained network as a folder of weights in another project's names, with a model card."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from densejax import config as schema
from densejax import models
from densejax.config import flatten, printable
from densejax.data.facts import without_lists
from densejax.inference.classifier import Classifier
from densejax.runs import files, formats, workdir
from densejax.training import result
from densejax.weights import conversion
from densejax.weights.names import PEERS

# Fields that only training or the speed depends on.
TRAINING_FIELDS = ("dropout_rate", "drop_path", "zero_init", "layer_scale", "recompute")
CARD = """\
---
{library}pipeline_tag: image-classification
tags:
- image-classification
- densejax
---
# {title}, {classes} classes

- **Network**: {title}, {parameters} parameters, float32
- **Images**: {images}
- **Values**: from 0 to 1, less the mean {mean}, divided by the standard deviation {std}
{training}
- **Classes**, in the order of the logits: `{class_names}`

## Load it

In this folder, {loading}
With densejax:

```python
from safetensors.numpy import load_file
from densejax import models, pretrained

model = models.create({model}, {classes})
variables = pretrained.from_torch(model, load_file("model.safetensors"))
```
"""
LOADING = {  # by whose names are written, where they have this network
    "timm": """with timm:

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
class_names = model.pretrained_cfg["label_names"]
```
""",
    "torchvision": """with torchvision:

```python
import json
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision import models

model = models.{peer}(num_classes={classes})
model.load_state_dict(load_file("model.safetensors"))
model.eval()
class_names = json.loads(safe_open("model.safetensors", "pt").metadata()["class_names"])
```
""",
    "": """the arrays have the names of {names}; no network of theirs is known to compute the same.
""",
}


def write(network: Classifier, source: epath.Path, names: str, output: str) -> str:
    """Writes a new folder: model.safetensors, README.md, and for timm config.json.

    The arrays are those of the network, bit for bit. The file's metadata have the class names, the
    mean and the std of values from 0 to 1, and the image's [height, width, channels], as JSON.

    Args:
      network: what is written.
      source: the directory that it was opened from, of a run or of weights.
      names: whose names the arrays get, of `densejax.weights.names.LAYOUTS`.
      output: the folder, which must not exist.

    Returns:
      The name under which the project of `names` has this network; "" where it has none.

    Raises:
      UserError: the project has no names for such a network, or the folder cannot be written.
    """
    path = files.new_path("--output", output)
    arrays = conversion.to_torch(network.model, network.variables, names)
    size = network.preparation.crop_size or network.preparation.image_size
    shape = (size, size, network.image_shape[-1]) if size else network.image_shape
    facts = {"class_names": network.class_names, "image_shape": shape}
    for key in ("mean", "std"):
        values = getattr(network.preparation, key)
        facts[key] = [value / network.white_level for value in values]
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    peer = peer_of(network, names)
    texts = {"README.md": _card(network, source, names, peer, facts)}
    if names == "timm" and peer:
        texts["config.json"] = json.dumps(_timm_config(network, peer, facts), indent=2) + "\n"
    with files.writing(f"--output={output}", "name another directory"):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(safetensors.numpy.save(arrays, metadata))
        for name, text in texts.items():
            (path / name).write_text(text)
    return peer


def peer_of(network: Classifier, project: str) -> str:
    """The name under which a project has a network that computes the same; "" where it has none."""

    def described(model):
        fields = _fields(models.reference(model))
        return {name: fields[name] for name in fields.keys() - set(TRAINING_FIELDS)}

    if project == "torchvision" and network.image_shape[-1] != 3:
        return ""
    layout = conversion.layout_of(network.model, project)
    for name, peer in PEERS.get(project, {}).items():
        if isinstance(network.model, models.FAMILIES[models.MODELS[name]["family"]]):
            model = models.create(models.fields(name, **layout.fields), len(network.class_names))
            if described(model) == described(network.model):
                return peer
    return ""


def _fields(model) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(model))
    return {name: getattr(model, name) for name in names if name not in models.RUN_FIELDS}


def _timm_config(network, peer, facts) -> dict[str, Any]:
    """config.json as `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it."""
    height, width, channels = facts["image_shape"]
    layout = conversion.layout_of(network.model, "timm")
    return {
        "architecture": peer,
        "num_classes": len(network.class_names),
        "label_names": network.class_names,
        "model_args": {"in_chans": channels},
        "pretrained_cfg": {
            "input_size": [channels, height, width],
            "interpolation": "bilinear",
            "crop_pct": min(height, width) / (network.resize_size or min(height, width)),
            "mean": facts["mean"],
            "std": facts["std"],
            "classifier": layout.name(conversion.CLASSIFIER[0]).removesuffix(".weight"),
        },
    }


def _card(network, source, names, peer, facts) -> str:
    """The text of the model card, by the customs of Hugging Face."""
    height, width, channels = facts["image_shape"]
    images, loading = f"{height}x{width}, {channels} channels", LOADING["" if not peer else names]
    if network.resize_size:
        images += f", the middle of an image whose shorter side has {network.resize_size} pixels"
    family = next(n for n, kind in models.FAMILIES.items() if isinstance(network.model, kind))
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(network.variables["params"]))
    return CARD.format(
        library="library_name: timm\n" if peer and names == "timm" else "",
        title=peer or type(network.model).__name__,
        classes=len(network.class_names),
        parameters=formats.count(parameters),
        images=images,
        mean=facts["mean"],
        std=facts["std"],
        training=_training(source),
        class_names=printable(json.dumps(network.class_names, ensure_ascii=False)),
        loading=loading.format(peer=peer, names=names, classes=len(network.class_names)),
        model={"family": family} | _fields(network.model),
    )


def _training(source: epath.Path) -> str:
    """How a run trained and what came out, as a list; of weights, where they are from."""
    if (source / "model.json").exists():
        described = json.loads((source / "model.json").read_text())
        return f"- **Weights**: converted from `{described.get('source')}`"
    config = without_lists(workdir.completed(json.loads((source / "config.json").read_text())))
    summary = result.read(source)
    data, train, optimizer = (config[name] for name in ("data", "train", "optimizer"))
    known = flatten(schema.default().to_dict())
    own = {key: v for key, v in flatten(config).items() if known.get(key, v) != v}
    start = f"the weights `{train['weights']}`" if train["weights"] else "random weights"
    found = (
        f"- **Training**: {data['name']}, {train['epochs']} epochs in batches of "
        f"{train['batch_size']} images, {optimizer['name']} with a learning rate of up to "
        f"{optimizer['learning_rate']}, from {start}; other than densejax's defaults are\n"
        f"  `{json.dumps(own)}`"
    )
    if summary and workdir.same_run(summary["config"], ConfigDict(config)):
        found += f"\n- **Result**: {result.line(summary, source).splitlines()[0]}"
    return found
