"""`dante bench --against`: a slower package is flagged, noise is not, and nothing is left behind."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess

import pytest

import dante_kernels
from bench import against, app, report, workloads

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(dante_kernels.__file__).resolve().parent
SETTINGS = {"device": "cpu", "threads": 1, "precision": "highest", "quick": True, "rows": 200}
SLOW = """
import time
_pass = sngd_epoch_
def sngd_epoch_(*args, **settings):
    begin = time.perf_counter()
    out = _pass(*args, **settings)
    while time.perf_counter() < begin + 0.02:
        pass
    return out
"""
LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds processes to cores")


def ratios(seed, median, noise, count=27):
    draw = random.Random(seed)
    return [median * draw.lognormvariate(0, noise) for _ in range(count)]


def test_noise_is_not_taken_for_slowness():
    looks = [[against.judge(ratios(2 * seed + look, 1.0, 0.1)).slower for look in (0, 1)] for seed in range(200)]
    assert sum(first for first, _ in looks) <= 6
    assert not any(all(both) for both in looks)
    assert not any(against.judge(ratios(seed, 1.03, 0.02)).slower for seed in range(200))


def test_ten_percent_outside_noise_is_slower():
    assert all(against.judge(ratios(seed, 1.1, 0.03)).slower for seed in range(200))
    verdict = against.judge([1.1] * 27)
    assert (verdict.ratio, verdict.low, verdict.high) == (1.1, 1.1, 1.1)


def test_the_interval_holds_the_median_95_times_in_100():
    verdicts = [against.judge(ratios(seed, 1.0, 0.2)) for seed in range(1000)]
    held = sum(v.low <= 1 <= v.high for v in verdicts)
    assert 950 <= held <= 995


def test_too_few_pairs_prove_nothing():
    assert not against.judge([2.0] * 5).slower


@pytest.fixture
def package(tmp_path):
    """A copy of the package in a folder of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(PACKAGE, folder / "dante_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@LINUX
def test_a_slower_package_is_flagged_after_a_second_look(package, monkeypatch):
    with (package / "dante_kernels" / "ops" / "__init__.py").open("a") as file:
        file.write(SLOW)
    monkeypatch.setattr(against, "STARTS", 1)
    looks = []
    real = against.pairs_of
    monkeypatch.setattr(against, "pairs_of", lambda *args: (looks.append(args[2]), real(*args))[1])
    *_, found = against.compare({"base": PACKAGE.parent, "head": package}, SETTINGS, 9)
    verdicts = {kind: v for kind, _, v in found}
    slow = verdicts["pass"]
    assert slow.slower
    assert slow.ratio > 2
    assert 1 in looks[1]


@LINUX
def test_the_heads_harness_measures_both_sides(package):
    """A base's own bench neither runs nor has to be there whole: `bench.app` came later than some commits."""
    (package / "bench").mkdir()
    (package / "bench" / "__init__.py").write_text("raise SystemExit('the harness of the base was taken')")
    (package / "bench" / "measure.py").write_text("raise SystemExit('the harness of the base was taken')")
    with contextlib.closing(against.Side(package, SETTINGS | {"mode": "serve"})) as side:
        assert side.ask("places") == {"bench": str(ROOT), "dante_kernels": str(package)}
        assert side.ask("sample", 0) > 0


@pytest.mark.parametrize("name", ["bench", "dante_kernels"])
def test_a_package_from_elsewhere_is_an_error(monkeypatch, name):
    places = {"bench": str(ROOT), "dante_kernels": str(PACKAGE.parent)} | {name: "/elsewhere"}
    monkeypatch.setattr(against.Side, "ask", lambda self, what: places)
    with pytest.raises(RuntimeError, match=r"expected the packages .*, got .*/elsewhere"):
        against.Side(PACKAGE.parent, SETTINGS)


@LINUX
def test_a_package_that_computes_something_else_is_an_error(package):
    with (package / "dante_kernels" / "ops" / "__init__.py").open("a") as file:
        file.write("\ndef sngd_epoch_(*args, **settings):\n    return None\n")
    with pytest.raises(RuntimeError, match="20-16-10, batch 10: wrong result"):
        list(against.compare({"base": PACKAGE.parent, "head": package}, SETTINGS, 2))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_the_exit_status_and_the_files_say_whether_something_is_slower(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "stale_extension", lambda folder: False)
    for ratio, status in ((1.2, 1), (1.0, 0)):
        verdict = against.judge([ratio] * 9)
        monkeypatch.setattr(against, "compare", lambda *args, v=verdict: [[("pass", workloads.QUICK, v)]])
        output = tmp_path / str(status)
        assert app.against_commit("HEAD", SETTINGS | {"repeats": 9}, output) == status
        out = capsys.readouterr().out
        assert ("SLOWER" in out) == bool(status)
        assert git("rev-parse", "HEAD")[:12] in out
        (path,) = output.glob("bench-against-*-quick.json")
        (row,) = json.loads(path.read_text())["rows"]
        assert (row["status"], row["ratio"]) == ("slower" if status else "not slower", ratio)
        assert len(list(output.glob("*.csv"))) == 1


class Told:
    """A side whose new package takes 1.2 times as long; it ends as `how` says when it is asked for a time too many."""

    left, how = 0, None

    def __init__(self, folder, settings):
        self.seconds = {"base": 1.0, "head": 1.2}[folder]

    def ask(self, *request):
        if Told.left == 0 and Told.how is not None:
            raise Told.how
        Told.left -= 1
        return self.seconds

    def close(self):
        pass


@pytest.mark.parametrize("how", [RuntimeError("out of memory"), SystemExit(143), KeyboardInterrupt()])
@pytest.mark.parametrize(("left", "cases"), [(18, 1), (17, 0), (6 * 18, 2), (7 * 18, 2), (10**6, 2)])
def test_pairs_that_are_done_are_judged_and_written_where_it_is_ended_early(monkeypatch, tmp_path, capsys, how, left, cases):
    monkeypatch.setattr(Told, "left", left)
    monkeypatch.setattr(Told, "how", how)
    monkeypatch.setattr(against, "Side", Told)
    monkeypatch.setattr(against, "checkout", lambda *_: contextlib.nullcontext("base"))
    monkeypatch.setattr(report, "commit_of", lambda folder: "abc")
    real = against.compare
    monkeypatch.setattr(against, "compare", lambda sides, *rest: real({"base": "base", "head": "head"}, *rest))
    run = lambda: app.against_commit("HEAD", SETTINGS | {"repeats": 9}, tmp_path)  # noqa: E731
    if left == 10**6:
        assert run() == 1
    elif isinstance(how, RuntimeError):
        assert run() == 2
    else:
        with pytest.raises(type(how)):
            run()
    rows = [row for path in tmp_path.glob("*.json") for row in json.loads(path.read_text())["rows"]]
    assert [(row["status"], row["ratio"]) for row in rows] == [("slower", 1.2)] * cases
    assert all(("looked at only once" in row["note"]) == (left < 10**6) for row in rows)
    assert capsys.readouterr().out.count("SLOWER") == cases


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_an_extension_older_than_its_sources_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "stale_extension", lambda folder: True)
    assert app.against_commit("HEAD", SETTINGS | {"repeats": 9}, tmp_path) == 2
    assert "older than csrc" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_a_commit_is_checked_out_for_as_long_as_it_is_needed(monkeypatch):
    monkeypatch.setattr(report, "stale_extension", lambda folder: False)
    before = git("worktree", "list")
    with against.checkout("HEAD", PACKAGE.parent) as folder:
        assert (folder / "dante_kernels" / "__init__.py").is_file()
        built = {path.name for path in PACKAGE.glob("_C*.so")}
        assert {path.name for path in (folder / "dante_kernels").glob("_C*.so")} == built
        assert git("worktree", "list") != before
    assert not folder.exists()
    assert git("worktree", "list") == before


def test_an_extension_is_copied_only_where_no_source_differs(monkeypatch, tmp_path):
    """Neither a changed file of csrc nor one that git does not know yet."""
    files = {
        "setup.py": "open('dante_kernels/_C.abi3.so', 'w').write('built')", "csrc/a.cpp": "", "dante_kernels/__init__.py": "",
        ".gitignore": "*.so\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
    (tmp_path / "dante_kernels" / "_C.abi3.so").write_text("copied")
    monkeypatch.setattr(against, "ROOT", tmp_path)
    monkeypatch.setattr(report, "stale_extension", lambda folder: False)
    for name, made in ((None, "copied"), ("csrc/new.cpp", "built"), ("csrc/a.cpp", "built")):
        if name:
            (tmp_path / name).write_text("changed")
        with against.checkout("HEAD", tmp_path) as folder:
            assert (folder / "dante_kernels" / "_C.abi3.so").read_text() == made, name
        subprocess.run(["git", "clean", "-fdq"], cwd=tmp_path, check=True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_what_is_no_commit_is_named(capsys, tmp_path):
    assert app.against_commit("no-such-commit", SETTINGS | {"repeats": 9}, tmp_path) == 2
    assert "got 'no-such-commit'" in capsys.readouterr().err
