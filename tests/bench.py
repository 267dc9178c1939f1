"""How fast the loader of CelebA is, as a ratio within one run (make bench).

Writes 10,000 drawn faces in the layout of CelebA, then decodes them all, five times in turns:
with nothing but Pillow's calls, from the folder, and with the loader, which also lists and
checks the files, writes its cache and forces it onto the disk, from the folder and from the
archive. All on as many processes as there are cores. The ratios are those of each turn, and
their median. Last, a second start: from the call of load_dataset to the end of the first
training step.
"""

import contextlib
import io
import multiprocessing
import os
import statistics
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
        face = Image.open(path).crop((15, 35, 163, 183))
        face.resize((64, 64), Image.Resampling.BILINEAR)


def rate(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return N / (time.perf_counter() - start)


def load(root: Path) -> None:
    (root / "celeba" / CELEBA_CACHE).unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        load_dataset("celeba", root)


def main() -> None:
    workers = len(os.sched_getaffinity(0))  # Linux only, as is decoding in processes
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
        bare, from_folder, from_zip = [], [], []
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            list(pool.map(decode_only, chunks[: 4 * workers]))
            for _ in range(5):
                bare.append(rate(lambda: list(pool.map(decode_only, chunks))))
                from_folder.append(rate(load, folder))
                from_zip.append(rate(load, zipped))
        print(f"images a second on {workers} processes, median of 5, and of Pillow alone")
        print(f"Pillow alone    {statistics.median(bare):7,.0f}")
        for name, rates in (("loader, folder", from_folder), ("loader, zip", from_zip)):
            ratios = [one / other for one, other in zip(rates, bare)]
            print(
                f"{name:15} {statistics.median(rates):7,.0f}  {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )

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
