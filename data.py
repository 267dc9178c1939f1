"""The datasets: MNIST, Fashion-MNIST and CelebA from their files; digits and faces from draw.py.

Every dataset is loaded by one call and has one shape:

    train, test = load_dataset("mnist", "data")
    train.images    uint8   (n, channels, height, width)
    train.labels    int64   (n,)
    train.factors   dict    what is known beside the label: name -> (n,) tensor

`Batches` then serves it as float images in [0, 1], one batch at a time.

mnist, fashion-mnist   28 x 28 grey, read from <root>/<name>/, downloaded if missing
celeba                 64 x 64 colour, read from <root>/celeba/, where you have put it
digits, faces          28 x 28 grey, 64 x 64 colour, drawn here: all factors known
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.client
import inspect
import io
import math
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import draw

PROJECT_DATA = Path(__file__).resolve().parent / "data"


class UserError(Exception):
    """Something that the user can put right: what is wrong, where, and what to do."""


class DataUnavailable(UserError):
    """A dataset is neither on disk nor available from the network."""


class Split(NamedTuple):
    images: Tensor
    labels: Tensor
    factors: dict[str, Tensor]


class Batches:
    """Iterate over (images, labels); images become float32 in [0, 1] a batch at a time.

    images: uint8 (n, channels, height, width) and labels: (n,) stay on the device they are on,
    and so do the batches: no step copies from host to device. With shuffle, each pass draws a
    new order from torch's global generator, as it begins. With binarize, pixels become 0 or 1,
    drawn anew in every batch with the grey value as the probability of 1. The last batch may be
    smaller. Of world_size processes, each gets every world_size-th image of a batch, from its
    rank on; in a shuffled pass all shares are equal, up to world_size - 1 images being left out.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool = False,
        binarize: bool = False, rank: int = 0, world_size: int = 1
    ):
        if images.dtype != torch.uint8:  # so no image can hold a NaN
            raise TypeError(f"images must be uint8, 0 to 255, and are {images.dtype}")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.binarize = batch_size, shuffle, binarize
        self.rank, self.world_size = rank, world_size
        self.count = len(images) - (len(images) % world_size if shuffle else 0)

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that a seed means one order on every device.
        order = (torch.randperm if self.shuffle else torch.arange)(len(self.images))[: self.count]
        return map(self.batch, order.to(self.images.device).split(self.batch_size))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index[self.rank :: self.world_size]
        images = self.images.index_select(0, index).float().div_(255)
        if self.binarize:  # rand < p, several times as fast as torch.bernoulli
            images = (torch.rand_like(images) < images).float()
        return images, self.labels.index_select(0, index)


def binarize_once(images: Tensor, seed: int = 0) -> Tensor:
    """One draw of binary images, for testing: uint8 pixels become 0 or 255, the latter with
    probability pixel / 255. The same seed gives the same draw."""
    uniform = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return (uniform < images.cpu() / 255).to(torch.uint8) * 255


# ------------------------------------------------------------------- files, in general


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def show_status(line: str) -> None:
    """Put a line in the place of the last one on a terminal; elsewhere, say nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def writable_folder(folders: Iterable[Path]) -> Path:
    """The first of the folders in which files can be created."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    raise UserError(f"{folder}: cannot be written; name another place with --data-dir")


# ---------------------------------------------------- MNIST and Fashion-MNIST: IDX files

