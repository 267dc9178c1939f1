"""How fast it is, as ratios within one run (make bench; 25 minutes on two cores).

1. Steps: this project's beside the plain way that everyone starts with, and beside the floor,
   the matrix products or convolutions alone, at the same shapes.
2. Growth: images a second against the number of images, the batch, the code, and processes.
3. Whole runs: start-up, loading, figures, memory; ten epochs beside the plain way's loop.
4. CelebA's JPEGs: the loader beside Pillow alone.

What is compared runs in turns, several times; shown are medians, and medians of the ratios of
each turn, so that a machine whose speed drifts does not favour either side. Name one part or
more to run these only: python tests/bench.py steps growth runs jpegs
"""

import contextlib
import io
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
import train
from data import CELEBA_CACHE, PROJECT_DATA, Batches, load_dataset, write_celeba
from vae import VAE, CelebAVAE, ConvVAE, kl_divergence_gaussian

CPU = torch.device("cpu")
TURNS = 5
CORES = len(os.sched_getaffinity(0))  # Linux only, as is decoding in processes
MODELS = {"mlp": VAE, "conv": ConvVAE, "celeba": CelebAVAE}


def in_turns(rivals: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each of them returns, in every turn; a first turn does not count."""
    found = {name: [] for name in rivals}
    for turn in range(TURNS + 1):
        for name, rival in rivals.items():
            value = rival()
            if turn:
                found[name].append(value)
    return found


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


# ---------------------------------------------------------------------- the plain way


class PlainImages(Dataset):
    """One image at a time, by way of Pillow, as in torchvision's MNIST with ToTensor."""

    def __init__(self, images: torch.Tensor):
        self.images = images.permute(0, 2, 3, 1).squeeze(-1).numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        array = np.array(Image.fromarray(self.images[i]), copy=True)
        array = array.reshape(*array.shape[:2], -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255), 0


def plain_loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    mu, logvar = model.encode(x)
    x_recon = torch.sigmoid(model.decode_logits(model.reparameterize(mu, logvar)))
    bce = F.binary_cross_entropy(x_recon, x.view(x_recon.shape), reduction="sum")
    return bce + kl_divergence_gaussian(mu, logvar).sum()


def plain(model: torch.nn.Module, loader: DataLoader, training: bool) -> float:
    """Images a second."""
    model.train(training)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    start, total = time.perf_counter(), 0.0
    with torch.set_grad_enabled(training):
        for x, _ in loader:
            loss = plain_loss(model, x)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item()
    return len(loader.dataset) / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- ours


def ours(model: torch.nn.Module, batches: Batches, training: bool) -> float:
    """Images a second."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    if training:
        train.train_epoch(model, batches, optimizer, CPU)
    else:
        train.test_epoch(model, batches, CPU)
    return len(batches.images) / (time.perf_counter() - start)


def prepared(name: str, amp: bool = False, compile: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    train.prepare(model, CPU, amp, compile)
    return model


# ------------------------------------------------------------------------- the floor


def products(model: torch.nn.Module, x: torch.Tensor, training: bool) -> list[Callable]:
    """The calls of matrix products and convolutions of one step on x: forward and, in training,
    backward to the weights and, except in the first layer, to the inputs."""
    calls, kinds = [], (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)

    def record(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x, y, w = inputs[0].detach(), torch.randn_like(output), layer.weight.detach()
        to_inputs = inputs[0].requires_grad
        if isinstance(layer, torch.nn.Linear):
            calls.append(lambda: x @ w.T)
            if training:
                calls.append(lambda: y.T @ x)
                if to_inputs:
                    calls.append(lambda: y @ w)
            return
        transposed = isinstance(layer, torch.nn.ConvTranspose2d)
        shape = (layer.stride, layer.padding, layer.dilation, transposed)
        shape += (layer.output_padding, layer.groups)
        calls.append(lambda: torch.ops.aten.convolution(x, w, None, *shape))
        if training:
            mask = [to_inputs, True, False]
            backward = torch.ops.aten.convolution_backward
            calls.append(lambda: backward(y, x, w, None, *shape, mask))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    model.loss(x, None, 1.0)
    for hook in hooks:
        hook.remove()
    return calls


def floor(calls: list[Callable], images: int, batch_size: int) -> float:
    """Images a second."""
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(images // batch_size):
            for call in calls:
                call()
    return images / (time.perf_counter() - start)


# ------------------------------------------------------------------------- the parts


def steps() -> None:
    print(
        f"\nimages a second, median of {TURNS} turns, and times the plain way (0 workers) in "
        "brackets\nmodel   batch          ours     --amp     plain  2 workers     floor  "
        "ours' step / floor's"
    )
    digits, faces = (torch.randint(0, 256, (8000, *s), dtype=torch.uint8)
                     for s in ((1, 28, 28), (3, 64, 64)))
    for training in (True, False):
        for name in MODELS:
            for batch_size in (128, 1000):
                n = {"mlp": 8000, "conv": 3000, "celeba": 1000}[name] // batch_size * batch_size
                images = (faces if name == "celeba" else digits)[:n]
                batches = Batches(images, torch.zeros(n), batch_size, shuffle=training)
                loaders = [
                    DataLoader(PlainImages(images), batch_size, shuffle=training, num_workers=w)
                    for w in (0, 2)
                ]
                plain_model = MODELS[name]()
                exact, amp = prepared(name), prepared(name, amp=True)
                calls = products(prepared(name), images[:batch_size].float() / 255, training)
                found = in_turns({
                    "ours": lambda: ours(exact, batches, training),
                    "amp": lambda: ours(amp, batches, training),
                    "plain": lambda: plain(plain_model, loaders[0], training),
                    "workers": lambda: plain(plain_model, loaders[1], training),
                    "floor": lambda: floor(calls, n, batch_size),
                })
                speeds = {key: statistics.median(values) for key, values in found.items()}
                gains = {key: ratio(found[key], found["plain"]) for key in found}
                print(
                    f"{name:6} {batch_size:5}  {'training' if training else 'testing ':8}"
                    + "".join(f"{speeds[k]:8,.0f} ({gains[k]:.2f})" for k in found)
                    + f"  {ratio(found['floor'], found['ours']):.2f}",
                    flush=True,
                )


def growth() -> None:
    digits, _ = load_dataset("digits", PROJECT_DATA)
    print(f"\nmlp in training, images a second, median of {TURNS} turns, and times the first")

    def epoch(images: torch.Tensor, batch_size: int, **sizes) -> Callable[[], float]:
        model = VAE(**sizes)
        train.prepare(model, CPU, amp=False, compile=False)
        batches = Batches(images, torch.zeros(len(images)), batch_size, shuffle=True)
        return lambda: ours(model, batches, training=True)

    def show(rivals: dict[str, Callable[[], float]]) -> None:
        found = in_turns(rivals)
        first = next(iter(found.values()))
        for name, values in found.items():
            print(f"{name:24} {statistics.median(values):9,.0f}  {ratio(values, first):.2f}")

    images = digits.images
    show({f"{n * len(images):,} images": epoch(images.repeat(n, 1, 1, 1), 128) for n in (1, 4, 16)})
    few = images[:20_000]
    show({f"batches of {size}": epoch(few, size) for size in (128, 32, 512, 2048)})
    show({f"{d} latents": epoch(few, 128, latent_dim=d) for d in (20, 2, 200, 2000)})


def seconds_of(*args, **env) -> float:
    start = time.perf_counter()
    command = [sys.executable, *map(str, args)]
    subprocess.run(command, env=os.environ | env, cwd=PROJECT, check=True, capture_output=True)
    return time.perf_counter() - start


def runs() -> None:
    """Whole processes, on the built-in digits."""
    load_dataset("digits", PROJECT_DATA)  # drawn, if this is the first time
    with tempfile.TemporaryDirectory() as scratch:
        numbers = iter(range(1000))

        def run(*options: str, launch: tuple = (), threads: int = CORES) -> float:
            out = f"{scratch}/{next(numbers)}"
            options = ("--dataset", "digits", "--out", out, *options)
            return seconds_of(*launch, "train.py", *options, OMP_NUM_THREADS=str(threads))

        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        digits, _ = load_dataset("digits", PROJECT_DATA)
        loader = DataLoader(PlainImages(digits.images), 128, shuffle=True)
        start = time.perf_counter()
        load_dataset("digits", PROJECT_DATA)
        loading = time.perf_counter() - start
        one_step = ("--limit", "128", "--epochs", "1")
        found = in_turns({
            "importing PyTorch": lambda: seconds_of("-c", "import torch"),
            "importing viz.py and all it needs": lambda: seconds_of("-c", "import viz"),
            "a run of one step, its test and its figures": lambda: run(*one_step),
            "drawing the figures of a run again": lambda: seconds_of("viz.py", f"{scratch}/0"),
        })
        print(f"\nloading the digits: {loading:.2f} s")
        for name, seconds in found.items():
            print(f"{name}: {statistics.median(seconds):.2f} s")

        plain_model = VAE()
        found = in_turns({
            "ours": lambda: run("--epochs", "10"),
            "plain": lambda: 10 * 60_000 / plain(plain_model, loader, training=True),
        })
        print(
            f"ten epochs: ours, whole process, {statistics.median(found['ours']):.1f} s; the plain "
            "way, training loop alone (one epoch times 10), "
            f"{statistics.median(found['plain']):.1f} s; "
            f"ratio {ratio(found['ours'], found['plain']):.2f}"
        )

        def seconds_an_epoch(model: str, **how) -> float:
            run("--model", model, "--epochs", "3", "--limit", "20000", **how)
            out = max(Path(scratch).iterdir(), key=os.path.getctime)
            return statistics.mean(row["seconds"] for row in train.load_run(out)[1]["history"][1:])

        for model in ("mlp", "conv"):
            found = in_turns({
                "one": lambda: seconds_an_epoch(model),
                "two": lambda: seconds_an_epoch(model, launch=torchrun, threads=1),
            })
            print(
                f"{model}, 20,000 images: one process of {CORES} threads "
                f"{statistics.median(found['one']):.2f} s an epoch, two of one thread "
                f"{statistics.median(found['two']):.2f} s, "
                f"ratio {ratio(found['two'], found['one']):.2f}"
            )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of a process: {peak:,.0f} MB")


def decode_only(paths: list[Path]) -> None:
    for path in paths:
        face = Image.open(path).crop((15, 35, 163, 183))
        face.resize((64, 64), Image.Resampling.BILINEAR)


def load_celeba(root: Path) -> None:
    (root / "celeba" / CELEBA_CACHE).unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        load_dataset("celeba", root)


def jpegs(n: int = 10_000) -> None:
    """Drawn faces in the layout of CelebA, decoded with nothing but Pillow's calls, from the
    folder, and with the loader, which also lists and checks the files, writes its cache and forces
    it onto the disk, from the folder and from the archive."""

    def rate(function: Callable, *args) -> float:
        start = time.perf_counter()
        function(*args)
        return n / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as scratch:
        folder, zipped = Path(scratch) / "folder", Path(scratch) / "zip"
        print(f"\nwriting {n:,} JPEGs ...", flush=True)
        write_celeba(zipped, n, zipped=True)
        (folder / "celeba").mkdir(parents=True)
        with zipfile.ZipFile(zipped / "celeba" / "img_align_celeba.zip") as archive:
            archive.extractall(folder / "celeba")
        for path in zipped.glob("celeba/*.txt"):
            (folder / "celeba" / path.name).write_bytes(path.read_bytes())
        paths = sorted((folder / "celeba" / "img_align_celeba").iterdir())
        print(f"of {sum(path.stat().st_size for path in paths) / n:,.0f} bytes on average")
        chunks = [paths[i : i + 64] for i in range(0, n, 64)]
        with ProcessPoolExecutor(CORES, multiprocessing.get_context("fork")) as pool:
            found = in_turns({
                "Pillow alone": lambda: rate(lambda: list(pool.map(decode_only, chunks))),
                "loader, folder": lambda: rate(load_celeba, folder),
                "loader, zip": lambda: rate(load_celeba, zipped),
            })
        print(f"images a second on {CORES} processes, and of Pillow alone")
        for name, rates in found.items():
            ratios = [one / other for one, other in zip(rates, found["Pillow alone"])]
            print(
                f"{name:15} {statistics.median(rates):7,.0f}  {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )

        start = time.perf_counter()
        split, _ = load_dataset("celeba", zipped)
        loaded = time.perf_counter() - start
        model = prepared("celeba")
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        train.train_epoch(model, Batches(split.images[:128], split.labels, 128), optimizer, CPU)
        seconds = time.perf_counter() - start
        print(f"second start: {loaded:.2f} s to load, {seconds:.2f} s to the end of a first step")


PARTS = {"steps": steps, "growth": growth, "runs": runs, "jpegs": jpegs}

if __name__ == "__main__":
    named = sys.argv[1:] or list(PARTS)
    print(f"PyTorch {torch.__version__}, {CORES} cores, {torch.get_num_threads()} threads")
    with open("/proc/cpuinfo") as cpuinfo:
        print(next(line.split(":")[1].strip() for line in cpuinfo if "model name" in line))
    for name in named:
        PARTS[name]()
