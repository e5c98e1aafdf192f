"""A page of Markdown from summaries; no figure in it is typed by hand."""

from __future__ import annotations

from .experiments import QUICK_ROWS
from .runs import Row
from .summary import VERDICTS, failures

HEAD = """# The papers' experiments, run again

Made by `dante reproduce {name} --{scale}`; {made_by}. Do not edit: the text is in `dante_kernels/reproduce/`.

For every method the learning rate is searched in the same way: {grid} rates, 1 and 3 times powers of ten, around the method's
start, trained on 85 % of the training rows and judged on the other 15 %, and further ones while the best stands at the edge;
`!` behind a rate says that it still does. The best is trained again with a second seed and then counts by the worse of its two
losses, a diverged one being the worst, until the best has been trained with both: a single seed may choose a rate at the edge
of stability. The figures are those of other seeds, trained on all training rows and judged on the test rows, which no choice
has seen: mean ± standard deviation. All methods of a case update the same number of weights, with mini-batches of the same
size and the same initial weights for the same seed (torch's own initialisation). "Passes" are over the data, of each layer or,
for SGD, of all layers at once; "T" is the number of them that a layer makes in a block, so that 10 passes with T = 5 are two
rounds of the alternation. Seconds are those of the processor in training. {note}
"""
NOTES = {
    False: f"""**This is a quick run: {QUICK_ROWS:,} training rows of pictures, few passes and seeds. It shows what works;
figures as published take `--full`.**""",
    True: "Pictures: all training rows, 50 passes, 5 seeds, where an experiment says nothing else.",
}


def page(name: str, summaries: list[Row]) -> str:
    """The page of some experiments, all of one scale."""
    full = summaries[0]["full"]
    made_by = "; ".join(sorted({text for s in summaries for text in s["made_by"]})) or "no training was done"
    head = HEAD.format(
        name=name, scale="full" if full else "quick", made_by=made_by, note=NOTES[full], grid="five" if full else "two"
    )
    return "\n".join([head, *(_section(summary) for summary in summaries)])


def _section(summary: Row) -> str:
    parts = [f"## {summary['title']}\n", f"{summary['source']}; `dante reproduce {summary['name']}`.\n", summary["text"], ""]
    parts += _table(_HEADS[summary["metric"]], [row for case in summary["cases"] for row in _rows(summary["metric"], case)])
    judged = [case for case in summary["cases"] if not case["speed_only"]]
    parts += [text for case in judged for find in (_nothing_learnt, _unsteady) if (text := find(case))]
    if summary["claims"]:
        parts += [
            "",
            _CLAIM_TEXT,
            "",
            *_table(_CLAIM_HEAD, list(map(_claim_row, summary["claims"]))),
        ]
        parts += ["", *(f"- {line}" for line in verdicts(summary["claims"]))]
    if summary["only_full"]:
        parts += ["", f"Only with `--full`: {'; '.join(summary['only_full'])}."]
    if summary["picture"] and any(case["methods"] and not case["speed_only"] for case in summary["cases"]):
        parts += ["", f"![{summary['title']}](reproduction/{summary['name']}.png)"]
    parts += ["", *(f"Failed: {text}" for text in failures(summary))]
    return "\n".join(parts)


_START, _END = ("data", "net", "method", "rate"), ("without learning", "passes", "seeds", "weights updated", "seconds")
_HEADS = {
    "test_loss": (*_START, "published", "test loss", "test accuracy", *_END),
    "test_accuracy": (*_START, "published", "test accuracy", "test loss", *_END),
    "svm_accuracy": (*_START, "published", "SVM accuracy", "test loss", *_END),
}
_CLAIM_TEXT = """The claim that DANTE is at least as good; "level" is a mean difference within its own spread over the seeds,
and a single seed, of which there is no spread, decides nothing:"""
_CLAIM_HEAD = ("data", "net", "DANTE", "the other", "means", "DANTE better by", "seeds not worse", "holds")


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = (head, ["---"] * len(head), *rows)
    return [f"| {' | '.join(cells[i] for i in kept)} |" for cells in lines]


def _rows(metric: str, case: Row) -> list[list[str]]:
    """A case's lines in the table: one for each method, or one that says why there is none."""
    start = [case["title"], case["net"]]
    empty = [""] * (len(_HEADS[metric]) - 3)
    if case["absent"]:
        return [[*start, f"data {'damaged' if case['damaged'] else 'absent'}: {_escaped(case['absent'])}", *empty]]
    lines = [_speed_line(case, m) if case["speed_only"] else _line(metric, case, m) for m in case["methods"]]
    return [start + line for line in (*lines, *map(_rival_line, case["rivals"]))]


