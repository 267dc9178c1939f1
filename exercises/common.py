"""What the exercises share: runs that are trained once, and the table, JSON and plot of a sweep.

Each exercise trains some models for every seed, measures each one, and ends with a list of
rows, one a model: what was varied, the seed, and the numbers. Models go into
runs/exercises/, where an interrupted exercise finds them again; so do the results.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.nn as nn
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's own files

import train  # noqa: E402
from data import Split, load_dataset, write_atomically  # noqa: E402
from viz import save  # noqa: E402

RESULTS = Path("runs/exercises")


def parse_args(argv: list[str] | None, name: str, description: str,
               datasets: tuple[str, ...]) -> argparse.Namespace:
    """The options of an exercise, the first of the datasets being the default; and `name`, how
    its results are called: unusual options are part of it, so that a quick look does not
    overwrite the work of an hour."""
    parser = train.Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=datasets, default=datasets[0],
                        help=f"default: {datasets[0]}")
    parser.add_argument("--epochs", type=train.number(int, 1), default=10, metavar="N",
                        help="passes over the training images (default: 10)")
    parser.add_argument("--seeds", type=train.number(int, 0), nargs="+", default=[0, 1, 2],
                        metavar="S", help="each is a model of every kind (default: 0 1 2)")
    parser.add_argument("--limit", type=train.number(int, 1), metavar="N",
                        help="train on the first N training images only, for a quick look")
    parser.add_argument("--data-dir", metavar="DIR", help="as for train.py")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.name = f"{name}-{args.dataset}"
    for option in ("epochs", "seeds", "limit"):
        if vars(args)[option] != parser.get_default(option):
            args.name += f"-{option}{vars(args)[option]}".translate(str.maketrans(",", "-", "[] "))
    return args


def run(main: Callable[[], object]) -> NoReturn:
    train.run_cli(main, "the same command goes on from there")


def load_images(args: argparse.Namespace) -> tuple[Split, Split]:
    return load_dataset(args.dataset, train.find_data_dir(args.data_dir))


def trained(args: argparse.Namespace, seed: int, epochs: int | None = None,
            **options) -> tuple[nn.Module, list[dict]]:
    """A model on the CPU, frozen, in evaluation mode, and its history: read from disk, or trained.

    options: those of train.py, with _ for -. Two exercises that ask for the same share it.
    """
    options |= {"dataset": args.dataset, "epochs": epochs or args.epochs, "seed": seed}
    if args.limit:
        options["limit"] = args.limit
    asked = train.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in options.items()])
    folder = RESULTS / train.run_name(vars(asked) | {"notice": ""})
    asked.out, asked.resume, asked.data_dir = str(folder), True, args.data_dir
    print(f"{folder.name} ... ", end="", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        _, model, _, history, *_ = train.train_run(asked)
    seconds = sum(row["seconds"] for row in history)
    print(f"test loss {history[-1]['test_loss']:.2f}, trained in {seconds:.0f} s", flush=True)
    return model.cpu().eval().requires_grad_(False), history


def last_test(history: list[dict]) -> dict[str, float]:
    """Test losses after the last epoch, nats: -ELBO (whatever the beta was), recon and KL."""
    recon, kl = history[-1]["test_recon"], history[-1]["test_kl"]
    return {"recon + KL": recon + kl, "recon": recon, "KL": kl}


def spread(rows: list[dict], key: str, setting, measure: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of the rows that have key = setting."""
    values = [row[measure] for row in rows if row[key] == setting]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown_table(rows: list[dict], key: str, formats: dict[str, str]) -> str:
    """A line for each value of key: mean ± standard deviation over the seeds.

    formats: the measures to show, in order, with the format of their numbers.
    """
    lines = [[key, *formats], ["---"] * (1 + len(formats))]
    for setting in dict.fromkeys(row[key] for row in rows):
        chosen = [row for row in rows if row[key] == setting]
        cells = [str(setting)]
        for measure, form in formats.items():
            if measure not in chosen[0]:
                cells.append("")
                continue
            mean, std = spread(rows, key, setting, measure)
            cells.append(f"{mean:{form}}" + (f" ± {std:{form}}" if len(chosen) > 1 else ""))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot_measures(rows: list[dict], key: str, measures: dict[str, list[str]], path: Path) -> None:
    """Mean ± standard deviation over the seeds against key, on a logarithmic axis.

    measures: the label of each panel -> the measures in it.
    """
    settings = list(dict.fromkeys(row[key] for row in rows))
    figure = Figure(figsize=(2.6 * len(measures), 2.6), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(1, len(measures)), measures.items()):
        for name in names:
            means, stds = zip(*(spread(rows, key, setting, name) for setting in settings))
            axes.errorbar(settings, means, stds, fmt=".-", capsize=2, label=name)
        axes.set_xscale("log")
        axes.set_xticks(settings, [f"{setting:g}" for setting in settings])
        axes.minorticks_off()
        axes.set(xlabel=key, ylabel=label)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=6)
    save(figure, path)


def report(args: argparse.Namespace, rows: list[dict], key: str, formats: dict[str, str],
           **more) -> None:
    """Write the results as JSON, what was asked and every row, and as a table; print the table."""
    asked = {option: value for option, value in vars(args).items() if option != "data_dir"}
    content = json.dumps({**asked, **more, "rows": rows}, indent=1)
    table = markdown_table(rows, key, formats)
    for suffix, text in (("json", content), ("md", table)):
        with write_atomically(RESULTS / f"{args.name}.{suffix}") as file:
            file.write(text.encode() + b"\n")
    print(table)
