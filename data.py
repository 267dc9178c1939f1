"""The datasets: MNIST and its relatives, CelebA, any folder of pictures, and those of draw.py.

Every dataset is loaded by one call and has one shape:

    train, test = load_dataset("mnist", "data")
    train.images    uint8   (n, channels, height, width)
    train.labels    int64   (n,)
    train.factors   dict    what is known beside the label: name -> (n,) tensor

`Batches` then serves it as float images in [0, 1], one batch at a time.

mnist, fashion-mnist, kmnist   28 x 28 grey, read where they lie below <root>, or downloaded
mnist-validation               the training images of mnist alone, the last sixth for testing
celeba, any folder's path      64 x 64 colour, from <root>/celeba/, or from the folder
digits, faces                  28 x 28 grey, 64 x 64 colour, drawn here: all factors known
"""

import contextlib
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import os
import re
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
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

    images: uint8 (n, channels, height, width) and labels: (n,) stay on their device, and so do the
    batches. With shuffle, each pass draws a new order from torch's global generator, as it begins.
    With binarize, pixels become 0 or 1, drawn anew in every batch with the grey value as the
    probability of 1. Of world_size processes, each gets every world_size-th image of a batch, from
    its rank on; in a shuffled pass all shares are equal, up to world_size - 1 images left out.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool = False,
                 binarize: bool = False, rank: int = 0, world_size: int = 1):
        if images.dtype != torch.uint8:  # so no image can hold a NaN
            raise TypeError(f"images must be uint8, 0 to 255, and are {images.dtype}")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.binarize = batch_size, shuffle, binarize
        self.rank, self.world_size = rank, world_size
        self.count = len(images) - (len(images) % world_size if shuffle else 0)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)  # rounded up

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


def checksum(content: bytes | np.ndarray) -> str:
    """The first 20 hexadecimal digits, 80 bits, of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:20]


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


def made_once(path: Path, made_from: str, write: Callable[[BinaryIO], None],
              read: Callable[[Path], Any]) -> Any:
    """What read() finds in a file that write() makes unless it is there: at this path or, if its
    folder is read-only, in PROJECT_DATA. The file ends with a checksum of what it is made from."""
    mark, paths = checksum(made_from.encode()).encode(), (path, PROJECT_DATA / path.name)
    for place in paths:
        with contextlib.suppress(Exception):  # what is damaged is made anew, however damaged
            place.parent.mkdir(parents=True, exist_ok=True)
            if np.memmap(place, mode="r")[-20:].tobytes() == mark:
                return read(place)
    path = next((place for place in paths if os.access(place.parent, os.W_OK)), None)
    if path is None:
        raise UserError(f"{paths[0].parent}, {PROJECT_DATA}: make one of them a writable folder")
    with write_atomically(path) as file:
        write(file)
        file.write(mark)
    return read(path)


def show_status(line: str) -> None:
    """Put a line in the place of the last one on a terminal; elsewhere, say nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="", flush=True)


