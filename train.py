"""Train an autoencoder or a VAE from the command line (chapter 2.5).

    python train.py                               the MLP VAE on MNIST, 10 epochs
    python train.py --model conv --beta 4         a convolutional beta-VAE
    python train.py --latent-dim 2                two latents, to draw as a map
    python train.py --dataset digits              no download: digits drawn here
    python train.py --model celeba --limit 20000  faces, from CelebA's files (chapter 2.7)
    python train.py --out runs/long --epochs 50 --resume      begin it, or go on with it
    torchrun --nproc_per_node=2 train.py          two processes (GPUs), half of every batch each

A run is a folder: config.json (what was asked), history.csv (a row an epoch, nats per
image; for ae and --recon mse squared errors), checkpoint.pt (the model), and the figures of viz.py.
"""

import argparse
import atexit
import contextlib
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from ae import Autoencoder
from data import DATASETS, DRAWN, PROJECT_DATA, Batches, DataUnavailable, Split, UserError
from data import binarize_once, load_dataset, show_status, write_atomically
from vae import VAE, CelebAVAE, ConvVAE, bce_from_logits, squared_error
from viz import draw_run, loss_unit

MODELS = {"ae": Autoencoder, "mlp": VAE, "conv": ConvVAE, "celeba": CelebAVAE}
RECON_LOSSES = {"bce": bce_from_logits, "mse": squared_error}

COLUMNS = ("epoch", "beta", "train_loss", "train_recon", "train_kl",
           "test_loss", "test_recon", "test_kl", "seconds")  # of history.csv

# torchrun starts several processes and tells each of them which it is, and of how many.
PARALLEL, RANK, WORLD_SIZE = "TORCHELASTIC_RUN_ID" in os.environ, 0, 1
if PARALLEL:
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ----------------------------------------------------------------------- the loop


def train_epoch(model: nn.Module, train_loader: Iterable, optimizer: torch.optim.Optimizer,
                device: torch.device | str, beta: float = 1.0) -> tuple[float, float, float]:
    """One pass over the data, one optimizer step a batch.

    train_loader: any iterable of (images, labels), images float in [0, 1]. Returns the mean (loss,
    recon, kl) per image in the units of model.loss (nats), every batch measured before its step.
    """
    model.train()
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        total, recon, kl = model.loss(images, labels, beta)
        optimizer.zero_grad()
        # The mean over the batch of the sum over pixels and latents. A mean over the
        # pixels too would shrink recon, but not the KL: as if beta were 784.
        (total / len(images)).backward()
        optimizer.step()
        # Summed on the device: an .item() in every step would make a GPU wait.
        sums.add_(torch.stack([total, recon, kl]).detach())

    if all(group.get("capturable") for group in optimizer.param_groups):
        step = recorded(step)
    for images, labels in on_device(train_loader, device):
        step(images, labels)
        count += len(images)
    return mean_per_image(sums, count)


@torch.no_grad()
def test_epoch(model: nn.Module, test_loader: Iterable, device: torch.device | str,
               beta: float = 1.0) -> tuple[float, float, float]:
    """The mean (loss, recon, kl) per image as `train_epoch`, in evaluation mode, no steps."""
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, labels in on_device(test_loader, device):
        sums += torch.stack(model.loss(images, labels, beta))
        count += len(images)
    return mean_per_image(sums, count)


def on_device(loader: Iterable, device: torch.device | str) -> Iterator:
    """The batches, on the device, if the first one is of images in [0, 1]: others, from -1 to 1 as
    in many tutorials, train to a loss without a bottom."""
    for number, (images, labels) in enumerate(loader):
        if number == 0 and not 0 <= images.min() <= images.max() <= 1:
            found = f"from {images.min():g} to {images.max():g}"
            raise UserError(f"images go {found}, not 0 to 1: omit Normalize, or divide by 255")
        yield images.to(device), labels.to(device)


def mean_per_image(sums: torch.Tensor, count: int) -> tuple[float, float, float]:
    """The sums over the images, of all processes if there are several, over their count."""
    sums = torch.cat([sums, sums.new_tensor([count])])
    if PARALLEL:
        dist.all_reduce(sums)
    return tuple((sums[:3] / sums[3]).tolist())


def kl_weight(epoch: int, kl_anneal: int) -> float:
    """The weight of the KL in an epoch, counted from 1: it rises along a line to 1 in epoch
    kl_anneal (KL annealing; Bowman et al. 2016 take a sigmoid). kl_anneal = 0: always 1."""
    return min(1.0, epoch / kl_anneal) if kl_anneal else 1.0


