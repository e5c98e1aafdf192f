"""Data sets as tensors: scikit-learn's bundled digits, and MNIST and its kin from their original IDX files.

The IDX files come from a directory that the user names, or are fetched once into a cache, checksums verified. Nothing is
fetched at import, and scikit-learn and pooch are imported only by the functions that need them.
"""

from __future__ import annotations

import gzip
import importlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
CACHE_VARIABLE = "DANTE_DATA_DIR"
_UNSIGNED_BYTE = 0x08  # the type code in an IDX file's third byte


class Dataset(NamedTuple):
    """A classification data set, split.

    Attributes:
        x_train: (rows, features) float32 from 0 to 1.
        y_train: (rows,) int64 class indices from 0 to classes - 1.
        x_test, y_test: likewise.
        classes: how many there are.
        name: what the data set is called.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    name: str


class Source(NamedTuple):
    """Where a data set's files can be had: base URLs, tried in order, and the SHA-256 of each of `FILES`."""

    urls: tuple[str, ...]
    sha256: dict[str, str]


class MissingExtraError(ImportError):
    """A package of one of the extras is not installed; the message says which extra to install."""


class FetchError(OSError):
    """A data set could not be fetched; the message says why and what to do instead."""


# Tests replace an entry to fetch from a server of their own.
SOURCES = {
    "mnist": Source(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": Source(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "kmnist": Source(
        ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/", "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
        {
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
    ),
}
NAMES = ("digits", *SOURCES)


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional module.

    Raises:
        MissingExtraError: naming the extra of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{purpose} needs {module.partition(".")[0]}, which cannot be imported: pip install "dante_kernels[{extra}]"'
        ) from error


def load(name: str, directory: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set by its name.

    Args:
        name: ``"digits"``, ``"mnist"``, ``"fashion-mnist"`` or ``"kmnist"``.
        directory: where the IDX files of the latter three are; None fetches them into the cache (see `fetch`).

    Raises:
        ValueError: for an unknown name, a directory beside digits, or a file that is not what it should be.
        FileNotFoundError: naming the files that the directory lacks.
        FetchError, MissingExtraError: see `fetch` and `load_digits`.
    """
    if name not in NAMES:
        raise ValueError(f"dataset: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        if directory is not None:
            raise ValueError("data directory: expected none for digits, which come with scikit-learn, got one")
        return load_digits()
    return load_idx(fetch(name) if directory is None else directory, name)


def load_digits(seed: int = 0) -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, scaled by 1/16, split 80/20 by class.

    Args:
        seed: of the split.

    Raises:
        MissingExtraError: where scikit-learn is not installed.

    >>> load_digits().x_train.shape
    torch.Size([1437, 64])
    """
    datasets = require("sklearn.datasets", "sklearn", "the digits data set")
    model_selection = require("sklearn.model_selection", "sklearn", "the digits data set")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        (pixels / 16).astype(np.float32), labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=seed
    )
    as_tensor = torch.from_numpy
    return Dataset(as_tensor(x_train), as_tensor(y_train), as_tensor(x_test), as_tensor(y_test), classes=10, name="digits")


def load_idx(directory: str | os.PathLike[str], name: str | None = None) -> Dataset:
    """A data set in MNIST's format: the four original IDX files, gzipped or not, in one directory.

    Args:
        directory: holds the files of `FILES`, with or without ``.gz``.
        name: what to call the data set; the directory's name where None.

    Returns:
        Images as float32 rows of pixels / 255, labels as int64; as many classes as the highest label says.

    Raises:
        FileNotFoundError: naming the files that are missing.
        ValueError: naming the file that is damaged or does not fit the others, what was expected and what came.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"data directory: expected a directory with {', '.join(FILES)}, got {str(directory)!r}")
    paths = [_find(directory, file) for file in FILES]
    missing = [file for file, path in zip(FILES, paths, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(f"data directory {str(directory)!r} lacks {', '.join(missing)} (with or without .gz)")
    train_images, train_labels, test_images, test_labels = (path for path in paths if path is not None)
    x_train, y_train = _read_split(train_images, train_labels)
    x_test, y_test = _read_split(test_images, test_labels)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{test_images}: expected images of {_by(x_train.shape[1:])} pixels as in {train_images.name}, "
            f"got {_by(x_test.shape[1:])}"
        )
    classes = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(
        _as_rows(x_train),
        torch.from_numpy(y_train.astype(np.int64)),
        _as_rows(x_test),
        torch.from_numpy(y_test.astype(np.int64)),
        classes,
        directory.resolve().name if name is None else name,
    )


def read_idx(path: str | os.PathLike[str], dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The unsigned bytes of one IDX file, gzipped where its name ends in ``.gz``, in the shape that its header gives.

    Args:
        path: the file.
        dimensions: how many it must have: 3 for images, 1 for labels.

    Raises:
        ValueError: where it is no such file, cut short, or too long; names the file, what was expected and what came.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got one that cannot be unpacked ({error})") from error
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}, "
            f"which starts with the bytes {magic.hex(' ')}, got {content[:4].hex(' ') or 'an empty file'}"
        )
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, got a file of {len(content)}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if math.prod(shape) == 0:
        raise ValueError(f"{path}: expected at least one item, got the shape {_by(shape)}")
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes after the header, for the shape {_by(shape)}, "
            f"got {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def fetch(name: str) -> Path:
    """The directory with a data set's four IDX files, fetched where they are not there yet.

    They are kept in the directory that the environment variable DANTE_DATA_DIR names, else in the user's cache, each data
    set in its own subdirectory. A file counts only with the right SHA-256: what is damaged is fetched again, and nothing
    damaged is kept.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"`` or ``"kmnist"``.

    Raises:
        ValueError: for an unknown name.
        MissingExtraError: where pooch is not installed.
        FetchError: where no source gave the right bytes; says in one line what to do instead.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset: expected one of {', '.join(SOURCES)}, got {name!r}")
    pooch = require("pooch", "cli", f"fetching {name} (or name its directory with --data-dir)")
    directory = Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("dante_kernels")).expanduser() / name
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        for file in FILES:
            _fetch_file(pooch, name, file, directory)
    finally:
        logger.setLevel(level)
    return directory


def _fetch_file(pooch: Any, name: str, file: str, directory: Path) -> None:
    import requests

    urls, sha256 = SOURCES[name]
    reasons = []
    for url in urls:
        try:
            pooch.retrieve(
                url.rstrip("/") + "/" + file,
                known_hash=f"sha256:{sha256[file]}",
                fname=file,
                path=directory,
                downloader=pooch.HTTPDownloader(timeout=20),
            )
            return
        except requests.HTTPError as error:
            reasons.append(f"{url} answered {'with an error' if error.response is None else error.response.status_code}")
        except requests.RequestException as error:
            reasons.append(f"{url} cannot be reached ({type(error).__name__})")
        except ValueError:
            reasons.append(f"what {url} sent does not have the right SHA-256 and was not kept")
    raise FetchError(
        f"{name}: {file} cannot be downloaded: {'; '.join(reasons)}. "
        f"Instead, pass --data-dir DIR with the four files {', '.join(FILES)} in it"
    )


def _find(directory: Path, file: str) -> Path | None:
    candidates = (directory / file, directory / file.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_split(images: Path, labels: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise ValueError(f"{labels}: expected {len(x)} labels, one for each image of {images.name}, got {len(y)}")
    return x, y


def _as_rows(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
