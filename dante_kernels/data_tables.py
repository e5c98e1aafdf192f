"""The papers' tables of features, from their original files: UCI's regression and classification sets, LIBSVM's sets.

The files come from a directory that the user names, where they lie as they are or in folders `uci` and `libsvm`; nothing is
fetched. scikit-learn is imported only where a LIBSVM file is read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import require

FOLDERS = (".", "uci", "libsvm")
Array = np.ndarray[Any, Any]


class Table(NamedTuple):
    """Rows of features with a target, as the files give them: nothing is scaled.

    Attributes:
        x: (rows, features) float32; a column of words is one column of 0 and 1 for each word, in alphabetical order.
        y: (rows,) class indices int64 from 0, or values float32.
        x_test, y_test: likewise, where the source has a test file of its own; else None.
        name: what the data set is called.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor | None
    y_test: Tensor | None
    name: str

    @property
    def classes(self) -> int:
        """How many classes there are; 0 where the target holds values."""
        return 0 if self.y.is_floating_point() else int(self.y.max()) + 1


def load_table(name: str, directory: str | os.PathLike[str]) -> Table:
    """A table by its name.

    Args:
        name: one of `NAMES`.
        directory: holds the files, or folders `uci` and `libsvm` that hold them.

    Raises:
        ValueError: for an unknown name; for a file that is not what it should be, named with what was expected and what came.
        FileNotFoundError: naming the files that are not there.
        MissingExtraError: where a LIBSVM file is to be read and scikit-learn is not installed.
    """
    if name not in _READERS:
        raise ValueError(f"table: expected one of {', '.join(NAMES)}, got {name!r}")
    files, read = _READERS[name]
    places = [_find(Path(directory), file) for file in files]
    missing = [file for file, place in zip(files, places, strict=True) if place is None]
    if missing:
        raise FileNotFoundError(
            f"data directory {str(directory)!r} lacks {', '.join(missing)} (also looked for in uci, libsvm)"
        )
    return read(name, [place for place in places if place is not None])


def _find(directory: Path, file: str) -> Path | None:
    """The file in the directory or its folders, as it is called or without .bz2."""
    names = dict.fromkeys((file, file.removesuffix(".bz2")))
    return next((p for folder in FOLDERS for n in names if (p := directory / folder / n).is_file()), None)


def _cells(path: Path, columns: int, delimiter: str, header: list[str] | None) -> Array:
    """The words of a text file as an array (rows, columns)."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter=delimiter, skipinitialspace=True) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected lines of text with {columns} columns, got others ({error})") from error
    rows = [row[:-1] if row[-1] == "" else row for row in rows]  # spaces at the end of a line
    if header is not None:
        if not rows or rows[0] != header:
            raise ValueError(f"{path}: expected the header {','.join(header)}, got {','.join(rows[0]) if rows else 'nothing'}")
        del rows[0]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"{path}: row {number}: expected {columns} columns, got {len(row)}")
    return np.array(rows)


def _numbers(path: Path, cells: Array) -> Array:
    try:
        values = cells.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: expected numbers, got another text ({error})") from error
    return _finite(path, values)


def _finite(path: Path, values: Array) -> Array:
    """As float32, which 1e39 is too large for."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise ValueError(f"{path}: expected finite numbers, got {values[~np.isfinite(narrow)][0]}")
    return narrow


def _as_indices(words: Array) -> Array:
    """The place of each word, or number, among those that occur."""
    indices: Array = np.unique(words, return_inverse=True)[1].astype(np.int64)
    return indices


def _classes(path: Path, words: Array, known: tuple[str, ...]) -> Array:
    unknown = np.setdiff1d(words, known)
    if len(unknown):
        raise ValueError(f"{path}: expected the classes {', '.join(known)}, got {', '.join(unknown)}")
    return _as_indices(words)


def _one_hot(words: Array) -> Array:
    return (words[:, None] == np.unique(words)[None]).astype(np.float32)


def _table(name: str, x: Array, y: Array) -> Table:
    return Table(torch.from_numpy(x), torch.from_numpy(y), None, None, name)


def _airfoil(name: str, paths: list[Path]) -> Table:
    values = _numbers(paths[0], _cells(paths[0], 6, "\t", None))
    return _table(name, values[:, :-1].copy(), values[:, -1].copy())


FIRES = ["X", "Y", "month", "day", "FFMC", "DMC", "DC", "ISI", "temp", "RH", "wind", "rain", "area"]


def _fires(name: str, paths: list[Path]) -> Table:
    cells = _cells(paths[0], 13, ",", FIRES)
    values = _numbers(paths[0], np.delete(cells, [2, 3], axis=1))
    x = np.hstack([values[:, :2], _one_hot(cells[:, 2]), _one_hot(cells[:, 3]), values[:, 2:-1]])
    return _table(name, x, values[:, -1].copy())


def _ccpp(name: str, paths: list[Path]) -> Table:
    values = _numbers(paths[0], _cells(paths[0], 5, ",", ["AT", "V", "AP", "RH", "PE"]))
    return _table(name, values[:, :-1].copy(), values[:, -1].copy())


def _ionosphere(name: str, paths: list[Path]) -> Table:
    cells = _cells(paths[0], 35, ",", None)
    return _table(name, _numbers(paths[0], cells[:, :-1]), _classes(paths[0], cells[:, -1], ("b", "g")))


def _vehicle(name: str, paths: list[Path]) -> Table:
    cells = _cells(paths[0], 19, " ", None)
    known = ("bus", "opel", "saab", "van")
    return _table(name, _numbers(paths[0], cells[:, :-1]), _classes(paths[0], cells[:, -1], known))


def _libsvm(features: int) -> Callable[[str, list[Path]], Table]:
    """A reader of a training and a test file in LIBSVM's format."""

    def read(name: str, paths: list[Path]) -> Table:
        datasets = require("sklearn.datasets", "sklearn", f"reading {name}")
        parts = []
        for path in paths:
            try:
                x, y = datasets.load_svmlight_file(str(path), n_features=features, dtype=np.float64)
            except (ValueError, OSError, EOFError) as error:
                text = f"{path}: expected lines in LIBSVM's format with at most {features} features, got others ({error})"
                raise ValueError(text) from error
            if not len(y):
                raise ValueError(f"{path}: expected at least one row, got none")
            _finite(path, y)
            parts.append((torch.from_numpy(_finite(path, x.toarray())), y))
        labels = _as_indices(np.concatenate([y for _, y in parts]))
        (x, _), (x_test, _) = parts
        y, y_test = torch.from_numpy(labels).split([len(x), len(x_test)])
        return Table(x, y, x_test, y_test, name)

    return read


_READERS: dict[str, tuple[tuple[str, ...], Callable[[str, list[Path]], Table]]] = {
    "airfoil": (("airfoil_self_noise.dat",), _airfoil),
    "fires": (("forestfires.csv",), _fires),
    "ccpp": (("ccpp.csv",), _ccpp),
    "ionosphere": (("ionosphere.data",), _ionosphere),
    "vehicle": (("vehicle.dat",), _vehicle),
    "svmguide4": (("svmguide4", "svmguide4.t"), _libsvm(10)),
    "usps": (("usps.bz2", "usps.t.bz2"), _libsvm(256)),
}
NAMES = tuple(_READERS)
FILES = {name: files for name, (files, _) in _READERS.items()}
