"""The papers' tables: what is read is what the files hold, and a file that is not right is refused by name."""

import bz2

import pytest
import torch

from dante_kernels import data_tables

FIRES = "X,Y,month,day,FFMC,DMC,DC,ISI,temp,RH,wind,rain,area\n"
# Name: (file, content, x, y) of tiny tables in the original formats.
TINY = {
    "airfoil": ("airfoil_self_noise.dat", "800\t0\t0.5\t71.25\t0.25\t126.5\n1000\t1\t0.5\t71.25\t0.25\t125\n",
                [[800, 0, 0.5, 71.25, 0.25], [1000, 1, 0.5, 71.25, 0.25]], [126.5, 125.0]),
    "fires": ("forestfires.csv", FIRES + "7,5,mar,fri,86,26,94,5,8,51,6.5,0,0\n7,4,oct,fri,90,35,669,6,18,33,1,0,6.25\n",
              [[7, 5, 1, 0, 1, 86, 26, 94, 5, 8, 51, 6.5, 0], [7, 4, 0, 1, 1, 90, 35, 669, 6, 18, 33, 1, 0]], [0.0, 6.25]),
    "ccpp": ("ccpp.csv", "AT,V,AP,RH,PE\n14.5,41.75,1024,73,463.25\n25,62.5,1020,59,444\n",
             [[14.5, 41.75, 1024, 73], [25, 62.5, 1020, 59]], [463.25, 444.0]),
    "ionosphere": ("ionosphere.data",
                   "".join(f"{','.join([v] * 34)},{c}\n" for v, c in (("1", "g"), ("-0.5", "b"), ("0", "g"))),
                   [[1.0] * 34, [-0.5] * 34, [0.0] * 34], [1, 0, 1]),
    "vehicle": ("vehicle.dat", "".join(f"{' '.join([v] * 18)} {c}\n" for v, c in (("9", "van"), ("8", "bus"), ("7", "saab"))),
                [[9.0] * 18, [8.0] * 18, [7.0] * 18], [2, 0, 1]),
}  # fmt: skip
CLASSES = {"ionosphere": 2, "vehicle": 3}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("folder", ["", "uci"])
def test_rows_come_back_as_they_were_written(tmp_path, name, folder):
    file, content, x, y = TINY[name]
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / file).write_text(content)
    table = data_tables.load_table(name, tmp_path)
    assert table.name == name
    assert torch.equal(table.x, torch.tensor(x, dtype=torch.float32))
    assert torch.equal(table.y, torch.tensor(y))
    assert (table.x.dtype, table.y.dtype) == (torch.float32, torch.int64 if name in CLASSES else torch.float32)
    assert table.classes == CLASSES.get(name, 0)
    assert (table.x_test, table.y_test) == (None, None)


@pytest.mark.parametrize("compressed", [True, False])
def test_libsvm_files_keep_zeros_and_number_their_classes_from_0(tmp_path, compressed):
    pytest.importorskip("sklearn")
    (tmp_path / "libsvm").mkdir()
    for file, content in (("usps", b"3 1:-0.5 256:1\n1 2:0.25\n"), ("usps.t", b"10 3:0.5\n")):
        path = tmp_path / "libsvm" / (file + ".bz2" if compressed else file)
        path.write_bytes(bz2.compress(content) if compressed else content)
    table = data_tables.load_table("usps", tmp_path)
    expected = torch.zeros(2, 256)
    expected[0, 0], expected[0, 255], expected[1, 1] = -0.5, 1, 0.25
    assert torch.equal(table.x, expected)
    assert table.y.tolist() == [1, 0]
    assert table.x_test[0].nonzero().tolist() == [[2]]
    assert table.y_test.tolist() == [2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("airfoil", "800\t0\t0.3\t71.3\t126.2\n", "row 1: expected 6 columns, got 5"),
        ("airfoil", "800\t0\t0.3\tx\t0.1\t126.2\n", "expected numbers"),
        ("airfoil", "800\t0\t0.3\tnan\t0.1\t126.2\n", "expected finite numbers, got nan"),
        ("airfoil", "", "expected at least one row, got none"),
        ("ccpp", "14,41,1024,73,463\n", "expected the header AT,V,AP,RH,PE, got 14,41,1024,73,463"),
        ("ccpp", "", "expected the header AT,V,AP,RH,PE, got nothing"),
        ("fires", FIRES, "expected at least one row"),
        ("vehicle", "9 8 van\n", "row 1: expected 19 columns, got 3"),
        ("airfoil", "800\t0\t0.3\t1e39\t0.1\t126.2\n", "expected finite numbers, got 1e+39"),
        ("ccpp", "AT,V,AP,RH,PE\n14,41,1024,73,inf\n", "expected finite numbers, got inf"),
        ("ionosphere", f"{','.join(['1'] * 34)},x\n", "expected the classes b, g, got x"),
        ("vehicle", f"{' '.join(['1'] * 18)} car\n", "expected the classes bus, opel, saab, van, got car"),
        ("ccpp", f"AT,V,AP,RH,PE\n{'1' * 200_000},41,1024,73,463\n", "expected lines of text with 5 columns"),
        ("ccpp", "AT,V,AP,RH,PE\n\udcff4,41,1024,73,463\n", "expected lines of text with 5 columns"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_what_was_expected_and_what_came(tmp_path, name, content, says):
    file = TINY[name][0]
    (tmp_path / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=file) as caught:
        data_tables.load_table(name, tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["", "1 300:1\n", "not libsvm\n", "1 1:nan\n", "1 1:1e39\n", "inf 1:1\n"])
def test_a_wrong_libsvm_file_is_refused_by_name(tmp_path, content):
    pytest.importorskip("sklearn")
    (tmp_path / "usps").write_text(content)
    (tmp_path / "usps.t").write_text("1 1:1\n")
    with pytest.raises(ValueError, match=r"usps: expected"):
        data_tables.load_table("usps", tmp_path)


def test_missing_files_are_named_and_no_others(tmp_path):
    (tmp_path / "svmguide4").write_text("1 1:1\n")
    with pytest.raises(FileNotFoundError, match=r"lacks svmguide4\.t \("):
        data_tables.load_table("svmguide4", tmp_path)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of airfoil, .*usps, got 'iris'"):
        data_tables.load_table("iris", tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "tested"),
    [
        ("airfoil", (1503, 5), 0, None), ("fires", (517, 29), 0, None), ("ccpp", (9568, 4), 0, None),
        ("ionosphere", (351, 34), 2, None), ("vehicle", (846, 18), 4, None),
        ("svmguide4", (300, 10), 6, 312), ("usps", (7291, 256), 10, 2007),
    ],
)  # fmt: skip
def test_the_real_files_have_the_published_shapes(real_data, name, shape, classes, tested):
    table = data_tables.load_table(name, real_data)
    assert (tuple(table.x.shape), table.classes) == (shape, classes)
    assert (None if table.x_test is None else len(table.x_test)) == tested
    assert torch.isfinite(table.x).all()
