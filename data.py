"""The datasets: MNIST, Fashion-MNIST and CelebA from their files; digits and faces drawn here.

Every dataset is loaded by one call and has one shape:

    train, test = load_dataset("mnist", "data")
    train.images    uint8   (n, channels, height, width)
    train.labels    int64   (n,)
    train.factors   dict    what is known beside the label: name -> (n,) tensor

`Batches` then serves it as float images in [0, 1], one batch at a time.

mnist, fashion-mnist   28 x 28 grey, read from <root>/<name>/, downloaded if missing
celeba                 64 x 64 colour, read from <root>/celeba/, where you have put it
digits                 28 x 28 grey, drawn from random pen strokes: no download, all
                       factors known
faces                  64 x 64 colour, drawn from soft shapes: likewise
"""

import collections
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import http.client
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

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

    images: uint8 (n, channels, height, width) and labels: (n,) stay on the device
    they are on, and so do the batches: nothing is copied from host to device in a
    training step. With shuffle, each pass draws a new order from torch's global
    generator. With binarize, pixels become 0 or 1, drawn anew in every batch with the grey
    value as the probability of 1 (so no image is ever quite the same). The last batch may be
    smaller.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle: bool = False,
        binarize: bool = False,
    ):
        if images.dtype != torch.uint8:  # so no image can hold a NaN
            raise TypeError(f"images must be uint8, 0 to 255, and are {images.dtype}")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.binarize = batch_size, shuffle, binarize

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.images), self.images.device
        order = torch.randperm(n, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order.split(self.batch_size):
            images = self.images.index_select(0, index).float().div_(255)
            if self.binarize:  # rand < p, several times as fast as torch.bernoulli
                images = (torch.rand_like(images) < images).float()
            yield images, self.labels.index_select(0, index)


def binarize_once(images: Tensor, seed: int = 0) -> Tensor:
    """One draw of binary images, for testing: uint8 pixels become 0 or 255, the latter with
    probability pixel / 255. The same seed gives the same draw."""
    uniform = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return (uniform < images.cpu() / 255).to(torch.uint8) * 255


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
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


def is_there(path: Path) -> bool:
    """Whether a file is there; UserError if it is something else: a pipe would be read for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; put the file itself there")
    return path.is_file()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for this folder. One that is killed is out, and
    what it has left half-written is removed."""
    descriptor = None
    with contextlib.suppress(ImportError, OSError):  # Windows and some network disks have none
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is at work in {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in folder.glob(".*.[0-9]*.part"):  # see write_atomically
            leftover.unlink()
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


# ---------------------------------------------------- MNIST and Fashion-MNIST: IDX files

IDX_MIRRORS = {
    "mnist": [
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ],
    "fashion-mnist": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
}
# The published checksum of every download: SHA-256 where there is one, else MD5.
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
DOWNLOAD_SPEED = 1000  # bytes a second, on average, or else likewise
DOWNLOAD_LIMIT = 64 << 20  # bytes; the largest of the files has 26 MB
IDX_LIMIT = 1 << 30  # bytes, inflated; the largest has 47 MB


def load_idx_dataset(name: str, root: Path) -> tuple[Split, Split]:
    """MNIST or Fashion-MNIST: 60,000 + 10,000 images of 28 x 28, ten classes."""
    return load_idx_split(name, root, "train"), load_idx_split(name, root, "t10k")


def load_idx_split(name: str, root: Path, prefix: str) -> Split:
    images_path = find_idx_file(name, root, f"{prefix}-images-idx3-ubyte")
    labels_path = find_idx_file(name, root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path}: holds images of shape {images.shape}, not (n, 28, 28)")
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels: "
            "take both from one download"
        )
    if labels.max() > 9:
        raise UserError(f"{labels_path}: holds the label {labels.max()}; labels are 0 to 9")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long(), {})


def find_idx_file(name: str, root: Path, stem: str) -> Path:
    """The path of an IDX file below root, plain or .gz; downloaded if it is not there."""
    for path in (root / name / stem, root / name / f"{stem}.gz"):
        if is_there(path):
            return path
    reasons = []
    for mirror in IDX_MIRRORS[name]:
        try:
            content = download(f"{mirror}{stem}.gz", IDX_CHECKSUMS[name][stem])
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', error)}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent), write_atomically(path) as file:
            file.write(content)
        return path
    raise DataUnavailable(
        f"{name}: {path} is missing and cannot be downloaded ({'; '.join(reasons)}). "
        f"Put the four .gz files into {path.parent}, or train on --dataset digits"
    )


def download(url: str, checksum: str) -> bytes:
    """The verified content of url; OSError, HTTPException or ValueError if it cannot be had."""
    algorithm = "sha256" if len(checksum) == 64 else "md5"
    content, start = bytearray(), time.monotonic()
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        size = response.length or 0
        while chunk := response.read1(1 << 16):
            content += chunk
            if len(content) > DOWNLOAD_LIMIT:
                raise OSError(f"sends more than {DOWNLOAD_LIMIT >> 20} MB")
            if len(content) < (time.monotonic() - start - DOWNLOAD_TIMEOUT) * DOWNLOAD_SPEED:
                raise OSError(f"sends less than {DOWNLOAD_SPEED} bytes a second")
            show_status(f"{len(content) / 1e6:.1f} of {size / 1e6:.1f} MB")
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
    try:
        with open(path, "rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if is_gzip else raw as file:
                magic = read_exactly(file, 4)
                if magic[:3] != b"\0\0\x08":
                    raise UserError(
                        f"{path}: begins with {magic.hex(' ')}, so it is no IDX file of bytes "
                        "(00 00 08): fetch it again"
                    )
                if magic[3] != ndim:
                    raise UserError(f"{path}: has {magic[3]} dimensions where {ndim} are expected")
                shape = np.frombuffer(read_exactly(file, 4 * ndim), ">u4").tolist()
                size = math.prod(shape)
                if size > IDX_LIMIT:
                    raise UserError(f"{path}: declares {size:,} bytes, more than {IDX_LIMIT:,}")
                content = read_exactly(file, size)
                if file.read(1):  # reading to the end also verifies the gzip checksum
                    raise UserError(f"{path}: goes on after the {size:,} bytes that it declares")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}): fetch it again") from error
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_exactly(file: BinaryIO, n: int) -> bytearray:
    """n bytes, or EOFError. Read in pieces, so a false n costs no more memory than the file."""
    content = bytearray()
    while len(content) < n:
        piece = file.read(min(n - len(content), 1 << 20))
        if not piece:
            raise EOFError(f"ends after {len(content)} of {n} bytes")
        content += piece
    return content


