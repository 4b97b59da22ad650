"""The model table: exact parameter counts and multiply-adds of every name, and its errors."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from densejax import models
from densejax.config import UserError
from densejax.models import counts
from densejax.models.resnet import ResNet

# Closed forms, for what nobody printed.


def total(convolutions, norms, width, classes):
    """(parameters, multiply-adds) of (pixels, weights) of convolutions, norms and a classifier."""
    parameters = sum(weights for _, weights in convolutions) + 2 * sum(norms)
    multiply_adds = sum(pixels * weights for pixels, weights in convolutions)
    return parameters + (width + 1) * classes, multiply_adds + width * classes


def densenet(blocks, k, stem, *, bottleneck=False, theta=1, classes=10, one_shot=False):
    size, convolutions, norms, width = 32, [(32**2, 9 * 3 * stem)], [], stem
    if classes == 1000:
        size, convolutions, norms = 56, [(112**2, 49 * 3 * stem)], [stem]
    for number, depth in enumerate(blocks, 1):
        reads = width
        for _ in range(depth):
            norms.append(reads)
            if bottleneck:
                convolutions += [(size**2, reads * 4 * k), (size**2, 9 * 4 * k * k)]
                norms.append(4 * k)
            else:
                convolutions.append((size**2, 9 * reads * k))
            reads = k if one_shot else reads + k
        width += depth * k
        norms.append(width)  # of the transition, or the network's last
        if number < len(blocks):
            convolutions.append((size**2, width * int(theta * width)))
            width, size = int(theta * width), size // 2
    return total(convolutions, norms, width, classes)


def resnet(
    blocks, widths, *, classes=10, bottleneck=False, preact=False, projection=False, late=False
):
    """`late`: the stride is on a bottleneck's 3x3, as in torchvision, and not on the first 1x1."""
    size, convolutions, norms = 32, [(32**2, 9 * 3 * widths[0])], [] if preact else [widths[0]]
    if classes == 1000:
        size, convolutions = 56, [(112**2, 49 * 3 * widths[0])]
    reads = widths[0]
    for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
        size = size // 2 if stage else size
        gives = 4 * width if bottleneck else width
        for index in range(depth):
            weights = [9 * reads * width, 9 * width**2]
            norms += [width, width]
            if bottleneck:
                weights = [reads * width, 9 * width**2, width * gives]
                norms.append(reads if preact else gives)
            if projection and index == 0 and reads != gives:
                weights.append(reads * gives)
                norms += [] if preact else [gives]
            pixels = [size**2] * len(weights)
            if late and stage and index == 0:
                pixels[0] *= 4
            convolutions += zip(pixels, weights, strict=True)
            reads = gives
    return total(convolutions, [*norms, reads] if preact else norms, reads, classes)


BLOCKS, WIDTHS, CIFAR_WIDTHS = (3, 4, 6, 3), (64, 128, 256, 512), (16, 32, 64)
BC = {"bottleneck": True, "theta": 0.5}
PREACT = {"bottleneck": True, "preact": True, "projection": True}

