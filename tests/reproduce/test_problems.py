"""The experiments' data: cut, enlarged, scaled and split as said; and what is asked of a trained autoencoder."""

import gzip

import numpy as np
import pytest
import torch
from support_reproduce import blobs, write_ccpp
from test_data import idx_bytes, small_arrays, write_files

from dante_kernels import data
from dante_kernels.reproduce import experiments, probes, problems, runs
from dante_kernels.reproduce.problems import Spec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_are_cut_enlarged_and_their_own_target(tmp_path):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (6, 3, 3), dtype=np.uint8), np.arange(6, dtype=np.uint8)] * 2
    write_files(tmp_path / "mnist", arrays)
    problem = problems.load(Spec("mnist", rows=4, test_rows=2, side=6, autoencoder=True), tmp_path)
    assert problem.x.shape == (4, 36)
    assert problem.y is problem.x
    assert len(problem.x_test) == len(problem.labels_test) == 2
    square = problem.x[1].view(6, 6)
    assert torch.equal(square[1:4, 1:4], torch.from_numpy(arrays[0][1]).float() / 255)
    assert float(square.sum()) == pytest.approx(float(square[1:4, 1:4].sum()))
    assert problems.load(Spec("mnist"), tmp_path).y.tolist() == list(range(6))


def test_of_kmnist_the_first_images_do(tmp_path):
    (tmp_path / "kmnist").mkdir()
    for file, array in zip(problems.KMNIST_PART, small_arrays(), strict=True):
        (tmp_path / "kmnist" / file).write_bytes(gzip.compress(idx_bytes(array)))
    problem = problems.load(Spec("kmnist"), tmp_path)
    assert torch.equal(problem.x, torch.from_numpy(small_arrays()[0].reshape(6, 9)).float() / 255)
    assert problem.y_test.tolist() == small_arrays()[3].tolist()


