"""How other projects call a network's variables: the layouts of each family."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

Rules = Mapping[str, Callable[..., str] | str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and axes of one project's weights.

    Attributes:
      project: whose names they are.
      rules: their layer for ours: a pattern of the whole path below "params", and a name or a
        function of the pattern's groups, numbers as integers.
      is_torch: kernels are [out, in, height, width] and [out, in], not ours transposed.
      aliases: patterns of other spellings that occur, and what stands here for them.
      sign: pattern of a name that weights of this project alone have; "": of those without one.
      fields: what the project's networks are; no name or shape shows it.
    """

    project: str
    rules: Rules
    is_torch: bool = True
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sign: str = ""

    def name(self, path: str) -> str | None:
        """Their name of our variable, such as "params/block1/layer3/conv2/kernel"; None: no rule.

        Args:
          path: collection, modules and variable with "/" between.
        """
        collection, _, rest = path.partition("/")
        layer, _, leaf = rest.rpartition("/")
        if self.is_torch:
            names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
            names |= {"mean": "running_mean", "var": "running_var"}
        else:
            names = {"kernel": "kernel", "scale": "gamma"}
            names |= {"bias": "beta" if "norm" in layer.rpartition("/")[2] else "bias"}
            names |= {"mean": "moving_mean", "var": "moving_variance"}
        for pattern, theirs in self.rules.items():
            if match := re.fullmatch(pattern, layer):
                groups = [int(part) if part.isdigit() else part for part in match.groups("")]
                theirs = theirs(*groups) if callable(theirs) else theirs
                return f"{theirs}{'.' if self.is_torch else '/'}{names[leaf]}"
        return None

    def spelled(self, name: str) -> str | None:
        """A name as this layout spells it; None for counts and the like."""
        if re.search(r"(^|[.:/])(num_batches_tracked|n_averaged|seed_generator.*)$", name):
            return None
        for pattern, replacement in self.aliases.items():
            name = re.sub(pattern, replacement, name)
        return name


_CLASSIFIER = "head/classifier"
_LAYER = r"block(\d+)/layer(\d+)/(norm|conv)(\d)"
_TRANSITION = r"transition(\d+)/(norm|conv)"
_STEM = r"stem/(norm|conv)"
_BLOCK = r"stage(\d+)_block(\d+)/(norm|conv)(\d)"
_PROJECTION = r"stage(\d+)_block(\d+)/projection(_norm)?"
_STEM3 = r"stem(\d)/(norm|conv)"
_CHAIN = r"stage(\d+)_module(\d+)/layer(\d+)/(norm|conv)"
_AGGREGATION = r"stage(\d+)_module(\d+)/aggregation/(norm|conv)"

_KERAS = {r":0$": ""}  # TensorFlow's output number
_SHORT = {"norm": "bn", "conv": "conv"}


def _author_vovnet(stage: int, module: int, layer: int | str, kind: str) -> str:
    place = f"OSA{stage + 1}_{module}"
    inner = "concat" if layer == "concat" else f"layers.{layer}"
    return f"stage{stage + 1}.{place}.{inner}.{place}_{layer}/{kind}"


_RESNET = {
    _STEM: lambda kind: f"{_SHORT[kind]}1",
    "stem_norm": "bn1",
    _BLOCK: lambda s, b, kind, i: f"layer{s}.{b - 1}.{_SHORT[kind]}{i}",
    _PROJECTION: lambda s, b, norm: f"layer{s}.{b - 1}.downsample.{int(bool(norm))}",
}
# By family; the first is the one that is written unless another is named.
LAYOUTS: dict[str, list[Layout]] = {
    "densenet": [
        Layout(
            "torchvision",  # and timm; others write norm.1 for norm1 and norm_final for norm5
            {
                _STEM: lambda kind: f"features.{kind}0",
                _LAYER: lambda b, n, kind, i: f"features.denseblock{b}.denselayer{n}.{kind}{i}",
                _TRANSITION: lambda t, kind: f"features.transition{t}.{kind}",
                "norm": "features.norm5",
                _CLASSIFIER: "classifier",
            },
            aliases={r"\.(norm|conv)\.(\d)\.": r".\1\2.", r"\.norm_final\.": ".norm5."},
        ),
        Layout(
            "keras",
            {
                _STEM: lambda kind: f"conv1_{_SHORT[kind]}",
                # A layer's norms are counted from 0, its convolutions from 1.
                _LAYER: lambda b, n, kind, i: (
                    f"conv{b + 1}_block{n}_{i - (kind == 'norm')}_{_SHORT[kind]}"
                ),
                _TRANSITION: lambda t, kind: f"pool{t + 1}_{_SHORT[kind]}",
                "norm": "bn",
                _CLASSIFIER: "predictions",
            },
            is_torch=False,
            aliases=_KERAS,
            fields={"batch_norm_epsilon": 1.001e-5},
        ),
    ],
    "resnet": [
        Layout(
            "torchvision",  # and timm
            _RESNET | {_CLASSIFIER: "fc"},
        ),
        Layout(
            "keras",
            {
                _STEM: lambda kind: f"conv1_{_SHORT[kind]}",
                _BLOCK: lambda s, b, kind, i: f"conv{s + 1}_block{b}_{i}_{_SHORT[kind]}",
                _PROJECTION: lambda s, b, norm: (
                    f"conv{s + 1}_block{b}_0_{'bn' if norm else 'conv'}"
                ),
                _CLASSIFIER: "predictions",
            },
            is_torch=False,
            aliases=_KERAS,
            fields={
                "batch_norm_epsilon": 1.001e-5,
                "convolution_bias": True,
                "stride_on": "1x1",
            },
        ),
        Layout(
            "pytorch-cifar",
            _RESNET
            | {
                _PROJECTION: lambda s, b, norm: f"layer{s}.{b - 1}.shortcut.{int(bool(norm))}",
                _CLASSIFIER: "linear",
            },
            fields={"shortcut": "projection"},
            sign=r"\.shortcut\.0\.weight$",
        ),
        Layout(
            "pytorch_resnet_cifar10",
            _RESNET | {_CLASSIFIER: "linear"},
            fields={"shortcut": "identity_middle"},
            sign=r"(^|[.:])linear\.weight$",
        ),
    ],
    "vovnet": [
        Layout(
            "authors",
            {
                _STEM3: lambda n, kind: f"stem.stem_{n}/{kind}",
                _CHAIN: lambda s, m, n, kind: _author_vovnet(s, m, n - 1, kind),
                _AGGREGATION: lambda s, m, kind: _author_vovnet(s, m, "concat", kind),
                _CLASSIFIER: "classifier",
            },
            fields={"identity": True},
        ),
        Layout(
            "timm",
            {
                _STEM3: lambda n, kind: f"stem.{n - 1}.{_SHORT[kind]}",
                _CHAIN: lambda s, m, n, kind: (
                    f"stages.{s - 1}.blocks.{m - 1}.conv_mid.{n - 1}.{_SHORT[kind]}"
                ),
                _AGGREGATION: lambda s, m, kind: (
                    f"stages.{s - 1}.blocks.{m - 1}.conv_concat.{_SHORT[kind]}"
                ),
                _CLASSIFIER: "head.fc",
            },
            fields={"identity": False},
        ),
    ],
}
