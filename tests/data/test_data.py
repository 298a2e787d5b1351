"""Data sets, shipped files and their checksums. No test needs data outside the repository."""

import csv
import gzip
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.data.pictures import read_picture, write_picture
from diffoc.data.provenance import digest


def idx(images: np.ndarray) -> bytes:
    sizes = np.array(images.shape, ">i4").tobytes()
    return bytes((0, 0, 8, images.ndim)) + sizes + images.tobytes()


def as_bytes(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0]


@pytest.fixture
def mnist_root(tmp_path):
    """A small MNIST: 20 shipped digits hidden among 10 others, plain and gzipped files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    others = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    shipped, labels = data.digits()
    images = np.concatenate([others[:5], as_bytes(shipped), others[5:]])
    labels = np.concatenate([np.arange(5), labels.numpy(), np.arange(5, 10)]).astype(np.uint8)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, images, labels, others


@pytest.fixture
def weights(tmp_path):
    """A folder with one registered safetensors file."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(tensors, tmp_path / "small.safetensors", {"shape": "1,2,3"})
    manifest.register_file("small.safetensors", "CC0-1.0", "this test", tmp_path)
    return tmp_path, tensors


# --- digits and MNIST -----------------------------------------------------------------------------


def test_digits_are_two_of_each_class_in_range():
    images, labels = data.digits()
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() <= 1
    assert labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert len({image.tobytes() for image in as_bytes(images)}) == 20
    # Exact bytes: v / 127.5 - 1 and back.
    assert torch.equal(torch.from_numpy(as_bytes(images)) / 127.5 - 1, images[:, 0])


def test_training_split_leaves_the_shipped_digits_out(mnist_root):
    root, _, _, others = mnist_root
    images, labels = data.mnist("train", root)
    assert np.array_equal(images, others)
    assert labels.tolist() == list(range(10))


def test_test_split_is_complete_and_reads_the_environment(mnist_root, monkeypatch):
    root, images, labels, _ = mnist_root
    monkeypatch.setenv("DIFFOC_DATA", str(root))
    read, read_labels = data.mnist("test")
    assert np.array_equal(read, images)
    assert np.array_equal(read_labels, labels)


def fake_module(monkeypatch, name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def downloading(tmp_path, monkeypatch):
    """No DIFFOC_DATA, an empty cache, and libraries that fail as they do offline."""
    monkeypatch.delenv("DIFFOC_DATA", raising=False)
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    def unreachable(*args, **kwargs):
        raise OSError("Network is unreachable")

    fake_module(monkeypatch, "torchvision")
    fake_module(monkeypatch, "torchvision.datasets", MNIST=offline)
    fake_module(monkeypatch, "sklearn")
    fake_module(monkeypatch, "sklearn.datasets", fetch_lfw_people=unreachable)
    return tmp_path / "cache" / "datasets"


def test_data_sets_that_cannot_be_downloaded_say_what_to_do(downloading, monkeypatch):
    for read in (data.mnist, data.faces):
        with pytest.raises(FileNotFoundError, match="DIFFOC_DATA is not set"):
            read("train")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # not installed
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[train\]'"):
        data.mnist("train")


def test_mnist_is_read_from_where_torchvision_puts_it(downloading, mnist_root, monkeypatch):
    def download(root, download):
        assert download
        shutil.copytree(mnist_root[0] / "MNIST", root / "MNIST")

    fake_module(monkeypatch, "torchvision.datasets", MNIST=download)
    assert np.array_equal(data.mnist("train")[0], mnist_root[3])


def test_faces_are_cropped_and_split_by_person(downloading, monkeypatch):
    """Of 1000 persons with two pictures each; grey levels tell the persons apart."""
    persons = np.arange(1000).repeat(2)
    calls = []

    def fetch(data_home, resize, slice_):
        calls.append(data_home)
        side = slice_[0].stop - slice_[0].start
        assert side == slice_[1].stop - slice_[1].start
        images = np.broadcast_to((persons / 1000)[:, None, None], (2000, side, side))
        return SimpleNamespace(images=images.astype(np.float32), target=persons)

    fake_module(monkeypatch, "sklearn.datasets", fetch_lfw_people=fetch)
    train, test = data.faces("train"), data.faces("test")
    assert calls == [downloading]  # the second call found the file
    assert len(train) + len(test) == 2000
    assert 0.02 < len(test) / 2000 < 0.3
    levels = np.rint(255 * persons / 1000)
    assert sorted([*train[:, 5, 5], *test[:, 5, 5]]) == sorted(levels.astype(int))
    assert len(test) % 2 == 0


def test_mnist_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*https.*DIFFOC_DATA"):
        data.mnist("train", tmp_path)
    with pytest.raises(ValueError, match="split"):
        data.mnist("validation", tmp_path)


@pytest.mark.parametrize("damage", ["magic", "short", "gzip", "labels"])
def test_mnist_refuses_damaged_files(mnist_root, damage):
    root, images, labels, _ = mnist_root
    raw = root / "MNIST" / "raw"
    packed = raw / "t10k-images-idx3-ubyte.gz"
    if damage == "magic":
        packed.write_bytes(gzip.compress(b"\x00\x00\x0d" + idx(images)[3:]))
    elif damage == "short":
        packed.write_bytes(gzip.compress(idx(images)[:-1]))
    elif damage == "gzip":
        packed.write_bytes(packed.read_bytes()[:-20])
    else:
        (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:-1]))
    with pytest.raises(ValueError, match=r"t10k-images|MNIST"):
        data.mnist("test", root)


# --- faces and portraits --------------------------------------------------------------------------