def _line(metric: str, case: Row, method: Row) -> list[str]:
    first, second = metric, "test_accuracy" if metric == "test_loss" else "test_loss"
    published = [_value(f["metric"], f["value"], digits=6) + _in_brackets(f["setting"]) for f in method["published"]]
    mean = method["mean"]
    middle = [_with_spread(method, first), _with_spread(method, second), _value("baseline", mean["baseline"])]
    if method["status"] != "done":
        middle = [method["status"], "", ""]
    rates = ", ".join(f"{rate:g}" for rate in method["rates"]) + ("!" if method["edge"] else "")
    return [method["title"], rates, "; ".join(published), *middle, *_ends(case, method)]


def _speed_line(case: Row, method: Row) -> list[str]:
    status = "speed only" if method["status"] == "done" else method["status"]
    return [method["title"], "", "", status, "", "", *_ends(case, method)]


def _rival_line(rival: Row) -> list[str]:
    accuracy = rival["accuracy"]
    figure = "" if accuracy is None else f"{100 * accuracy:.4g} % "
    return [f"{rival['title']}: not run here", "", f"{figure}({rival['source']})", "", "", "", "", "", "", rival["seconds"]]


def _ends(case: Row, method: Row) -> list[str]:
    weights, seconds = method["mean"]["weights_updated"], method["mean"]["seconds"]
    return [
        str(case["epochs"]),
        str(method["runs"]),
        "" if weights is None else f"{weights:.3g}",
        "" if seconds is None else f"{seconds:.3g}",
    ]


def _claim_row(claim: Row) -> list[str]:
    metric = claim["metric"]
    verdict = "**no**" if claim["verdict"] == "no" else claim["verdict"] + (claim["why"] and f": {claim['why']}")
    head = [claim["title"], claim["net"], claim["dante"], claim["sgd"]]
    if claim["gain"] is None:
        return [*head, "", "", "", verdict]
    spread = "" if claim["spread"] is None else f" ± {_value(metric, claim['spread'], digits=2)}"
    return [
        *head, " / ".join(_value(metric, mean) for mean in claim["means"]), _value(metric, claim["gain"], digits=2) + spread,
        f"{claim['not_worse']} of {claim['seeds']}", verdict,
    ]  # fmt: skip


def verdicts(claims: list[Row]) -> list[str]:
    """In words, a line for each pair of methods: how many claims have each of `VERDICTS`, and by name those without a yes."""
    lines = []
    for pair in dict.fromkeys((claim["dante"], claim["sgd"]) for claim in claims):
        of_pair = [claim for claim in claims if (claim["dante"], claim["sgd"]) == pair]
        parts = [f"holds in {sum(claim['verdict'] == 'yes' for claim in of_pair)} of {len(of_pair)}"]
        for verdict in VERDICTS[1:]:
            found = [claim for claim in of_pair if claim["verdict"] == verdict]
            where = "; ".join(f"{c['title']} {c['net']}" + (c["why"] and f": {c['why']}") for c in found)
            words = "the other stays ahead" if verdict == "no" else verdict
            parts += [f"{words} in {len(found)} ({where})"] if found else []
        lines.append(f"`{pair[0]}` against `{pair[1]}`: {', '.join(parts)}.")
    return lines


def _nothing_learnt(case: Row) -> str | None:
    if not case["nothing_learnt"]:
        return None
    text = "no method is better than a guess, or than answering with the mean by more than its spread over the seeds"
    return f"\nOn {case['title']} {case['net']} {text}: no verdict."


def _unsteady(case: Row) -> str | None:
    """Which methods' trainings came to more than answering with the mean, with a rate at which others did not."""
    found = []
    for method in case["methods"]:
        losses, means = method["values"]["test_loss"], method["values"]["baseline"]
        worse = sum(loss > mean for loss, mean in zip(losses, means, strict=False))
        if 0 < worse < len(losses):
            found.append(f"{worse} of {len(losses)} of {method['title']}")
    if not found or case["nothing_learnt"]:
        return None
    return f"\nOn {case['title']} {case['net']} some trainings came to more than answering with the mean: {'; '.join(found)}."


def _with_spread(method: Row, metric: str) -> str:
    spread = method["spread"][metric]
    return _value(metric, method["mean"][metric]) + ("" if spread is None else f" ± {_value(metric, spread, digits=2)}")


def _value(metric: str, value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    if metric in ("test_accuracy", "svm_accuracy"):
        return f"{100 * value:.2f} %"
    return f"{value:.{digits}g}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