# ------------------------------------------------------ MNIST and its relatives: IDX files

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# Where torchvision keeps a set, its mirrors, and the checksums of its four .gz files; of MNIST also
# those of its labels, without header and compression.
IDX_SETS = {
    "mnist": (
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",
         "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        "440fcabf73cc546fa214 3552534a0a558bbed6ae 8d422c7b0a1c1c79245a f7ae60f92e00ec6debd2 "
        "1feba77c54802fa5339a ddeff807876a9661a111"),
    "fashion-mnist": (
        "FashionMNIST/raw",
        ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
         "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        "3aede38d61863908ad78 a04f17134ac03560a47e 346e55b948d973a97e58 67da17c76eaffca5446c"),
    "kmnist": (
        "KMNIST/raw", ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        "51467d22d8cc72929e2a e38f9ebcd0f3ebcdec7f edd7a857845ad6bb1d0b 20bb9a0ef54c7db3efc5"),
}
DOWNLOAD_TIMEOUT = 15  # seconds without a byte, then the next mirror


def load_idx(name: str, root: Path) -> tuple[Split, Split]:
    """MNIST or a relative, 60,000 + 10,000 images of 28 x 28: from the first of the usual places
    below root that has any of its files; what an interrupted download left out is downloaded."""
    raw, _, sums = IDX_SETS[name]
    for folder in (root / name, root / raw, root):
        paths = [find_idx(folder, stem) for stem in IDX_FILES]
        if any(paths):
            break
    missing = [stem for stem, path in zip(IDX_FILES, paths) if not path]
    if missing and not all(checksum(path.read_bytes()) in sums for path in paths if path):
        raise UserError(f"{folder}: lacks {', '.join(missing)}: add what is of the same set")
    folder = folder if any(paths) else root / name
    paths = [path or fetch(name, stem, folder) for path, stem in zip(paths, IDX_FILES)]
    return read_split(name, *paths[:2]), read_split(name, *paths[2:])


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file of this stem, written with -idx or with .idx: plain, or in a folder of its own name,
    as Kaggle's archive unpacks; if there is neither, compressed."""
    names = stem, stem.replace("-idx", ".idx")
    paths = (folder / form.format(name) for form in ("{0}", "{0}/{0}", "{0}.gz") for name in names)
    return next(filter(Path.is_file, paths), None)


def fetch(name: str, stem: str, folder: Path) -> Path:
    """Download one of the four files of a set; DataUnavailable if no mirror has it."""
    _, mirrors, sums = IDX_SETS[name]
    path, reasons = folder / f"{stem}.gz", []
    for mirror in mirrors:
        print(f"downloading {mirror}{path.name}", flush=True)
        try:
            with urllib.request.urlopen(mirror + path.name, timeout=DOWNLOAD_TIMEOUT) as response:
                content = response.read()
            if checksum(content) != sums.split()[IDX_FILES.index(stem)]:
                raise OSError(f"the checksum of {len(content)} bytes received is wrong")
            folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as file:
                file.write(content)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', error)}")
    raise DataUnavailable(
        f"{name}: {path} is missing and cannot be downloaded ({'; '.join(reasons)}). "
        f"Put the four .gz files there, name another --data-dir, or train on --dataset digits")


def read_split(name: str, images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape != (len(labels), 28, 28) or len(labels) == 0:
        raise UserError(f"{images_path} {images.shape} does not fit {labels_path} {labels.shape}: "
                        "take both from one download")
    # The sets have files of the same names; their labels tell them apart.
    digests = {checksum(labels_path.read_bytes()), checksum(labels)}
    owner = next((key for key, (_, _, sums) in IDX_SETS.items() if digests & {*sums.split()}), None)
    if owner is None:
        print(f"{name}: the labels in {labels_path} have no known checksum; taken as they are")
    elif owner != name:
        raise UserError(f"{labels_path}: is of {owner}: train on that, or name another --data-dir")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), {})


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip-compressed: uint8, ndim dimensions.

    The format (Y. LeCun, "The MNIST database"): two zero bytes, 8 for unsigned bytes, the number of
    dimensions, each of them as a big-endian uint32, then exactly that many bytes; else UserError.
    """
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)  # verifies its checksum, too
        if content[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(f"no IDX file of bytes in {ndim} dimensions")
        shape = np.frombuffer(content, ">u4", ndim, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
    except (EOFError, gzip.BadGzipFile, ValueError, zlib.error) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}): fetch it again") from error


# ------------------------------------------------- pictures: any folder of them, and CelebA

PICTURE = re.compile(r"(?!(.*/)?(\.|__MACOSX/)).*\.(jpe?g|png|bmp|webp)", re.IGNORECASE)
CELEBA_PICTURE = re.compile(r"(.*/)?\d{6}\.jpg")
CELEBA_LINE = re.compile(r"^(\d{6}\.jpg)(.*)", re.MULTILINE)


def load_folder(folder: Path) -> tuple[Split, Split]:
    """The pictures in a folder, however deep: their centre squares, 64 x 64 in colour. About a
    tenth is for testing, by their names, so none changes sides when another one is added. (Of a
    few, by chance none may be: then one is taken.)"""
    if not folder.is_dir():
        raise UserError(f"dataset {folder}: is no folder, nor {', '.join(DATASETS)}")
    pictures = Pictures(folder, folder, PICTURE, crop=1.0, strict=False)
    if (n := len(pictures.names)) < 20:
        raise UserError(f"{folder}: has {n} pictures (jpg, jpeg, png, bmp or webp); 20 are needed")
    digests = [int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in pictures.names]
    test = np.array([digest % 10 == 0 for digest in digests])
    if not test.any():
        test[digests.index(min(digests))] = True
    return pictures.split(~test, "train", {}), pictures.split(test, "test", {})


def load_celeba(root: Path) -> tuple[Split, Split]:
    """CelebA (Liu et al. 2015), 64 x 64 in colour: its official training and test images.

    Reads <root>/celeba/img_align_celeba.zip, or the folder img_align_celeba/, and the two lists
    beside it, .txt or, as Kaggle has them, .csv. factors: the attributes, 1 or 0; labels: Smiling.
    """
    folder = root / "celeba"
    sources = folder / "img_align_celeba.zip", folder / "img_align_celeba"
    source = next(filter(Path.exists, sources), None)
    if source is None:
        raise DataUnavailable(
            f"celeba: {sources[0]} (or the folder) is missing, and no script can download it. Put "
            "it there, with list_eval_partition.txt and list_attr_celeba.txt, from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or train on --dataset faces")
    # The middle 148 of 178 columns, as is usual.
    pictures = Pictures(source, folder, CELEBA_PICTURE, crop=148 / 178, strict=True)
    names = [name.split("/")[-1] for name in pictures.names]
    if not names:
        raise UserError(f"{source}: has no images named 000001.jpg, 000002.jpg, ... in it")
    _, parts = read_list(folder, "list_eval_partition", names, (0, 1, 2))
    attributes, values = read_list(folder, "list_attr_celeba", names, (-1, 1))
    factors = dict(zip(attributes, (values > 0).astype(np.uint8)))
    return (pictures.split(parts[0] == 0, "train", factors),
            pictures.split(parts[0] == 2, "test", factors))


def read_list(folder: Path, stem: str, names: list[str], allowed: tuple) -> tuple[list, np.ndarray]:
    """Of a list with lines "000001.jpg -1 1 ...", or with commas: the names of its columns, from
    the line before the first image, if any, and the values of these images, (columns, n)."""
    path = next(filter(Path.is_file, (folder / f"{stem}.txt", folder / f"{stem}.csv")), None)
    if path is None:
        raise UserError(f"{folder / stem}.txt (or .csv, of Kaggle) is missing: put it there, too")
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace(",", " ")
    rows = dict(CELEBA_LINE.findall(text))
    header = CELEBA_LINE.split(text, maxsplit=1)[0].strip().split("\n")[-1].split()
    try:
        values = np.loadtxt([rows[name] for name in names], np.int8, comments=None, ndmin=2).T
        header = header[-len(values):]  # Kaggle also names the first column
        fits = values.shape == (len(header) or len(values), len(names))
        if not fits or not np.isin(values, allowed).all():
            raise ValueError(f"{len(header)} names, values from {values.min()} to {values.max()}")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: is damaged or lacks images ({error}): fetch it again") from error
    return header, values


class Pictures:
    """The pictures in a folder, however deep, or in an archive, whose names fit the pattern. One
    that is broken is an error if strict, else it is left out. place: where they are kept, decoded;
    crop: as of decode_picture."""

    def __init__(self, source: Path, place: Path, pattern: re.Pattern, crop: float, strict: bool):
        self.source, self.place, self.crop, self.strict = source, place, crop, strict
        if source.is_dir():
            names = (path.relative_to(source).as_posix() for path in source.rglob("*"))
            self.read = lambda name: (source / name).read_bytes()
        else:
            try:
                archive = zipfile.ZipFile(source)
            except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                hint = "fetch it again, or delete it if its folder is beside it"
                raise UserError(f"{source}: is damaged or cut short ({error}): {hint}") from None
            names, self.read = archive.namelist(), archive.read
        self.names = sorted(filter(pattern.fullmatch, names))

    def split(self, chosen: np.ndarray, kind: str, factors: dict) -> Split:
        """The chosen ones; their images are memory-mapped from a file of nothing but pixels."""
        names = list(itertools.compress(self.names, chosen))
        files = [self.source / name for name in names] if self.source.is_dir() else [self.source]
        state = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, files)]
        made_from = repr((names, state, self.crop, inspect.getsource(decode_picture)))
        path = self.place / f"{self.source.stem}-64x64-{kind}.uint8"

        def write(file: BinaryIO) -> None:
            print(f"decoding {len(names):,} pictures into {path.name}, once", flush=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the GIL
                for first in range(0, len(names), 256):
                    show_status(f"{first:,} of {len(names):,} pictures")
                    file.writelines(pool.map(self.decode, names[first : first + 256]))
            show_status("")

        pixels = made_once(path, made_from, write, lambda path: np.memmap(path, mode="c"))
        images = torch.from_numpy(pixels[:-20]).view(-1, 3, 64, 64)  # without the checksum
        if len(images) == 0:
            raise UserError(f"{self.source}: has no pictures for {kind}ing")
        known = {name: torch.from_numpy(values[chosen]) for name, values in factors.items()}
        labels = known.get("Smiling", torch.zeros(len(images))).long()
        return Split(images, labels, known)

    def decode(self, name: str) -> bytes:
        try:
            return decode_picture(io.BytesIO(self.read(name)), crop=self.crop).tobytes()
        except Exception as error:  # Pillow has many kinds for the many ways to be broken
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # that is not the picture's fault
            what = f"{self.source}: {name} is broken ({re.sub(' <.*>', '', str(error))})"
            if self.strict:
                raise UserError(f"{what}: fetch it again, or delete it") from error
            show_status("")
            print(f"{what} and passed over\n", end="")  # at once, for other threads print, too
            return b""


def decode_picture(file: str | Path | BinaryIO, side: int = 64, mode: str = "RGB",
                   crop: float = 1.0) -> np.ndarray:
    """The centre square of a picture, at most `crop` times as wide as it, as a viewer shows it:
    upright, on white, 16 bits of grey as 8. (channels, side, side), uint8; mode: "RGB" or "L"."""
    image = Image.open(file)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] == "I":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:  # or it would be copied, which takes as long as the resizing
        image = image.convert(mode)
    square = min(image.width * crop, image.height)
    left, top = (image.width - square) / 2, (image.height - square) / 2
    box = (left, top, left + square, top + square)
    # Pillow's filter grows with the step from pixel to pixel: antialiased.
    small = image.resize((side, side), Image.Resampling.BILINEAR, box)
    return np.atleast_3d(np.asarray(small)).transpose(2, 0, 1)


def load_picture(path: str | Path, channels: int = 3, side: int = 64) -> Tensor:
    """One picture of your own as a model takes it: (1, channels, side, side), float in [0, 1]."""
    pixels = decode_picture(path, side, "L" if channels == 1 else "RGB")
    return torch.from_numpy(pixels.copy())[None] / 255


# ------------------------------------------------------------------------ all datasets

DIGITS, SMILING = tuple("0123456789"), ("not smiling", "smiling")
CLASS_NAMES = {
    "mnist": DIGITS, "mnist-validation": DIGITS,
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "celeba": SMILING, "digits": DIGITS, "faces": SMILING,
}
DATASETS = tuple(CLASS_NAMES)
DRAWN = {"digits": (draw.draw_digits, 60_000, 10_000), "faces": (draw.draw_faces, 20_000, 2_000)}


def load_drawn(name: str, root: Path) -> tuple[Split, Split]:
    """The digits or the faces: always the same, drawn once and kept as <name>.npz."""
    function, n_train, n_test = DRAWN[name]

    def write(file: BinaryIO) -> None:
        print(f"drawing {n_train + n_test:,} {name}, once (some seconds)", flush=True)
        images, labels, factors = function(n_train + n_test, seed=0)
        np.savez(file, images=images, labels=labels, **factors)

    # They are good for this very drawing only, so that an edited glyph is seen at once.
    made_from, path = Path(draw.__file__).read_text(), root / f"{name}.npz"
    arrays = made_once(path, made_from, write, lambda path: dict(np.load(path)))
    splits = ({key: torch.from_numpy(values[rows]) for key, values in arrays.items()}
              for rows in (slice(n_train), slice(-n_test, None)))
    return tuple(Split(split.pop("images"), split.pop("labels"), split) for split in splits)


def load_dataset(name: str, root: str | Path = PROJECT_DATA) -> tuple[Split, Split]:
    """The training and the test split, on the CPU. name: one of DATASETS, or the path of a folder.
    DataUnavailable if it is neither in root nor to be had, UserError if its files are damaged."""
    root = Path(root)
    if name == "mnist-validation":  # settings are chosen on it, so that the test set stays unseen
        images, labels, _ = load_idx("mnist", root)[0]
        n = len(images) // 6
        return Split(images[:-n], labels[:-n], {}), Split(images[-n:], labels[-n:], {})
    if name in IDX_SETS:
        return load_idx(name, root)
    if name in DRAWN:
        return load_drawn(name, root)
    return load_celeba(root) if name == "celeba" else load_folder(Path(name))
