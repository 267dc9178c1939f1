"""How fast it is, as ratios within one run (make bench; 13 minutes on two cores).

1. Steps: this project's beside the plain way that everyone starts with, and beside the floor,
   the matrix products or convolutions alone, at the same shapes.
2. Whole runs: start-up, loading, figures, memory; ten epochs beside the plain way's; processes.

What is compared runs in turns; shown are medians, and medians of the ratios of each turn, so that
a machine whose speed drifts favours neither side. A part alone: python tests/bench.py runs
"""

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
import train
from data import PROJECT_DATA, Batches, load_dataset
from vae import VAE, CelebAVAE, ConvVAE, kl_divergence_gaussian

CPU = torch.device("cpu")
TURNS = 5
CORES = len(os.sched_getaffinity(0))
MODELS = {"mlp": VAE, "conv": ConvVAE, "celeba": CelebAVAE}


def in_turns(rivals: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each of them returns, in every turn; a first turn does not count."""
    turns = [[rival() for rival in rivals.values()] for _ in range(TURNS + 1)]
    return dict(zip(rivals, map(list, zip(*turns[1:]))))


def ratio(a: list[float], b: list[float]) -> float:
    return median(x / y for x, y in zip(a, b))


def rate(images: int, function: Callable, *args) -> float:
    """Images a second."""
    start = time.perf_counter()
    function(*args)
    return images / (time.perf_counter() - start)


# ---------------------------------------------------------------------- the plain way


class PlainImages(Dataset):
    """One image at a time, by way of Pillow, as in torchvision's MNIST with ToTensor."""

    def __init__(self, images: torch.Tensor):
        self.images = images.permute(0, 2, 3, 1).squeeze(-1).numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        array = np.atleast_3d(np.array(Image.fromarray(self.images[i])))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255), 0


def plain_loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    mu, logvar = model.encode(x)
    x_recon = torch.sigmoid(model.decode_logits(model.reparameterize(mu, logvar)))
    bce = F.binary_cross_entropy(x_recon, x.view(x_recon.shape), reduction="sum")
    return bce + kl_divergence_gaussian(mu, logvar).sum()


def plain(model: torch.nn.Module, loader: DataLoader, training: bool) -> None:
    model.train(training)
    optimizer, total = torch.optim.Adam(model.parameters(), lr=1e-3), 0.0
    with torch.set_grad_enabled(training):
        for x, _ in loader:
            loss = plain_loss(model, x)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item()


# --------------------------------------------------------------- ours, and the floor


def prepared(name: str, amp: bool = False, **sizes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](**sizes).to(memory_format=torch.channels_last)
    return train.Loss(model, amp=True) if amp else model


def ours(model: torch.nn.Module, batches: Batches, training: bool = True) -> None:
    if training:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        train.train_epoch(model, batches, optimizer, CPU)
    else:
        train.test_epoch(model, batches, CPU)