def recorded(step: Callable) -> Callable:
    """The step, recorded in its fourth call as a CUDA graph, and replayed for batches of that size:
    Python takes eight times as long to launch its hundred small kernels as a GPU to run them."""
    calls, graph, buffers = 0, torch.cuda.CUDAGraph(), ()

    def replay(*batch: torch.Tensor) -> None:
        nonlocal calls, buffers
        calls += 1
        if calls == 4:
            buffers = [part.clone() for part in batch]
            with torch.cuda.graph(graph):
                step(*buffers)
        if calls < 4 or batch[0].shape != buffers[0].shape:
            return step(*batch)
        for buffer, part in zip(buffers, batch):
            buffer.copy_(part)
        graph.replay()

    return replay


class Loss(nn.Module):
    """A model's loss as the forward pass of a module, which can be wrapped. With amp, layers
    compute in bfloat16 (8 bits of precision, the range of float32), losses in float32."""

    def __init__(self, model: nn.Module, amp: bool):
        super().__init__()
        self.model, self.amp = model, amp

    def forward(self, images: torch.Tensor, labels: torch.Tensor, beta: float) -> tuple:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.model.loss(images, labels, beta)

    loss = nn.Module.__call__


class ParallelLoss(DistributedDataParallel):
    """The same in several processes: backward() takes the mean of their gradients."""

    loss = nn.Module.__call__


def train_run(args: argparse.Namespace) -> tuple:
    """Train, test and save one run, an epoch at a time. Returns the arguments of viz.draw_run:
    (folder, model, config, history, test_loader, factors of the test images)."""
    if args.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size {args.batch_size}: is no multiple of {WORLD_SIZE} processes")
    device = find_device(args.device)
    join_processes(device)
    asked = args.dataset
    args.dataset, (train_split, test_split) = choose_dataset(args)
    images, labels = (part[: args.limit] for part in train_split[:2])
    test_images, test_labels, factors = test_split
    if args.binarize:
        test_images = binarize_once(test_images)

    torch.manual_seed(args.seed)
    model = build_model(vars(args))
    config = vars(args) | {
        "notice": "" if asked == args.dataset else f"built-in {args.dataset}, not {asked}",
        "train_images": len(images),
        "test_images": len(test_images),
        "processes": WORLD_SIZE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": str(torch.__version__),
    }
    folder, checkpoint = first_decides(lambda: open_run(config))
    try:
        # Channels-last takes a fifth off convolutions on a CPU.
        model.to(device, memory_format=torch.channels_last)
        optimizer, history = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True), []
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            history = checkpoint["history"]
            config = checkpoint["config"] | {"epochs": max(args.epochs, len(history))}
            save_run(folder, config, model, optimizer, history)  # if the last one was cut short
        trained = Loss(model, args.amp) if args.amp or PARALLEL else model
        if PARALLEL:
            trained = ParallelLoss(trained)

        images, labels = images.to(device), labels.to(device)
        loader = Batches(images, labels, args.batch_size, shuffle=True, binarize=args.binarize,
                         rank=RANK, world_size=WORLD_SIZE)
        test_images, test_labels = test_images.to(device), test_labels.to(device)
        test_loader = Batches(test_images, test_labels, 1000, rank=RANK, world_size=WORLD_SIZE)
        print(f"{args.model} with {config['parameters']:,} parameters on {args.dataset}, "
              f"{len(images):,} + {len(test_images):,} images, {device}. "
              f"Losses: {loss_unit(config)}. Run: {folder}", flush=True)
        if len(history) >= args.epochs:
            print(f"nothing left to train: {folder} has {len(history)} epochs")
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.monotonic()
            # Every epoch has a seed of its own, so a resumed run draws the same numbers.
            torch.manual_seed(args.seed + 1_000_003 * epoch)
            batches = iter(loader)  # draws the order, in which all processes agree
            if RANK > 0:  # but not in their noise
                sequence = np.random.SeedSequence((args.seed, epoch, RANK))
                torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
            batches = progress(batches, len(loader), epoch, args.epochs)
            beta, lr = args.beta * kl_weight(epoch, args.kl_anneal), args.lr
            if args.lr_schedule == "cosine":  # towards 0, once (Loshchilov & Hutter 2017)
                lr *= 0.5 * (1 + math.cos(math.pi * (epoch - 1) / args.epochs))
            capturable = device.type == "cuda" and not PARALLEL  # see recorded
            optimizer.param_groups[0].update(lr=lr, capturable=capturable)
            train = train_epoch(trained, batches, optimizer, device, beta)
            test = test_epoch(trained, test_loader, device, args.beta)
            seconds = round(time.monotonic() - start, 3)
            row = dict(zip(COLUMNS, (epoch, beta, *train, *test, seconds), strict=True))
            if bad := [f"{key} is {row[key]}" for key in row if not math.isfinite(row[key])]:
                raise UserError(f"{folder}: in epoch {epoch} {', '.join(bad)}; epochs kept: "
                                f"{epoch - 1}. Try a new run with a smaller --lr or --beta")
            history.append(row)
            save_run(folder, config, model, optimizer, history)
            print("epoch {:2d}/{}  train loss {:.2f} (recon {:.2f}, KL {:.2f})  test loss {:.2f} "
                  "(recon {:.2f}, KL {:.2f})  {:.1f} s".format(
                      epoch, args.epochs, *train, *test, seconds), flush=True)
    except KeyboardInterrupt:
        name = shlex.quote(str(folder))
        raise KeyboardInterrupt(f"the same command with --out {name} --resume goes on") from None
    finally:
        if RANK == 0:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing has been saved in it
    if PARALLEL:
        del trained  # what is left of DistributedDataParallel at the exit may abort there
        gc.collect()
    return folder, model, config, history, Batches(test_images, test_labels, 1000), factors


