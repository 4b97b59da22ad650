"""Files of PyTorch and Keras, and files made to execute, to fill memory or to read others."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from densejax.config import UserError
from densejax.weights import files

STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage"}
LEGACY = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


class Storage:
    """What torch.save writes beside its pickle."""

    def __init__(self, array, kind):
        self.data, self.size, self.kind = array.tobytes(), array.size, kind


class Tensor:
    """A tensor as torch.save describes it; every number may be a lie."""

    def __init__(self, array, offset=0, shape=None, strides=None, kind=""):
        kind = kind or STORAGES.get(array.dtype.str[1:], "BFloat16Storage")
        contiguous = tuple(step // array.itemsize for step in array.strides)
        self.arguments = (
            *(Storage(array, kind), offset, array.shape if shape is None else shape),
            *(contiguous if strides is None else strides, False, collections.OrderedDict()),
        )


def torch_name(name):
    """A class that is pickled by a name of torch's."""
    module, _, qualname = name.rpartition(".")
    return type(qualname, (), {"__module__": module})


NAMES = {
    name: torch_name(name)
    for name in (
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{kind}" for kind in STORAGES.values()),
    )
} | {f"torch.{kind}": torch_name(f"torch.{kind}") for kind in ("BFloat16Storage", "QInt8Storage")}


class Pickler(pickle.Pickler):
    """Torch's: a storage is named in the pickle and written beside it."""

    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, thing):
        if not isinstance(thing, Storage):
            return None
        self.storages.append(thing)
        key = str(len(self.storages) - 1)
        return "storage", NAMES[f"torch.{thing.kind}"], key, "cpu", thing.size

    def reducer_override(self, thing):
        if isinstance(thing, np.ndarray):
            thing = Tensor(thing)
        if not isinstance(thing, Tensor):
            return NotImplemented
        return NAMES["torch._utils._rebuild_tensor_v2"], thing.arguments


def torch_file(tree, legacy=False, protocol=2, compression=zipfile.ZIP_STORED, data=None):
    """The bytes that torch.save writes of a tree of arrays; `data` in the place of the pickle."""
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, thing in NAMES.items():
            module = name.rpartition(".")[0]
            if module not in sys.modules:
                patch.setitem(sys.modules, module, types.ModuleType(module))
            patch.setattr(sys.modules[module], thing.__name__, thing, raising=False)
        pickler = Pickler(file, protocol)
        pickler.dump(tree)
    data, storages = data or file.getvalue(), pickler.storages
    written = io.BytesIO()
    if legacy:
        keys = [str(index) for index in range(len(storages))]
        parts = [pickle.dumps(part, 2) for part in LEGACY] + [data, pickle.dumps(keys, 2)]
        parts += [struct.pack("<q", s.size) + s.data for s in storages]
        return b"".join(parts)
    with zipfile.ZipFile(written, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for index, storage in enumerate(storages):
            archive.writestr(f"archive/data/{index}", storage.data)
    return written.getvalue()


def read(path, data):
    path.write_bytes(data)
    return files.read(str(path))[0]


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, np.int64, ml_dtypes.bfloat16]
)
def test_tensors_of_every_form_are_read(tmp_path, legacy, protocol, dtype):
    array = ARRAY.astype(dtype)
    tree = {
        "state_dict": {"a": array, "b": np.asarray(array[0, 0])},
        "epoch": 3,
        "names": ["x", None, True],
    }
    found = read(tmp_path / "a.pth", torch_file(tree, legacy, protocol))
    assert found.keys() == {"state_dict::a", "state_dict::b"}
    assert found["state_dict::a"].dtype == array.dtype
    np.testing.assert_array_equal(found["state_dict::a"], array)
    assert found["state_dict::b"].shape == ()


def test_a_tensor_is_a_view_of_its_storage(tmp_path):
    turned = Tensor(ARRAY, offset=1, shape=(2, 2), strides=(1, 3))
    np.testing.assert_array_equal(
        read(tmp_path / "a.pt", torch_file({"a": turned}))["a"], [[1, 4], [2, 5]]
    )


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed_and_the_tensors_are_read(tmp_path, legacy, protocol):
    namespace = types.SimpleNamespace(rate=0.1, state=ARRAY)
    tree = {"a": ARRAY, "origin": Evil(tmp_path / "executed"), "arguments": namespace}
    found = read(tmp_path / "a.ckpt", torch_file(tree, legacy, protocol))
    np.testing.assert_array_equal(found["a"], ARRAY)
    assert not (tmp_path / "executed").exists()


def test_a_whole_model_is_read_by_the_names_of_its_layers(tmp_path):
    inner = {"_parameters": {"weight": ARRAY}, "_buffers": {"mean": ARRAY[0]}, "_modules": {}}
    whole = {"_parameters": {}, "_modules": {"features": {"_modules": {"0": inner}}}}
    assert read(tmp_path / "a.pt", torch_file(whole)).keys() == {
        *("features.0.weight", "features.0.mean")
    }


