"""Compares densejax with torchvision and timm: logits, one training step, running statistics.

    pip install torch torchvision timm
    python experiments/parity_torch.py [--size=64] [--hardnet=FILE] [name ...]

Each network is built there with random weights and statistics, carried over by
densejax.pretrained.from_torch, and given the same images. Per network one line: the largest
difference as a share of the largest value, of the logits in eval and in train mode, of the
gradient (the worst parameter), and of the running mean and variance after one step. PyTorch keeps
the unbiased variance of a batch, Flax the biased: n / (n - 1) of the batch's part, n its pixels, is
between them, and the last column is the difference without that factor. Exits with 1 above 1e-5.

Everything is computed in float64 (but for pooling, float32 here): in float32 the gradients of deep
networks differ by percents, because rounding decides which ReLUs are open. --float32 shows that.

timm's networks are called "timm/name" and are left out where timm is not installed. With --hardnet,
the file hardnet.py of PingoLH/Pytorch-HarDNet, its networks are compared too. A parameter before a
norm that takes its effect away has a gradient of rounding errors, and is compared with the largest.
"""

import argparse
import importlib.util
import runpy
import sys

import jax
import numpy as np
import torch
import torchvision

from densejax import models, pretrained

LIMIT = 1e-5
TORCHVISION = (
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
)
TIMM = {
    "timm/densenet121": "densenet121",
    "timm/resnet18": "resnet18",
    "timm/resnet50": "resnet50",
    "timm/vovnet39a": "vovnet39",
    "timm/vovnet57a": "vovnet57",
    "timm/ese_vovnet19b_dw": "ese_vovnet19b_dw",
    "timm/ese_vovnet39b": "ese_vovnet39b",
    "timm/rdnet_tiny": "rdnet_tiny",
}
HARDNET = {"hardnet39ds": 39, "hardnet68": 68, "hardnet68ds": 68, "hardnet85": 85}


def build(name, dtype, hardnet="", classes=100):
    """The peer's network with random statistics, scales and biases, and ours."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        peer = timm.create_model(name.partition("/")[2], num_classes=classes)
        fields = {"identity": False} if name.startswith("timm/vovnet") else {}
        fields = models.fields(TIMM[name], **fields)
    elif name in HARDNET:
        authors = runpy.run_path(hardnet)["HarDNet"]
        peer = authors(depth_wise=name.endswith("ds"), arch=HARDNET[name], pretrained=False)
        peer.base[-1][3] = torch.nn.Linear(peer.base[-1][3].in_features, classes)
        for module in peer.modules():
            module.p = 0.0  # of dropout
        fields = models.fields(name, dropout_rate=0.0)
    else:
        peer = getattr(torchvision.models, name)(num_classes=classes)
        fields = models.fields(name)
    for key, value in peer.state_dict().items():
        if key.endswith("running_var") or (key.endswith(("weight", "gamma")) and value.ndim == 1):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("bias", "running_mean")):
            value.normal_(0, 0.2)
    for module in peer.modules():  # PyTorch's own gradient has a factor of float32, 1 / 6
        if isinstance(module, torch.nn.Hardsigmoid):
            module.forward = lambda x: (x / 6 + 0.5).clamp(0, 1)
    return peer, models.create(fields, classes, dtype)


def arrays(state):
    """NumPy copies: PyTorch changes its buffers in place."""
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def distance(found, expected, least=1e-30):
    """The largest difference as a share of the largest expected value, or of `least`."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), least))


def compare(name, size, batch, dtype, hardnet):
    """The differences of one network, by what differs."""
    peer, model = build(name, dtype, hardnet)
    random = np.random.default_rng(0)
    image = random.normal(size=(batch, 3, size, size)).astype(dtype)
    direction = random.normal(size=(batch, 100)).astype(dtype) / dtype(batch)
    variables = pretrained.from_torch(model, arrays(peer.state_dict()))
    variables = jax.tree.map(lambda array: array.astype(dtype), variables)
    peer = peer.double() if dtype is np.float64 else peer

    with torch.no_grad():
        expected = peer.eval()(torch.from_numpy(image)).numpy()
    ours = np.moveaxis(image, 1, -1)
    found = {"eval logits": distance(jax.jit(model.apply)(variables, ours)[0], expected)}

    pixels = {}  # of each norm: images x height x width
    for key, module in peer.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, args, out, key=key: pixels.update({key: out.numel() // out.shape[1]})
            )
    before = arrays(peer.state_dict())
    logits = peer.train()(torch.from_numpy(image))
    (logits * torch.from_numpy(direction)).sum().backward()

    def loss(params):
        (logits, _), updates = model.apply(
            variables | {"params": params}, ours, True, mutable=["batch_stats"]
        )
        return (logits * direction).sum(), (logits, updates.get("batch_stats", {}))

    gradient, (trained, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    found["train logits"] = distance(trained, logits.detach().numpy())
    gradient = pretrained.to_torch(model, {"params": jax.device_get(gradient)}, project(name))
    theirs = arrays({key: value.grad for key, value in peer.named_parameters()})
    assert gradient.keys() == theirs.keys()
    least = 1e-6 * max(np.abs(array).max() for array in theirs.values())
    found["gradient"] = max(distance(gradient[key], theirs[key], least) for key in theirs)

    after = arrays(peer.state_dict())
    stats = pretrained.to_torch(model, {"batch_stats": jax.device_get(stats)}, project(name))
    means, variances, raw = [], [], []
    for key, number in pixels.items():
        mean, var = f"{key}.running_mean", f"{key}.running_var"
        means.append(distance(stats[mean], after[mean]))
        batch_part = after[var] - 0.9 * before[var]  # unbiased
        biased = 0.9 * before[var] + batch_part * (number - 1) / number
        variances.append(distance(stats[var], biased))
        raw.append(distance(stats[var], after[var]))
    if pixels:
        found |= {"mean": max(means), "variance": max(variances), "unbiased": max(raw)}
    return found


def project(name):
    """The project whose parameter names are written."""
    return "timm" if "vovnet" in name else ""


def main():
    """Prints one line per network; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=8, help="images of a batch")
    parser.add_argument("--hardnet", default="", help="the file hardnet.py of its authors")
    parser.add_argument("--float32", action="store_true", help="instead of float64")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", not options.float32)
    dtype = np.float32 if options.float32 else np.float64
    known = [*TORCHVISION, *(TIMM if importlib.util.find_spec("timm") else ())]
    known += HARDNET if options.hardnet else ()
    if unknown := set(options.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: known here are {', '.join(known)}")
    worst = 0.0
    for name in options.names or known:
        found = compare(name, options.size, options.batch, dtype, options.hardnet)
        print(f"{name:18}", *(f"{what} {error:.1e}" for what, error in found.items()), flush=True)
        worst = max([worst, *(error for what, error in found.items() if what != "unbiased")])
    print(f"largest {worst:.1e}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"jax {jax.__version__}")  # fmt: skip
    return int(not worst < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