# name: (classes, image size, channels, parameters, multiply-adds as published or exact). ImageNet's
# counts are torchvision's; the CIFAR ones equal those of osmr/imgclsmob and the paper's Table 2.
# A plain network has the numbers of a residual one whose shortcuts have no parameters.
TABLE = {
    "densenet_40_12": (10, 32, 3, 1_019_722, "264.8M"),
    "densenet_100_12": (10, 32, 3, 6_979_642, "1.770G"),
    "densenet_100_24": (10, 32, 3, 27_249_082, "6.889G"),
    "densenet_b_100_12": (10, 32, 3, *densenet((16,) * 3, 12, 16, bottleneck=True)),
    "densenet_c_40_12": (10, 32, 3, 578_090, "192.0M"),
    "densenet_bc_40_12": (10, 32, 3, 176_122, "72.4M"),
    "densenet_bc_40_36": (10, 32, 3, 1_542_682, "0.647G"),
    "densenet_bc_40_48": (10, 32, 3, 2_733_130, "1.150G"),
    "densenet_bc_40_60": (10, 32, 3, 4_261_690, "1.796G"),
    "densenet_bc_100_12": (10, 32, 3, 769_162, "287.9M"),
    "densenet_bc_190_40": (10, 32, 3, 25_624_430, "9.302G"),
    "densenet_bc_250_24": (10, 32, 3, 15_324_406, "5.419G"),
    "sparsenet_bc_100_24": (100, 32, 3, 1_461_124, "641M"),  # the authors' code
    "densenet121": (1000, 224, 3, 7_978_856, "2.834G"),
    "densenet161": (1000, 224, 3, 28_681_000, "7.728G"),
    "densenet169": (1000, 224, 3, 14_149_480, "3.360G"),
    "densenet201": (1000, 224, 3, 20_013_928, "4.291G"),
    "densenet232": (1000, 224, 3, 55_570_984, "10.119G"),
    "densenet264": (1000, 224, 3, 33_337_704, "5.752G"),
    "densenet264_48": (1000, 224, 3, 72_686_632, "12.851G"),
    "densenet_d2l": (10, 96, 1, 758_226, "129.1M"),  # both by hand
    "densenet_one_shot_40_20": (10, 32, 3, *densenet((12,) * 3, 20, 16, one_shot=True)),
    "densenet_one_shot_40_27": (10, 32, 3, *densenet((12,) * 3, 27, 16, one_shot=True)),
    "densenet_one_shot_19_43": (10, 32, 3, *densenet((5,) * 3, 43, 16, one_shot=True)),
    "resnet18": (1000, 224, 3, 11_689_512, "1.814G"),
    "resnet34": (1000, 224, 3, 21_797_672, "3.664G"),
    "resnet50": (1000, 224, 3, 25_557_032, "4.089G"),
    "resnet101": (1000, 224, 3, 44_549_160, "7.801G"),
    "resnet152": (1000, 224, 3, 60_192_808, "11.514G"),
    "resnet20_cifar": (10, 32, 3, 269_722, "40.6M"),
    "resnet32_cifar": (10, 32, 3, 464_154, "68.9M"),
    "resnet44_cifar": (10, 32, 3, 658_586, "97.2M"),
    "resnet56_cifar": (10, 32, 3, 853_018, "125.5M"),
    "resnet110_cifar": (10, 32, 3, 1_727_962, "252.9M"),
    "resnet1202_cifar": (10, 32, 3, 19_421_274, "2.83G"),
    "preact_resnet164": (10, 32, 3, *resnet((18,) * 3, CIFAR_WIDTHS, **PREACT)),
    "preact_resnet1001": (10, 32, 3, *resnet((111,) * 3, CIFAR_WIDTHS, **PREACT)),
    "plain18": (1000, 224, 3, *resnet((2,) * 4, WIDTHS, classes=1000)),
    "plain34": (1000, 224, 3, *resnet(BLOCKS, WIDTHS, classes=1000)),
    "plain20_cifar": (10, 32, 3, 269_722, "40.6M"),
    "plain32_cifar": (10, 32, 3, 464_154, "68.9M"),
    "plain44_cifar": (10, 32, 3, 658_586, "97.2M"),
    "plain56_cifar": (10, 32, 3, 853_018, "125.5M"),
    "plain110_cifar": (10, 32, 3, 1_727_962, "252.9M"),
    "vovnet27_slim": (1000, 224, 3, 3_525_736, "2.177G"),
    "vovnet39": (1000, 224, 3, 22_600_296, "7.072G"),
    "vovnet57": (1000, 224, 3, 36_640_296, "8.930G"),
    # Of its networks by timm: parameters, and multiply-adds by the shapes of its layers.
    "ese_vovnet19b_dw": (1000, 224, 3, 6_543_080, "1.333G"),
    "ese_vovnet39b": (1000, 224, 3, 24_568_936, "7.074G"),
    "ese_vovnet57b": (1000, 224, 3, 38_608_936, "8.932G"),
    "rdnet_tiny": (1000, 224, 3, 23_863_008, "5.033G"),
    "rdnet_small": (1000, 224, 3, 50_436_448, "8.706G"),
    "rdnet_base": (1000, 224, 3, 87_451_096, "15.358G"),
    "rdnet_large": (1000, 224, 3, 186_269_632, "34.675G"),
    "rdnet_cifar": (10, 32, 3, 850_418, "36.4M"),  # ours: our own count
    # Of the authors' code, PingoLH/Pytorch-HarDNet, by the shapes of its layers.
    "hardnet39ds": (1000, 224, 3, 3_488_228, "429.5M"),
    "hardnet68": (1000, 224, 3, 17_565_348, "4.246G"),
    "hardnet68ds": (1000, 224, 3, 4_180_602, "775.3M"),
    "hardnet85": (1000, 224, 3, 36_670_212, "9.074G"),
}
# The same nets with other fields: the authors' code has stems of 2k, the paper's text of 16.
CHANGED = [
    ("densenet_40_12", {"stem_width": 24}, 10, 1_059_298, "282.9M"),
    ("densenet_100_24", {"stem_width": 48}, 10, 28_071_706, "7.266G"),
    ("densenet_c_40_12", {"stem_width": 24}, 10, 599_050, "205.9M"),
    ("densenet_b_100_12", {"stem_width": 24}, 10, 1_210_066, "376.8M"),
]
HUNDRED_CLASSES = {
    "densenet_40_12": 1_060_132,
    "densenet_100_12": 7_084_852,
    "densenet_100_24": 27_457_972,
    "densenet_bc_100_12": 800_032,
    "densenet_bc_250_24": 15_480_556,
    "densenet_bc_190_40": 25_821_620,
}