def progress(batches: Iterable, steps: int, epoch: int, epochs: int) -> Iterator:
    """Yield the batches; on a terminal, keep one line of what is done, and of the time left."""
    start = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        yield batch
        left = (time.monotonic() - start) / step * (steps * (epochs - epoch + 1) - step)
        show_status(f"epoch {epoch}/{epochs}  {100 * step // steps:3d} %  {left:.0f} s left")
    show_status("")


# ------------------------------------------------------ devices, processes, datasets


def find_device(name: str, precision: str = "tf32") -> torch.device:
    """The device, and how a GPU multiplies float32: "tf32", 10 bits of precision and several
    times as fast, or "ieee", all 23."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    index, found = int(os.environ["LOCAL_RANK"]) if PARALLEL else 0, torch.cuda.device_count()
    if index >= found:
        raise UserError(f"--device {name}: PyTorch finds {found} CUDA GPUs, and every process "
                        "needs one: use --device cpu, or start fewer")
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    return torch.device("cuda", index)


def join_processes(device: torch.device) -> None:
    """Under torchrun, meet the other processes. Only the first one prints, writes and draws."""
    if PARALLEL and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def first_decides(decide: Callable[[], object]) -> object:
    """What decide() returns in the first process, for all of them. If it fails there, it has said
    why, and the others end without a word."""
    answer = [None]
    try:
        if RANK == 0:
            answer = [decide()]
    finally:
        if PARALLEL:
            dist.broadcast_object_list(answer)
    if answer[0] is None:
        sys.exit(2)
    return answer[0]


def find_data_dir(option: str | None) -> Path:
    """--data-dir or $VAE_DATA_DIR, which must exist, or the project's data/."""
    folder = Path(option or os.environ.get("VAE_DATA_DIR") or PROJECT_DATA).expanduser()
    if folder != PROJECT_DATA and not folder.is_dir():
        raise UserError(f"the data folder {folder} is no folder: create it, or name another")
    return folder


def choose_dataset(args: argparse.Namespace) -> tuple[str, tuple[Split, Split]]:
    """The dataset asked for, or --fallback if that is not available: its name and splits."""
    root = find_data_dir(args.data_dir)
    load = functools.cache(lambda name: load_dataset(name, root))

    def choose() -> str:
        try:
            load(args.dataset)
            return args.dataset
        except DataUnavailable as error:
            if args.fallback is None:
                raise
            print(f"*** {args.dataset.upper()} IS NOT AVAILABLE: training on the built-in "
                  f"{args.fallback} instead. *** The reason: {error}")
            return args.fallback

    name = first_decides(choose)  # or they might train on different datasets
    return name, load(name)


# ------------------------------------------------------------------- runs on disk

RUN_FILES = ("checkpoint.pt", "config.json", "history.csv")
# Options that are not part of a run's name, and may change on --resume.
PLACES = ("device", "data_dir", "fallback", "out", "resume")


def build_model(config: dict) -> nn.Module:
    sizes = {key: config[key] for key in ("latent_dim", "hidden_dim") if config[key]}
    model = MODELS[config["model"]](**sizes)
    model.recon_loss = RECON_LOSSES[config["recon"]]
    return model


