"""Pictures in colour, from their original files: CIFAR-10's binary version, SVHN's cropped digits, Tiny ImageNet.

The files come from a directory that the user names; nothing is fetched. scipy (with the extra ``sklearn``) is imported only
where SVHN is read, pillow only where Tiny ImageNet is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Dataset, require

Array = np.ndarray[Any, Any]
_RECORD = 1 + 3072  # CIFAR-10: a label, then 32 x 32 pixels of red, green and blue


def load_colour(name: str, directory: str | os.PathLike[str], rows: int | None = None) -> Dataset:
    """A data set of pictures in colour by its name.

    Args:
        name: one of `NAMES`.
        directory: CIFAR-10: data_batch_1.bin to data_batch_5.bin and test_batch.bin. SVHN: train_32x32.mat and
            test_32x32.mat. Tiny ImageNet: the folders train and val, whose pictures stand in for the test rows.
        rows: of Tiny ImageNet, so many training pictures, as many of each class as can be; all where None (4.9 GB).

    Returns:
        Rows of pixels / 255 as float32, all of one colour before the next one's; labels from 0.

    Raises:
        ValueError: for an unknown name; for a file that is not what it should be, named with what was expected and what came.
        FileNotFoundError: naming what is not there.
        MissingExtraError: where a package that reads the files is not installed.
    """
    if name not in _READERS:
        raise ValueError(f"dataset: expected one of {', '.join(NAMES)}, got {name!r}")
    return _READERS[name](Path(directory), rows)


def _there(*paths: Path) -> list[Path]:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)}")
    return list(paths)


def _rows(pixels: Array) -> Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32)).div_(255)


def _read(path: Path, read: Callable[[BytesIO], Any], what: str) -> Any:
    content = BytesIO(path.read_bytes())
    try:
        return read(content)
    except Exception as error:  # of a damaged file scipy and pillow raise whatever comes up
        raise ValueError(f"{path}: expected {what}, got another or a damaged file ({error})") from error


def _cifar10(directory: Path, rows: int | None) -> Dataset:
    paths = _there(*(directory / f"data_batch_{i}.bin" for i in range(1, 6)), directory / "test_batch.bin")
    parts = []
    for path in paths:
        content = np.frombuffer(path.read_bytes(), np.uint8)
        if len(content) == 0 or len(content) % _RECORD:
            raise ValueError(f"{path}: expected records of {_RECORD} bytes, got a file of {len(content)} bytes")
        parts.append(content.reshape(-1, _RECORD))
        if parts[-1][:, 0].max() > 9:
            raise ValueError(f"{path}: expected labels from 0 to 9, got {parts[-1][:, 0].max()}")
    (x_train, y_train), (x_test, y_test) = (
        (_rows(records[:, 1:]), torch.from_numpy(records[:, 0].astype(np.int64)))
        for records in (np.concatenate(parts[:-1]), parts[-1])
    )
    return Dataset(x_train, y_train, x_test, y_test, 10, "cifar10")


def _svhn(directory: Path, rows: int | None) -> Dataset:
    paths = _there(directory / "train_32x32.mat", directory / "test_32x32.mat")
    io = require("scipy.io", "sklearn", "reading SVHN")
    parts: list[Tensor] = []
    for path in paths:
        content = _read(path, io.loadmat, "a MATLAB file with X and y")
        if not {"X", "y"} <= content.keys():
            raise ValueError(f"{path}: expected a MATLAB file with X and y, got {', '.join(content) or 'nothing'}")
        pixels, labels = content["X"], content["y"].ravel()
        if pixels.shape != (32, 32, 3, len(labels)) or pixels.dtype != np.uint8:
            raise ValueError(f"{path}: expected X of 32 x 32 x 3 x {len(labels)} bytes, got {pixels.dtype} of {pixels.shape}")
        if not np.isin(labels, range(1, 11)).all():
            raise ValueError(f"{path}: expected labels from 1 to 10, got {labels[~np.isin(labels, range(1, 11))][0]}")
        parts += [_rows(pixels.transpose(3, 2, 0, 1)), torch.from_numpy(labels.astype(np.int64) % 10)]  # 10 is the digit 0
    x_train, y_train, x_test, y_test = parts
    return Dataset(x_train, y_train, x_test, y_test, 10, "svhn")


def _tiny_imagenet(directory: Path, rows: int | None) -> Dataset:
    _there(directory / "train", directory / "val" / "val_annotations.txt")
    names = sorted(folder.name for folder in (directory / "train").iterdir() if folder.is_dir())
    pictures = [sorted((directory / "train" / name / "images").glob("*.JPEG")) for name in names]
    if not names or not all(pictures):
        raise ValueError(f"{directory / 'train'}: expected a folder of pictures for each class, got none for some")
    most = max(map(len, pictures)) if rows is None else -(-rows // len(names))
    # The first of every class, then the second, so that any number of first rows holds all classes alike.
    train = [(files[i], label) for i in range(most) for label, files in enumerate(pictures) if i < len(files)][:rows]
    lines = (directory / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split("\t") for line in lines]
    wrong = next((line for line, cells in zip(lines, words, strict=True) if len(cells) < 2 or cells[1] not in names), None)
    if wrong is not None:
        raise ValueError(f"{directory / 'val' / 'val_annotations.txt'}: expected a picture and its class, got {wrong!r}")
    test = [(directory / "val" / "images" / cells[0], names.index(cells[1])) for cells in words]
    (x_train, y_train), (x_test, y_test) = _pictures(train), _pictures(test)
    return Dataset(x_train, y_train, x_test, y_test, len(names), "tiny-imagenet")


def _pictures(files: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    images = require("PIL.Image", "bench", "reading Tiny ImageNet")
    x = np.empty((len(files), 3, 64, 64), np.uint8)
    for row, (path, _) in enumerate(files):
        pixels = _read(path, lambda file: np.asarray(images.open(file).convert("RGB")), "a picture")
        if pixels.shape != (64, 64, 3):
            raise ValueError(f"{path}: expected 64 x 64 pixels, got {pixels.shape[1]} x {pixels.shape[0]}")
        x[row] = pixels.transpose(2, 0, 1)
    return _rows(x), torch.tensor([label for _, label in files])


_READERS: dict[str, Callable[[Path, int | None], Dataset]] = {
    "cifar10": _cifar10,
    "svhn": _svhn,
    "tiny-imagenet": _tiny_imagenet,
}
NAMES = tuple(_READERS)
