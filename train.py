"""Train an autoencoder or a VAE from the command line (chapter 2.5).

    python train.py                               the MLP VAE on MNIST, 10 epochs
    python train.py --model conv --beta 4         a convolutional beta-VAE
    python train.py --latent-dim 2                two latents, to draw as a map
    python train.py --kl-anneal 5                 let the KL in over five epochs
    python train.py --dataset digits              no download: digits drawn here
    python train.py --model celeba --limit 20000  faces, from CelebA's files (chapter 2.7)
    python train.py --out runs/long --epochs 50 --resume      begin it, or go on with it
    python train.py --binarize --importance-samples 5         an IWAE, on binary pixels
    python train.py --evaluate runs/long          its log p(x), by importance sampling
    torchrun --nproc_per_node=2 train.py          two processes (GPUs), half of every batch each

A run is a folder: config.json (what was asked), history.csv (a row an epoch, nats per
image; for ae and --recon mse squared errors), checkpoint.pt (the model), and the figures of viz.py;
after --evaluate also evaluation.json and bounds.png.
"""

import signal

if __name__ == "__main__":  # Ctrl-C amid the imports ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import contextlib
import csv
import gc
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from ae import Autoencoder
from data import DATASETS, DRAWN, PROJECT_DATA, Batches, DataUnavailable, Split, UserError
from data import binarize_once, load_dataset, locked, show_status, write_atomically
from vae import ACTIVATIONS, VAE, CelebAVAE, ConvVAE, active_units, bce_from_logits
from vae import draw_log_weights, importance_weighted_bound, squared_error

MODELS = {"ae": Autoencoder, "mlp": VAE, "conv": ConvVAE, "celeba": CelebAVAE}
RECON_LOSSES = {"bce": bce_from_logits, "mse": squared_error}
COLOUR = ("celeba", "faces")  # 64 x 64 in colour; the other datasets are 28 x 28 in grey

# evaluate measures the bounds L_k for these k, and for all draws together.
BOUND_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)

RUN_FILES = ("config.json", "checkpoint.pt", "history.csv")
# What decides a run's numbers; --resume insists that none of it has changed.
SETTINGS = (
    "model", "dataset", "binarize", "train_images", "test_images",
    "latent_dim", "hidden_dim", "hidden_layers", "activation",
    "beta", "kl_anneal", "recon", "importance_samples",
    "batch_size", "lr", "lr_schedule", "seed", "amp", "compile", "processes",
)

# torchrun starts several processes and tells each of them which it is, and of how many.
RANK, PROCESSES = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ----------------------------------------------------------------------- the loop


def train_epoch(
    model: nn.Module,
    train_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    beta: float = 1.0,
) -> tuple[float, float, float]:
    """One pass over the data, one optimizer step a batch.

    train_loader: any iterable of (images, labels), images float in [0, 1]. Returns the
    mean (loss, recon, kl) per image in the units of model.loss (nats), every batch
    measured before its step. Raises FloatingPointError if one of them is no longer finite.
    """
    model.train()
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for step, (images, labels) in enumerate(train_loader, start=1):
        batch_size = len(images)
        images, labels = share(images).to(device), share(labels).to(device)
        total, recon, kl = model.loss(images, labels, beta)
        optimizer.zero_grad()
        # The mean over the batch of the sum over pixels and latents. A mean over the
        # pixels too would shrink recon, but not the KL: as if beta were 784.
        # (Several processes average their gradients, so a sum is divided by a mean share.)
        (total / (batch_size / PROCESSES)).backward()
        optimizer.step()
        # Summed on the device, and seldom looked at: an .item() makes a GPU wait. (One process
        # of several must not stop alone; they look at the end of the epoch, when all know.)
        sums += torch.stack([total, recon, kl]).detach()
        count += batch_size
        if PROCESSES == 1 and (step % 20 == 0 or not sums.is_cuda):
            check_finite(sums, f"step {step}")
    return mean_over_processes(sums, count, "training")