def products(model: torch.nn.Module, x: torch.Tensor, training: bool) -> list[Callable]:
    """The calls of matrix products and convolutions of one step on x: forward and, in training,
    backward to the weights and, except in the first layer, to the inputs."""
    calls, kinds = [], (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)

    def record(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x, y, w = inputs[0].detach(), torch.randn_like(output), layer.weight.detach()
        to_inputs = inputs[0].requires_grad
        if isinstance(layer, torch.nn.Linear):
            calls.append(lambda: x @ w.T)
            calls.extend([lambda: y.T @ x] * training + [lambda: y @ w] * (training and to_inputs))
            return
        transposed = isinstance(layer, torch.nn.ConvTranspose2d)
        shape = (layer.stride, layer.padding, layer.dilation, transposed)
        shape += (layer.output_padding, layer.groups)
        mask, aten = [to_inputs, True, False], torch.ops.aten
        calls.append(lambda: aten.convolution(x, w, None, *shape))
        calls.extend([lambda: aten.convolution_backward(y, x, w, None, *shape, mask)] * training)

    layers = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    model.loss(x, None, 1.0)
    for hook in hooks:
        hook.remove()
    return calls


def repeat(calls: list[Callable], times: int) -> None:
    for _ in range(times):
        for call in calls:
            call()


# ------------------------------------------------------------------------- the parts


def steps() -> None:
    print(f"\nimages a second, median of {TURNS} turns, and times the plain way (0 workers) in "
          "brackets\nmodel   batch          ours     --amp     plain  2 workers     floor  "
          "ours' step / floor's")
    digits, faces = (torch.randint(0, 256, (8000, *s), dtype=torch.uint8)
                     for s in ((1, 28, 28), (3, 64, 64)))
    for training, name, size in itertools.product((True, False), MODELS, (128, 1000)):
        n = {"mlp": 8000, "conv": 3000, "celeba": 1000}[name] // size * size
        images = (faces if name == "celeba" else digits)[:n]
        batches, data = Batches(images, torch.zeros(n), size, training), PlainImages(images)
        alone, two = (DataLoader(data, size, training, num_workers=w) for w in (0, 2))
        exact, amp, other = prepared(name), prepared(name, amp=True), MODELS[name]()
        calls = products(prepared(name), images[:size].float() / 255, training)
        found = in_turns({
            "ours": lambda: rate(n, ours, exact, batches, training),
            "amp": lambda: rate(n, ours, amp, batches, training),
            "plain": lambda: rate(n, plain, other, alone, training),
            "workers": lambda: rate(n, plain, other, two, training),
            # Once before it counts: the workers, forked, have left pages to be copied.
            "floor": lambda: (repeat(calls, n // size), rate(n, repeat, calls, n // size))[1],
        })
        columns = [f"{median(x):8,.0f} ({ratio(x, found['plain']):.2f})" for x in found.values()]
        print(f"{name:6} {size:5}  {'training' if training else 'testing ':8}{''.join(columns)}"
              f"  {ratio(found['floor'], found['ours']):.2f}", flush=True)


def seconds_of(*args: str, **env: str) -> float:
    command, how = [sys.executable, *args], {"check": True, "capture_output": True}
    return 1 / rate(1, lambda: subprocess.run(command, env=os.environ | env, cwd=PROJECT, **how))


def runs() -> None:
    digits, _ = load_dataset("digits", PROJECT_DATA)  # drawn, if this is the first time
    print(f"\nloading the digits: {1 / rate(1, load_dataset, 'digits', PROJECT_DATA):.2f} s")
    loader = DataLoader(PlainImages(digits.images), 128, shuffle=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    with tempfile.TemporaryDirectory() as scratch:
        outs = (f"{scratch}/{number}" for number in itertools.count())

        def run(*options: str, launch: tuple = (), threads: int = CORES) -> float:
            options = ("--dataset", "digits", "--out", next(outs), *options)
            return seconds_of(*launch, "train.py", *options, OMP_NUM_THREADS=str(threads))

        found = in_turns({
            "importing PyTorch": lambda: seconds_of("-c", "import torch"),
            "importing viz.py and all it needs": lambda: seconds_of("-c", "import viz"),
            "a run of one step, with figures": lambda: run("--limit", "128", "--epochs", "1"),
            "drawing the figures of a run again": lambda: seconds_of("viz.py", f"{scratch}/0"),
        })
        for name, seconds in found.items():
            print(f"{name}: {median(seconds):.2f} s")

        model = VAE()
        fast, slow = in_turns({
            "ours": lambda: run("--epochs", "10"),
            "plain": lambda: 10 / rate(1, plain, model, loader, True),
        }).values()
        print(f"ten epochs: ours, whole process, {median(fast):.1f} s; the plain way, training "
              f"alone (one epoch times 10), {median(slow):.1f} s; ratio {ratio(fast, slow):.2f}")

        def an_epoch(model: str, **how) -> float:
            run("--model", model, "--epochs", "3", "--limit", "20000", **how)
            out = max(Path(scratch).iterdir(), key=os.path.getctime)
            return mean(row["seconds"] for row in train.load_run(out)[1]["history"][1:])

        for model in ("mlp", "conv"):
            one, two = in_turns({
                "one": lambda: an_epoch(model),
                "two": lambda: an_epoch(model, launch=torchrun, threads=1),
            }).values()
            print(f"{model}, 20,000 images: one process of {CORES} threads {median(one):.2f} s an "
                  f"epoch, two of one thread {median(two):.2f} s, ratio {ratio(two, one):.2f}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of a process: {peak:,.0f} MB")


PARTS = {"steps": steps, "runs": runs}

if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}, {CORES} cores, {torch.get_num_threads()} threads")
    names = [line for line in Path("/proc/cpuinfo").open() if "model name" in line]
    print(names[0].split(":")[1].strip())
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