BOMB = np.zeros(10**6, np.float32)
LIES = {
    "an offset": {"a": Tensor(ARRAY, offset=1)},
    "an offset below zero": {"a": Tensor(ARRAY, offset=-1, shape=(2,), strides=(1,))},
    "a stride": {"a": Tensor(ARRAY, strides=(4, 1))},
    "a stride below zero": {"a": Tensor(ARRAY, shape=(2,), strides=(-1,))},
    "one number for all": {"a": Tensor(ARRAY, shape=(10**6, 10**6), strides=(0, 0))},
    "a shape below zero": {"a": Tensor(ARRAY, shape=(-2, -3))},
    "no whole number": {"a": Tensor(ARRAY, offset=0.5)},
    "int8": {"a": Tensor(ARRAY, kind="QInt8Storage")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_that_is_not_within_its_storage_is_refused(tmp_path, lie, legacy):
    with pytest.raises(UserError, match="a.pth: cannot be read") as caught:
        read(tmp_path / "a.pth", torch_file(LIES[lie], legacy))
    assert "\n" not in str(caught.value)


def laughs(depth=100):
    """A pickle of a dict whose key is a tuple of twice itself, and so on: hashing it takes ages."""
    return b"\x80\x02})" + b"q\x000h\x00h\x00\x86" * depth + b"K\x01s."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"K\x01K\x02s.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        laughs(),
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"\x80\x02" + b"}U\x01a" * 2000 + b"}" + b"s" * 2000 + b".",
        b"(((((((.",
        b"garbage",
    ],
    ids=["memo", "bytearray", "bytes", "laughs", "nested", "names", "marks", "garbage"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_fill_memory_or_hang_does_neither(tmp_path, data, legacy):
    try:
        assert read(tmp_path / "a.pth", torch_file({}, legacy, data=data)) == {}
    except UserError as error:
        assert "a.pth: cannot be read" in str(error) and "\n" not in str(error)


def test_a_zip_that_outgrows_itself_is_refused(tmp_path):
    data = torch_file({"a": BOMB}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 10**4
    with pytest.raises(UserError, match="stand for 4000[0-9]{3}: write it without compression"):
        read(tmp_path / "a.pth", data)


@pytest.mark.parametrize("suffix", ["pth", "pt", "th", "pth.tar", "ckpt", "bin"])
def test_torch_files_have_many_suffixes(tmp_path, suffix):
    assert "a" in read(tmp_path / f"a.{suffix}", torch_file({"a": ARRAY}))


@pytest.mark.parametrize("size", [2**63, 2**40, 100])
def test_a_header_beyond_the_file_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "a.safetensors", struct.pack("<Q", size) + b"{}")


def test_arrays_that_overlap_are_refused(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"b":{entry}}}'.encode()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "a.safetensors", struct.pack("<Q", len(header)) + header + bytes(4))


def dataset(file, secret):
    """Each way in which an HDF5 file can say more than it holds."""
    import h5py

    big = (1 << 16, 1 << 13)  # 2 GiB
    layout = h5py.VirtualLayout(big, "f4")
    layout[:4, :4] = h5py.VirtualSource(str(secret), "x", (4, 4))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_external(os.fsencode(secret), 0, 8)
    return {
        "external storage": lambda: h5py.h5d.create(
            file.id, b"a", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((8,)), plist
        ),
        "a virtual dataset": lambda: file.create_virtual_dataset("a", layout),
        "a fill value": lambda: file.create_dataset("a", big, "f4", fillvalue=1.0),
        "a small fill value": lambda: file.create_dataset("a", (2,), "f4", fillvalue=1.0),
        "compression": lambda: file.create_dataset("a", data=np.zeros(10**6), compression="gzip"),
        "little compression": lambda: file.create_dataset("a", data=np.ones(9), compression="gzip"),
        "texts": lambda: file.create_dataset("a", data=["x"]),
    }


@pytest.mark.parametrize(
    "way",
    [
        *("external storage", "a virtual dataset", "a fill value", "a small fill value"),
        *("compression", "little compression", "texts"),
    ],
)
def test_an_hdf5_file_gives_what_it_holds_alone(tmp_path, way):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(b"password")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset(file, tmp_path / "secret")[way]()
    with pytest.raises(UserError, match="without compression|not an array of numbers in this file"):
        files.read(str(tmp_path / "a.h5"))


def test_links_of_an_hdf5_file_are_not_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = ARRAY
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one/one/kernel"] = ARRAY
        file["two"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        file["three"] = h5py.SoftLink("/one/one/kernel")
        file["one/loop"] = file["/"]
    assert files.read(str(tmp_path / "a.h5"))[0].keys() == {"one/kernel"}


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    (tmp_path / "b.pth").symlink_to("/dev/zero")
    (tmp_path / "c.pth").mkdir()
    for name in "abc":
        with pytest.raises(UserError, match=f"{name}.pth: cannot be read .*(no regular|Is a dir)"):
            files.read(str(tmp_path / f"{name}.pth"))