# ---------------------------------------------------------- CelebA: 202,599 JPEG files

CELEBA_SPLITS = (162_770, 19_867, 19_962)  # training, validation, test images, in this order
CELEBA_CACHE = "celeba-64x64.npy"
JPEG_NAME = re.compile(r"\d{6}\.jpg")
JPEG_LIMIT = 16 << 20  # bytes; those of CelebA have about 7,000
PIXEL_LIMIT = 1 << 24  # those of CelebA have 178 x 218
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # about 5 times that limit
DECODE_CHUNK = 64  # images a task


def load_celeba(root: Path, skip_broken: bool = False) -> tuple[Split, Split]:
    """CelebA (Liu et al. 2015), 64 x 64 in colour: its official training and test images.

    Reads <root>/celeba/img_align_celeba.zip, or the folder img_align_celeba/, once: the
    images are decoded into one array in a file beside them, or in the project's own
    data/celeba/ if that place is read-only, and memory-mapped from then on. factors: the
    attributes of list_attr_celeba.txt, 1 or 0; labels: the attribute Smiling.

    Raises DataUnavailable if there are no images, UserError if files are damaged or do not
    belong together. With skip_broken, JPEGs that cannot be decoded are left out.
    """
    folder = root / "celeba"
    source = folder / "img_align_celeba.zip"
    if not is_there(source):
        source = folder / "img_align_celeba"
    if not source.exists():
        raise DataUnavailable(
            f"celeba: {source} (.zip or folder) is missing, and no script can download it. Take "
            "img_align_celeba.zip, list_eval_partition.txt and list_attr_celeba.txt from "
            f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them into {folder}, "
            "or train on --dataset faces"
        )
    lists = folder / "list_eval_partition.txt", folder / "list_attr_celeba.txt"
    recipe = celeba_recipe(source, lists)
    places = [folder, PROJECT_DATA / "celeba"]
    caches = (open_celeba_cache(place / CELEBA_CACHE, recipe) for place in places)
    cache = next(filter(None, caches), None)
    if cache is None:
        path = writable_folder(places) / CELEBA_CACHE
        with locked(path.parent):
            cache = open_celeba_cache(path, recipe)  # another run may have built it meanwhile
            if cache is None:
                build_celeba_cache(path, source, lists, recipe, skip_broken)
                cache = open_celeba_cache(path, recipe)
    images, attributes, info = cache
    for notice in info["notices"]:
        print(f"celeba: {notice}")
    if broken := info["broken"]:
        if not skip_broken:
            raise UserError(f"{source}: {broken[0]}; --skip-broken leaves it out")
        n = len(images) + len(broken)
        print(f"celeba: left out {len(broken)} of {n} images, the first: {broken[0]}")
    train, validation, test = info["splits"]
    if not (train and test):
        raise UserError(
            f"{source}: of its {len(images)} images {train} are for training and {test} for "
            f"testing; both are needed (without a {lists[0].name}, they are split 9 to 1)"
        )

    def split(first: int, n: int) -> Split:
        columns = torch.from_numpy(attributes[first : first + n].T.copy())
        factors = dict(zip(info["attributes"], columns))
        labels = factors.get("Smiling", torch.zeros(n)).long()
        return Split(torch.from_numpy(images[first : first + n]), labels, factors)

    return split(0, train), split(train + validation, test)


def celeba_recipe(source: Path, lists: Iterable[Path]) -> str:
    """A checksum of what makes the cache: names, sizes, times of the files, and decode_face."""
    files = [source]
    if source.is_dir():
        entries = (entry for entry in os.scandir(source) if JPEG_NAME.fullmatch(entry.name))
        files = sorted(entries, key=lambda entry: entry.name)
    files += [path for path in lists if path.exists()]
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((state, inspect.getsource(decode_face))).encode()).hexdigest()


def open_celeba_cache(path: Path, recipe: str) -> tuple[np.ndarray, np.ndarray, dict] | None:
    """The images, memory-mapped, their attributes, and the rest; None if of another recipe."""
    with contextlib.suppress(Exception):  # a damaged cache is built anew, however damaged
        images = np.load(path, mmap_mode="c")
        with open(path, "rb") as file:  # two more arrays follow in the same file
            file.seek(images.offset + images.nbytes)
            attributes, info = np.load(file), json.loads(np.load(file).tobytes())
        if info["recipe"] == recipe:
            return images, attributes, info
    return None