def test_tables_are_split_by_seed_and_scaled_by_their_training_rows(tmp_path):
    write_ccpp(tmp_path)
    first, again, other = (problems.load(Spec("ccpp", split=split), tmp_path) for split in (1, 1, 2))
    assert (len(first.x), len(first.x_test)) == (40, 10)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert torch.allclose(first.x.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(first.y.std(0), torch.ones(1), atol=1e-4)
    table = problems.data_tables.load_table("ccpp", tmp_path)
    train = table.y[torch.randperm(50, generator=torch.Generator().manual_seed(1))[10:]]
    assert first.unit == pytest.approx(float((train.std() / table.y.max()) ** 2), rel=1e-4)


def test_a_table_with_other_rows_than_the_whole_is_another_problem(tmp_path, real_data):
    write_ccpp(tmp_path)
    assert problems.as_there(Spec("ccpp"), tmp_path) == Spec("ccpp", rows=50)
    assert len(problems.load(Spec("ccpp", rows=50), tmp_path).x) == 40
    assert problems.as_there(Spec("airfoil"), tmp_path) == Spec("airfoil")  # which is not there at all
    assert all(problems.as_there(Spec(name), real_data) == Spec(name) for name in problems.ROWS)


def test_a_table_for_an_autoencoder_is_scaled_to_one_and_keeps_its_classes(tmp_path):
    lines = [f"{' '.join(str((i * k) % 17) for k in range(1, 19))} {('van', 'bus')[i % 2]}" for i in range(200)]
    (tmp_path / "vehicle.dat").write_text("\n".join(lines) + "\n")
    problem = problems.load(Spec("vehicle", autoencoder=True, split=1), tmp_path)
    assert (float(problem.x.min()), float(problem.x.max()), len(problem.x_test)) == (0, 1, 127)
    assert problem.y is problem.x
    assert set(problem.labels.tolist()) == {0, 1}


def test_the_svm_judges_the_hidden_activations():
    pytest.importorskip("sklearn")
    problem = blobs(90)
    problem = problem._replace(labels=problem.y, labels_test=problem.y_test)
    model = runs.build((4, 6, 4), "leaky_relu", "leaky_relu", 0)
    assert probes.svm(model, problem)["svm_accuracy"] > 0.9
    with torch.no_grad():
        model[0].weight.zero_()
    assert probes.svm(model, problem)["svm_accuracy"] < 0.5


def test_pictures_show_one_test_row_of_each_class():
    problem = blobs(12)._replace(labels_test=torch.tensor([1, 0, 1, 2, 0, 2]))
    model = torch.nn.Sequential(torch.nn.Identity())
    shown = probes.pictures(model, problem)
    expected = (problem.x_test[[1, 0, 3]].clamp(0, 1) * 255).round().int().tolist()
    assert [probes.pixels_of(text) for text in shown["originals"]] == expected
    assert shown["reconstructions"] == shown["originals"]


@pytest.mark.parametrize(("name", "rows", "least"), [("ionosphere", 54, 55), ("ionosphere", 3, 55), ("airfoil", 2, 3)])
def test_a_table_without_rows_to_train_on_is_refused_with_its_file_and_counts(tmp_path, name, rows, least):
    file, columns, separator, end = {
        "ionosphere": ("ionosphere.data", 34, ",", ",g"), "airfoil": ("airfoil_self_noise.dat", 5, "\t", "\t1"),
    }[name]  # fmt: skip
    line = separator.join(["0.5"] * columns) + end + "\n"
    (tmp_path / file).write_text(line * rows)
    with pytest.raises(ValueError, match=rf"^{file}: expected at least {least} rows, \d+ of them for testing, got {rows}$"):
        problems.load(Spec(name), tmp_path)
    (tmp_path / file).write_text(line * least)
    assert len(problems.load(Spec(name), tmp_path).x) == 2


def test_only_what_is_not_there_is_absent(tmp_path, monkeypatch):
    assert not problems.lack(Spec("mnist"), tmp_path).damaged
    assert not problems.lack(Spec("ccpp"), tmp_path).damaged
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / data.FILES[0]).write_bytes(b"no gzip file")
    assert not problems.lack(Spec("mnist"), tmp_path / "mnist" / "..").damaged  # the others are missing
    write_files(tmp_path / "kmnist", small_arrays())
    (tmp_path / "kmnist" / data.FILES[0]).write_bytes(b"no gzip file")
    assert problems.lack(Spec("kmnist"), tmp_path) == (
        f"kmnist/{data.FILES[0]}: expected a whole gzip file, got one that cannot be unpacked (Not a gzipped file (b'no'))",
        True,
    )


@pytest.mark.parametrize("autoencoder", [False, True])
def test_a_column_that_only_test_rows_change_is_not_blown_up(tmp_path, autoencoder):
    judged = int(torch.randperm(50, generator=torch.Generator().manual_seed(3))[0])
    lines = [f"{i},0,{1024.07 + (i == judged):.2f},{i % 5},{i % 3}" for i in range(50)]
    (tmp_path / "ccpp.csv").write_text("AT,V,AP,RH,PE\n" + "\n".join(lines) + "\n")
    problem = problems.load(Spec("ccpp", split=3, autoencoder=autoencoder), tmp_path)
    assert float(problem.x_test.abs().max()) < 5
    assert torch.allclose(problem.x_test[:, 2], torch.tensor([1.0] + [0.0] * 9), atol=1e-3)


@pytest.mark.parametrize(("name", "figure"), [("fires", "0.0444 on Fires"), ("ccpp", "0.0000849 on CCPP")])
def test_the_errors_of_least_squares_are_those_that_are_named(real_data, name, figure):
    errors = []
    for split in range(1, 6):
        problem = problems.load(Spec(name, split=split), real_data)
        train, test = (torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in (problem.x, problem.x_test))
        weights = torch.linalg.lstsq(train, problem.y.double(), driver="gelsd").solution
        errors.append((test @ weights - problem.y_test).square().mean() * problem.unit)
    text = " ".join(experiments.EXPERIMENTS["table3"](experiments.Scale(full=False)).text.split())
    assert figure in text
    assert float(torch.stack(errors).mean()) == pytest.approx(float(figure.split()[0]), rel=2e-3)
