"""The datasets: MNIST and Fashion-MNIST from their files, and digits we draw ourselves.

Every dataset is loaded by one call and has one shape:

    train, test = load_dataset("mnist", "data")
    train.images    uint8   (n, channels, height, width)
    train.labels    int64   (n,)
    train.factors   dict    what is known beside the label: name -> (n,) tensor

`Batches` then serves it as float images in [0, 1], one batch at a time.

mnist, fashion-mnist   read from <root>/<name>/, downloaded into it if they are missing
digits                 28 x 28, drawn from random pen strokes: no download, all factors known
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
    generator. The last batch may be smaller.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool = False):
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.images), self.images.device
        order = torch.randperm(n, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order.split(self.batch_size):
            images = self.images.index_select(0, index)
            yield images.float().div_(255), self.labels.index_select(0, index)


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
    finally:
        temporary.unlink(missing_ok=True)


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
DOWNLOAD_LIMIT = 64 << 20  # bytes; the largest of the files has 26 MB


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
        if path.is_file():
            return path
    reasons = []
    for mirror in IDX_MIRRORS[name]:
        try:
            content = download(f"{mirror}{stem}.gz", IDX_CHECKSUMS[name][stem])
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', error)}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(content)
        return path
    raise DataUnavailable(
        f"{name}: {path} is missing and cannot be downloaded ({'; '.join(reasons)}). "
        f"Put the four .gz files into {path.parent}, or train on --dataset digits"
    )


def download(url: str, checksum: str) -> bytes:
    """The verified content of url; OSError or HTTPException if it cannot be had."""
    algorithm = "sha256" if len(checksum) == 64 else "md5"
    content = bytearray()
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 16):
            content += chunk
            if len(content) > DOWNLOAD_LIMIT:
                raise OSError(f"sends more than {DOWNLOAD_LIMIT >> 20} MB")
            if sys.stdout.isatty():
                print(f"\r{len(content) / 1e6:.1f} of {size / 1e6:.1f} MB ", end="", flush=True)
    if sys.stdout.isatty():
        print()
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
                content = read_exactly(file, math.prod(shape))
                if file.read(1):  # reading to the end also verifies the gzip checksum
                    raise UserError(
                        f"{path}: goes on after the {math.prod(shape)} bytes that it declares"
                    )
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


def load_digits(name: str, root: Path) -> tuple[Split, Split]:
    """60,000 + 10,000 drawn digits: always the same, drawn once and cached as digits.npz.

    The cache goes into root, or into the project's own data/ if root is read-only.
    """
    # A cache is good for this very file only, so that an edited glyph is seen at once.
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    keys, arrays = ["images", "labels", "class", "glyph", *DIGIT_FACTORS], None
    for folder in (root, PROJECT_DATA):
        with contextlib.suppress(Exception):  # a damaged cache is drawn anew, however damaged
            cache = dict(np.load(folder / "digits.npz"))
            if cache.pop("recipe") == recipe:
                arrays = {key: torch.from_numpy(cache[key]) for key in keys}
                break
    if arrays is None:
        print("drawing 70,000 digits, once (some seconds)", flush=True)
        images, labels, factors = draw_digits(70_000, seed=0)
        arrays = {"images": images, "labels": labels, **factors}
        for folder in (root, PROJECT_DATA):
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with write_atomically(folder / "digits.npz") as file:
                    np.savez(file, recipe=recipe, **arrays)
                break

    def split(part: slice) -> Split:
        rows = {key: values[part] for key, values in arrays.items()}
        return Split(rows.pop("images"), rows.pop("labels"), rows)

    return split(slice(60_000)), split(slice(60_000, None))


CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat",
                      "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "digits": tuple("0123456789"),
}
DATASETS = {"mnist": load_idx_dataset, "fashion-mnist": load_idx_dataset, "digits": load_digits}


def load_dataset(name: str, root: str | Path = PROJECT_DATA) -> tuple[Split, Split]:
    """The training and the test split of a dataset, on the CPU.

    Raises DataUnavailable if it is neither in root nor to be downloaded, UserError
    if its files are damaged.
    """
    return DATASETS[name](name, Path(root))
