"""How fast the loader of CelebA is, as a ratio within one run (make bench).

Writes 10,000 drawn faces in the layout of CelebA, then decodes them all, three times in
turns: with nothing but Pillow's calls, and with the loader, which also lists and checks the
files, writes its cache and forces it onto the disk. Both on as many processes as there are
cores; the best of the three counts. Last, a second start: from the call of load_dataset to
the end of the first training step.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import CELEBA_CACHE, Batches, load_dataset, write_celeba
from vae import CelebAVAE

N = 10_000


def decode_only(paths: list[Path]) -> None:
    for path in paths:
        image = Image.open(path).convert("RGB")
        image.resize((64, 64), Image.Resampling.BILINEAR, (15, 35, 163, 183))


def rate(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return N / (time.perf_counter() - start)


def load(root: Path) -> None:
    (root / "celeba" / CELEBA_CACHE).unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        load_dataset("celeba", root)


def main() -> None:
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder, zipped = Path(scratch) / "folder", Path(scratch) / "zip"
        print(f"writing {N:,} JPEGs ...", flush=True)
        write_celeba(zipped, N, zipped=True)
        (folder / "celeba").mkdir(parents=True)
        with zipfile.ZipFile(zipped / "celeba" / "img_align_celeba.zip") as archive:
            archive.extractall(folder / "celeba")
        for path in zipped.glob("celeba/*.txt"):
            (folder / "celeba" / path.name).write_bytes(path.read_bytes())
        paths = sorted((folder / "celeba" / "img_align_celeba").iterdir())
        print(f"of {sum(path.stat().st_size for path in paths) / N:,.0f} bytes on average")
        chunks = [paths[i : i + 64] for i in range(0, N, 64)]
        rates = {"Pillow alone": [], "loader, folder": [], "loader, zip": []}
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            list(pool.map(decode_only, chunks[: 4 * workers]))
            for _ in range(3):
                bare = rate(lambda: list(pool.map(decode_only, chunks)))
                rates["Pillow alone"].append(bare)
                rates["loader, folder"].append(rate(load, folder))
                rates["loader, zip"].append(rate(load, zipped))
        best = max(rates["Pillow alone"])
        for name, measured in rates.items():
            all_rates = ", ".join(f"{value:,.0f}" for value in measured)
            print(f"{name:15} {all_rates} images/s on {workers} processes: "
                  f"{max(measured) / best:.2f} of Pillow alone")

        start = time.perf_counter()
        split, _ = load_dataset("celeba", zipped)
        loaded = time.perf_counter() - start
        model = CelebAVAE()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        images, labels = next(iter(Batches(split.images, split.labels, 128, shuffle=True)))
        model.loss(images, labels)[0].backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        print(f"second start: {loaded:.2f} s to load, {seconds:.2f} s to the end of a first step")


if __name__ == "__main__":
    main()
