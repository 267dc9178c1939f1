"""How fast it is (make bench; 15 minutes on two cores). A part alone: python tests/bench.py runs

steps: this project's beside the plain way that everyone starts with, and beside the floor, the bare
matrix products and convolutions. runs: start-up, loading, figures, processes. What is
compared takes turns, as a machine's speed drifts; shown are medians, also of the ratios in a turn.
"""

import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from subprocess import DEVNULL, check_output

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
os.environ["PYTHONPATH"] = str(PROJECT)
import train
from data import PROJECT_DATA, Batches, load_dataset
from vae import VAE, kl_divergence_gaussian

TURNS = 5


def in_turns(rivals: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each of them returns, in every turn; a first turn does not count."""
    turns = [[rival() for rival in rivals.values()] for _ in range(TURNS + 1)]
    return dict(zip(rivals, map(list, zip(*turns[1:]))))


def ratio(a: list[float], b: list[float]) -> float:
    return median(x / y for x, y in zip(a, b))


def seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


class PlainImages(list):
    """Of arrays: one at a time becomes a tensor, by way of Pillow, as in torchvision's MNIST."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        array = np.atleast_3d(np.array(Image.fromarray(super().__getitem__(i))))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255), 0


def plain(model: torch.nn.Module, loader: DataLoader, training: bool) -> None:
    model.train(training)
    optimizer, total = torch.optim.Adam(model.parameters(), lr=1e-3), 0.0
    with torch.set_grad_enabled(training):
        for x, _ in loader:
            logits, mu, logvar = model(x)
            bce = F.binary_cross_entropy(torch.sigmoid(logits), x.view_as(logits), reduction="sum")
            loss = bce + kl_divergence_gaussian(mu, logvar).sum()
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item()


def ours(model: torch.nn.Module, batches: Batches, training: bool) -> tuple:
    if not training:
        return train.test_epoch(model, batches, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return train.train_epoch(model, batches, optimizer, "cpu")


class Products(TorchDispatchMode):
    """The matrix products and convolutions of one step on x, without biases."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor, training: bool):
        super().__init__()
        self.calls = []
        for layer in model.modules():
            layer.bias = None
        with torch.set_grad_enabled(training), self:
            loss, _, _ = model.loss(x, None, 1.0)
            if training:
                loss.backward()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if re.match("aten::(mm|convolution)", function.name()):
            self.calls.append((function, args))
        return function(*args, **kwargs or {})

    def repeat(self, times: int) -> None:
        for function, args in self.calls * times:
            function(*args)


def steps() -> None:
    print("\nimages a second, and times the plain way (0 workers) in brackets\n"
          "model   batch          ours     --amp     plain  2 workers     floor  our step / floor")
    shapes = {"mlp": (8000, 1, 28, 28), "conv": (3000, 1, 28, 28), "celeba": (1000, 3, 64, 64)}
    for training, name, size in itertools.product((True, False), shapes, (128, 1000)):
        n = shapes[name][0] // size * size
        images = torch.randint(0, 256, (n, *shapes[name][1:]), dtype=torch.uint8)
        batches = Batches(images, torch.zeros(n), size, training)
        data = PlainImages(images.permute(0, 2, 3, 1).squeeze(-1).numpy())
        alone, two = (DataLoader(data, size, training, num_workers=w) for w in (0, 2))
        other, exact, half, bare = (train.MODELS[name]() for _ in range(4))
        for model in (exact, half, bare):
            model.to(memory_format=torch.channels_last)
        amp, floor = train.Loss(half, amp=True), Products(bare, images[:size] / 255, training)
        found = in_turns({
            "ours": lambda: seconds(ours, exact, batches, training),
            "amp": lambda: seconds(ours, amp, batches, training),
            "plain": lambda: seconds(plain, other, alone, training),
            "workers": lambda: seconds(plain, other, two, training),
            # Once before it counts: the workers, forked, have left pages to be copied.
            "floor": lambda: [seconds(floor.repeat, n // size) for _ in range(2)][1],
        })
        print(f"{name:6} {size:5}  {'training' if training else 'testing ':8}", end="")
        for times in found.values():
            print(f"{n / median(times):8,.0f} ({ratio(found['plain'], times):.2f})", end="")
        print(f"  {ratio(found['ours'], found['floor']):.2f}", flush=True)


def report(rivals: dict[str, Callable[[], float]]) -> None:
    found = in_turns(rivals)
    for name, times in found.items():
        against = ratio(times, next(iter(found.values())))
        print(f"{name}: {median(times):.2f} s, {against:.2f} times the first", flush=True)


def runs() -> None:
    digits, _ = load_dataset("digits", PROJECT_DATA)  # drawn, if this is the first time
    print(f"\nloading the digits: {seconds(load_dataset, 'digits', PROJECT_DATA):.2f} s")
    loader = DataLoader(PlainImages(digits.images[:, 0].numpy()), 128, shuffle=True)
    script = [str(PROJECT / "train.py"), "--dataset", "digits"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # of one thread

    def run(*args: str) -> float:
        return seconds(lambda: check_output([sys.executable, *args], stderr=DEVNULL, cwd=scratch))

    def an_epoch(model: str, *launch: str) -> float:
        run(*launch, *script, "--model", model, "--epochs=3", "--limit=20000")
        newest = max(Path(scratch, "runs").iterdir(), key=os.path.getctime)
        return mean(row["seconds"] for row in train.load_run(newest)[1]["history"][1:])

    with tempfile.TemporaryDirectory() as scratch:
        report({
            "importing PyTorch": lambda: run("-c", "import torch"),
            "importing viz.py and all it needs": lambda: run("-c", "import viz"),
            "a run of one step, with figures": lambda: run(*script, "--limit=128", "--epochs=1"),
            "drawing the figures of a run again": lambda: run(str(PROJECT / "viz.py")),
        })
        report({
            "ten epochs, plain, training alone": lambda: 10 * seconds(plain, VAE(), loader, True),
            "ten epochs, ours, whole process": lambda: run(*script, "--epochs=10"),
        })
        for name in ("mlp", "conv"):
            report({
                f"{name}, 20,000 images, an epoch of one process": lambda: an_epoch(name),
                f"{name}, 20,000 images, an epoch of two": lambda: an_epoch(name, *two),
            })


if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1])
    for name in sys.argv[1:] or ("steps", "runs"):
        {"steps": steps, "runs": runs}[name]()
