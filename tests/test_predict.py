"""Image files go in, the run's own classes come out."""

import functools
import io
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from densejax import predict
from densejax.config import UserError
from densejax.data import builders, encoded, facts
from densejax.inference import classifier, prediction
from densejax.runs import files
from densejax.training import experiment
from tests import photos, small
from tests.programs import shared_programs  # noqa: F401
from tests.test_command_line import ROOT, command, one_line  # noqa: F401


@pytest.fixture
def classify(command):  # noqa: F811
    """Runs the command on the trained run."""
    options = {"main": predict.main, "config": "unused", "arguments": True}
    return functools.partial(command, f"--workdir={small.trained()}", **options)


def as_files(folder, images):
    """Writes grey images, uint8 [n, height, width, 1], as PNG files; returns their paths."""
    paths = [str(folder / f"{index}.png") for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    return paths


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The test images as PNG files from black to white, and their labels."""
    images, labels = builders.read("digits", "test", str(small.SESSION / "data"))
    assert images.max() == 16
    ordinary = np.round(images * (255 / 16)).astype(np.uint8)
    return as_files(tmp_path_factory.mktemp("digits"), ordinary), labels


def test_accuracy_on_ordinary_files_is_the_run_s_own(classify, digits):
    paths, labels = digits
    code, output, error = classify(*paths, "--top=99", "--format=json")
    assert (code, error) == (0, "")
    found = json.loads(output)
    assert [result["image"] for result in found] == paths
    right = [result["classes"][0]["index"] == n for result, n in zip(found, labels, strict=True)]
    summary = json.loads((small.trained() / "summary.json").read_text())
    assert len(right) == summary["test_examples"] == 360
    assert np.mean(right) == pytest.approx(summary["test_accuracy"], abs=1e-9)
    for result in found:
        probabilities = [entry["probability"] for entry in result["classes"]]
        assert len(probabilities) == 10 and sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
        assert sorted(entry["name"] for entry in result["classes"]) == list("0123456789")
    code, output, _ = classify(paths[0], paths[1], "--top=2")
    lines, best = output.splitlines(), found[0]["classes"][0]
    assert code == 0 and len(lines) == 6 and (lines[0], lines[3]) == tuple(paths[:2])
    assert lines[1].split() == [f"{100 * best['probability']:.2f}", "%", best["name"]]


def test_what_is_unlike_the_training_images_is_named(classify, tmp_path):
    images = builders.read("digits", "test", str(small.SESSION / "data"))[0][:50]
    paths = as_files(tmp_path, np.concatenate([images, 255 - 15 * images]))  # dark; black on white
    code, output, error = classify(*paths, "--top=1", "--format=json")
    assert code == 0
    expected = "is unlike the training images, its class may be wrong"
    kinds = ["mean value"] * 50 + ["border"] * 50
    for path, what, found in zip(paths, kinds, json.loads(output), strict=True):
        assert f"densejax: {path} {expected}: {what} " in error
        assert any(text.startswith(what) for text in found["unlike"])


def test_of_no_image_nothing_is_predicted():
    assert prediction.predict(classifier.load(small.trained()), []) == []


def test_names_cannot_steer_the_terminal(classify, tmp_path, digits):
    path = shutil.copytree(small.trained(), tmp_path / "run")
    stored = files.unseal(json.loads((path / "data.json").read_text()))
    stored["class_names"] = [f"\x1b[2J{name}\n" for name in stored["class_names"]]
    (path / "data.json").write_text(json.dumps(files.seal(stored)))
    image = shutil.copy(digits[0][0], tmp_path / "\x1b[31m\udcff.png")
    code, output, error = classify(str(image), f"--workdir={path}", "--top=1")
    assert (code, error, len(output.splitlines())) == (0, "", 2)
    assert r"\x1b[31m\udcff.png" in output and r"\x1b[2J" in output and "\x1b" not in output


# --- The images of an evaluation and of files are one, bit for bit.


def photo_run(folder, crop_size):
    """A streamed run before its first step: its directory, its experiment, state and images."""
    photos.make(folder / "data", train=6, val=9)
    turned = folder / "data/val/n01/turned.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 6
    photos.photo(90, 64, 5).save(turned, "JPEG", exif=exif)
    config = small.tiny(
        data__name="photos",
        data__storage="stream",
        data__manual_dir=str(folder / "data"),
        data__normalization="scale",
        data__image_size=32,
        augmentation__shift=0,
        train__batch_size=8,
        evaluate__resize_size=40,
        evaluate__crop_size=crop_size,
        evaluate__batch_size=20,
    )
    built = experiment.build(config)
    state = built.init()
    noise = np.random.default_rng(0)  # so that images differ in their logits
    state = state.replace(
        params=jax.tree.map(lambda x: x + noise.normal(0, 0.3, x.shape).astype("f4"), state.params)
    )
    path = small.saved(folder / "run", config, (1, state, {}))
    facts.write(path, built.info, built.data.sample())
    images = sorted((folder / "data/val").rglob("*.JPEG"))
    return path, built, state, images


@pytest.mark.parametrize("crop_size", [0, 32])
def test_a_file_is_prepared_as_evaluation_does(tmp_path, crop_size):
    path, built, state, files = photo_run(tmp_path, crop_size)
    (batch,) = built.data.evaluation["test"].evaluation()
    measured = built.evaluate(state, "test")
    files = [
        shutil.copy(file, tmp_path / f"{i}.{file.parent.name}") for i, file in enumerate(files)
    ]
    shutil.rmtree(tmp_path / "data")  # the run needs it no more
    encoded.open_splits.cache_clear()
    network = classifier.load(path)
    read = np.stack([prediction.read(file, network) for file in files])
    np.testing.assert_array_equal(read, np.asarray(batch["image"])[: len(files)])
    found = prediction.predict(network, files)
    assert [len(result["unlike"]) for result in found] == [0] * len(files)
    losses = [
        -np.log(entry["probability"])
        for file, result in zip(files, found, strict=True)
        for entry in result["classes"]
        if file.suffix == f".{entry['name']}"
    ]
    assert len(losses) == 19 and np.ptp(losses) > 0.1
    assert np.mean(losses) == pytest.approx(measured["loss"], rel=1e-4)


def two_pixels():
    """A network whose logits are an image's two pixels, and the shapes it was traced with."""
    traced = []

    def logits(variables, images):
        traced.append(images.shape)
        return images.reshape(len(images), -1).astype(jnp.float32) * variables

    network = stored_as((1, 2, 1))
    network.variables, network.class_names, network.logits = np.float32(1), ("l", "r"), logits
    return network, traced


def test_many_images_are_one_program(tmp_path):
    network, traced = two_pixels()
    sides = np.arange(150) % 3 % 2
    for index, side in enumerate(sides):
        pixels = np.array([[9 * (1 - side), 9 * side]], np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    paths = tuple(tmp_path / f"{index}.png" for index in range(150))
    found = prediction.predict(network, paths, top=1)
    assert [result["classes"][0]["index"] for result in found] == sides.tolist()
    assert traced == [(64, 1, 2, 1)]


# --- Files become arrays.


def stored_as(image_shape, resize_size=0):
    """What `read` asks of a network."""
    return types.SimpleNamespace(
        image_shape=image_shape, resize_size=resize_size, white_level=255, usual_brightness={}
    )


def write(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_pixels_of_the_right_size_stay_as_they_are(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    path = write(tmp_path / "a.png", image)
    np.testing.assert_array_equal(prediction.read(path, stored_as((8, 6, 3))), image)


def test_colours_become_the_channels_that_are_wanted(tmp_path):
    image = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    colour, grey = write(tmp_path / "a.png", image), write(tmp_path / "b.png", image[..., 1])
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)  # ITU-R 601-2
    np.testing.assert_array_equal(
        prediction.read(colour, stored_as((4, 4, 1))), np.full((4, 4, 1), luma)
    )
    np.testing.assert_array_equal(
        prediction.read(grey, stored_as((4, 4, 3))), np.full((4, 4, 3), 100)
    )
    alpha = np.concatenate([image, np.full((4, 4, 1), 9, np.uint8)], axis=-1)
    np.testing.assert_array_equal(
        prediction.read(write(tmp_path / "c.png", alpha), stored_as((4, 4, 3))), image
    )


def test_another_size_is_resized_from_the_middle(tmp_path):
    wide = np.repeat(np.uint8([0, 80, 80, 0]), 4)[None].repeat(8, 0)  # 8 x 16, ends are black
    found = prediction.read(write(tmp_path / "a.png", wide), stored_as((4, 4, 1)))
    np.testing.assert_allclose(found, np.full((4, 4, 1), 80), atol=10)  # edges see beyond
    ramp = np.uint8([[0, 100]]).repeat(2, 0)
    found = prediction.read(write(tmp_path / "b.png", ramp), stored_as((4, 4, 1)))[0, :, 0]
    np.testing.assert_array_equal(found, [0, 25, 75, 100])  # bilinear, at pixels' centres


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_see_the_middle_of_a_file(tmp_path, channels):
    # torchvision: Resize(40), CenterCrop(32); 80 x 60 pixels become 53 x 40, two pixels a level.
    ramp = np.arange(80, dtype=np.uint8)[None].repeat(60, 0)
    path = write(tmp_path / "a.png", ramp)
    found = prediction.read(path, stored_as((32, 32, channels), resize_size=40))
    assert found.shape == (32, 32, channels)
    columns = 80 / 53 * (np.arange(10, 42) + 0.5) - 0.5
    np.testing.assert_allclose(found[16, :, 0], columns, atol=0.8)


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_networks_of_other_images_are_refused(tmp_path, channels):
    path = write(tmp_path / "a.png", np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(UserError, match=f"a.png: the network reads images of {channels} channels"):
        prediction.read(path, stored_as((8, 8, channels)))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the row 0 is the visual right-hand side
    image = np.zeros((8, 8, 3), np.uint8)
    image[0] = 255
    path = write(tmp_path / "a.png", image, exif=exif)
    turned = prediction.read(path, stored_as((8, 8, 3)))
    assert turned[:, -1].min() == 255 and turned[:, :-1].max() == 0


def test_images_that_cannot_be_read_are_named(tmp_path):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(content, "png")
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 9), 1000, np.uint16)).save(deep, "tiff")
    damaged = {
        "missing.png": None,
        "empty.png": b"",
        "text.jpg": b"no image",
        "cut.png": content.getvalue()[:2000],
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would run it
        "deep.tif": deep.getvalue(),  # of 16 bits a pixel
        "flipped.png": content.getvalue()[:500] + b"\x00" * 500 + content.getvalue()[1000:],
    }
    for name, data in damaged.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            prediction.read(tmp_path / name, stored_as((8, 8, 3)))
        text = str(caught.value)
        assert text.startswith(f"{tmp_path / name}: no image") and len(text.splitlines()) == 1


# --- Bad input.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name at least one image file"),
        (["none.png"], "none.png: no image that can be read ([Errno 2] No such file"),
        (["configs", "configs/digits.py"], "configs: there is no image in this folder (.jpg,"),
        (["{digit}", "--top=0"], "flag --top=0: "),
        (["{digit}", "--format=xml"], "flag --format=xml: "),
        (["{digit}", "--config=configs/digits.py"], "--config: nothing here reads it"),
        (["{digit}", "--workdir="], "--workdir=: give a value"),
        (["{digit}", "--workdir=configs"], "--workdir=configs: neither a run's directory nor"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_bad_input_is_one_line(classify, digits, arguments, says):
    arguments = [argument.replace("{digit}", digits[0][0]) for argument in arguments]
    assert one_line(classify(*arguments)).startswith(says)


def test_one_bad_file_costs_no_other_result(classify, digits, tmp_path):
    folder = tmp_path / "images"
    (folder / "folder.jpg").mkdir(parents=True)  # is no image, whatever its name
    shutil.copy(digits[0][0], folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    says = f"densejax: {folder}/bad.png: no image that can be read"
    code, output, error = classify(str(folder))
    assert code == 2 and output.startswith(f"{folder}/good.png\n") and "bad.png" not in output
    assert error.startswith(says) and error.count("\n") == 1
    code, output, error = classify(str(folder), "--format=json")
    bad, good = json.loads(output)
    assert code == 2 and says.endswith(bad["error"].partition(" (")[0]) and bad["classes"] == []
    assert len(good["classes"]) == 5 and "error" not in good


def test_a_damaged_checkpoint_is_refused(classify, digits, tmp_path):
    path = shutil.copytree(small.trained(), tmp_path / "run")
    for file in (path / "checkpoints").rglob("*"):
        if file.is_file() and "record" not in str(file):
            file.write_bytes(file.read_bytes()[:10])
    code, output, error = classify(digits[0][0], f"--workdir={path}")
    assert (code, output) == (2, "") and "no checkpoint is intact" in error


def test_a_folder_gives_the_images_below_it(classify, digits, tmp_path):
    names = ["b.png", "a/2.PNG", "a/10.png", "a/.hidden.png", ".git/c.png", "a/text.txt"]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digits[0][0], tmp_path / "photos" / name)
    single = str(shutil.copy(digits[0][1], tmp_path / "z.png"))
    words = [single, str(tmp_path / "photos"), digits[0][2], "--top=1", "--format=json"]
    found = [result["image"] for result in json.loads(classify(*words)[1])]
    below = [str(tmp_path / "photos" / name) for name in ("a/10.png", "a/2.PNG", "b.png")]
    assert found == [single, *below, digits[0][2]]
    (tmp_path / "none").mkdir()
    refused = one_line(classify(digits[0][0], str(tmp_path / "none")))
    assert refused.startswith(f"{tmp_path / 'none'}: there is no image in this folder (.jpg, ")


def test_how_many_images_are_done_is_told(tmp_path):
    Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / "0.png")
    said = []
    prediction.predict(two_pixels()[0], [tmp_path / "0.png"] * 150, 1, said.append)
    assert said == ["0 of 150 images", "64 of 150 images", "128 of 150 images"]