def rounded(number, published):
    """A number in the unit and with the digits of a published one, such as "1.770G"."""
    digits, unit = published[:-1], {"M": 1e6, "G": 1e9}[published[-1]]
    return f"{number / unit:.{len(digits.partition('.')[2])}f}{published[-1]}"


def test_every_name_is_in_the_table():
    assert list(models.MODELS) == list(TABLE)


def test_one_shot_width_27_comes_nearest_to_the_parameters_of_densenet_40():
    numbers = {k: densenet((12,) * 3, k, 16, one_shot=True)[0] for k in range(1, 60)}
    target = TABLE["densenet_40_12"][3]
    assert min(numbers, key=lambda k: abs(numbers[k] - target)) == 27


FORMS = [
    name
    for name, fields in models.MODELS.items()
    if fields["family"] in ("densenet", "resnet")
    and name not in ("densenet_d2l", "sparsenet_bc_100_24")
]


def by_fields(name, classes, **changes):
    """(parameters, multiply-adds) by the closed form, from a network's fields."""
    network = models.create(models.fields(name, **changes), classes)
    assert (network.stem == "imagenet") == (classes == 1000) and not network.convolution_bias
    if isinstance(network, ResNet):
        is_bottleneck = network.block == "bottleneck"
        return resnet(
            network.blocks,
            network.widths,
            classes=classes,
            bottleneck=is_bottleneck,
            preact=network.preactivation,
            projection=(network.connect, network.shortcut) == ("add", "projection"),
            late=is_bottleneck and network.stride_on == "3x3",
        )
    assert network.bottleneck_width == 4
    return densenet(
        network.block_depths(),
        network.growth_rate,
        network.widths()[0],
        bottleneck=network.bottleneck,
        theta=network.compression,
        classes=classes,
        one_shot=network.connect == "one_shot",
    )


def assert_printed(name, found):
    *_, parameters, multiply_adds = TABLE[name]
    assert found[0] == parameters
    if isinstance(multiply_adds, str):
        assert rounded(found[1], multiply_adds) == multiply_adds
    else:
        assert found[1] == multiply_adds