def run_name(config: dict) -> str:
    """<dataset>-<model>, and every option that is not the default, such as latent-dim2."""
    dataset, model = config["dataset"], config["model"]
    asked = config["notice"].replace("built-in ", "").replace(", not ", "-instead-of-")
    name = f"{asked or Path(dataset).name}-{model}"
    for key, usual in vars(parse_args(["--model", model, "--dataset", dataset])).items():
        value = config[key]
        if value != usual and key not in PLACES:
            text = "" if value is True else f"{value:g}" if type(value) is float else value
            name += f"-{key.replace('_', '-')}{text}"
    return name


def open_run(config: dict) -> tuple[Path, dict | None]:
    """The folder of a run, never another run's, and the checkpoint in it to go on from."""
    if config["out"] is None:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("runs", run_name(config) + (f"-{number}" if number > 1 else ""))
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder, None
    folder = Path(config["out"]).expanduser()
    if config["resume"] and (folder / "checkpoint.pt").exists():
        _, checkpoint = load_run(folder)
        found, free = checkpoint["config"], {*PLACES, "notice", "torch"}
        if config["lr_schedule"] != "cosine":  # whose length is laid out at the beginning
            free.add("epochs")
        for key, value in config.items():
            if found.get(key) != value and key not in free:
                raise UserError(f"{folder}: is a run with {key} {found.get(key)}, not {value}: "
                                "go on as it was begun, or name another --out")
        return folder, checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=config["resume"])
    except FileExistsError:
        raise UserError(f"--out {folder}: is there already; --resume it, or name another") from None
    if found := [name for name in RUN_FILES if (folder / name).exists()]:
        raise UserError(f"{folder}: has {found} but no checkpoint.pt; name another --out")
    return folder, None


def save_run(folder: Path, config: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
             history: list) -> None:
    """Write the RUN_FILES, each whole or not at all; of several processes, the first one."""
    if RANK > 0:
        return
    content = io.BytesIO()  # torch.save would hide a full disk behind an error of its own
    torch.save({"config": config, "history": history, "model": model.state_dict(),
                "optimizer": optimizer.state_dict()}, content)
    lines = [COLUMNS, *(row.values() for row in history)]
    table = "".join(",".join(map(str, line)) + "\n" for line in lines)
    text = json.dumps(config, indent=2) + "\n"
    for name, part in zip(RUN_FILES, (content.getvalue(), text.encode(), table.encode())):
        with write_atomically(folder / name) as file:
            file.write(part)


def load_run(folder: str | Path) -> tuple[nn.Module, dict]:
    """A run's model, on the CPU and in evaluation mode, and its checkpoint: a dictionary of config,
    history, model and optimizer. UserError if it is missing or damaged."""
    path = Path(folder).expanduser() / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path} is missing: name the folder of a run, such as runs/mnist-mlp")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums in it
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        # weights_only: a checkpoint from elsewhere must not be able to run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        checkpoint["history"], checkpoint["optimizer"]  # are there, too
    except Exception as error:  # torch has many kinds for the many ways to be broken
        raise UserError(f"{path}: is damaged, or of an exercise's model ({error!r:.80})") from error
    # channels-last as in training, where convolutions round otherwise
    return model.to(memory_format=torch.channels_last).eval(), checkpoint


def load_test_split(config: dict, data_dir: str | None) -> Split:
    """The test images of a run."""
    _, test = load_dataset(config["dataset"], find_data_dir(data_dir))
    return test._replace(images=binarize_once(test.images)) if config["binarize"] else test