IDX_MIRRORS = {
    "mnist": [
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ],
    "fashion-mnist": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
}
# The published checksums of the four .gz files: SHA-256 where there is one, else MD5.
IDX_CHECKSUMS = {
    "mnist": {
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
DOWNLOAD_TIMEOUT = 15  # seconds without a byte, then the next mirror


def load_idx_split(name: str, root: Path, prefix: str) -> Split:
    """MNIST or Fashion-MNIST: prefix "train", 60,000 images of 28 x 28, or "t10k", 10,000."""
    images_path = find_idx_file(name, root, f"{prefix}-images-idx3-ubyte")
    labels_path = find_idx_file(name, root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path}: holds images of shape {images.shape}, not (n, 28, 28)")
    if len(images) != len(labels):
        raise UserError(f"{images_path} holds {len(images)} images, but {labels_path} "
                        f"{len(labels)} labels: take both from one download")
    if labels.max() > 9:
        raise UserError(f"{labels_path}: holds the label {labels.max()}; labels are 0 to 9")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long(), {})


def find_idx_file(name: str, root: Path, stem: str) -> Path:
    """The path of an IDX file below root, plain or .gz; downloaded if it is not there."""
    for path in (root / name / stem, root / name / f"{stem}.gz"):
        if path.is_file():
            return path
    reasons = []
    for mirror in IDX_MIRRORS[name]:
        try:
            content = download(f"{mirror}{stem}.gz", IDX_CHECKSUMS[name][stem])
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as file:
                file.write(content)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', error)}")
    raise DataUnavailable(
        f"{name}: {path} is missing and cannot be downloaded ({'; '.join(reasons)}). "
        f"Put the four .gz files into {path.parent}, or train on --dataset digits")


def download(url: str, checksum: str) -> bytes:
    """The verified content of url; OSError, HTTPException or ValueError if it cannot be had."""
    algorithm = "sha256" if len(checksum) == 64 else "md5"
    content = bytearray()
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            show_status(f"{len(content) / 1e6:.1f} MB")
    show_status("")
    if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != checksum:
        raise OSError(f"the {algorithm} checksum of {len(content)} bytes received is wrong")
    return bytes(content)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip-compressed: uint8, ndim dimensions.

    The format (Y. LeCun, "The MNIST database"): two zero bytes, a type code (8 is
    unsigned byte), the number of dimensions, each dimension as a big-endian uint32,
    then exactly that many bytes. Raises UserError for anything else.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)  # verifies its checksum, too
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: is damaged or cut short ({error}): fetch it again") from error
    start = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < start:
        raise UserError(f"{path}: is damaged, or no IDX file of bytes in {ndim} dimensions (00 00 "
                        f"08 {ndim:02d}): begins with {content[:4].hex(' ')}; fetch it again")
    shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
    size, found = math.prod(shape), len(content) - start
    if size != found:
        raise UserError(f"{path}: is damaged or cut short (declares {size:,} bytes, has {found:,}): "
                        "fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


# ------------------------------------------------------------- datasets that are made once


def made_once(
    places: list[Path], name: str, recipe: str, make: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of a dataset from <name>.npz in one of the places, if they are of this recipe.

    Else make(path of <name>.npy) returns them, and they are kept in the first place that can be
    written. Images too large for memory make writes to that path itself; they are memory-mapped.
    """
    for place in places:
        with contextlib.suppress(Exception):  # what is damaged is made anew, however damaged
            arrays = dict(np.load(place / f"{name}.npz"))
            if arrays.pop("recipe") == recipe:
                if "images" not in arrays:
                    arrays["images"] = np.load(place / f"{name}.npy", mmap_mode="c")
                return arrays
    folder = writable_folder(places)
    path, facts = folder / f"{name}.npy", folder / f"{name}.npz"
    facts.unlink(missing_ok=True)  # it is written last, and says that the images are there
    arrays = make(path)
    with write_atomically(facts) as file:
        np.savez(file, recipe=recipe, **arrays)
    return arrays if "images" in arrays else arrays | {"images": np.load(path, mmap_mode="c")}


def splits(arrays: dict[str, np.ndarray], n_train: int, n_test: int) -> tuple[Split, Split]:
    """The first n_train images, and the last n_test; what is no image and no label is a factor."""

    def split(part: slice) -> Split:
        rows = {key: torch.from_numpy(values[part]) for key, values in arrays.items()}
        return Split(rows.pop("images"), rows.pop("labels"), rows)

    return split(slice(n_train)), split(slice(len(arrays["labels"]) - n_test, None))


DRAWN = {"digits": (draw.draw_digits, 60_000, 10_000), "faces": (draw.draw_faces, 20_000, 2_000)}


def load_drawn(name: str, root: Path) -> tuple[Split, Split]:
    """The digits or the faces: always the same, drawn once and kept as <name>.npz."""
    function, n_train, n_test = DRAWN[name]

    def make(path: Path) -> dict[str, np.ndarray]:
        print(f"drawing {n_train + n_test:,} {name}, once (some seconds)", flush=True)
        images, labels, factors = function(n_train + n_test, seed=0)
        arrays = {"images": images, "labels": labels} | factors
        return {key: values.numpy() for key, values in arrays.items()}

    # They are good for this very drawing only, so that an edited glyph is seen at once.
    recipe = hashlib.sha256(Path(draw.__file__).read_bytes()).hexdigest()
    return splits(made_once([root, PROJECT_DATA], name, recipe, make), n_train, n_test)


# ---------------------------------------------------------- CelebA: 202,599 JPEG files

CELEBA_SPLITS = (162_770, 19_867, 19_962)  # training, validation, test images, in this order
JPEG_NAME = re.compile(r"\d{6}\.jpg")
DECODE_CHUNK = 64  # images a task


def load_celeba(root: Path) -> tuple[Split, Split]:
    """CelebA (Liu et al. 2015), 64 x 64 in colour: its official training and test images.

    Decodes <root>/celeba/img_align_celeba.zip, or the folder img_align_celeba/, once, into an array
    beside it, or in the project's own data/celeba/ if that place is read-only. factors: the
    attributes of list_attr_celeba.txt, 1 or 0; labels: the attribute Smiling.
    """
    folder = root / "celeba"
    source = folder / "img_align_celeba.zip"
    if not source.exists():
        source = folder / "img_align_celeba"
    if not source.exists():
        raise DataUnavailable(
            f"celeba: {source} (.zip or folder) is missing, and no script can download it. Take "
            "img_align_celeba.zip, list_eval_partition.txt and list_attr_celeba.txt from "
            f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them into {folder}, or "
            "train on --dataset faces")
    partition, attributes = folder / "list_eval_partition.txt", folder / "list_attr_celeba.txt"
    for path in (partition, attributes):
        if not path.is_file():
            print(f"celeba: {path} is missing: split by number, or without attributes")

    def make(path: Path) -> dict[str, np.ndarray]:
        names, read = list_images(source)
        n = len(names)
        sizes = CELEBA_SPLITS if n == sum(CELEBA_SPLITS) else (n * 9 // 10, 0, n - n * 9 // 10)
        parts, factors = np.repeat((0, 1, 2), sizes), {}
        if partition.is_file():
            parts = read_list(partition, names, (0, 1, 2))[1][0]
        order = np.argsort(parts, kind="stable")
        if attributes.is_file():
            columns, values = read_list(attributes, names, (-1, 1))
            factors = dict(zip(columns, (values[:, order] > 0).astype(np.uint8)))
        decode_images(path, source, [names[i] for i in order], read)
        labels = factors.get("Smiling", np.zeros(n)).astype(np.int64)
        return {"parts": parts[order], "labels": labels} | factors

    # A checksum of what makes them: names, sizes and times of the files, and how they are decoded.
    files = sorted(os.scandir(source), key=lambda e: e.name) if source.is_dir() else [source]
    files += filter(Path.exists, (partition, attributes))
    stats = [(file.name, file.stat()) for file in files if file.name[0] != "."]
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    recipe = hashlib.sha256(repr((state, inspect.getsource(decode_face))).encode()).hexdigest()
    arrays = made_once([folder, PROJECT_DATA / "celeba"], "celeba-64x64", recipe, make)
    n_train, _, n_test = np.bincount(arrays.pop("parts"), minlength=3).tolist()
    if not (n_train and n_test):
        raise UserError(f"{source}: {n_train} of its images are for training and {n_test} for "
                        "testing; both are needed")
    return splits(arrays, n_train, n_test)


def list_images(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of the JPEGs in a folder or an archive, sorted, and a function that reads one."""
    if source.is_dir():
        found = {path.name: path for path in source.iterdir()}
        read = Path.read_bytes
    else:
        try:
            archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(f"{source}: is damaged or cut short ({error}): fetch it again") from None
        found = {PurePosixPath(name).name: name for name in archive.namelist()}
        read = archive.read
    names = sorted(filter(JPEG_NAME.fullmatch, found))
    if not names:
        raise UserError(f"{source}: has no images named 000001.jpg, 000002.jpg, ... in it")
    return names, lambda name: read(found[name])


def read_list(path: Path, names: list[str], allowed: tuple) -> tuple[list[str], np.ndarray]:
    """Of a list with lines "000001.jpg -1 1 ...": the names of its columns, from the line before
    the first image, if there is one, and the values of the named images, (columns, n)."""
    header, rows = [], {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        words = line.split()
        if words and JPEG_NAME.fullmatch(words[0]):
            rows[words[0]] = words[1:]
        elif words and not rows:
            header = words
    try:
        values = np.array([rows[name] for name in names]).astype(np.int8).T
        if not np.isin(values, allowed).all() or header and len(header) != len(values):
            raise ValueError(f"{len(header)} names, values from {values.min()} to {values.max()}")
    except KeyError as missing:
        raise UserError(f"{path}: has no line for {missing}: fetch both from one place") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error}): fetch it again") from error
    return header, values


def decode_images(path: Path, source: Path, names: list[str], read: Callable) -> None:
    """Write the images as an array, (n, 3, 64, 64), in threads, for Pillow decodes outside the GIL."""
    n, start = len(names), time.perf_counter()
    size, free = n * 3 * 64 * 64, shutil.disk_usage(path.parent).free
    if free < 1.02 * size:  # for a disk that becomes full under a memory map kills the process
        raise UserError(f"{path}: takes {size / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB free")
    print(f"decoding {n:,} images of {source} into {path}, once", flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with write_atomically(path) as file:
        images = np.lib.format.open_memmap(file.name, "w+", np.uint8, (n, 3, 64, 64))

        def decode(first: int) -> None:
            for row, name in enumerate(names[first : first + DECODE_CHUNK], first):
                try:
                    images[row] = decode_face(read(name))
                except Exception as error:  # Pillow has many kinds for the many ways to be broken
                    if isinstance(error, MemoryError) or getattr(error, "errno", None):
                        raise  # that is not the image's fault
                    what = f"{source}: {name} is broken ({error}): fetch it again, or delete it"
                    raise UserError(what) from error

        try:
            for i, _ in enumerate(pool.map(decode, range(0, n, DECODE_CHUNK)), start=1):
                done, seconds = min(n, i * DECODE_CHUNK), time.perf_counter() - start
                left = seconds / done * (n - done)
                show_status(f"{done:,} of {n:,} images, {done / seconds:,.0f}/s, {left:.0f} s left")
        finally:
            pool.shutdown(cancel_futures=True)
        images.flush()
    show_status("")


def decode_face(content: bytes) -> np.ndarray:
    """The centre square of a picture, 148/178 of its width, as (3, 64, 64), uint8, RGB.

    Of CelebA's 178 x 218 pixels that is the usual crop to 148 x 148.
    """
    image = Image.open(io.BytesIO(content))
    if image.mode != "RGB":  # or it would be copied, which takes as long as the resizing
        image = image.convert("RGB")
    side = min(image.width * 148 / 178, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    # Pillow's filter grows with the step from pixel to pixel: antialiased.
    face = image.resize((64, 64), Image.Resampling.BILINEAR, box)
    return np.asarray(face).transpose(2, 0, 1)


# ------------------------------------------------------------------------ all datasets

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
    "celeba": ("not smiling", "smiling"),
    "digits": tuple("0123456789"),
    "faces": ("not smiling", "smiling"),
}
DATASETS = tuple(CLASS_NAMES)


def load_dataset(name: str, root: str | Path = PROJECT_DATA) -> tuple[Split, Split]:
    """The training and the test split of a dataset, on the CPU.

    Raises DataUnavailable if it is neither in root nor to be downloaded, UserError
    if its files are damaged.
    """
    if name == "celeba":
        return load_celeba(Path(root))
    if name in DRAWN:
        return load_drawn(name, Path(root))
    return load_idx_split(name, Path(root), "train"), load_idx_split(name, Path(root), "t10k")