@pytest.mark.parametrize("name", FORMS)
def test_fields_of_a_name_give_the_printed_numbers(name):
    assert_printed(name, by_fields(name, TABLE[name][0]))


@pytest.mark.parametrize(
    "name, changes, classes",
    [
        ("densenet_40_12", {"depth": 10, "stem_width": 24}, 100),
        ("densenet_b_100_12", {"depth": 16}, 10),
        ("densenet_c_40_12", {"depth": 10}, 10),
        ("densenet_bc_100_12", {"depth": 16, "growth_rate": 8}, 10),
        ("densenet_one_shot_40_20", {"depth": 10}, 10),
        ("densenet121", {"blocks": (2, 1, 1, 2)}, 1000),
        ("resnet18", {"blocks": (1, 2, 1, 1)}, 1000),
        ("resnet50", {"blocks": (2, 1, 1, 1)}, 1000),
        ("plain18", {"blocks": (1, 1, 1, 1)}, 1000),
        ("plain20_cifar", {"blocks": (1, 2, 1)}, 10),
        ("preact_resnet164", {"blocks": (2, 1, 1)}, 10),
    ],
)
def test_a_network_has_the_counts_of_its_closed_form(name, changes, classes):
    size = 224 if classes == 1000 else 32
    network = models.create(models.fields(name, **changes), classes)
    assert counts.of_network(network, (size, size, 3)) == by_fields(name, classes, **changes)


TRACED = ("densenet_bc_40_12", "resnet20_cifar")  # the other forms are traced a few layers deep
SLOW = {name: pytest.mark.slow for name in FORMS if name not in TRACED}
LARGER = ("rdnet_small", "rdnet_base", "rdnet_large", "hardnet68ds", "hardnet85", "vovnet57")
SLOW |= dict.fromkeys((*LARGER, "ese_vovnet57b"), pytest.mark.slow)  # the code is the smaller ones'


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in TABLE])
def test_counts(name):
    classes, size, channels, *_ = TABLE[name]
    network = models.create(models.fields(name), classes)
    assert_printed(name, counts.of_network(network, (size, size, channels)))


def test_a_hundred_classes_have_the_printed_numbers():
    for name, number in HUNDRED_CLASSES.items():
        assert by_fields(name, 100)[0] == number


@pytest.mark.parametrize("name, changes, classes, parameters, multiply_adds", CHANGED)
def test_counts_of_other_stems(name, changes, classes, parameters, multiply_adds):
    found = by_fields(name, classes, **changes)
    assert (found[0], rounded(found[1], multiply_adds)) == (parameters, multiply_adds)


def test_fields_take_each_of_their_types():
    section = models.fields("densenet_bc_100_12")
    section.depth, section.blocks, section.growth_rate = None, (1, 2), (4, 8)
    section.stem_width = 6
    network = models.create(section, 10)
    assert network.block_depths() == (1, 2) and network.growth_rates() == (4, 8)
    section.depth = "forty"
    with pytest.raises(UserError, match="model.depth = 'forty'"):
        models.create(section, 10)


def test_create_passes_what_the_run_decides():
    network = models.create(models.fields("densenet_40_12"), 7, jnp.bfloat16, "data")
    assert (network.num_classes, network.dtype) == (7, jnp.bfloat16)
    assert network.batch_norm_axis == "data"


class Average(nn.Module):
    """A family without BatchNorm, and without the fields that a run may set."""

    num_classes: int
    width: int = 4

    def check(self):
        if self.width < 1:
            raise UserError(f"model.width = {self.width}: must be at least 1")

    @nn.compact
    def __call__(self, image, train=False, keys=None):
        maps = nn.relu(nn.Conv(self.width, (3, 3), strides=2, use_bias=False)(image))
        features = {"maps": maps, "average": maps.mean((1, 2))}
        if self.num_classes == 0:
            return None, features
        return nn.Dense(self.num_classes)(features["average"]), features