def redraw(argv: list[str] | None = None) -> None:
    """What `python viz.py` does: draw the figures of a run again."""
    parser = Parser(description="Redraw the figures of a run.")
    parser.add_argument("run", nargs="?", help="its folder (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="as for train.py")
    args = parser.parse_args(argv)
    saved = Path("runs").glob("*/checkpoint.pt")
    newest = max(saved, key=os.path.getmtime, default=Path("runs/checkpoint.pt"))
    folder = Path(args.run or newest.parent).expanduser()
    model, checkpoint = load_run(folder)
    test = load_test_split(checkpoint["config"], args.data_dir)
    loader = Batches(test.images, test.labels, 1000)
    draw_run(folder, model, checkpoint["config"], checkpoint["history"], loader, test.factors)
    print(f"figures drawn in {folder}")


# --------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help explains the options")


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """An argparse type: a number from low to high, so neither inf nor nan."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {low} to {high}")

    return parse


def parse_args(argv: Sequence[str], description: str = __doc__) -> argparse.Namespace:
    """The options of a training run, checked; UserError for a bad one."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, size = parser.add_argument, number(int, 1, 2**16)
    add("--model", choices=MODELS, help="default: mlp; celeba for what is in colour")
    add("--latent-dim", type=size, metavar="N", help="size of the code (20; conv 128, celeba 256)")
    add("--hidden-dim", type=size, metavar="N", help="units of ae's and mlp's hidden layers (400)")
    add("--beta", type=number(float, 0), default=1.0, metavar="B", help="weight of the KL (1)")
    add("--kl-anneal", type=number(int, 0), default=0, metavar="N", help="epochs to raise beta (0)")
    add("--recon", choices=RECON_LOSSES, help="cross-entropy or squared error (bce; ae: mse)")
    add("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)}, or a folder of pictures (mnist)")
    add("--fallback", choices=DRAWN, help="train on this if the dataset cannot be had")
    add("--binarize", action="store_true", help="make pixels 0 or 1, at random by their grey value")
    add("--limit", type=number(int, 1), metavar="N", help="train on the first N images only")
    add("--data-dir", metavar="DIR", help="where datasets are ($VAE_DATA_DIR, else data/ here)")
    add("--epochs", type=number(int, 1), default=10, metavar="N", help="passes over images (10)")
    add("--batch-size", type=number(int, 1), default=128, metavar="N", help="images a step (128)")
    add("--lr", type=number(float, 1e-12), default=2e-3, metavar="LR", help="Adam's rate (0.002)")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: to 0")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of all chance (0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    add("--amp", action="store_true", help="the layers in bfloat16, the losses in float32")
    add("--out", metavar="DIR", help="the folder of the run (a new one, runs/DATASET-MODEL...)")
    add("--resume", action="store_true", help="go on with the run in --out, or begin it")
    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume needs --out DIR, the run to go on with")
    args.dataset = args.dataset or ("celeba" if args.model == "celeba" else "mnist")
    if args.dataset not in DATASETS:
        args.dataset = str(Path(args.dataset).expanduser().resolve())
    grey = {*DATASETS} - {"celeba", "faces"}  # 28 x 28; all others are 64 x 64, in colour
    args.model = args.model or ("mlp" if args.dataset in grey else "celeba")
    for name in filter(None, (args.dataset, args.fallback)):
        if (name in grey) == (args.model == "celeba") and (name in DATASETS or os.path.isdir(name)):
            parser.error(f"{name} does not fit --model {args.model}: celeba, faces and pictures "
                         "(64 x 64, colour) need celeba, the others (28 x 28, grey) another model")
    sizes = inspect.signature(MODELS[args.model]).parameters
    args.latent_dim = args.latent_dim or sizes["latent_dim"].default
    if "hidden_dim" in sizes:
        args.hidden_dim = args.hidden_dim or sizes["hidden_dim"].default
    elif args.hidden_dim:
        parser.error(f"--hidden-dim is for ae and mlp, not for {args.model}")
    args.recon = args.recon or ("mse" if args.model == "ae" else "bce")
    if args.model == "ae" and (args.beta != 1 or args.kl_anneal or args.recon != "mse"):
        parser.error("--model ae has no KL for --beta and --kl-anneal, and no --recon but mse")
    if args.kl_anneal > args.epochs:
        parser.error(f"--kl-anneal {args.kl_anneal} would end after the --epochs {args.epochs}")
    return args


def main(argv: Sequence[str] = ()) -> Path:
    """Train and draw one run, of these options. Returns its folder."""
    folder, _, config, *_ = run = train_run(parse_args(argv))
    if RANK == 0:
        draw_run(*run)
        print(f"saved in {folder}: config.json, history.csv, checkpoint.pt and the figures")
        if config["notice"]:
            print(f"*** REMEMBER: these are the {config['notice'].upper()}. ***")
    return folder


def run_cli(main: Callable[[], object], to_go_on: str = "") -> NoReturn:
    """Run a script: a user's error becomes one line on stderr and exit status 2, Ctrl-C one that
    says how to go on (to_go_on, or what main says) and 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        sys.exit(0)
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, torch.OutOfMemoryError):
        message = "the memory is full: take a smaller --batch-size, --hidden-dim or --latent-dim"
    except KeyboardInterrupt as interrupt:
        hint = to_go_on or str(interrupt) or "what was saved is kept"
        print(f"\ninterrupted; {hint}", file=sys.stderr)
        sys.exit(130)
    show_status("")
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # if it is what has failed, it must not fail again as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