def build_celeba_cache(
    path: Path, source: Path, lists: tuple[Path, Path], recipe: str, skip_broken: bool
) -> None:
    """Decode all images into the file at path, which appears whole or not at all."""
    jpegs, read = list_folder(source) if source.is_dir() else list_zip(source)
    names = sorted(jpegs)
    if not names:
        raise UserError(f"{source}: has no images named 000001.jpg, 000002.jpg, ... in it")
    parts, notices = read_partition(lists[0], names)
    attribute_names, attributes, more_notices = read_attributes(lists[1], names)
    size, free = len(names) * 3 * 64 * 64, shutil.disk_usage(path.parent).free
    if free < 1.02 * size:
        raise UserError(f"{path}: takes {size / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB free")

    order = np.argsort(parts, kind="stable")  # all of training first, and so on
    entries = [(names[i], jpegs[names[i]]) for i in order]
    tasks = ((row, entries[row : row + DECODE_CHUNK]) for row in range(0, len(names), DECODE_CHUNK))
    print(f"celeba: decoding {len(names):,} images into {path}, once", flush=True)
    start, done, broken = time.perf_counter(), 0, {}
    with write_atomically(path) as file:
        write_npy_header(file, len(names))
        file.flush()
        pixels = file.tell()
        decode = functools.partial(decode_chunk, read, file.name, pixels)
        for count, bad in in_parallel(decode, tasks):
            if bad and not skip_broken:
                raise UserError(f"{source}: {min(bad.items())[1]}; --skip-broken leaves it out")
            broken |= bad
            done, seconds = done + count, time.perf_counter() - start
            show_status(
                f"{done:,} of {len(names):,} images, {done / seconds:,.0f} images/s, "
                f"{seconds / done * (len(names) - done):.0f} s left"
            )
        kept = [row for row in range(len(names)) if row not in broken]
        if broken:  # close the gaps
            images = np.memmap(file.name, np.uint8, "r+", pixels, (len(names), 3, 64, 64))
            for to, row in enumerate(kept):
                images[to] = images[row]
            images.flush()
        order = order[kept]
        info = {
            "recipe": recipe,
            "splits": [int((parts[order] == part).sum()) for part in (0, 1, 2)],
            "attributes": attribute_names,
            "notices": notices + more_notices,
            "broken": list(broken.values()),
        }
        file.truncate(file.seek(pixels + len(kept) * 3 * 64 * 64))
        np.save(file, attributes[order])
        np.save(file, np.frombuffer(json.dumps(info).encode(), np.uint8))
        file.seek(0)
        write_npy_header(file, len(kept))  # as long as the first: numpy leaves room for n
    show_status("")
    print(f"celeba: done in {seconds:.1f} s, {done / seconds:,.0f} images/s", flush=True)


def write_npy_header(file: BinaryIO, n: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, 64, 64)}
    np.lib.format.write_array_header_1_0(file, header)


def list_folder(path: Path) -> tuple[dict[str, str], Callable]:
    """The JPEGs of a folder, and a function that reads one: read(jpegs[name])."""
    files = (entry for entry in os.scandir(path) if entry.is_file())
    jpegs = {file.name: file.name for file in files if JPEG_NAME.fullmatch(file.name)}
    return jpegs, functools.partial(read_from_folder, path)


def read_from_folder(path: Path, name: str) -> bytes:
    return (path / name).read_bytes()


