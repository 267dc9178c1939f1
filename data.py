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
from pathlib import Path
from typing import BinaryIO, NamedTuple

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


# ------------------------------------------------------ MNIST and its relatives: IDX files

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# Where torchvision keeps a set, its mirrors, and the SHA-256 of its four .gz files.
IDX_SETS = {
    "mnist": ("MNIST/raw", ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                            "https://storage.googleapis.com/cvdf-datasets/mnist/"), (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6")),
    "fashion-mnist": ("FashionMNIST/raw", (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"), (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5")),
    "kmnist": ("KMNIST/raw", ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",), (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c")),
}
# The SHA-256 of MNIST's 60,000 and 10,000 labels themselves, however they are stored.
MNIST_LABELS = ("1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
                "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5")
DOWNLOAD_TIMEOUT = 15  # seconds without a byte, then the next mirror


def load_idx(name: str, root: Path) -> tuple[Split, Split]:
    """MNIST or a relative, 60,000 + 10,000 images of 28 x 28: from the first of the usual places
    below root that has any of its files; what an interrupted download left out is downloaded."""
    raw, _, sums = IDX_SETS[name]
    for folder in (root / name, root / raw, root):
        found = {stem: idx_paths(folder, stem) for stem in IDX_FILES}
        if any(found.values()):
            break
    there = [path for paths in found.values() for path in paths]
    missing = [stem for stem in IDX_FILES if not found[stem]]
    if missing and not all(sha256(path.read_bytes()) in sums for path in there):
        raise UserError(f"{folder}: has {', '.join(path.name for path in there)}, but not "
                        f"{', '.join(missing)}: put the rest of the same set there, too; a "
                        "download may be of another")
    for stem in missing:
        found[stem] = [fetch(name, stem, folder if there else root / name)]
    return tuple(read_split(name, *map(found.get, pair)) for pair in (IDX_FILES[:2], IDX_FILES[2:]))


def read_split(name: str, images_paths: list[Path], labels_paths: list[Path]) -> Split:
    images, images_path = read_first(images_paths, 3)
    labels, labels_path = read_first(labels_paths, 1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path}: holds images of shape {images.shape}, not (n, 28, 28)")
    if len(images) != len(labels):
        raise UserError(f"{images_path} holds {len(images)} images, but {labels_path} "
                        f"{len(labels)} labels: take both from one download")
    # The sets have files of the same names; their labels tell them apart.
    digest = sha256(labels_path.read_bytes())
    owner = next((other for other, (_, _, sums) in IDX_SETS.items() if digest in sums), None)
    owner = "mnist" if sha256(labels) in MNIST_LABELS else owner
    if owner is None:
        print(f"{name}: the labels in {labels_path} are of no set known here; taken as they are")
    elif owner != name:
        raise UserError(f"{labels_path}: is of {owner}, not of {name}: train on --dataset {owner}, "
                        "or name another folder with --data-dir")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), {})


def sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()


def idx_paths(folder: Path, stem: str) -> list[Path]:
    """The files that may be this one: under either usual name; plain, or in a folder of its name,
    as Kaggle's archive unpacks, before compressed."""
    names = stem, stem.replace("-idx", ".idx")
    forms = "{0}", "{0}/{0}", "{0}.gz"
    paths = (folder / form.format(name) for form in forms for name in names)
    return list(filter(Path.is_file, paths))


