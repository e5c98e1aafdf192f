"""The command `dante reproduce`: the papers' experiments, what was published beside what comes out here and what SGD gives."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

from .cli_common import errors_in_one_line, expect

with contextlib.suppress(ImportError):  # `cli.main` says what to install
    import typer


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="all, table1, table2, table3, table4, mlp, sigmoid, cross-entropy, t-sweep, rivals, widths or autoencoder"
        ),
    ],
    full: Annotated[bool, typer.Option("--full/--quick", help="as published (hours), or small (minutes on 2 cores)")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder with mnist, fashion-mnist, kmnist, uci, libsvm, cifar10, svhn, tiny-imagenet, as far as there",
            show_default="DANTE_DATA_DIR; else MNIST and its kin are fetched",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for the page, the pictures and every training's row")] = Path("results"),
    jobs: Annotated[
        int | None, typer.Option(help="trainings side by side, of one thread each", show_default="torch's number of threads")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="train nothing; print what it takes, in hours as far as rows in --output tell")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only where the page is")] = False,
) -> None:
    """Run an experiment of the papers and write a page: published, ours, and SGD's at its best rate.

    Broken off and started again with the same --output, it goes on where it was. Where data is absent the page says so.
    """
    with errors_in_one_line():
        import torch

        from .reproduce import main, report, search
        from .reproduce import plan as planned
        from .reproduce.experiments import EXPERIMENTS
        from .reproduce.summary import failures

        expect(name == "all" or name in EXPERIMENTS, "name", f"all or one of {', '.join(EXPERIMENTS)}", name)
        expect(jobs is None or jobs >= 1, "--jobs", "at least 1", jobs)
        expect(data_dir is None or data_dir.is_dir(), "--data-dir", "a folder that is there", str(data_dir))
        expect(output.is_dir() or not output.exists(), "--output", "a folder", str(output))
        if plan:
            print(planned.plan(name, full, data_dir, search.Store(output / search.RUNS)), end="")
            return
        say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
        try:
            page, summaries = main.reproduce(
                name, full=full, directory=data_dir, output=output, jobs=jobs or torch.get_num_threads(), say=say
            )
        except KeyboardInterrupt:
            print(f"dante: finished trainings are kept in {output / search.RUNS}; the same command goes on", file=sys.stderr)
            raise
        wrong = [f"{s['name']}: {text}" for s in summaries for text in failures(s)]
        if not quiet:
            for summary in summaries:
                for line in report.verdicts(summary["claims"]):
                    print(f"{summary['name']}: {line}")
        print(page)
        for text in wrong:
            print(f"dante: {text}", file=sys.stderr)
        if wrong:
            raise SystemExit(1)