def test_faces_are_block_averages(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "faces64.npz", train=images, test=images[:1])
    assert np.array_equal(data.faces("train", 64, tmp_path), images)
    small = data.faces("train", 16, tmp_path)
    assert small.shape == (3, 16, 16)
    assert small.dtype == np.uint8
    assert small[2, 5, 7] == np.rint(images[2, 20:24, 28:32].mean())
    assert len(data.faces("test", 32, tmp_path)) == 1


def test_faces_refuse_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"faces64.npz.*Labeled Faces"):
        data.faces("train", 32, tmp_path)
    for size in (0, 48, 128):
        with pytest.raises(ValueError, match="size"):
            data.faces("train", size, tmp_path)
    with pytest.raises(ValueError, match="split"):
        data.faces("all", 32, tmp_path)
    np.savez(tmp_path / "faces64.npz", train=np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        data.faces("train", 32, tmp_path)
    with pytest.raises(ValueError, match="no array 'test'"):
        data.faces("test", 32, tmp_path)
    (tmp_path / "faces64.npz").write_bytes((tmp_path / "faces64.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        data.faces("train", 32, tmp_path)


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
@pytest.mark.parametrize("size", [32, 64])
def test_colour_portraits(name, size):
    image = data.portrait(name, size)
    assert image.shape == (1, 3, size, size)
    assert image.dtype == torch.float32
    red, green, blue = image.mean((0, 2, 3))
    assert red > green > blue  # skin
    # Pupils and mouth are darker than the cheeks between them, at the rows of the mean face.
    grey, u = image.mean((0, 1)), size / 64
    cheeks = grey[round(26 * u) : round(34 * u), round(12 * u) : round(20 * u)].mean()
    for row, column in ((15, 16), (15, 47)):
        near = (slice(round((r - 3) * u), round((r + 4) * u)) for r in (row, column))
        assert grey[tuple(near)].min() < cheeks - 0.3
    assert grey[round(44 * u) : round(54 * u), round(24 * u) : round(40 * u)].min() < cheeks - 0.2


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
def test_portraits_are_those_of_the_records(name, tmp_path):
    """The rows of the tables name their images, PNG files of 8 bits, by this checksum."""
    write_picture(data.portrait(name)[0], tmp_path / "a.png")
    truth, notes = read_picture(tmp_path / "a.png", (3, 64, 64))
    assert notes == []
    found = digest(truth[0])
    with (manifest.data_folder() / "records" / "few_steps_portraits.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == f"{name}.png"]
    assert {row["image_sha256"] for row in rows} == {found}


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
@pytest.mark.parametrize("size", [32, 64])
def test_portraits(name, size):
    image = data.portrait(name, size, grey=True)
    assert image.shape == (1, 1, size, size)
    assert image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    # The eyes are where faces have them: dark against the cheeks below.
    u = size // 32
    rows, cheeks = slice(11 * u, 14 * u), slice(17 * u, 20 * u)
    for columns in (slice(8 * u, 12 * u), slice(20 * u, 24 * u)):
        assert image[0, 0, rows, columns].min() < image[0, 0, cheeks, columns].mean() - 0.2


def test_portrait_refuses_bad_input():
    with pytest.raises(ValueError, match="name"):
        data.portrait("lena", 32, grey=True)
    with pytest.raises(ValueError, match="size"):
        data.portrait("astronaut", 0)


# --- shipped files --------------------------------------------------------------------------------


def test_weights_round_trip(weights):
    folder, tensors = weights
    for name in ("small", "small.safetensors"):
        read = manifest.load_weights(name, folder)
        assert read.keys() == tensors.keys()
        assert torch.equal(read["a"], tensors["a"])


def test_altered_and_truncated_weights_are_refused(weights):
    folder, _ = weights
    path = folder / "small.safetensors"
    content = path.read_bytes()
    for bad in (content[:-1], content[:-1] + b"\x01", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"small.safetensors.*git checkout"):
            manifest.load_weights("small", folder)


def test_missing_and_unregistered_weights_are_refused(weights):
    folder, tensors = weights
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        manifest.load_weights("none", folder)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        manifest.register_file("none.safetensors", "", "", folder)
    save_file(tensors, folder / "other.safetensors")
    with pytest.raises(ValueError, match="no entry"):
        manifest.load_weights("other", folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json"):
        manifest.load_weights("small", folder)


def test_missing_data_folder_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(
        manifest, "__file__", str(tmp_path / "site-packages" / "diffoc" / "data.py")
    )
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        manifest.data_folder()


def test_every_shipped_file_is_what_the_manifest_says():
    entries = json.loads((manifest.data_folder() / manifest.MANIFEST).read_text())
    assert {"digits.npz", "mixture_mnist.safetensors", "mixture_faces32.safetensors"} <= set(
        entries
    )
    for file, entry in entries.items():
        assert len(manifest.checked_bytes(file)) == entry["bytes"]
        assert entry["license"]
        assert entry["source"]
    mixtures = [e["bytes"] for f, e in entries.items() if f.startswith("mixture_")]
    assert sum(mixtures) <= 4 * 2**20


@pytest.mark.parametrize(("name", "n"), [("mixture_mnist", 784), ("mixture_faces32", 1024)])
def test_shipped_mixtures_are_mixtures(name, n):
    tensors = manifest.load_weights(name)
    K, r = tensors["loadings"].shape[0], tensors["loadings"].shape[2]
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    assert shapes == {
        "log_weights": (K,),
        "means": (K, n),
        "loadings": (K, n, r),
        "noise_variance": (K,),
    }
    for key, tensor in tensors.items():
        half = key in ("means", "loadings")
        assert tensor.dtype == (torch.float16 if half else torch.float32)
        assert tensor.isfinite().all()
    assert tensors["log_weights"].exp().sum() == pytest.approx(1, abs=1e-5)
    assert tensors["noise_variance"].min() > 0