@torch.no_grad()
def test_epoch(
    model: nn.Module, test_loader: Iterable, device: torch.device | str, beta: float = 1.0
) -> tuple[float, float, float]:
    """The mean (loss, recon, kl) per image as `train_epoch`, in evaluation mode, no steps."""
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, labels in test_loader:
        count += len(images)
        images, labels = share(images).to(device), share(labels).to(device)
        sums += torch.stack(model.loss(images, labels, beta))
    return mean_over_processes(sums, count, "the test")


def check_finite(sums: torch.Tensor, where: str) -> None:
    """FloatingPointError if a NaN or an infinity is, and so stays, in the sums of the terms."""
    if not sums.isfinite().all():
        terms = dict(zip(("loss", "recon", "KL"), sums.tolist()))
        bad = (f"{name} is {value:g}" for name, value in terms.items() if not math.isfinite(value))
        raise FloatingPointError(f"in {where} {', '.join(bad)}")


def kl_weight(epoch: int, kl_anneal: int) -> float:
    """The weight of the KL in an epoch, counted from 1: min(1, epoch / kl_anneal).

    So the first epoch already trains at a weight above 0. kl_anneal = 0: always 1. This is a
    linear form of KL annealing (Bowman et al. 2016, who raise it step by step, as a sigmoid).
    """
    return min(1.0, epoch / kl_anneal) if kl_anneal else 1.0


def learning_rate(epoch: int, epochs: int, lr: float, schedule: str) -> float:
    """The learning rate of an epoch, counted from 1.

    constant: lr. cosine: half a period of the cosine, from lr in the first epoch towards 0,
    which it would reach one epoch after the last (Loshchilov & Hutter 2017, without restarts):
    the noise that keeps the weights from settling dies away.
    """
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def progress(batches: Batches, epoch: int, epochs: int) -> Iterator:
    """Yield the batches; on a terminal, keep one line of throughput and time left."""
    if not sys.stdout.isatty():
        yield from batches
        return
    start = shown = time.monotonic()
    images = 0
    for step, batch in enumerate(batches, start=1):
        yield batch
        images += len(batch[0])
        now = time.monotonic()
        if now - shown > 0.2:
            shown, steps_left = now, len(batches) * (epochs - epoch + 1) - step
            show_status(
                f"epoch {epoch}/{epochs}  {100 * step // len(batches):3d} %  "
                f"{images / (now - start):,.0f} images/s  "
                f"{(now - start) / step * steps_left:.0f} s left"
            )
    show_status("")


# ------------------------------------------------- faster, and on several processes


def prepare(model: nn.Module, device: torch.device, amp: bool, compile: bool) -> None:
    """Put the model on the device and change how it is computed, but not its weights."""
    model.to(device, memory_format=torch.channels_last)  # a fifth off convolutions, on the CPU
    if amp:
        model.encode = in_bfloat16(model.encode, device.type)
        model.decode_logits = in_bfloat16(model.decode_logits, device.type)
    if compile:
        # eager mode's random numbers, so that a seed means the same; on a GPU, CUDA graphs
        options = {"fallback_random": True, "triton.cudagraphs": True}
        model.loss = torch.compile(model.loss, options=options)
    if PROCESSES > 1:
        wrapped = nn.Module()  # DistributedDataParallel takes a module, and calls its forward
        wrapped.model, wrapped.forward = model, model.loss
        model.loss = DistributedDataParallel(wrapped).forward


