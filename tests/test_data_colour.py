"""Pictures in colour: what is read is what the files hold, and a file that is not right is refused by name."""

import numpy as np
import pytest
import torch

from dante_kernels import data_colour


def pixels(rows, side, seed=0):
    """Random pictures (rows, 3, side, side)."""
    return np.random.default_rng(seed).integers(0, 256, (rows, 3, side, side), dtype=np.uint8)


def as_rows(pictures):
    return torch.from_numpy(pictures.reshape(len(pictures), -1)).float() / 255


def write_cifar(folder):
    """Six files of two pictures each, in order; the pictures and labels."""
    pictures, labels = pixels(12, 32), np.arange(12, dtype=np.uint8) % 10
    for i in range(6):
        part = slice(2 * i, 2 * i + 2)
        content = np.hstack([labels[part, None], pictures[part].reshape(2, -1)])
        (folder / ("test_batch.bin" if i == 5 else f"data_batch_{i + 1}.bin")).write_bytes(content.tobytes())
    return pictures, labels


def test_cifar_comes_back_as_it_was_written(tmp_path):
    pictures, labels = write_cifar(tmp_path)
    split = data_colour.load_colour("cifar10", tmp_path)
    assert torch.equal(torch.cat([split.x_train, split.x_test]), as_rows(pictures))
    assert torch.cat([split.y_train, split.y_test]).tolist() == labels.tolist()
    assert (len(split.x_test), split.classes) == (2, 10)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected records of 3073 bytes, got a file of 0"),
        (b"\0" * 3072, "got a file of 3072"),
        (b"\x0a" + b"\0" * 3072, "expected labels from 0 to 9, got 10"),
    ],
)
def test_a_wrong_cifar_file_is_refused_by_name(tmp_path, content, says):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin") as caught:
        data_colour.load_colour("cifar10", tmp_path)
    assert says in str(caught.value)


def test_svhn_counts_its_tens_as_zeros(tmp_path):
    io = pytest.importorskip("scipy.io")
    pictures, labels = pixels(5, 32), np.array([[10], [1], [2], [10], [9]], np.uint8)
    for name, part in (("train", slice(0, 3)), ("test", slice(3, 5))):
        io.savemat(tmp_path / f"{name}_32x32.mat", {"X": pictures[part].transpose(2, 3, 1, 0), "y": labels[part]})
    split = data_colour.load_colour("svhn", tmp_path)
    assert torch.equal(torch.cat([split.x_train, split.x_test]), as_rows(pictures))
    assert torch.cat([split.y_train, split.y_test]).tolist() == [0, 1, 2, 0, 9]


X = np.zeros((32, 32, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"X": X, "y": np.ones((3, 1))}, r"expected X of 32 x 32 x 3 x 3 bytes, got uint8 of \(32, 32, 3, 2\)"),
        ({"X": X / 255, "y": np.ones((2, 1))}, "expected X of 32 x 32 x 3 x 2 bytes, got float64"),
        ({"X": X, "y": np.array([[1.0], [1.5]])}, "expected labels from 1 to 10, got 1.5"),
        ({"X": X, "y": np.array([[0], [1]])}, "expected labels from 1 to 10, got 0"),
        ({"X": X}, "expected a MATLAB file with X and y, got .*X"),
    ],
)
def test_a_svhn_file_of_other_content_is_refused_by_name(tmp_path, content, says):
    io = pytest.importorskip("scipy.io")
    for name in ("train", "test"):
        io.savemat(tmp_path / f"{name}_32x32.mat", content)
    with pytest.raises(ValueError, match=rf"train_32x32\.mat: {says}"):
        data_colour.load_colour("svhn", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:60],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-10],
        lambda content: content[:300] + bytes(byte ^ 0x5A for byte in content[300:400]) + content[400:],
        lambda content: b"no MATLAB file, but long enough to have a header" * 10,
        lambda content: b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"x" * 100,
    ],
    ids=["empty", "header", "half", "end", "bytes", "other", "version 7.3"],
)
def test_a_damaged_svhn_file_is_refused_by_name(tmp_path, damage):
    io = pytest.importorskip("scipy.io")
    path = tmp_path / "train_32x32.mat"
    pictures = pixels(2, 32).transpose(2, 3, 1, 0)
    for name in ("train", "test"):
        io.savemat(tmp_path / f"{name}_32x32.mat", {"X": pictures, "y": np.ones((2, 1))}, do_compression=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"train_32x32\.mat: expected a MATLAB file with X and y, got another or a damaged file"
    ):
        data_colour.load_colour("svhn", tmp_path)


def write_tiny_imagenet(folder):
    """Two classes of two training pictures and two validation pictures, each of one colour, so that JPEG keeps it nearly."""
    images = pytest.importorskip("PIL.Image")
    colours = {"n01/a": 10, "n01/b": 60, "n02/a": 110, "n02/b": 160, "val/0": 210, "val/1": 250}
    for name, value in colours.items():
        place, file = name.split("/")
        path = folder / ("val" if place == "val" else f"train/{place}") / "images" / f"{file}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.fromarray(np.full((64, 64, 3), value, np.uint8)).save(path)
    (folder / "val" / "val_annotations.txt").write_text("0.JPEG\tn02\t0\t0\t1\t1\n1.JPEG\tn01\t0\t0\t1\t1\n")


@pytest.mark.parametrize(
    ("rows", "expected", "labels"), [(None, [10, 110, 60, 160], [0, 1, 0, 1]), (3, [10, 110, 60], [0, 1, 0])]
)
def test_tiny_imagenet_takes_all_classes_alike(tmp_path, rows, expected, labels):
    write_tiny_imagenet(tmp_path)
    split = data_colour.load_colour("tiny-imagenet", tmp_path, rows)
    assert split.x_train.shape == (len(expected), 12288)
    assert torch.allclose(split.x_train.mean(1) * 255, torch.tensor(expected).float(), atol=2)
    assert split.y_train.tolist() == labels
    assert torch.allclose(split.x_test.mean(1) * 255, torch.tensor([210.0, 250.0]), atol=2)
    assert split.y_test.tolist() == [1, 0]


def test_wrong_tiny_imagenet_files_are_refused_by_name(tmp_path):
    images = pytest.importorskip("PIL.Image")
    write_tiny_imagenet(tmp_path)
    images.new("RGB", (32, 64)).save(tmp_path / "train" / "n02" / "images" / "a.JPEG")
    with pytest.raises(ValueError, match=r"a\.JPEG: expected 64 x 64 pixels, got 32 x 64"):
        data_colour.load_colour("tiny-imagenet", tmp_path)
    path = tmp_path / "train" / "n02" / "images" / "b.JPEG"
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "train" / "n02" / "images" / "a.JPEG").unlink()
    with pytest.raises(
        ValueError, match=r"b\.JPEG: expected a picture, got another or a damaged file \(image file is truncated"
    ):
        data_colour.load_colour("tiny-imagenet", tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.JPEG\tn99\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: expected a picture and its class, got '0\.JPEG\\tn99'"):
        data_colour.load_colour("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("name", data_colour.NAMES)
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1|train"):
        data_colour.load_colour(name, tmp_path)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of cifar10, svhn, tiny-imagenet, got 'mnist'"):
        data_colour.load_colour("mnist", tmp_path)