def read_first(paths: list[Path], ndim: int) -> tuple[np.ndarray, Path]:
    """The first that can be read: beside a plain file that is cut short there may be a good .gz."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            return read_idx(path, ndim), path
    return read_idx(paths[-1], ndim), paths[-1]


def fetch(name: str, stem: str, folder: Path) -> Path:
    """Download one of the four files of a set; DataUnavailable if no mirror has it."""
    _, mirrors, sums = IDX_SETS[name]
    path, reasons = folder / f"{stem}.gz", []
    for mirror in mirrors:
        try:
            content = download(mirror + path.name)
            if sha256(content) != sums[IDX_FILES.index(stem)]:
                raise OSError(f"the checksum of {len(content)} bytes received is wrong")
            folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as file:
                file.write(content)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', error)}")
    raise DataUnavailable(
        f"{name}: {path} is missing and cannot be downloaded ({'; '.join(reasons)}). "
        f"Put the four .gz files into {folder}, or train on --dataset digits")


def download(url: str) -> bytearray:
    content = bytearray()
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            show_status(f"{len(content) / 1e6:.1f} MB")
    show_status("")
    return content


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
        raise UserError(f"{path}: is damaged or cut short (declares {size:,} bytes, has "
                        f"{found:,}): fetch it again")
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


def as_splits(arrays: dict[str, np.ndarray], n_train: int, n_test: int) -> tuple[Split, Split]:
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
    return as_splits(made_once([root, PROJECT_DATA], name, recipe, make), n_train, n_test)


# ------------------------------------------------- pictures: any folder of them, and CelebA

PICTURE = re.compile(r"(?!(.*/)?(\.|__MACOSX/)).*\.(jpe?g|png|bmp|webp)", re.IGNORECASE)
CELEBA_PICTURE = re.compile(r"(.*/)?\d{6}\.jpg")
CELEBA_SPLITS = (162_770, 19_867, 19_962)  # training, validation, test images, in this order
DECODE_CHUNK = 64  # pictures a task


def load_folder(folder: Path) -> tuple[Split, Split]:
    """The pictures in a folder, however deep: their centre squares, 64 x 64 in colour. About a
    tenth is for testing, by their names, so none changes sides when another one is added. (Of a
    few, by chance none may be: then one is taken.)"""

    def arrange(names: list[str]) -> tuple[np.ndarray, dict]:
        if len(names) < 20:
            raise UserError(f"{folder}: has {len(names)} pictures (.jpg .jpeg .png .bmp .webp), and "
                            "20 are needed at least")
        digests = [int(sha256(name.encode()), 16) for name in names]
        test = np.array([digest % 10 == 0 for digest in digests])
        test[digests.index(min(digests))] |= not test.any()
        return 2 * test, {"labels": np.zeros(len(names), np.int64)}

    splits, broken = load_pictures(folder, PICTURE, 1.0, arrange, [folder, PROJECT_DATA], False)
    if broken:
        names = ", ".join(broken[:20])
        print(f"{folder}: passed over {len(broken)} files that are no pictures: {names}")
    return splits


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
            f"celeba: {sources[1]} (.zip or folder) is missing, and no script can download it. "
            "Take img_align_celeba.zip, list_eval_partition.txt and list_attr_celeba.txt from "
            f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them into {folder}, or "
            "train on --dataset faces")
    lists = []
    for stem in ("list_eval_partition", "list_attr_celeba"):
        paths = folder / f"{stem}.txt", folder / f"{stem}.csv"
        lists.append(next(filter(Path.is_file, paths), None))
        if lists[-1] is None:
            print(f"celeba: {paths[0]} is missing: split by number, or without attributes")

    def arrange(names: list[str]) -> tuple[np.ndarray, dict]:
        n, names = len(names), [name.split("/")[-1] for name in names]
        if not n:
            raise UserError(f"{source}: has no images named 000001.jpg, 000002.jpg, ... in it")
        sizes = CELEBA_SPLITS if n == sum(CELEBA_SPLITS) else (n * 9 // 10, 0, n - n * 9 // 10)
        parts, factors = np.repeat((0, 1, 2), sizes), {}
        if lists[0]:
            parts = read_list(lists[0], names, (0, 1, 2))[1][0]
        if lists[1]:
            columns, values = read_list(lists[1], names, (-1, 1))
            factors = dict(zip(columns, (values > 0).astype(np.uint8)))
        return parts, {"labels": factors.get("Smiling", np.zeros(n)).astype(np.int64)} | factors

    # To 148 of 178 columns, as everyone crops it.
    places, lists_there = [folder, PROJECT_DATA / "celeba"], filter(None, lists)
    return load_pictures(
        source, CELEBA_PICTURE, 148 / 178, arrange, places, True, *lists_there)[0]


def read_list(path: Path, names: list[str], allowed: tuple) -> tuple[list[str], np.ndarray]:
    """Of a list with lines "000001.jpg -1 1 ...", or with commas: the names of its columns, from
    the line before the first image, if any, and the values of these images, (columns, n)."""
    header, rows = [], {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        words = line.replace(",", " ").split()
        if words and CELEBA_PICTURE.fullmatch(words[0]):
            rows[words[0]] = words[1:]
        elif words and not rows:
            header = words
    try:
        values = np.array([rows[name] for name in names]).astype(np.int8).T
        header = header[-len(values):]  # Kaggle also names the first column
        if not np.isin(values, allowed).all() or header and len(header) != len(values):
            raise ValueError(f"{len(header)} names, values from {values.min()} to {values.max()}")
    except KeyError as missing:
        raise UserError(f"{path}: has no line for {missing}: fetch both from one place") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error}): fetch it again") from error
    return header, values


def load_pictures(
    source: Path, pattern: re.Pattern, crop: float, arrange: Callable, places: list[Path],
    strict: bool, *lists: Path
) -> tuple[tuple[Split, Split], list[str]]:
    """The splits of the pictures in a folder or an archive, and the names of those that are broken,
    unless strict, which makes them an error.

    arrange(names) returns the part of each, 0 training, 1 validation, 2 test, and its labels and
    factors; lists are the files that it reads. Decoded once, into one of the places.
    """
    names, read, files = list_pictures(source, pattern)

    def make(path: Path) -> dict[str, np.ndarray]:
        kept, broken = names, []
        while True:
            parts, known = arrange(kept)
            order = np.argsort(parts, kind="stable")
            bad = decode_all(path, source, [kept[i] for i in order], read, crop, strict)
            if not bad:
                break
            kept, broken = [name for name in kept if name not in bad], broken + sorted(bad)
        arrays = {key: values[order] for key, values in (known | {"parts": parts}).items()}
        return arrays | {"broken": np.array(broken, str)}

    # A checksum of what makes them: names, sizes and times of the files, and how they are decoded.
    stats = [(path.name, path.stat()) for path in (*files, *lists)]
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    recipe = sha256(repr((names, state, inspect.getsource(decode_picture))).encode())
    arrays = made_once(places, f"{source.stem}-64x64", recipe, make)
    broken = arrays.pop("broken").tolist()
    n_train, _, n_test = np.bincount(arrays.pop("parts"), minlength=3).tolist()
    if not (n_train and n_test):
        raise UserError(f"{source}: {n_train} of its images are for training and {n_test} for "
                        "testing; both are needed")
    return as_splits(arrays, n_train, n_test), broken


def list_pictures(source: Path, pattern: re.Pattern) -> tuple[list[str], Callable, list[Path]]:
    """The names that fit the pattern in a folder or an archive, sorted; a function that reads one;
    and the files that hold them."""
    if source.is_dir():
        walk = ((Path(folder), files) for folder, _, files in os.walk(source))
        found = {(p / f).relative_to(source).as_posix(): p / f for p, files in walk for f in files}
        names = sorted(filter(pattern.fullmatch, found))
        return names, lambda name: found[name].read_bytes(), [found[name] for name in names]
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        beside = source.with_suffix("")
        hint = f", or delete it, for {beside} is there" if beside.is_dir() else ""
        what = f"{source}: is damaged or cut short ({error}): fetch it again{hint}"
        raise UserError(what) from None
    return sorted(filter(pattern.fullmatch, archive.namelist())), archive.read, [source]


def decode_all(
    path: Path, source: Path, names: list[str], read: Callable, crop: float, strict: bool
) -> list[str]:
    """Write the pictures as an array, (n, 3, 64, 64), in threads, for Pillow decodes outside the
    GIL. Returns the names of those that it cannot decode; if strict, the first is an error."""
    n, start, broken = len(names), time.perf_counter(), []
    size, free = n * 3 * 64 * 64, shutil.disk_usage(path.parent).free
    if free < 1.02 * size:  # for a disk that becomes full under a memory map kills the process
        raise UserError(f"{path}: takes {size / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB free")
    print(f"decoding {n:,} pictures into {path}, once", flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with write_atomically(path) as file:
        images = np.lib.format.open_memmap(file.name, "w+", np.uint8, (n, 3, 64, 64))

        def decode(first: int) -> None:
            for row, name in enumerate(names[first : first + DECODE_CHUNK], first):
                try:
                    images[row] = decode_picture(io.BytesIO(read(name)), crop=crop)
                except Exception as error:  # Pillow has many kinds for the many ways to be broken
                    if isinstance(error, MemoryError) or getattr(error, "errno", None):
                        raise  # that is not the picture's fault
                    if strict:
                        hint = "fetch it again, or delete it"
                        raise UserError(f"{source}: {name} is broken ({error}): {hint}") from error
                    broken.append(name)

        try:
            for i, _ in enumerate(pool.map(decode, range(0, n, DECODE_CHUNK)), start=1):
                done, seconds = min(n, i * DECODE_CHUNK), time.perf_counter() - start
                left = seconds / done * (n - done)
                speed = f"{done / seconds:,.0f}/s, {left:.0f} s left"
                show_status(f"{done:,} of {n:,} pictures, {speed}")
        finally:
            pool.shutdown(cancel_futures=True)
        images.flush()
    show_status("")
    return broken


def decode_picture(
    file: str | Path | BinaryIO, side: int = 64, mode: str = "RGB", crop: float = 1.0
) -> np.ndarray:
    """The centre square of a picture as a viewer shows it, on white: (channels, side, side), uint8.

    mode: "RGB" or "L", grey. crop: at most this share of the width. A viewer turns what a camera
    has noted to be turned, and shows 16 bits of grey as 8.
    """
    image = Image.open(file)
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
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

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "mnist-validation": tuple("0123456789"),
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "celeba": ("not smiling", "smiling"),
    "digits": tuple("0123456789"),
    "faces": ("not smiling", "smiling"),
}
DATASETS = tuple(CLASS_NAMES)


def load_dataset(name: str, root: str | Path = PROJECT_DATA) -> tuple[Split, Split]:
    """The training and the test split of a dataset, on the CPU. name: one of DATASETS, or the path
    of a folder of pictures.

    Raises DataUnavailable if it is neither in root nor to be downloaded, UserError
    if its files are damaged.
    """
    if name == "celeba":
        return load_celeba(Path(root))
    if name == "mnist-validation":  # settings are chosen on it, so that the test set stays unseen
        images, labels, _ = load_idx("mnist", Path(root))[0]
        n = len(images) // 6
        return Split(images[:-n], labels[:-n], {}), Split(images[-n:], labels[-n:], {})
    if name in DRAWN:
        return load_drawn(name, Path(root))
    return load_idx(name, Path(root)) if name in IDX_SETS else load_folder(Path(name))