def test_a_family_without_batch_norm_is_as_good_as_any(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "average", Average)
    network = models.create({"family": "average", "width": 6}, 5, jnp.bfloat16, "data")
    assert (network.num_classes, network.width) == (5, 6)
    assert models.feature_info(network, (32, 32, 3)) == {"maps": (6, 2), "average": (6, None)}
    assert models.depth(network) == 2
    parameters, multiply_adds = 27 * 6 + 6 * 5 + 5, 16 * 16 * 27 * 6 + 6 * 5
    assert counts.of_network(network, (32, 32, 3)) == (parameters, multiply_adds)
    assert [row.name for row in counts.layers(network, (32, 32, 3))] == ["Conv_0", "Dense_0"]
    values = 32 * 32 * 3 + 27 * 6 + 16 * 16 * 6
    assert counts.memory_access_cost(network, (32, 32, 3)) == values
    with pytest.raises(UserError, match="model.width = 0: must be at least 1"):
        models.create({"family": "average", "width": 0}, 5)
    with pytest.raises(UserError, match="model.depth: the fields of average are width"):
        models.create({"family": "average", "depth": 3, "width": 4}, 5)


def test_changes_of_a_card():
    def changes(**given):
        return models.changes(models.CHANGES | given)

    assert changes() == {}
    assert changes(variant="bc") == {"bottleneck": True, "compression": 0.5}
    assert changes(variant="plain") == {"bottleneck": False, "compression": 1.0}
    assert changes(variant="b", depth=16) == {"bottleneck": True, "compression": 1.0, "depth": 16}
    expected = {"bottleneck": False, "compression": 0.5, "growth_rate": 4}
    assert changes(variant="c", growth_rate=4) == expected


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: models.fields("densenet_41"), ["model = 'densenet_41'", *models.MODELS]),
        (lambda: models.fields("densenet121", widht=3), ["model.widht", "stem_width", "blocks"]),
        (lambda: models.fields("densenet121", dtype="x"), ["model.dtype", "stem_width"]),
        (
            lambda: models.changes(models.CHANGES | {"variant": "d"}),
            ["variant = 'd'", "plain, b, c, bc"],
        ),
        (lambda: models.create({"family": "vgg"}, 10), ["model.family = 'vgg'", "densenet"]),
        (lambda: models.create({"family": "densenet"}, 10), ["model.batch_norm_epsilon"]),
        (
            lambda: models.create(models.fields("densenet121", compression=2.0), 10),
            ["model.compression = 2.0", "(0, 1]"],
        ),
        (
            lambda: models.create(models.fields("densenet121").to_dict() | {"width": 1}, 10),
            ["model.width", "fields of densenet", "stem_width"],
        ),
    ],
)
def test_errors_are_one_line(call, said):
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in said), line


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("densenet_bc_100_12", {"depth": None, "blocks": (3, 3, 3)}, 22),
        ("densenet121", {}, 121),
        ("resnet20_cifar", {}, 20),
        ("resnet50", {}, 50),  # the projections of four shortcuts lie beside the longest path
    ],
)
def test_depth_is_the_number_in_the_papers_names(name, changes, layers):
    assert models.depth(models.create(models.fields(name, **changes), 10)) == layers


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_is_called_by_its_name(name):
    assert models.described(models.fields(name)) == name


def test_another_network_is_called_by_its_family_and_what_differs():
    changed = models.fields("densenet_bc_40_12", depth=22, connect="chain")
    assert models.described(changed) == "densenet with depth = 22, connect = chain"
    default = models.fields("resnet20_cifar", shortcut="projection")
    assert models.described(default) == "resnet with the default fields"


@pytest.mark.parametrize("family", ["densenet", "resnet", "vovnet", "rdnet", "hardnet"])
def test_every_field_of_a_family_has_a_meaning(family):
    meanings = models.meanings(family)
    fields = next(fields for fields in map(models.fields, models.MODELS) if fields.family == family)
    assert meanings.keys() == set(fields.keys())
    assert all(text[0] != "(" for text in meanings.values())