def list_zip(path: Path) -> tuple[dict[str, tuple], Callable]:
    """The JPEGs of a zip archive, which stays as it is, and a function that reads one."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}): fetch it again") from error
    jpegs = {}
    for member in members:
        inside = PureWindowsPath(member.filename)  # it knows drives and \ as well as /
        if inside.anchor or ".." in inside.parts:
            raise UserError(
                f"{path}: has a member {member.filename!r}, outside of its own folder: such an "
                "archive is not CelebA's; fetch it again"
            )
        if not JPEG_NAME.fullmatch(inside.name):
            continue
        if inside.name in jpegs:
            raise UserError(f"{path}: has two members named {inside.name}: fetch it again")
        encrypted, method = member.flag_bits & 1, member.compress_type
        if encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{path}: {inside.name} is encrypted, or compressed by another method than "
                "deflate: such an archive is not CelebA's; fetch it again"
            )
        jpegs[inside.name] = (member.header_offset, member.compress_size, method, member.CRC)
    return jpegs, functools.partial(read_from_zip, path)


def read_from_zip(path: Path, where: tuple[int, int, int, int]) -> bytes:
    """One member of an archive. zipfile would need the whole directory in every process."""
    offset, size, method, checksum = where
    with open(path, "rb", buffering=0) as file:
        file.seek(max(offset, 0))
        header = file.read(30)  # it ends with the lengths of the name and the extra field
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError("the directory of the archive is wrong about its place")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        content = file.read(min(size, JPEG_LIMIT))
    if method == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, JPEG_LIMIT)
    if zlib.crc32(content) != checksum:
        raise ValueError("its checksum is wrong")
    return content


def decode_chunk(
    read: Callable, path: str, pixels: int, task: tuple[int, list[tuple]]
) -> tuple[int, dict[int, str]]:
    """Decode some images, (name, where) each, into their rows of the file at path.

    pixels: where in the file row 0 begins; task: the first row, and the images. Returns how
    many images these were, and what is wrong with the broken ones: row -> reason.
    """
    first, entries = task
    images, broken = np.empty((len(entries), 3, 64, 64), np.uint8), {}
    for i, (name, where) in enumerate(entries):
        try:
            images[i] = decode_face(read(where))
        except Exception as error:  # Pillow has many kinds for the many ways to be broken
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # that is not the image's fault
            broken[first + i] = f"{name} is broken ({' '.join(str(error).split())})"
    with open(path, "r+b") as file:
        file.seek(pixels + first * 3 * 64 * 64)
        file.write(images)
    return len(entries), broken


def decode_face(content: bytes) -> np.ndarray:
    """The centre square of a picture, 148/178 of its width, as (3, 64, 64), uint8, RGB.

    Of CelebA's 178 x 218 pixels that is the usual crop to 148 x 148.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG"])  # PNGs are named .jpg, too
    except UnidentifiedImageError:
        raise ValueError("it is no JPEG and no PNG") from None
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"it declares {image.width} x {image.height} pixels")
    if image.mode != "RGB":  # or it would be copied, which takes as long as the resizing
        image = image.convert("RGB")
    side = min(image.width * 148 / 178, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    # Pillow's filter grows with the step from pixel to pixel: antialiased.
    face = image.resize((64, 64), Image.Resampling.BILINEAR, box)
    return np.asarray(face).transpose(2, 0, 1)


def in_parallel(function: Callable, tasks: Iterable) -> Iterator:
    """function(task) of every task, in order, on all cores; few results wait at a time."""
    if sys.platform == "linux":
        workers = len(os.sched_getaffinity(0))
        # Forked: a new interpreter would import torch, which takes seconds and memory.
        context = multiprocessing.get_context("fork")
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker)
        # Workers are born with Ctrl-C blocked: half-way into its start one would print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pool.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:  # fork is not safe there; threads do too, for Pillow decodes outside of the GIL
        workers = os.cpu_count()
        pool = concurrent.futures.ThreadPoolExecutor(workers)
    waiting = collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (concurrent.futures.BrokenExecutor, MemoryError) as error:
        raise UserError(
            "a process that decodes images was killed: by Ctrl-C, or because memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """In a new process: die of Ctrl-C at once, without a word, and whenever the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_partition(path: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The part of each image: 0 training, 1 validation, 2 test; and what there is to say."""
    n = len(names)
    if not is_there(path):
        official = n == sum(CELEBA_SPLITS)
        sizes = CELEBA_SPLITS if official else (n * 9 // 10, 0, n - n * 9 // 10)
        how = "at the official boundaries" if official else "9 to 1, in their order"
        return np.repeat((0, 1, 2), sizes), [f"{path} is missing: images are split {how}"]
    rows = read_rows(path, 0, 1, {"0", "1", "2"})
    listed = f"{path} lists {len(rows):,} images, of which {n:,} are there"
    return pick_rows(path, rows, names)[:, 0], [] if n == len(rows) else [listed]


def read_attributes(path: Path, names: list[str]) -> tuple[list[str], np.ndarray, list[str]]:
    """The names of the attributes, (n, attributes) of 0 and 1, and what there is to say."""
    if not is_there(path):
        return [], np.empty((len(names), 0), np.uint8), [f"{path} is missing: no attributes"]
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        count, attributes = file.readline().strip(), file.readline().split()
    rows = read_rows(path, 2, len(attributes), {"-1", "1"})
    if count != str(len(rows)):
        raise UserError(f"{path}: says {count!r} images, has {len(rows)} lines: fetch it again")
    return attributes, (pick_rows(path, rows, names) > 0).astype(np.uint8), []


def read_rows(path: Path, skip: int, columns: int, allowed: set[str]) -> dict[str, list[int]]:
    """The lines "name value value ..." of a list, after the first `skip`: name -> values."""
    rows = {}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            name, *values = line.split() or [""]
            if number <= skip or not name:
                continue
            if len(values) != columns or not allowed.issuperset(values) or name in rows:
                raise UserError(
                    f"{path}, line {number}: {line.strip()[:60]!r} is not a new image with "
                    f"{columns} of the values {', '.join(sorted(allowed))}: fetch it again"
                )
            rows[name] = [int(value) for value in values]
    return rows


def pick_rows(path: Path, rows: dict[str, list[int]], names: list[str]) -> np.ndarray:
    """The rows of these images, (n, columns)."""
    for name in names:
        if name not in rows:
            raise UserError(f"{path}: has no line for {name}: fetch both from one place")
    return np.array([rows[name] for name in names], np.int8)


# ------------------------------------------------------------------- the drawn digits

# How each digit may be written, as pen strokes. A stroke is a list of points "x y"
# in a box of 100 x 100, y downwards, joined by a smooth curve; "/" lifts the pen.
GLYPHS = [
    ["56 3, 36 7, 21 28, 18 58, 30 88, 52 98, 73 86, 82 54, 77 22, 60 4, 46 4",
     "64 8, 46 2, 26 22, 18 56, 32 92, 58 96, 80 64, 76 22, 56 3, 42 10"],
    ["50 2, 50 35, 50 68, 50 98",
     "35 31, 45 18, 53 2 / 53 2, 52 35, 52 68, 51 98",
     "34 30, 44 17, 52 2 / 52 2, 52 35, 51 68, 51 96 / 28 97, 50 96, 74 96"],
    ["22 26, 34 6, 58 2, 77 18, 70 44, 46 70, 20 95 / 20 95, 50 94, 82 92",
     "22 22, 40 3, 66 5, 77 26, 62 54, 40 82, 24 94, 16 84, 30 76, 54 88, 84 92"],
    ["22 14, 44 2, 70 9, 72 32, 44 46 / 44 46, 74 54, 80 76, 58 97, 32 96, 18 84",
     "22 5, 50 4, 76 4 / 76 4, 58 24, 44 40 / 44 40, 72 48, 80 70, 64 94, 38 97, 18 86"],
    ["32 3, 25 32, 20 56 / 20 56, 50 56, 86 54 / 68 6, 66 50, 63 98",
     "62 3, 40 32, 15 64 / 15 64, 50 64, 88 63 / 62 3, 61 50, 60 98"],
    ["30 4, 28 22, 25 44 / 25 44, 48 36, 72 46, 78 68, 64 92, 38 97, 18 86 / 30 4, 54 4, 78 2",
     "76 5, 50 4, 34 7 / 34 7, 28 24, 26 42 / 26 42, 54 40, 76 56, 74 82, 50 97, 20 92"],
    ["66 3, 42 20, 24 50, 22 78, 42 97, 66 92, 76 72, 62 54, 40 56, 25 74",
     "52 2, 34 34, 22 68, 30 93, 54 98, 74 84, 72 62, 52 54, 32 64, 23 78"],
    ["20 6, 48 5, 80 5 / 80 5, 62 38, 48 68, 40 98",
     "20 6, 48 5, 80 5 / 80 5, 62 38, 48 68, 40 98 / 36 50, 56 49, 76 48",
     "20 18, 22 6 / 22 6, 52 6, 80 4 / 80 4, 66 34, 56 66, 52 98"],
    ["72 16, 50 2, 28 13, 34 36, 56 50, 76 70, 68 93, 44 98, 22 84, 30 62, 56 44, 74 24, 70 12",
     "50 2, 28 12, 28 36, 50 48, 72 36, 72 12, 50 2 / "
     "50 48, 26 60, 22 84, 50 98, 78 84, 74 60, 50 47"],
    ["75 22, 56 3, 32 9, 24 32, 40 50, 62 44, 75 22 / 75 22, 74 56, 68 98",
     "74 20, 52 2, 28 13, 26 38, 46 50, 68 40, 76 18 / 76 18, 78 60, 64 92, 36 97"],
]

# The factors of variation, each uniform in its range and independent of all others.
DIGIT_FACTORS = {
    "slant": (-0.15, 0.4),  # horizontal shift per unit of height, to the right
    "rotation": (-12.0, 12.0),  # degrees, clockwise
    "size": (17.0, 21.0),  # height of the box, pixels
    "aspect": (0.72, 1.08),  # its width over its height
    "thickness": (0.65, 1.15),  # standard deviation of the pen's Gaussian tip, pixels
    "shift_x": (-1.0, 1.0),  # pixels to the right
    "shift_y": (-1.0, 1.0),  # pixels downwards
}


def draw_digits(n: int, seed: int) -> Split:
    """Draw n digits; the same n and seed give the same digits.

    images: (n, 1, 28, 28); labels: the classes, 0 to 9; factors: DIGIT_FACTORS, the
    "class" and the "glyph" (which of the ways in GLYPHS to write that class).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    labels = torch.randint(10, (n,), generator=generator)
    variants = torch.tensor([len(glyphs) for glyphs in GLYPHS])
    factors = {"class": labels, "glyph": (uniform(0, 1) * variants[labels]).long()}
    factors |= {name: uniform(*limits) for name, limits in DIGIT_FACTORS.items()}
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for digit, glyphs in enumerate(GLYPHS):
        for number, glyph in enumerate(glyphs):
            strokes = [parse_stroke(stroke) for stroke in glyph.split("/")]
            chosen = ((labels == digit) & (factors["glyph"] == number)).nonzero().squeeze(1)
            for index in chosen.split(500):  # 500 at once need few megabytes
                style = {name: factors[name][index] for name in DIGIT_FACTORS}
                images[index, 0] = draw_glyph(strokes, style, generator)
    return Split(images, labels, factors)


def parse_stroke(text: str) -> Tensor:
    """The points "x y, x y, ..." in percent, as (points, 2) in [-0.5, 0.5]."""
    points = [[float(v) for v in point.split()] for point in text.split(",")]
    return torch.tensor(points) / 100 - 0.5


def draw_glyph(
    strokes: list[Tensor], style: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Draw one glyph in m styles: (m, 28, 28), uint8.

    strokes: (points, 2) each, in [-0.5, 0.5]; style: the factors, (m,) each.
    """
    style = {name: values[:, None] for name, values in style.items()}
    m = len(style["size"])
    bend = 0.24 * torch.randn(m, 7, 2, generator=generator)  # how this hand distorts the plane
    angle = style["rotation"].deg2rad()
    paths = []
    for points in strokes:
        x, y = points.T
        terms = torch.stack([x * x, x * y, y * y, x * x * y, x * y * y, x**3, y**3], dim=1)
        tremor = 0.02 * torch.randn(m, len(points), 2, generator=generator)
        x, y = (points + terms @ bend + tremor).unbind(dim=2)
        x = x * style["aspect"] - style["slant"] * y
        x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
        paths.append(spline_weights(len(points)) @ torch.stack([x, y], dim=2))

    everything = torch.cat(paths, dim=1)
    middle = (everything.amin(dim=1) + everything.amax(dim=1)) / 2
    centre = 13.5 + torch.cat([style["shift_x"], style["shift_y"]], dim=1)
    paths = [(path - middle[:, None]) * style["size"][:, None] + centre[:, None] for path in paths]

    # The pen leaves a Gaussian blob on every piece of its path, as heavy as the piece
    # is long. A blob is the product of its profiles in x and in y, so the sum of all
    # blobs on the pixel grid is one matrix product.
    pieces = torch.cat([(path[:, 1:] + path[:, :-1]) / 2 for path in paths], dim=1)
    lengths = torch.cat([(path[:, 1:] - path[:, :-1]).norm(dim=2) for path in paths], dim=1)
    width = style["thickness"][:, None]
    profile = torch.exp(-0.5 * ((pieces[..., None] - torch.arange(28.0)) / width[..., None]) ** 2)
    weight = lengths[..., None] / (width * math.sqrt(2 * math.pi))  # a long line's ridge is 1
    ink = (profile[:, :, 1] * weight).transpose(1, 2) @ profile[:, :, 0]
    return (255 * (1.6 * ink - 0.12).clamp(0, 1)).round().byte()  # a full core, soft edges


def spline_weights(k: int) -> Tensor:
    """The (8k - 7, k) matrix that turns k points into a Catmull-Rom spline through them.

    Catmull & Rom 1974; the end points are repeated, 8 steps between neighbours.
    """
    t = torch.arange(8 * k - 7) / 8
    segment = t.floor().clamp(max=k - 2)
    t = t - segment
    weights = torch.stack([
        -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2
    ], dim=1) / 2
    neighbours = (segment[:, None].long() + torch.arange(-1, 3)).clamp(0, k - 1)
    return (weights[..., None] * F.one_hot(neighbours, k)).sum(dim=1)


# -------------------------------------------------------------------- the drawn faces

# The factors of variation, each uniform in its range and independent of all others. A
# factor that is a colour runs through the colours of FACE_COLOURS; "glasses" is 0 or 1.
FACE_FACTORS = {
    "skin": (0.0, 1.0),
    "hair_colour": (0.0, 1.0),
    "hair_length": (0.0, 1.0),  # from above the ears to the shoulders
    "fringe": (0.0, 1.0),  # how far down the forehead it comes
    "face_width": (0.47, 0.57),  # half of it; lengths are in units of 35 pixels of 64
    "jaw": (0.0, 1.0),  # from pointed to square
    "beard": (-2.0, 1.0),  # its opacity, clamped to 0: two faces in three have none
    "eye_size": (0.8, 1.25),  # relative
    "eye_colour": (0.0, 1.0),
    "gaze": (-1.0, 1.0),  # to our left or right
    "turn": (-1.0, 1.0),  # of the head, likewise
    "brows": (-1.0, 1.0),  # from worried to angry
    "smile": (-1.0, 1.0),  # from frown to smile
    "mouth_open": (0.0, 1.0),
    "shirt": (0.0, 1.0),
    "background": (0.0, 1.0),
}
FACE_COLOURS = {
    "skin": ["fbe0cf", "f0c3a0", "d79b6e", "a9683f", "6b3f26"],
    "hair_colour": ["1d1a1e", "4a2c1c", "8f4a21", "e0b054", "dcd8d2"],
    "eye_colour": ["3b1a08", "5f9a2a", "2f86e0"],
    "shirt": ["c8453b", "e0a030", "4f9d69", "3a7ca5", "7a5195"],
    "background": ["f7c9b6", "f5e3a8", "c4e3c1", "b9dcec", "cdc3e6"],
}


def draw_faces(n: int, seed: int) -> Split:
    """Draw n faces; the same n and seed give the same faces.

    images: (n, 3, 64, 64); labels: 1 where the mouth smiles, else 0; factors:
    FACE_FACTORS and "glasses".
    """
    factors = face_factors(n, seed)
    images = torch.cat([
        paint_faces({name: values[i : i + 250] for name, values in factors.items()})
        for i in range(0, n, 250)  # 250 at once fit into the processor's cache
    ])
    return Split(images, (factors["smile"] > 0).long(), factors)


def face_factors(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: low + (high - low) * torch.rand(n, generator=generator)
        for name, (low, high) in FACE_FACTORS.items()
    }
    factors["beard"].clamp_(min=0)
    return factors | {"glasses": (torch.rand(n, generator=generator) < 0.3).float()}


def paint_faces(
    factors: dict[str, Tensor], width: int = 64, height: int = 64, side: float = 64
) -> Tensor:
    """Paint m faces: (m, 3, height, width), uint8.

    factors: (m,) each; side: the centre square that holds a face, in pixels. One soft
    shape is painted over the other, from the background to the glasses. The edge of a
    shape is one pixel wide, so a small change of a factor is a small change of the image.
    """
    m, unit = len(factors["skin"]), side * 35 / 64
    colour = {
        name: mix_colours(factors[name], colours)[:, :, None, None]
        for name, colours in FACE_COLOURS.items()
    }
    f = {name: values.view(m, 1, 1, 1) for name, values in factors.items()}
    x = ((torch.arange(width) + 0.5 - width / 2) / unit).view(1, 1, 1, width)
    y = ((torch.arange(height) + 0.5 - height / 2) / unit).view(1, 1, height, 1) + 0.04
    image = colour["background"].repeat(1, 1, height, width)

    def paint(mask: Tensor, colour: Tensor) -> None:
        torch.lerp(image, colour, mask, out=image)

    def inside(depth: Tensor) -> Tensor:
        """The share of a pixel that is inside a shape whose edge is `depth` away."""
        return (depth * unit + 0.5).clamp_(0, 1)

    def ellipse(cx, cy, rx, ry) -> Tensor:
        q = ((x - cx) / rx).square() + ((y - cy) / ry).square()
        return inside((1 - q) * torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry)) / 2)

    def glow(cx, cy, rx, ry) -> Tensor:
        return torch.exp(-((x - cx) / rx).square()) * torch.exp(-((y - cy) / ry).square())

    def on_head(s: float) -> tuple[Tensor, Tensor]:
        """Where s in [-1, 1] across the face comes to lie when the head turns, how squeezed."""
        angle = math.asin(s) + turn
        return half * angle.sin(), angle.cos() / math.cos(math.asin(s))

    def rgb(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)

    white, black = rgb(1, 1, 1), rgb(0.08, 0.08, 0.1)
    skin, hair = colour["skin"], colour["hair_colour"]
    shade = skin * rgb(0.84, 0.76, 0.72)
    half, turn, size = f["face_width"], 0.33 * f["turn"], f["eye_size"]  # turn: radians
    middle, squeeze = on_head(0.0)
    paint((0.45 - 0.4 * y).clamp(0, 1), white)

    # The hair behind the head: a box with round corners.
    bottom = -0.05 + 1.05 * f["hair_length"]
    box_w, box_h = half + 0.09 + 0.05 * f["hair_length"], (bottom + 0.78) / 2
    corner = torch.minimum(box_w, box_h)
    out_x = (x.abs() - (box_w - corner)).clamp(min=0)
    out_y = ((y - (bottom - 0.78) / 2).abs() - (box_h - corner)).clamp(min=0)
    mane = inside(corner - (out_x.square() + out_y.square()).sqrt())
    paint(mane, 0.82 * hair)

    # Neck, shoulders, ears, head.
    paint(inside(0.24 - x.abs()) * inside(y - 0.3), shade)
    shoulders = (x / 0.98).square() + ((y - 1.22).clamp(max=0) / 0.44).square()
    paint(inside((1 - shoulders) * 0.22), colour["shirt"])
    paint(ellipse(0, 0.8, 0.27, 0.12), shade)
    for s in (-1, 1):
        paint(ellipse(0.98 * s * half - 0.1 * turn, 0.06, 0.1, 0.14), shade)
    chin = ((y - 0.05).clamp(min=0) / 0.65).square()
    u = x / (half * (1 - (0.6 - 0.6 * f["jaw"]) * chin))
    head = inside((1 - u.square() - ((y + 0.04) / 0.7).square()) * half / 2)
    paint(head, skin)
    paint(head * (0.1 + 0.15 * u + 0.3 * turn).clamp(0, 0.5), shade)
    for s in (-0.55, 0.55):  # cheeks
        cx, k = on_head(s)
        paint(0.35 * head * glow(cx, 0.27, 0.15 * k, 0.1), skin * rgb(1, 0.62, 0.58))

    # Beard, nose, mouth.
    edge = 0.3 - 0.42 * ((x - middle) / half).square().clamp(max=1)
    paint(head * inside(y - edge) * 0.9 * f["beard"], 0.9 * hair)
    paint(ellipse(1.25 * middle, 0.185, 0.075, 0.05), shade)
    paint(ellipse(1.25 * middle, 0.165, 0.07, 0.05) * inside(y - 0.13), skin)
    t = (x - 1.05 * middle) / (0.25 * squeeze)  # -1 and 1 are the corners of the mouth
    bow, gap = (1 - t.square()).clamp(min=0), 0.1 * f["mouth_open"]
    line = 0.43 - 0.14 * f["smile"] * (t.square() - 0.45)
    off = (y - line - 0.3 * gap * bow).abs()
    mouth = inside((1 - t.abs()) * 0.25 * squeeze)
    paint(mouth * inside(bow * (gap + 0.045) - off), skin * rgb(0.78, 0.42, 0.42))
    opening = mouth * inside(bow * gap - off - 0.003)
    paint(opening, rgb(0.35, 0.08, 0.1))
    paint(opening * inside(line - 0.35 * gap * bow - y), white)  # teeth

    # The hair before the head, and light on it.
    u = (x - 0.6 * middle) / half
    above = -0.64 + 0.36 * f["fringe"] + 0.62 * u**4 - y
    steep = (1 + (4 * 0.62 * u**3 / half).square()).sqrt()  # its distance is not vertical
    front = ellipse(0, -0.04, half + 0.055, 0.76) * inside(above / steep)
    paint(front, hair)
    paint(0.45 * front * glow(-0.18, -0.62, 0.2, 0.09), 0.5 + 0.5 * hair)
    curtain = half * (0.9 - 0.12 * f["hair_length"]) + 0.1 * (y - 0.2).square()
    for s in (-1, 1):
        paint(mane * inside(s * (x - 0.12 * turn) - curtain), 0.94 * hair)

    # Eyes, brows, glasses.
    for s in (-1, 1):
        cx, k = on_head(0.44 * s)
        rx, ry = 0.15 * size * k, 0.105 * size
        paint(ellipse(cx, -0.082, 1.06 * rx, 1.05 * ry), skin * rgb(0.45, 0.33, 0.32))  # lashes
        eye = ellipse(cx, -0.06, rx, ry)
        paint(eye, white)
        iris = cx + 0.062 * f["gaze"] * size * k
        paint(eye * ellipse(iris, -0.06, 0.085 * size * k, 0.09 * size), colour["eye_colour"])
        paint(eye * ellipse(iris, -0.06, 0.042 * size * k, 0.045 * size), black)
        paint(ellipse(iris - 0.02, -0.09, 0.022, 0.022), white)
        v = s * (x - on_head(0.46 * s)[0]) / (0.17 * k)  # 1 is the outer end of the brow
        brow = -0.23 - 0.03 * size - f["brows"] * (0.055 * v + 0.01) + 0.03 * v.square()
        depth = 0.03 * (1.2 - 0.4 * v) - (y - brow).abs()
        paint(inside(depth) * inside((1 - v.abs()) * 0.17 * k), 0.75 * hair)
        lens = (((x - cx) / (0.215 * k)).square() + ((y + 0.06) / 0.19).square()).sqrt()
        paint(f["glasses"] * 0.12 * inside((1 - lens) * 0.19), white)
        paint(f["glasses"] * inside(0.02 - 0.19 * (lens - 1).abs()), black)
    (left, _), (right, _) = on_head(-0.44), on_head(0.44)
    bridge = inside((right - left) / 2 - 0.2 - (x - (left + right) / 2).abs())
    paint(f["glasses"] * bridge * inside(0.016 - (y + 0.08).abs()), black)
    return image.mul_(255).round_().clamp_(0, 255).byte()


def mix_colours(t: Tensor, colours: list[str]) -> Tensor:
    """Run through the colours, from the first (t = 0) to the last (t = 1): (m,) -> (m, 3)."""
    table = torch.tensor([list(bytes.fromhex(colour)) for colour in colours]) / 255
    t = t * (len(colours) - 1)
    low = t.long().clamp(max=len(colours) - 2)
    return torch.lerp(table[low], table[low + 1], (t - low)[:, None])


# The forty attributes, in the order of the official file, and for those that a drawing
# shows, when it has them.
CELEBA_ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
    "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee "
    "Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes "
    "No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling "
    "Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
).split()
DRAWN_ATTRIBUTES = {
    "Bangs": lambda f: f["fringe"] > 0.7,
    "Black_Hair": lambda f: f["hair_colour"] < 0.15,
    "Blond_Hair": lambda f: (f["hair_colour"] > 0.65) & (f["hair_colour"] < 0.87),
    "Brown_Hair": lambda f: (f["hair_colour"] > 0.15) & (f["hair_colour"] < 0.6),
    "Eyeglasses": lambda f: f["glasses"] > 0,
    "Goatee": lambda f: f["beard"] > 0.3,
    "Gray_Hair": lambda f: f["hair_colour"] > 0.9,
    "Mouth_Slightly_Open": lambda f: f["mouth_open"] > 0.4,
    "Narrow_Eyes": lambda f: f["eye_size"] < 0.9,
    "No_Beard": lambda f: f["beard"] <= 0,
    "Oval_Face": lambda f: f["jaw"] < 0.4,
    "Pale_Skin": lambda f: f["skin"] < 0.15,
    "Smiling": lambda f: f["smile"] > 0,
}


def write_celeba(root: str | Path, n: int, zipped: bool = False, seed: int = 0) -> Path:
    """Write n drawn faces in the layout of CelebA, for a dry run without it: <root>/celeba/.

    JPEGs of 178 x 218 in img_align_celeba/ or, zipped, in img_align_celeba.zip; the
    attributes of DRAWN_ATTRIBUTES, -1 for the others of the forty; parts of 80, 10 and 10 %
    for training, validation and test. Raises FileExistsError if there is a <root>/celeba/.
    """
    folder = Path(root) / "celeba"
    folder.mkdir(parents=True)
    factors = face_factors(n, seed)
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    with contextlib.ExitStack() as stack:
        if zipped:
            method = zipfile.ZIP_DEFLATED
            path = folder / "img_align_celeba.zip"
            archive = stack.enter_context(zipfile.ZipFile(path, "w", method))
        else:
            (folder / "img_align_celeba").mkdir()
        for i in range(0, n, 50):
            some = {name: values[i : i + 50] for name, values in factors.items()}
            images = paint_faces(some, 178, 218, 148).permute(0, 2, 3, 1).numpy()
            for name, image in zip(names[i:], images):
                jpeg = io.BytesIO()
                Image.fromarray(image).save(jpeg, "JPEG", quality=95)
                if zipped:
                    archive.writestr(f"img_align_celeba/{name}", jpeg.getvalue())
                else:
                    (folder / "img_align_celeba" / name).write_bytes(jpeg.getvalue())
    has_not = torch.zeros(n, dtype=torch.bool)
    has = [DRAWN_ATTRIBUTES.get(a, lambda f: has_not)(factors).tolist() for a in CELEBA_ATTRIBUTES]
    lines = [str(n), " ".join(CELEBA_ATTRIBUTES)]
    for name, *values in zip(names, *has):
        lines.append(f"{name} {' '.join(' 1' if value else '-1' for value in values)}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = np.repeat((0, 1, 2), (n - n // 10 * 2, n // 10, n // 10))
    lines = [f"{name} {part}" for name, part in zip(names, parts)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return folder


# ------------------------------------------------- the drawn datasets, and all datasets

DRAWN = {"digits": (draw_digits, 60_000, 10_000), "faces": (draw_faces, 20_000, 2_000)}


def load_drawn(name: str, root: Path) -> tuple[Split, Split]:
    """The digits or the faces: always the same, drawn once and cached as <name>.npz.

    The cache goes into root, or into the project's own data/ if root is read-only.
    """
    draw, n_train, n_test = DRAWN[name]
    # A cache is good for this very file only, so that an edited glyph is seen at once.
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    places, arrays = [root, PROJECT_DATA], None
    for place in places:
        with contextlib.suppress(Exception):  # a damaged cache is drawn anew, however damaged
            cache = dict(np.load(place / f"{name}.npz"))
            if cache.pop("recipe") == recipe:
                arrays = {key: torch.from_numpy(values) for key, values in cache.items()}
                break
    if arrays is None:
        print(f"drawing {n_train + n_test:,} {name}, once (some seconds)", flush=True)
        images, labels, factors = draw(n_train + n_test, seed=0)
        arrays = {"images": images, "labels": labels, **factors}
        with contextlib.suppress(UserError, OSError):  # without a cache it is drawn every time
            folder = writable_folder(places)
            with locked(folder), write_atomically(folder / f"{name}.npz") as file:
                np.savez(file, recipe=recipe, **arrays)

    def split(part: slice) -> Split:
        rows = {key: values[part] for key, values in arrays.items()}
        return Split(rows.pop("images"), rows.pop("labels"), rows)

    return split(slice(n_train)), split(slice(n_train, None))


CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat",
                      "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "celeba": ("not smiling", "smiling"),
    "digits": tuple("0123456789"),
    "faces": ("not smiling", "smiling"),
}
DATASETS = tuple(CLASS_NAMES)


def load_dataset(
    name: str, root: str | Path = PROJECT_DATA, skip_broken: bool = False
) -> tuple[Split, Split]:
    """The training and the test split of a dataset, on the CPU.

    skip_broken: leave out the JPEGs of celeba that cannot be decoded.
    Raises DataUnavailable if it is neither in root nor to be downloaded, UserError
    if its files are damaged.
    """
    if name == "celeba":
        return load_celeba(Path(root), skip_broken)
    if name in DRAWN:
        return load_drawn(name, Path(root))
    return load_idx_dataset(name, Path(root))
