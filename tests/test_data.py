"""The data sets: what is read is what the files hold, and a file that is not right is refused by name."""

import gzip
import hashlib
import http.server
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dante_kernels import data


def idx_bytes(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_arrays(train=6, test=4, side=3, seed=0):
    """Images and labels in the order of data.FILES; the labels hold 0 to 3."""
    numbers = np.random.default_rng(seed)
    arrays = []
    for rows in (train, test):
        arrays.append(numbers.integers(0, 256, (rows, side, side), dtype=np.uint8))
        arrays.append((np.arange(rows) % 4).astype(np.uint8))
    return arrays


def write_files(directory, arrays, compressed=True):
    directory.mkdir(parents=True, exist_ok=True)
    for file, array in zip(data.FILES, arrays, strict=True):
        content = idx_bytes(array)
        if compressed:
            (directory / file).write_bytes(gzip.compress(content, mtime=0))
        else:
            (directory / file.removesuffix(".gz")).write_bytes(content)
    return directory


def run_without(module, statement):
    """The last line that a fresh interpreter without `module` prints for a statement: the error's class and message."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from dante_kernels import data\n"
        f"try:\n    {statement}\n    print('no error')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    root = str(pathlib.Path(data.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    return run.stdout.strip().splitlines()[-1]


# Digits


def test_digits_are_split_by_class_and_nothing_is_lost():
    from sklearn.datasets import load_digits

    split = data.load_digits()
    assert (split.x_train.shape, split.x_test.shape, split.classes) == ((1437, 64), (360, 64), 10)
    assert split.x_train.dtype == torch.float32
    assert split.y_train.dtype == torch.int64
    pixels, labels = load_digits(return_X_y=True)
    both = torch.cat([torch.cat([split.x_train, split.x_test]) * 16, torch.cat([split.y_train, split.y_test])[:, None]], 1)
    original = np.column_stack([pixels, labels])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, original.tolist()))
    share = torch.bincount(split.y_test) / torch.bincount(torch.cat([split.y_train, split.y_test]))
    assert (share - 0.2).abs().max() < 0.01


def test_the_split_of_the_digits_follows_the_seed():
    assert torch.equal(data.load_digits(3).x_test, data.load_digits(3).x_test)
    assert not torch.equal(data.load_digits(3).x_test, data.load_digits(4).x_test)


def test_without_scikit_learn_digits_name_the_extra():
    line = run_without("sklearn", "data.load_digits()")
    assert line.startswith("MissingExtraError")
    assert 'pip install "dante_kernels[sklearn]"' in line


# IDX files


@settings(max_examples=30, deadline=None)
@given(
    train=st.integers(1, 9),
    test=st.integers(1, 9),
    side=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    compressed=st.booleans(),
)
def test_images_and_labels_come_back_as_they_were_written(train, test, side, seed, compressed):
    arrays = small_arrays(train, test, side, seed)
    with tempfile.TemporaryDirectory() as directory:
        split = data.load_idx(write_files(pathlib.Path(directory), arrays, compressed), "small")
    for images, labels, x, y in ((*arrays[:2], split.x_train, split.y_train), (*arrays[2:], split.x_test, split.y_test)):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x, torch.from_numpy(images.reshape(len(images), -1)).float() / 255)
        assert torch.equal(y, torch.from_numpy(labels).long())
    assert split.classes == max(arrays[1].max(), arrays[3].max()) + 1
    assert split.name == "small"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_short_anywhere_is_refused_by_name(draw):
    compressed = draw.draw(st.booleans(), "compressed")
    file = draw.draw(st.sampled_from(data.FILES), "file").removesuffix("" if compressed else ".gz")
    with tempfile.TemporaryDirectory() as directory:
        path = write_files(pathlib.Path(directory), small_arrays(), compressed) / file
        content = path.read_bytes()
        path.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1), "bytes kept")])
        with pytest.raises(ValueError, match=file) as caught:
            data.load_idx(directory)
        assert "expected" in str(caught.value)


IMAGES, LABELS = small_arrays()[:2]
GOOD = idx_bytes(IMAGES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx_bytes(LABELS), "00 00 08 03, got 00 00 08 01"),
        (idx_bytes(IMAGES.astype(">f4"), code=0x0D), "00 00 08 03, got 00 00 0d 03"),
        (idx_bytes(IMAGES[..., None]), "00 00 08 03, got 00 00 08 04"),
        (b"P5 3 3 255\n", "00 00 08 03, got 50 35 20 33"),
        (GOOD + b"\0", "expected 54 bytes after the header, for the shape 6 x 3 x 3, got 55"),
        (idx_bytes(IMAGES[:0]), "expected at least one item, got the shape 0 x 3 x 3"),
        (GOOD[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + GOOD[16:], "got 54"),
        (idx_bytes(IMAGES[:5]), "expected 5 labels, one for each image of train-images-idx3-ubyte.gz, got 6"),
        (idx_bytes(IMAGES[:, :2]), "expected images of 2 x 3 pixels as in train-images-idx3-ubyte.gz, got 3 x 3"),
    ],
    ids=["labels", "floats", "4 dimensions", "no IDX", "too long", "empty", "absurd header", "fewer images", "other size"],
)
def test_a_wrong_file_is_refused_with_what_was_expected_and_what_came(tmp_path, content, says):
    write_files(tmp_path, small_arrays())
    (tmp_path / data.FILES[0]).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"idx[13]-ubyte") as caught:
        data.load_idx(tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize(("place", "value"), [(0, 0), (10, 255), (-6, 0), (-1, 255)], ids=["magic", "stream", "CRC", "length"])
def test_damage_inside_a_gzip_file_is_noticed(tmp_path, place, value):
    path = write_files(tmp_path, small_arrays()) / data.FILES[0]
    content = bytearray(path.read_bytes())
    assert content[place] != value
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{data.FILES[0]}: expected a whole gzip file"):
        data.load_idx(tmp_path)


@pytest.mark.parametrize("gone", [(0,), (1, 3), (0, 1, 2, 3)])
def test_missing_files_are_all_named_and_no_others(tmp_path, gone):
    write_files(tmp_path, small_arrays())
    for i in gone:
        (tmp_path / data.FILES[i]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load_idx(tmp_path)
    assert [file in str(caught.value) for file in data.FILES] == [i in gone for i in range(4)]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load_idx(tmp_path / "nowhere")


def test_unknown_names_list_the_known_ones():
    for function in (data.load, data.fetch):
        with pytest.raises(ValueError, match=r"expected one of .*mnist, fashion-mnist, kmnist, got 'cifar'"):
            function("cifar")


def test_digits_take_no_directory(tmp_path):
    with pytest.raises(ValueError, match="digits"):
        data.load("digits", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files_load_with_the_published_shapes(real_data, name):
    split = data.load(name, real_data / name)
    assert (split.x_train.shape, split.x_test.shape, split.classes) == ((60000, 784), (10000, 784), 10)
    assert (float(split.x_train.min()), float(split.x_train.max())) == (0, 1)
    assert torch.bincount(split.y_test, minlength=10).sum() == 10000


def test_the_checksums_for_fetching_are_those_of_the_original_files(real_data):
    checked = 0
    for name, source in data.SOURCES.items():
        assert set(source.sha256) == set(data.FILES)
        for file, sha256 in source.sha256.items():
            if (real_data / name / file).is_file():
                assert hashlib.sha256((real_data / name / file).read_bytes()).hexdigest() == sha256, f"{name}/{file}"
                checked += 1
    assert checked >= 8


# Fetching


class Server:
    """Files over HTTP on this machine, and a list of what was asked for."""

    def __init__(self):
        self.files, self.requests = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path.strip("/"))
                content = outer.files.get(self.path.strip("/"))
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/"

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves four small files under good/ and stands in for MNIST's source; the cache is tmp_path / "cache"."""
    server = Server()
    for file, array in zip(data.FILES, small_arrays(), strict=True):
        server.files[f"good/{file}"] = gzip.compress(idx_bytes(array), mtime=0)
    monkeypatch.setenv(data.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sha256 = {file: hashlib.sha256(server.files[f"good/{file}"]).hexdigest() for file in data.FILES}
    monkeypatch.setitem(data.SOURCES, "mnist", data.Source((server.url + "good/",), sha256))
    yield server
    server.stop()


def use_urls(monkeypatch, *urls):
    monkeypatch.setitem(data.SOURCES, "mnist", data.SOURCES["mnist"]._replace(urls=urls))


def kept_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_what_is_fetched_is_what_the_server_has_and_is_kept(server, tmp_path):
    assert data.fetch("mnist") == tmp_path / "cache" / "mnist"
    assert sorted(server.requests) == sorted(f"good/{file}" for file in data.FILES)
    split = data.load("mnist")
    assert len(server.requests) == 4, "the second time nothing is fetched"
    assert torch.equal(split.x_train, torch.from_numpy(small_arrays()[0].reshape(6, 9)).float() / 255)
    assert split.name == "mnist"


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    path = data.fetch("mnist") / data.FILES[1]
    path.write_bytes(path.read_bytes()[:-1])
    data.fetch("mnist")
    assert server.requests[4:] == [f"good/{data.FILES[1]}"]
    assert path.read_bytes() == server.files[f"good/{data.FILES[1]}"]


def test_a_corrupted_download_is_refused_and_not_kept(server, tmp_path):
    server.files[f"good/{data.FILES[2]}"] += b"x"
    with pytest.raises(data.FetchError, match=rf"{data.FILES[2]}.*SHA-256.*--data-dir"):
        data.fetch("mnist")
    assert kept_files(tmp_path) == sorted(data.FILES[:2])
    server.files[f"good/{data.FILES[2]}"] = server.files[f"good/{data.FILES[2]}"][:-1]
    data.fetch("mnist")
    assert kept_files(tmp_path) == sorted(data.FILES)


def test_the_next_source_is_asked_where_the_first_fails(server, monkeypatch, tmp_path):
    server.files[f"bad/{data.FILES[0]}"] = b"not the file"
    use_urls(monkeypatch, server.url + "none", server.url + "bad", server.url + "good")
    assert data.load("mnist").classes == 4
    assert server.requests[:3] == [f"{folder}/{data.FILES[0]}" for folder in ("none", "bad", "good")]


def test_with_no_network_one_line_says_what_to_do_instead(server, monkeypatch):
    server.stop()
    with pytest.raises(data.FetchError) as caught:
        data.fetch("mnist")
    message = str(caught.value)
    assert "\n" not in message
    assert f"{server.url}good/ cannot be reached" in message
    assert "--data-dir" in message
    assert all(file in message for file in data.FILES)


def test_an_answer_of_not_found_is_reported_as_such(server, monkeypatch):
    use_urls(monkeypatch, server.url + "none/")
    with pytest.raises(data.FetchError, match="none/ answered 404"):
        data.fetch("mnist")


def test_with_a_full_cache_no_network_is_needed(server):
    data.fetch("mnist")
    server.stop()
    assert data.load("mnist").classes == 4


def test_fetching_leaves_pooch_as_talkative_as_it_was(server):
    import pooch

    logger = pooch.get_logger()
    before = logger.level
    try:
        logger.setLevel(7)
        data.fetch("mnist")
        assert logger.level == 7
    finally:
        logger.setLevel(before)


def test_without_pooch_fetching_names_the_extra_and_the_way_without():
    line = run_without("pooch", "data.fetch('mnist')")
    assert line.startswith("MissingExtraError")
    assert 'pip install "dante_kernels[cli]"' in line
    assert "--data-dir" in line