def in_bfloat16(network: Callable, device_type: str) -> Callable:
    """The network with its products in bfloat16 (8 bits of precision, the range of float32);
    what it returns is float32 again, for the losses."""
    network = torch.autocast(device_type, torch.bfloat16)(network)

    def call(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        result = network(x)
        return tuple(map(torch.Tensor.float, result)) if type(result) is tuple else result.float()

    return call


def join_processes(device: torch.device) -> None:
    """Under torchrun, meet the other processes. Only the first of them prints, writes and draws."""
    if PROCESSES > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch of them all: every PROCESSES-th image, from RANK on."""
    return batch[RANK::PROCESSES]


def with_own_noise(batches: Iterable) -> Iterator:
    """The batches. All processes draw their order by one seed, and then noise of their own."""
    for step, batch in enumerate(batches):
        if RANK > 0 and step == 0:
            torch.manual_seed(torch.initial_seed() + RANK)
        yield batch


def mean_over_processes(sums: torch.Tensor, count: int, where: str) -> tuple[float, ...]:
    """The sums of all processes, divided by the count of images of them all; see check_finite."""
    if PROCESSES > 1:
        dist.all_reduce(sums)
    check_finite(sums, where)
    return tuple((sums / count).tolist())


# ------------------------------------------------------------------- runs on disk


def build_model(settings: dict) -> nn.Module:
    """The model that the SETTINGS ask for; a size of None keeps the architecture's own."""
    keys = ("latent_dim", "hidden_dim", "hidden_layers", "activation")
    sizes = {key: settings[key] for key in keys if settings[key] is not None}
    model = MODELS[settings["model"]](**sizes)
    model.recon_loss = RECON_LOSSES[settings["recon"]]
    model.importance_samples = settings["importance_samples"]
    return model


def loss_unit(config: dict) -> str:
    if config["model"] == "ae":
        return "squared error per image"
    return "nats per image" if config["recon"] == "bce" else "squared error per image, KL in nats"


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder of this name; if it is taken, also by another process, name-2, name-3, ..."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            folder.mkdir()
            return folder


@contextlib.contextmanager
def open_run(out: str | None, resume: bool, name: str) -> Iterator[Path]:
    """The folder of a run: out, or a new one in runs/. Never another run's; others are kept out.

    What cuts the run short is told how to go on with it.
    """
    folder = Path(out or "runs")
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name a folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not out:
        folder = new_folder(folder, name)
    with locked(folder):
        if not resume and any((folder / name).exists() for name in RUN_FILES):
            raise UserError(
                f"--out {folder}: holds a run already; add --resume to go on with it, "
                "or name another folder"
            )
        to_go_on = f"the same command with --out {shlex.quote(str(folder))} --resume goes on"
        try:
            yield folder
        except KeyboardInterrupt:
            raise KeyboardInterrupt(to_go_on) from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{error.filename or folder}: {reason}. Saved epochs are kept: {to_go_on}"
            ) from error


