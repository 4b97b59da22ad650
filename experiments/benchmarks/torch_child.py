"""The process of an implementation in PyTorch (see turns.py); needs torch alone.

The network is torchvision's own class where it has one that fits, with our CIFAR stem in the place
of its own, or timm's VoVNet or RDNet, and otherwise a DenseNet of the same layers and names,
written here. bfloat16 is autocast, as PyTorch's users write it.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from turns import Unavailable, serve

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional
except ModuleNotFoundError as error:
    print(json.dumps({"unavailable": f"{error.name} is not installed"}))
    sys.exit()

try:
    import torchvision
except ModuleNotFoundError:
    torchvision = None


class Layer(nn.Module):
    """BN-ReLU-3x3, after a bottleneck BN-ReLU-1x1 where the network has one."""

    def __init__(self, width: int, fields: Mapping[str, Any]) -> None:
        """From its input's channels and the fields of densejax.models.densenet.DenseNet."""
        super().__init__()
        sizes = [(fields["growth_rate"], 3)]
        if fields["bottleneck"]:
            sizes.insert(0, (fields["bottleneck_width"] * fields["growth_rate"], 1))
        self.depth = len(sizes)
        for index, (output, size) in enumerate(sizes, 1):
            bias = fields["convolution_bias"]
            setattr(self, f"norm{index}", nn.BatchNorm2d(width, fields["batch_norm_epsilon"]))
            conv = nn.Conv2d(width, output, size, padding=size // 2, bias=bias)
            setattr(self, f"conv{index}", conv)
            width = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps features to themselves and, after them, new ones."""
        y = x
        for index in range(1, self.depth + 1):
            y = functional.relu(getattr(self, f"norm{index}")(y), inplace=True)
            y = getattr(self, f"conv{index}")(y)
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    """A DenseNet with torchvision's names."""

    def __init__(self, fields: Mapping[str, Any], widths: list[int], depths: list[int],
                 num_classes: int) -> None:  # fmt: skip
        """From our fields and the widths that enter each block."""
        super().__init__()
        self.features = features = nn.Sequential()
        width, epsilon = widths[0], fields["batch_norm_epsilon"]
        bias = fields["convolution_bias"]
        if fields["stem"] == "imagenet":
            features.conv0 = nn.Conv2d(3, width, 7, 2, 3, bias=bias)
            features.norm0 = nn.BatchNorm2d(width, epsilon)
            features.relu0, features.pool0 = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        else:
            features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        for block, depth in enumerate(depths, 1):
            layers, width = nn.Sequential(), widths[block - 1]
            for index in range(1, depth + 1):
                layers.add_module(f"denselayer{index}", Layer(width, fields))
                width += fields["growth_rate"]
            features.add_module(f"denseblock{block}", layers)
            if block < len(depths):
                transition = nn.Sequential()
                transition.norm = nn.BatchNorm2d(width, epsilon)
                transition.relu = nn.ReLU(inplace=True)
                transition.conv = nn.Conv2d(width, widths[block], 1, bias=bias)
                transition.pool = nn.AvgPool2d(2, 2)
                features.add_module(f"transition{block}", transition)
        features.norm5 = nn.BatchNorm2d(width, epsilon)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images [batch, 3, height, width] to logits [batch, classes]."""
        return self.classifier(functional.relu(self.features(x), inplace=True).mean((2, 3)))


def network_of(spec: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """(network, whose class it is); raises Unavailable where neither form fits."""
    fields, classes = spec["fields"], spec["num_classes"]
    if fields["family"] == "densenet":
        if fields["connect"] != "dense" or not isinstance(fields["growth_rate"], int):
            raise Unavailable(f"the benchmark has no PyTorch form of {spec['work']['model']}")
        own = (fields["bottleneck"], fields["compression"], fields["convolution_bias"])
        if torchvision is None or own != (True, 0.5, False):
            return DenseNet(fields, spec["widths"], spec["depths"], classes), "torch layers"
        width = spec["widths"][0]
        network = torchvision.models.DenseNet(
            fields["growth_rate"],
            spec["depths"],
            width,
            bn_size=fields["bottleneck_width"],
            num_classes=classes,
        )
        if fields["stem"] == "cifar":
            stem = {"conv0": nn.Conv2d(3, width, 3, padding=1, bias=False)}
            rest = dict(list(network.features.named_children())[4:])
            network.features = nn.Sequential()
            for name, module in (stem | rest).items():
                network.features.add_module(name, module)
    elif fields["family"] in ("vovnet", "rdnet"):
        import timm

        name = spec["work"]["model"]
        if name.startswith("vovnet"):
            name += "a"  # with our identities it is another of their networks
        return timm.create_model(name, num_classes=classes), f"timm {timm.__version__}"
    elif torchvision is None:
        raise Unavailable("torchvision is not installed")
    elif spec["work"]["fields"] or not hasattr(torchvision.models, spec["work"]["model"]):
        raise Unavailable(f"torchvision has no {spec['work']['model']} of these fields")
    else:
        network = getattr(torchvision.models, spec["work"]["model"])(num_classes=classes)
    return network, "torchvision"


def build(spec: Mapping[str, Any]) -> tuple[dict[str, Any], Callable]:
    """From a specification (see compare.py) to facts and the function that takes one step."""
    name, _, layout = spec["implementation"].partition(":")
    directory = pathlib.Path(spec["directory"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, source = network_of(spec)
    if not (directory / "torch.npz").exists():
        raise Unavailable(f"{spec['work']['model']} has no weights by PyTorch's names")
    weights = np.load(directory / "torch.npz")
    known = {key: torch.from_numpy(weights[key]) for key in weights}
    missing, unexpected = network.load_state_dict(known, strict=False)
    wrong = [key for key in missing if not key.endswith("num_batches_tracked")] + unexpected
    if wrong:
        raise Unavailable(f"{source}: the network differs from ours in {wrong[0]}")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = network.to(device, memory_format=form)
    batch = np.load(directory / "batch.npz")
    images = torch.from_numpy(batch["input"]).permute(0, 3, 1, 2)
    images = images.to(device).contiguous(memory_format=form)
    labels = torch.from_numpy(batch["label"]).long().to(device)
    settings = spec["optimizer"]
    optimizer = torch.optim.SGD(
        network.parameters(),
        settings["learning_rate"],
        settings["momentum"],
        weight_decay=settings["weight_decay"],
        nesterov=settings["nesterov"],
    )
    is_training = spec["mode"] == "train"
    network.train(is_training)
    forward = network
    if name in ("torch_compile", "torch_graphs"):  # the second replays CUDA graphs
        mode = "reduce-overhead" if name == "torch_graphs" else "default"
        forward = torch.compile(network, mode=mode)

    dtype = getattr(torch, spec["work"]["dtype"])
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    @torch.inference_mode()
    def classify():
        with precision:
            return forward(images)

    def take_step():
        found = (train if is_training else classify)()

        def wait():
            if device.type == "cuda":
                torch.cuda.synchronize()
            return found.float()

        return wait

    start = time.perf_counter()
    try:
        first = take_step()()
    except Exception as error:  # whatever a compiler may raise
        if name == "torchvision":
            raise
        raise Unavailable(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
    compiling = {} if name == "torchvision" else {"compile_seconds": time.perf_counter() - start}
    if device.type == "cuda":
        compiling["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    check = {"loss": [first.item()]} if is_training else {"logits": first[0].tolist()}
    if is_training:  # after one step the buffer is that step's gradient, weight decay added
        buffers = [held["momentum_buffer"] for held in optimizer.state.values()]
        check["gradient"] = sorted(buffer.double().norm().item() for buffer in buffers)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__}
    if source == "torchvision":
        versions["torchvision"] = torchvision.__version__
    return compiling | {
        "device": f"1 x {kind}",
        "versions": versions,
        "network": source,
        "check": check,
    }, take_step


if __name__ == "__main__":
    serve(build)