def save_run(
    folder: Path,
    config: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict],
) -> None:
    """Write the RUN_FILES, each whole or not at all."""
    if RANK > 0:
        return
    with write_atomically(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
    checkpoint = {
        "config": config,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    content = io.BytesIO()  # torch.save would hide a full disk behind an error of its own
    torch.save(checkpoint, content)
    with write_atomically(folder / "checkpoint.pt") as file:
        file.write(content.getbuffer())
    table = io.StringIO()
    writer = csv.DictWriter(table, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with write_atomically(folder / "history.csv") as file:
        file.write(table.getvalue().encode())


def load_run(folder: str | Path) -> tuple[nn.Module, dict]:
    """A run's model, on the CPU and in evaluation mode, and its checkpoint, which holds the
    keys config, history, model and optimizer.

    Raises UserError if a file is missing or damaged, or if they are not of one run.
    """
    config_path, path = Path(folder) / "config.json", Path(folder) / "checkpoint.pt"
    for file in (config_path, path):
        if not file.is_file():
            raise UserError(f"{file} is missing: {folder} holds no trained run")
    try:
        config = json.loads(config_path.read_bytes())
        config = {key: config[key] for key in SETTINGS}
        MODELS[config["model"]], RECON_LOSSES[config["recon"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{config_path}: is not a run's config.json, or of another version ({error!r})"
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums in it
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        # weights_only: a checkpoint from elsewhere must not be able to run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(path, checkpoint["config"], config)
        model = build_model(config)
        model.load_state_dict(checkpoint["model"])
        # What the callers rely on must be there and fit, too:
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():
            torch.stack([parameter, state["exp_avg"], state["exp_avg_sq"]])
        checkpoint["history"][-1]["test_loss"], checkpoint["config"]["notice"]
    except UserError:
        raise
    except Exception as error:  # torch has many kinds for the many ways to be broken
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: is not a checkpoint that can be read ({reason} ...)") from error
    # channels-last as in training, where convolutions round otherwise
    return model.to(memory_format=torch.channels_last).eval(), checkpoint


def check_settings(path: Path, found: dict, expected: dict) -> None:
    """Raise UserError at the first setting in which the run at path is another."""
    for key in SETTINGS:
        if found[key] != expected[key]:
            raise UserError(f"{path}: is of a run with {key} {found[key]}, not {expected[key]}")


# --------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help explains the options")


def on_interrupt(handler: Callable | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def run_cli(main: Callable[[], object], to_go_on: str = "") -> NoReturn:
    """Run a script: a user's error becomes one line on stderr and exit status 2.

    to_go_on: what to tell a user who has ended it by Ctrl-C or kill, if not what main says.
    """
    on_interrupt(signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        reason = error.strerror or error
        message = f"{error.filename}: {reason}" if error.filename else str(reason)
    except (RuntimeError, MemoryError) as error:  # for most of it torch has no public exception
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "DefaultCPUAllocator" in str(error):
            message = (
                "the memory is full: take a smaller --batch-size, --importance-samples, "
                "--hidden-dim or --latent-dim"
            )
        elif "compiler" in str(error).lower():
            message = "--compile needs a C++ compiler: install one, such as g++, or leave it out"
        elif PROCESSES > 1 and "by peer" in str(error):
            message = "another process has ended"
        else:
            raise
    except KeyboardInterrupt as interrupt:
        on_interrupt(signal.SIG_IGN)  # a second one must not cut the line
        hint = to_go_on or str(interrupt) or "what was saved is kept"
        print(f"\ninterrupted; {hint}", file=sys.stderr)
        sys.exit(130)
    else:
        on_interrupt(signal.SIG_IGN)
        sys.exit(0)
    on_interrupt(signal.SIG_IGN)
    show_status("")
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stdout = None  # if it is what failed, a last flush would fail again, with a traceback
    sys.exit(2)


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """An argparse type: a number from low to high, so neither inf nor nan."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message: "invalid int value"
    return parse


def parse_args(argv: list[str] | None, description: str = __doc__) -> argparse.Namespace:
    """The options of a training run, checked; UserError for a bad one."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and loss").add_argument
    add("--model", choices=MODELS,
        help="ae: the autoencoder; mlp: the fully connected VAE; conv: the convolutional VAE; "
        "celeba: the same for 64 x 64 in colour (default: mlp; celeba for celeba and faces)")
    add("--latent-dim", type=number(int, 1, 2**16), metavar="N",
        help="size of the code z (default: 20, conv 128, celeba 256)")
    add("--hidden-dim", type=number(int, 1, 2**16), metavar="N",
        help="units in each hidden layer of mlp (default: 400)")
    add("--hidden-layers", type=number(int, 1, 100), metavar="N",
        help="hidden layers in the encoder of mlp, and in its decoder (default: 1)")
    add("--activation", choices=ACTIVATIONS,
        help="what follows each hidden layer of mlp (default: relu)")
    add("--beta", type=number(float, 0), default=1.0, metavar="B",
        help="weight of the KL in the loss: 1 is the VAE, more a beta-VAE (default: 1)")
    add("--kl-anneal", type=number(int, 0), default=0, metavar="N",
        help="train epoch e at the weight beta * min(1, e / N); test losses are always of the "
        "full beta (default: 0, none)")
    add("--recon", choices=RECON_LOSSES,
        help="reconstruction loss, summed over the pixels: bce, of Bernoulli pixels, or mse, the "
        "squared error, which is of Gaussian ones with variance beta / 2 (default: bce; ae: mse)")
    add("--importance-samples", type=number(int, 1, 10**6), default=1, metavar="K",
        help="train on the importance-weighted bound L_K of K draws of z, which makes an IWAE; "
        "the losses are -L_K then (default: 1, the VAE)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS,
        help="mnist and fashion-mnist are downloaded once, celeba you put there yourself (see "
        "the README), digits and faces are drawn here, once (default: mnist; for --model celeba, "
        "celeba)")
    add("--fallback", choices=DRAWN,
        help="train on this instead if the dataset is neither on disk nor available from "
        "the network; without --fallback that is an error")
    add("--binarize", action="store_true",
        help="make every pixel 0 or 1 at random, 1 with its grey value as the probability: anew in "
        "every batch for training, once, from seed 0, for testing")
    add("--limit", type=number(int, 1), metavar="N",
        help="train on the first N training images only")
    add("--skip-broken", action="store_true",
        help="leave out the JPEGs of celeba that cannot be decoded, instead of stopping")
    add("--data-dir", metavar="DIR",
        help="where the datasets are (default: $VAE_DATA_DIR, else data/ beside train.py)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=10, metavar="N",
        help="passes over the training images (default: 10)")
    add("--batch-size", type=number(int, 1), default=128, metavar="N",
        help="images a step (default: 128)")
    add("--lr", type=number(float, 0), default=2e-3, metavar="LR",
        help="learning rate of Adam (default: 0.002)")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant",
        help="cosine lets the learning rate fall towards 0 over the --epochs (default: constant)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="the same seed gives the same numbers on the same CPU (default: 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto takes the GPU if there is one (default: auto)")
    add("--amp", action="store_true",
        help="the networks' products in bfloat16, the losses in float32: pays on a processor that "
        "has bfloat16 instructions")
    add("--compile", action="store_true",
        help="have torch.compile write code for the loss and its gradient, which takes a minute "
        "and a C++ compiler: hardly pays on a CPU; meant for a GPU, on which the many small "
        "operations of a step are then launched as one (CUDA graphs)")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR",
        help="folder of the run (default: a new one, runs/DATASET-MODEL...)")
    add("--resume", action="store_true",
        help="go on with the run in --out after its last finished epoch, or begin it; "
        "takes the options that it was begun with, or a larger --epochs (but not with cosine)")
    add = parser.add_argument_group("evaluation, instead of training").add_argument
    add("--evaluate", metavar="RUN",
        help="estimate log p(x) of the binarized test images under the model of this run, a "
        "folder; takes --num-samples, --data-dir, --device and --seed besides")
    add("--num-samples", type=number(int, 1, 10**6), default=5000, metavar="K",
        help="draws of z for each image (default: 5000)")
    args = parser.parse_args(argv)
    if args.evaluate is not None:
        if PROCESSES > 1:
            parser.error("--evaluate runs in one process: leave torchrun out")
        takes = ("evaluate", "num_samples", "data_dir", "device", "seed")
        for key, value in vars(args).items():
            if key not in takes and value != parser.get_default(key):
                parser.error(f"--{key.replace('_', '-')} is for training, not for --evaluate")
        return args
    if args.num_samples != parser.get_default("num_samples"):
        parser.error("--num-samples is for --evaluate; --importance-samples is for training")
    if args.resume and args.out is None:
        parser.error("--resume needs --out DIR, the run to go on with")
    if args.dataset is None:
        args.dataset = "celeba" if args.model == "celeba" else "mnist"
    if args.model is None:
        args.model = "celeba" if args.dataset in COLOUR else "mlp"
    for dataset in filter(None, (args.dataset, args.fallback)):
        if (dataset in COLOUR) != (args.model == "celeba"):
            parser.error(
                f"--model {args.model} does not fit {dataset}: celeba and faces are 64 x 64 in "
                "colour, for --model celeba; the others are 28 x 28 in grey, for the other models"
            )
    if args.skip_broken and args.dataset != "celeba":
        parser.error(f"--skip-broken is for the JPEGs of celeba, not for {args.dataset}")
    if args.binarize and args.dataset in COLOUR:
        parser.error(f"--binarize is for grey images, not for {args.dataset}")
    if args.model == "mlp":
        args.hidden_dim, args.hidden_layers = args.hidden_dim or 400, args.hidden_layers or 1
        args.activation = args.activation or "relu"
    elif args.hidden_dim or args.hidden_layers or args.activation:
        parser.error(
            "--hidden-dim, --hidden-layers and --activation are for --model mlp, "
            f"not {args.model}"
        )
    if args.recon is None:
        args.recon = "mse" if args.model == "ae" else "bce"
    if args.model == "ae" and (args.beta != 1 or args.kl_anneal):
        parser.error("--beta and --kl-anneal weigh the KL, and --model ae has none")
    if args.importance_samples > 1 and args.beta != 1:
        parser.error("--importance-samples is for --beta 1: no other has such a bound")
    if args.model == "ae" and (args.recon != "mse" or args.importance_samples > 1):
        parser.error("--model ae is trained on the squared error only, --recon mse, of one code")
    return args


def find_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"]) if PROCESSES > 1 else 0
    if index >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs, not more")
    return torch.device("cuda", index)


def find_data_dir(option: str | None) -> Path:
    """--data-dir or $VAE_DATA_DIR, which must exist, or the project's data/."""
    named = option or os.environ.get("VAE_DATA_DIR")
    if named and not Path(named).is_dir():
        raise UserError(f"the data folder {named} is no folder: create it, or name another")
    return Path(named) if named else PROJECT_DATA


def load_or_fall_back(args: argparse.Namespace) -> tuple[str, tuple[Split, Split]]:
    """The dataset asked for, or --fallback if that is not available: its name and splits."""
    root = find_data_dir(args.data_dir)
    try:
        return args.dataset, load_dataset(args.dataset, root, args.skip_broken)
    except DataUnavailable as error:
        if args.fallback is None:
            raise
        print(
            f"*** {args.dataset.upper()} IS NOT AVAILABLE: training on the built-in "
            f"{args.fallback} instead. *** The reason: {error}"
        )
        return args.fallback, load_dataset(args.fallback, root)


def load_test_split(folder: str | Path, config: dict, data_dir: str | None) -> Split:
    """The test images of the run in folder, as they are on disk: not binarized."""
    _, test = load_dataset(config["dataset"], find_data_dir(data_dir), skip_broken=True)
    if len(test.images) != config["test_images"]:
        raise UserError(
            f"{folder}: was tested on {config['test_images']} images of {config['dataset']}, and "
            f"here are {len(test.images)}: name the data folder of the run with --data-dir"
        )
    return test


def train_run(args: argparse.Namespace) -> tuple:
    """Train, test and save one run, an epoch at a time.

    Returns the arguments of viz.draw_run: (folder, model, config, history, test_loader,
    factors of the test images).
    """
    device = find_device(args.device)
    join_processes(device)
    dataset, (train_split, test_split) = load_or_fall_back(args)

    limited = args.limit is not None and args.limit < len(train_split.images)
    train_split = Split(train_split.images[: args.limit], train_split.labels[: args.limit], {})
    if args.binarize:
        test_split = test_split._replace(images=binarize_once(test_split.images))

    torch.manual_seed(args.seed)
    model = build_model(vars(args))
    notice = "" if dataset == args.dataset else f"built-in {dataset}, not {args.dataset}"
    config = {
        "model": args.model,
        "dataset": dataset,
        "notice": notice,
        "binarize": args.binarize,
        "train_images": len(train_split.images),
        "test_images": len(test_split.images),
        "latent_dim": model.latent_dim,
        "hidden_dim": args.hidden_dim,
        "hidden_layers": args.hidden_layers,
        "activation": args.activation,
        "beta": args.beta,
        "kl_anneal": args.kl_anneal,
        "recon": args.recon,
        "importance_samples": args.importance_samples,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "lr_schedule": args.lr_schedule,
        "seed": args.seed,
        "amp": args.amp,
        "compile": args.compile,
        "processes": PROCESSES,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
    }
    name = f"{dataset}-instead-of-{args.dataset}" if notice else dataset
    name += "-binarized" if args.binarize else ""
    name += f"-{args.model}"
    if args.model == "mlp" and (args.hidden_layers, args.hidden_dim) != (1, 400):
        name += f"-{args.hidden_layers}x{args.hidden_dim}"
    name += "-tanh" if args.activation == "tanh" else ""
    name += f"-beta{args.beta:g}" if args.beta != 1 else ""
    name += f"-anneal{args.kl_anneal}" if args.kl_anneal else ""
    name += f"-iwae{args.importance_samples}" if args.importance_samples > 1 else ""
    name += "-mse" if args.recon == "mse" and args.model != "ae" else ""
    name += f"-latent{args.latent_dim}" if args.latent_dim else ""
    name += f"-first{args.limit}" if limited else ""
    with open_run(args.out, args.resume, name) if RANK == 0 else contextlib.nullcontext() as folder:
        if PROCESSES > 1:
            dist.broadcast_object_list(found := [folder])
            folder = found[0]
        return train_in(folder, args, config, model, device, train_split, test_split)


def train_in(
    folder: Path,
    args: argparse.Namespace,
    config: dict,
    model: nn.Module,
    device: torch.device,
    train_split: Split,
    test_split: Split,
) -> tuple:
    """Begin the run in the folder, or go on with it: `train_run`, once all is known."""
    checkpoint, history = None, []
    if args.resume and (folder / "checkpoint.pt").exists():
        model, checkpoint = load_run(folder)
        check_settings(folder, checkpoint["config"], config)
        if args.lr_schedule == "cosine" and checkpoint["config"]["epochs"] != args.epochs:
            raise UserError(
                f"{folder}: its cosine schedule was laid out for {checkpoint['config']['epochs']} "
                f"epochs, not {args.epochs}; go on with --epochs {checkpoint['config']['epochs']}"
            )
        history = checkpoint["history"]
        config = checkpoint["config"] | {"epochs": max(args.epochs, len(history))}
    prepare(model, device, args.amp, args.compile)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        save_run(folder, config, model, optimizer, history)
        if len(history) < args.epochs:  # these would soon be of another model
            for stale in ("evaluation.json", "bounds.png"):
                (folder / stale).unlink(missing_ok=True)

    images, labels, _ = train_split
    train_loader = Batches(
        images.to(device), labels.to(device), args.batch_size, shuffle=True, binarize=args.binarize
    )
    images, labels, factors = test_split
    test_batch = max(1, 1000 // args.importance_samples)  # as many draws, whatever K
    test_loader = Batches(images.to(device), labels.to(device), test_batch)
    print(
        f"{args.model} with {config['parameters']:,} parameters on {config['dataset']}, "
        f"{len(train_split.images):,} + {len(test_split.images):,} images, {config['device']}. "
        f"Losses: {loss_unit(config)}. Run: {folder}",
        flush=True,
    )
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        # Every epoch has a seed of its own, so a resumed run draws the same numbers.
        torch.manual_seed(args.seed + 1_000_003 * epoch)
        batches = with_own_noise(progress(train_loader, epoch, args.epochs))
        beta = args.beta * kl_weight(epoch, args.kl_anneal)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args.epochs, args.lr, args.lr_schedule)
        try:
            train = train_epoch(model, batches, optimizer, device, beta)
            test = test_epoch(model, test_loader, device, args.beta)
        except FloatingPointError as error:
            raise UserError(
                f"{folder}: epoch {epoch}, {error}; try a new run with a smaller --lr, or a --beta "
                f"nearer to 1. Epochs kept: {len(history)}"
            ) from error
        seconds = time.monotonic() - start
        row = {"epoch": epoch, "beta": beta}
        row |= zip(("train_loss", "train_recon", "train_kl"), train)
        row |= zip(("test_loss", "test_recon", "test_kl"), test)
        history.append(row | {"seconds": round(seconds, 3)})
        save_run(folder, config, model, optimizer, history)
        print(
            f"epoch {epoch:2d}/{args.epochs}  "
            f"train loss {train[0]:.2f} (recon {train[1]:.2f}, KL {train[2]:.2f})  "
            f"test loss {test[0]:.2f} (recon {test[1]:.2f}, KL {test[2]:.2f})  {seconds:.1f} s",
            flush=True,
        )
    if PROCESSES > 1:  # if DistributedDataParallel is left to the exit, its threads may abort there
        del model.loss
        gc.collect()
    return folder, model, config, history, test_loader, factors


# --------------------------------------------------------- the likelihood of a run


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_samples: int) -> dict:
    """The bounds L_k of log p(x), k from 1 (the ELBO) to num_samples (close to log p(x) itself).

    loader: any iterable of (images, labels), pixels 0 or 1; model: in evaluation mode, on their
    device. Means over the images, in nats. The spread of L_k is the standard deviation of its
    estimates for one and the same image, as a root mean square over the images; None where an
    image has only one estimate.
    """
    start = time.monotonic()
    sizes = [k for k in BOUND_SIZES if k < num_samples] + [num_samples]
    means, moments = [], []
    for images, _ in loader:
        means.append(model.encode(images)[0])
        for image in images:
            log_w = draw_log_weights(model, image[None], num_samples)
            # L_k from the first k draws, from the next k, and so on
            groups = [log_w[: len(log_w) // k * k].view(-1, k).T for k in sizes]
            estimates = [importance_weighted_bound(group) for group in groups]
            mean = torch.stack([e.mean() for e in estimates])
            variance = torch.stack([e.var(correction=min(1, len(e) - 1)) for e in estimates])
            moments.append(torch.stack([mean, variance]))
        show_status(f"{len(moments):,} images, {time.monotonic() - start:.0f} s")
    show_status("")
    bounds = [
        {"k": k, "bound": bound, "spread": variance**0.5 if 2 * k <= num_samples else None}
        for k, bound, variance in zip(sizes, *torch.stack(moments).double().mean(dim=0).tolist())
    ]
    elbo, log_p_x = bounds[0]["bound"], bounds[-1]["bound"]
    return {
        "images": len(moments),
        "num_samples": num_samples,
        "neg_elbo": -elbo,
        "neg_log_likelihood": -log_p_x,
        "gap": log_p_x - elbo,
        "active_units": active_units(torch.cat(means)),
        "seconds": round(time.monotonic() - start, 1),
        "bounds": bounds,
    }


def evaluate_run(args: argparse.Namespace) -> Path:
    """Evaluate the run args.evaluate on all binarized test images, the same draw of them (seed 0)
    for every run; args.seed is for the draws of z. Print it, write evaluation.json and draw it.
    Returns the folder.

    Whatever the pixels were in training, here the decoder's output is the mean of Bernoulli pixels.
    """
    folder, device = Path(args.evaluate), find_device(args.device)
    model, checkpoint = load_run(folder)
    config = checkpoint["config"]
    if config["recon"] != "bce" or config["dataset"] in COLOUR:
        raise UserError(
            f"{folder}: has no likelihood of binary pixels, being {config['model']} on "
            f"{config['dataset']} with --recon {config['recon']}; evaluate a VAE of grey images "
            "with --recon bce"
        )
    test = load_test_split(folder, config, args.data_dir)
    loader = Batches(binarize_once(test.images).to(device), test.labels.to(device), 1000)
    print(
        f"{folder}: {config['model']} on {config['dataset']}, {len(test.images):,} binarized test "
        f"images, {args.num_samples:,} draws of z each",
        flush=True,
    )
    torch.manual_seed(args.seed)
    model.to(device)
    result = evaluate(model, loader, args.num_samples)
    if not math.isfinite(result["neg_elbo"]):
        raise UserError(f"{folder}: the model's outputs are not finite; train it again")
    result |= {
        "epochs": len(checkpoint["history"]), "seed": args.seed, "notice": config["notice"]
    }
    with write_atomically(folder / "evaluation.json") as file:
        file.write(json.dumps(result, indent=2).encode() + b"\n")

    from viz import visualize_bounds  # viz.py stands on this file; only here does it look up

    visualize_bounds({str(folder): result}, folder / "bounds.png")
    print(
        f"-ELBO {result['neg_elbo']:.2f}  -log p(x) {result['neg_log_likelihood']:.2f}  gap "
        f"{result['gap']:.2f} nats per image  active units {result['active_units']} of "
        f"{config['latent_dim']}  {result['seconds']:.0f} s\n"
        f"saved in {folder}: evaluation.json and bounds.png"
    )
    if config["notice"]:
        print(f"*** REMEMBER: these are the {config['notice'].upper()}. ***")
    return folder


def main(argv: list[str] | None = None) -> Path:
    """Train and draw one run, or evaluate it. Returns its folder."""
    args = parse_args(argv)
    if args.evaluate is not None:
        return evaluate_run(args)
    run = train_run(args)
    folder, config = run[0], run[2]
    if RANK > 0:
        return folder

    from viz import draw_run  # see evaluate_run

    draw_run(*run)
    print(f"saved in {folder}: config.json, history.csv, checkpoint.pt and the figures")
    if config["notice"]:
        print(f"*** REMEMBER: these are the {config['notice'].upper()}. ***")
    return folder


if __name__ == "__main__":
    run_cli(main)
