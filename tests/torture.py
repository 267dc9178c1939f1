"""Attacks on what a run stands on: its files, the network, its life (make torture; 7 minutes).

Every attack is a function of a number, from which its chances are drawn, and of an empty folder;
it raises if anything was lost that must not be. What it stands for is in its first line, which
the table shows. `make test` makes a few tries of most (--few), this all of them.

Most run the scripts in a forked process, which is as real as a new one but need not import torch.
"""

import collections
import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.server
import io
import json
import mmap
import os
import pickle
import pty
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from conftest import PROJECT, write_idx, write_mnist
from PIL import Image

import data
import train
import viz

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
os.environ |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
PHASES = ("starting", "training", "evaluating", "saving", "drawing")


# ------------------------------------------------------------------------- the means


class Ended(NamedTuple):
    status: int  # of exit, or the negative number of a signal
    out: str
    err: str
    seconds: float


def fork(function: Callable[[], object], out: Path, stdout: int | None = None) -> int:
    """function() by way of train.run_cli in a process of its own, whose number is returned."""
    pid = os.fork()
    if pid:
        return pid
    try:  # sys.exit() would run what pytest or this script has left to do
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(out / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), descriptor)
        if stdout is not None:
            os.dup2(stdout, 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        train.run_cli(function)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:  # as a new interpreter does
        os.write(2, traceback.format_exc().encode())
        status = 120
    finally:
        os._exit(status)


def wait(pid: int, out: Path, limit: float = 60) -> Ended:
    """The end of a forked process; an error if it does not come."""
    start = time.monotonic()
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - start > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs: no end after {limit} seconds")
        time.sleep(0.002)
    texts = (
        (out / name).read_text(errors="replace") if (out / name).exists() else ""
        for name in ("out", "err")
    )
    return Ended(os.waitstatus_to_exitcode(ended[1]), *texts, time.monotonic() - start)


def run(function: Callable[[], object], folder: Path, **how) -> Ended:
    out = Path(tempfile.mkdtemp(dir=folder))
    return wait(fork(function, out, **how), out)


def one_line(ended: Ended, *words: str) -> None:
    """It ended as an error of the user's does: status 2, one line on stderr, with the words."""
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    for word in words:
        assert str(word) in ended.err, f"{word} is not in {ended.err}"


def refused(function: Callable[[], object], *words: str) -> None:
    """function raises a UserError of one line, with the words in it."""
    try:
        function()
    except data.UserError as error:
        line = " ".join(str(error).split())
        assert all(str(word) in line for word in words), line
    else:
        raise AssertionError("is not refused")


def no_leftovers(folder: Path) -> None:
    found = [path.name for path in folder.rglob("*.part")]
    assert not found, found


@contextlib.contextmanager
def patched(owner, **values) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@functools.cache
def digits() -> data.Split:
    return data.draw_digits(500, seed=1)


def small_mnist(root: Path) -> Path:
    """400 + 100 images, as MNIST's files below root."""
    images, labels, _ = digits()
    write_mnist(root, data.Split(images[:400], labels[:400], {}),
                data.Split(images[400:], labels[400:], {}))
    return root


@functools.cache
def home() -> Path:
    """A folder with data/mnist/, and later reference/, for all attacks."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    small_mnist(folder / "data")
    folder.chmod(0o755)
    return folder


def options(out: Path, *more) -> list[str]:
    """A short training run."""
    fixed = ["--data-dir", home() / "data", "--out", out, "--epochs", 12, "--batch-size", 20]
    return [str(option) for option in [*fixed, "--hidden-dim", 32, "--latent-dim", 4, *more]]


def without_figures(arguments: list[str]) -> None:
    with patched(viz, draw_run=lambda *args: None):
        train.main(arguments)


@functools.cache
def reference() -> Path:
    """That run, which nothing has interrupted."""
    folder = home() / "reference"
    ended = run(lambda: train.main(options(folder)), home())
    assert ended.status == 0, ended
    return folder


@functools.cache
def seconds_of_training() -> float:
    return run(lambda: without_figures(options(home() / "timed")), home()).seconds


def numbers(folder: Path) -> list[dict]:
    """The history, without its times."""
    history = train.load_run(folder)[1]["history"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def is_complete(folder: Path, figures: bool = True) -> None:
    """The run in the folder is the reference, bit for bit, with every figure."""
    assert numbers(folder) == numbers(reference())
    weights = [train.load_run(run)[0].state_dict() for run in (folder, reference())]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    lines = [(run / "history.csv").read_text().count("\n") for run in (folder, reference())]
    assert lines[0] == lines[1]
    missing = {path.name for path in reference().iterdir()} - set(os.listdir(folder))
    assert not (figures and missing), missing
    no_leftovers(folder)


# ------------------------------------------------------------------------ input files


def idx_file(i: int, folder: Path) -> None:
    """IDX: cut short, too long, any byte of the header or of the gzip stream changed"""
    chance = random.Random(i)
    images, labels, _ = digits()
    ndim, array = [(3, images[:3, 0].numpy()), (1, labels[:50].numpy())][chance.randrange(2)]
    gzipped = chance.random() < 0.5
    path = write_idx(folder / ("x.gz" if gzipped else "x"), array)
    content = bytearray(path.read_bytes())
    header = 4 + 4 * ndim
    kind = i % 5
    if kind == 0:  # every length of the header, then any
        del content[i // 5 % (2 * header) if i % 2 else chance.randrange(len(content)) :]
    elif kind == 1 and not gzipped:
        content[i // 5 % header] ^= chance.randrange(1, 256)
    elif kind in (1, 2):
        content[chance.randrange(len(content) if gzipped else header)] ^= chance.randrange(1, 256)
    elif kind == 3:
        content += chance.randbytes(chance.choice((1, 4, 1000)))
    else:  # sizes at random, up to 2^96 bytes
        plain = bytearray(gzip.decompress(content) if gzipped else content)
        sizes = (chance.choice((0, 1, 28, 2**16, 2**31, 2**32 - 1)) for _ in range(ndim))
        plain[4:header] = struct.pack(f">{ndim}I", *sizes)
        content = bytearray(gzip.compress(plain, 1)) if gzipped else plain
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read = data.read_idx(path, ndim)
        # a gzip stream has bytes without a meaning, such as its time; a plain file has none
        assert gzipped or kind == 4, "is not refused"
        assert np.array_equal(read, array) or read.size == 0, "is read as something else"
    except data.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < array.nbytes + (4 << 20), f"took {peak:,} bytes"


def no_idx_file(i: int, folder: Path) -> None:
    """IDX: gzip bombs, folders, pipes, closed files, wrong labels, counts and shapes"""
    root = small_mnist(folder / "data")
    images, labels = root / "mnist" / f"{IMAGES}.gz", root / "mnist" / LABELS
    zeros = gzip.compress(bytes(50_000_000), 1)
    words = [images]
    match i % 10:
        case 0:  # 60,000 images, and then four gigabytes
            images.write_bytes(gzip.compress(struct.pack(">4I", 2051, 60000, 28, 28)) + 80 * zeros)
            words += ["goes on after"]
        case 1:
            images.write_bytes(gzip.compress(struct.pack(">4I", 2051, 2**32 - 1, 28, 28)) + zeros)
            words += ["declares"]
        case 2:
            images.unlink()
            images.mkdir()
            words += ["no regular file"]
        case 3:
            images.unlink()
            os.mkfifo(images)
            words += ["no regular file"]
        case 4:
            images.chmod(0)
            words += ["Permission denied"]
        case 5:
            write_idx(labels, np.arange(400) % 11)
            words = [labels, "label 10"]
        case 6:
            write_idx(labels, np.zeros(399))
            words += ["400 images", "399 labels"]
        case 7:
            write_idx(images, np.zeros((0, 28, 28)))
            words += ["(0, 28, 28)"]
        case 8:
            write_idx(images, np.zeros((400, 28, 27)))
            words += ["(400, 28, 27)"]
        case 9:
            images.unlink()
            images.symlink_to(images)
            words = [images.name]

    def load() -> None:
        os.setuid(65534) if os.getuid() == 0 else None  # root may read what is closed
        tracemalloc.start()
        with patched(data, IDX_MIRRORS={"mnist": []}):
            try:
                data.load_dataset("mnist", root)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                print(f"took {peak} bytes")
    folder.chmod(0o777)
    ended = run(load, folder)
    one_line(ended, *words)
    assert int(ended.out.split()[-2]) < 1.13 * 60_000 * 784 + (4 << 20), ended.out


@functools.cache
def faces() -> tuple[torch.Tensor, torch.Tensor]:
    data.write_celeba(home(), 20, zipped=True, seed=0)
    with contextlib.redirect_stdout(io.StringIO()):
        return tuple(split.images for split in data.load_dataset("celeba", home()))


def celeba_file(i: int, folder: Path) -> None:
    """CelebA: bytes of the archive, its JPEGs or its lists changed, or cut short"""
    chance, _ = random.Random(i), faces()
    celeba = data.write_celeba(folder, 20, zipped=i % 2 == 0, seed=0)
    files = sorted(path for path in celeba.rglob("*") if path.is_file())
    lists = [path for path in files if path.suffix == ".txt"]
    path = chance.choice(lists if i % 4 < 2 else files)
    content = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.choice((1, 1, 10))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)

    def load() -> None:
        for split, expected in zip(data.load_dataset("celeba", folder), faces()):
            if path.suffix == ".zip":  # its members have checksums
                assert torch.equal(split.images, expected)
            assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 64, 64)
            assert len(split.images) == len(split.labels)
            assert all(set(values.tolist()) <= {0, 1} for values in split.factors.values())

    ended = run(load, folder)
    if ended.status:
        one_line(ended, celeba)
        assert not (celeba / data.CELEBA_CACHE).exists() or "for training and" in ended.err
    assert not ended.err or ended.status, ended.err
    no_leftovers(folder)


def no_celeba_file(i: int, folder: Path) -> None:
    """CelebA: pipes, decompression bombs; a PNG named .jpg, which is fine"""
    celeba = data.write_celeba(folder, 20, zipped=i % 6 == 0, seed=0)
    jpeg = celeba / "img_align_celeba" / "000001.jpg"
    words = []
    match i % 6:
        case 0:
            words = [celeba / "img_align_celeba.zip", "no regular file"]
            words[0].unlink()
            os.mkfifo(words[0])
        case 1:
            words = [celeba / "list_attr_celeba.txt", "no regular file"]
            words[0].unlink()
            os.mkfifo(words[0])
        case 2:  # is left out, so a line of the partition stands alone
            jpeg.unlink()
            os.mkfifo(jpeg)
        case 3 | 4:
            side = (65500, 11000)[i % 2]
            content = jpeg.read_bytes()
            at = content.index(b"\xff\xc0")
            jpeg.write_bytes(content[: at + 5] + struct.pack(">HH", side, side) + content[at + 9 :])
            words = [jpeg.name, f"declares {side}" if i % 2 else "pixels"]
        case 5:
            Image.open(jpeg).convert("RGBA").save(jpeg, "PNG")

    def load() -> None:
        data.load_dataset("celeba", folder)

    ended = run(load, folder)
    if words:
        one_line(ended, *words)
    else:
        assert ended.status == 0 and not ended.err, ended


# -------------------------------------------------------------------------- downloads


class BadServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        kind, name = self.path.strip("/").split("/")
        content = (home() / "mirror" / name).read_bytes()
        with contextlib.suppress(OSError):
            getattr(self, kind)(content)

    def answer(self, content: bytes, length: object = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    good = answer

    def missing(self, content):
        self.send_error(404)

    def failing(self, content):
        self.send_error(500)

    def silent(self, content):
        time.sleep(1000)

    def stalling(self, content):
        self.answer(content[:100], len(content))
        time.sleep(1000)

    def dripping(self, content):
        self.answer(b"", len(content))
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def short(self, content):
        self.answer(content[: len(content) // 2], len(content))

    def short_and_sure(self, content):
        self.answer(content[: len(content) // 2])

    def long(self, content):
        self.answer(content + b"more")

    def endless(self, content):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(1 << 16))

    def wrong(self, content):
        self.answer(content[:-9] + b"x" + content[-8:])

    def no_length(self, content):
        self.answer(content[:100], "many")

    def no_http(self, content):
        self.wfile.write(b"\0\1\2\3 not HTTP at all\n\n" * 10)

    def circling(self, content):
        self.redirect(self.path)

    def astray(self, content):
        self.redirect("http://[")

    def local(self, content):
        self.redirect("file:///etc/passwd")

    def redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@functools.cache
def server() -> str:
    """The address of the server, with a mirror of small files to serve."""
    mirror = home() / "mirror"
    mirror.mkdir()
    for path in (home() / "data" / "mnist").iterdir():
        content = path.read_bytes()
        name = path.name.removesuffix(".gz")
        (mirror / f"{name}.gz").write_bytes(content if path.suffix else gzip.compress(content))
    # in a process of its own, since those that are forked here have no threads
    bound = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    bound.daemon_threads = True
    if os.fork() == 0:
        parent = os.getppid()
        threading.Thread(target=bound.serve_forever, daemon=True).start()
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)
    return f"http://127.0.0.1:{bound.server_port}"


KINDS = [
    name for name in vars(BadServer)
    if name not in ("do_GET", "answer", "good", "redirect", "log_message") and name[0] != "_"
]


def download(i: int, folder: Path) -> None:
    """Downloads: 404, 500, refused, stalled, cut, too long, wrong; a full disk; two at once"""
    address, root = server(), folder / "data"
    root.mkdir()
    sums = {}
    for path in (home() / "mirror").iterdir():
        sums[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    kinds = [*KINDS, "refusing", "full", "two"]
    kind = kinds[i % len(kinds)]
    bad = "http://127.0.0.1:9/" if kind == "refusing" else f"{address}/{kind}/"
    good = f"{address}/good/"

    def load(mirrors: list[str], limit: int = resource.RLIM_INFINITY) -> Callable[[], None]:
        def function() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            fast = {"DOWNLOAD_TIMEOUT": 0.2, "DOWNLOAD_LIMIT": 1 << 20}
            with patched(
                data, IDX_MIRRORS={"mnist": mirrors}, IDX_CHECKSUMS={"mnist": sums}, **fast
            ):
                split, _ = data.load_dataset("mnist", root)
            assert torch.equal(split.images, digits().images[:400])
        return function

    if kind == "two":
        outs = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(2)]
        pids = [fork(load([good]), out) for out in outs]
        for pid, out in zip(pids, outs):
            ended = wait(pid, out)
            assert ended.status == 0, ended
    else:
        if kind == "full":
            one_line(run(load([good], 5000), folder), "File too large")
            bad = good
        else:
            one_line(run(load([bad]), folder), "cannot be downloaded")
        for path in filter(Path.is_file, root.rglob("*")):  # with a full disk, the small files
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.stem], path
        ended = run(load([bad, good]), folder)
        assert ended.status == 0, ended
        ended = run(load(["http://127.0.0.1:9/"]), folder)  # all is there
        assert ended.status == 0, ended
    no_leftovers(folder)


# --------------------------------------------------------------- checkpoints and runs


class Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def checkpoint(i: int, folder: Path) -> None:
    """A checkpoint or config.json that is cut, empty, changed, malicious, or of another run"""
    chance, out = random.Random(i), folder / "run"
    shutil.copytree(reference(), out)
    path, harmed = out / "checkpoint.pt", folder / "harmed"
    content = path.read_bytes()
    found = torch.load(path, weights_only=True)
    kind = i % 9
    if kind == 0:
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == 1:
        path.write_bytes(chance.randbytes(chance.choice((0, 1, 1000))))
    elif kind == 2:
        path.write_bytes(pickle.dumps(Malice(harmed)))
    elif kind == 3:
        torch.save(found | {"history": Malice(harmed)}, path)
    elif kind == 4:  # of another model, another version, or half of one
        another = train.build_model(found["config"] | {"hidden_dim": 16}).state_dict()
        changes = [
            {"model": another}, {"optimizer": {}}, {"history": []}, {"config": {}},
            {"model": {}}, {"config": found["config"] | {"beta": 2.0}}, {"history": [1]},
            {"optimizer": found["optimizer"] | {"state": {0: {
                "step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3),
            }}}},
        ]
        torch.save(found | chance.choice(changes), path)
    elif kind == 5:
        torch.save({key: found[key] for key in chance.sample(sorted(found), 3)}, path)
    elif kind == 6:
        path = out / "config.json"
        nonsense = ["", "{", "[]", "null", '"text"', "[" * 100_000, "{}", "\udcff", "NaN"]
        path.write_text(chance.choice(nonsense), errors="surrogateescape")
    elif kind == 7:
        path = out / "config.json"
        config = json.loads(path.read_text())
        values = [None, -1, 10**30, 0.5, "x", [], {}, float("nan"), "../../etc", True]
        key = chance.choice(train.SETTINGS)
        config[key] = chance.choice([value for value in values if value != config[key]])
        path.write_text(json.dumps(config))
    else:
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
    at = ["--data-dir", str(home() / "data")]
    function = (
        lambda: without_figures(options(out, "--resume")),
        lambda: viz.main([str(out), *at]),
        lambda: train.main(["--evaluate", str(out), "--num-samples", "1", *at]),
    )[i // 9 % 3]
    ended = run(function, folder)
    if kind == 8 and ended.status == 0:  # a byte without a meaning, such as a time
        is_complete(out)
    else:
        one_line(ended, path.parent)
    assert not harmed.exists(), "it was run"


fallen = collections.Counter()  # in which phase the kills fell


def kill(i: int, folder: Path) -> None:
    """kill -9 at five moments of a run, which goes on each time, and ends as if nothing had been"""
    chance, out, phase = random.Random(i), folder / "run", mmap.mmap(-1, 1)

    def in_phase(function: Callable, number: int) -> Callable:
        def call(*args, **more):
            before, phase[0] = phase[0], number
            try:
                return function(*args, **more)
            finally:
                phase[0] = before
        return call

    def training() -> None:
        with patched(
            train,
            train_epoch=in_phase(train.train_epoch, 1),
            test_epoch=in_phase(train.test_epoch, 2),
            save_run=in_phase(train.save_run, 3),
        ), patched(viz, draw_run=in_phase(viz.draw_run, 4)):
            train.main(options(out, "--resume"))

    expected = numbers(reference())
    kills = 0
    while kills < 5:
        phase[0] = 0
        log = Path(tempfile.mkdtemp(dir=folder))
        pid = fork(training, log)
        # three times in four before the figures, which take most of the time
        limit = seconds_of_training() * (1 if chance.random() < 0.75 else 4)
        time.sleep(chance.uniform(0, limit))
        os.kill(pid, signal.SIGKILL)
        ended = wait(pid, log)
        assert not ended.err, ended.err
        if ended.status:  # else it was at its end already
            kills += 1
            fallen[PHASES[phase[0]]] += 1
        found = numbers(out) if (out / "checkpoint.pt").exists() else []
        assert found == expected[: len(found)]
        if found == expected or kills == 5:
            ended = run(training, folder)
            assert ended.status == 0 and not ended.err, ended
            is_complete(out)
            out = Path(tempfile.mkdtemp(dir=folder))


def interrupt(i: int, folder: Path) -> None:
    """Ctrl-C or SIGTERM at any moment of python train.py: an end at once, in one line"""
    chance, out = random.Random(i), folder / "a run"
    number = (signal.SIGINT, signal.SIGTERM)[i % 2]
    command = [sys.executable, str(PROJECT / "train.py"), *options(out, "--epochs", 300)]
    with open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        time.sleep(0.1 + chance.uniform(0, 1 if chance.random() < 0.3 else 5))
        os.kill(process.pid, number)
        start = time.monotonic()
        status = process.wait(timeout=30)
    seconds = time.monotonic() - start
    assert seconds < 5, f"took {seconds:.1f} s to end"
    text = (folder / "err").read_text()
    if status == -number and not text:  # amid the imports
        assert not out.exists()
        return
    assert status == 130 and text.count("\n") == 2 and "interrupted; " in text, (status, text)
    if out.exists():
        assert f"--out '{out}' --resume" in text, text
        if (out / "checkpoint.pt").exists():
            assert numbers(out)
        no_leftovers(out)


def saving(i: int, folder: Path) -> None:
    """A full disk, or a closed folder, while a checkpoint is saved: the old one stays"""
    out, more = folder / "run", options(folder / "run", "--resume")
    ended = run(lambda: without_figures(options(out, "--epochs", 2)), folder)
    assert ended.status == 0, ended
    before, kept = numbers(out), (out / "checkpoint.pt").read_bytes()

    def training() -> None:
        if i % 2 == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        elif os.getuid() == 0:  # root may write everywhere
            os.setuid(65534)
        without_figures(more)

    assert len(kept) > 200_000
    if i % 2:
        folder.chmod(0o755)
        out.chmod(0o555)
    ended = run(training, folder)
    reason = ("File too large", "Permission denied")[i % 2]
    one_line(ended, out, "--resume goes on", reason)
    assert numbers(out) == before and (out / "checkpoint.pt").read_bytes() == kept
    out.chmod(0o755)
    ended = run(lambda: without_figures(more), folder)
    assert ended.status == 0, ended
    is_complete(out, figures=False)


def at_once(i: int, folder: Path) -> None:
    """Runs at once: of one name, each gets a folder; into one --out, they wait for each other"""
    logs = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(3)]
    (folder / "work").mkdir()
    arguments = options(folder / "run", "--epochs", 1)

    def training() -> None:
        os.chdir(folder / "work")
        if i % 2 == 0:
            at = arguments.index("--out")
            train.main(arguments[:at] + arguments[at + 2 :])
        else:
            train.main(arguments + (["--resume"] if i % 4 == 3 else []))

    with patched(viz, draw_run=lambda *args: None):
        pids = [fork(training, log) for log in logs]
        ends = [wait(pid, log) for pid, log in zip(pids, logs)]
    if i % 2 == 0:
        assert all(end.status == 0 for end in ends), ends
        assert len(os.listdir(folder / "work" / "runs")) == 3
    else:
        good = [end for end in ends if end.status == 0]
        assert len(good) == (3 if i % 4 == 3 else 1), ends
        for end in ends:
            if end.status:
                one_line(end, "holds a run already")
        assert numbers(folder / "run") == numbers(reference())[:1]


# --------------------------------------------------------- numbers, and surroundings


EXTREMES = [
    ("--beta", "1e6"), ("--lr", "10"), ("--lr", "1e9"), ("--latent-dim", "4096"),
    ("--batch-size", "60000"), ("--batch-size", "7"), ("--batch-size", "1"), ("--beta", "0"),
    ("--model", "conv", "--lr", "10"), ("--recon", "mse", "--lr", "1e6"), ("--lr", "1e30"),
    ("--importance-samples", "5", "--lr", "1e6"), ("--latent-dim", "1"), ("--beta", "1e9"),
    ("--batch-size", "0"), ("--lr", "nan"), ("--beta", "inf"), ("--latent-dim", "1000000"),
    ("--kl-anneal", "1000000"), ("--model", "ae", "--lr", "1e9"), ("--epochs", "0"),
    ("--limit", "1", "--lr", "1e9"), ("--seed", "-1"), ("--hidden-layers", "100"), ("--lr", "-1"),
]


def extreme(i: int, folder: Path) -> None:
    """Options at their extremes: they work, or a line says what is wrong"""
    more = EXTREMES[i % len(EXTREMES)]
    arguments = ["--data-dir", str(home() / "data"), "--out", str(folder / "run"), "--epochs", "2"]

    def training() -> None:
        # hidden_dim, for large codes, small, unless the model has none
        small = [] if "--model" in more else ["--hidden-dim", "32"]
        without_figures([*arguments, *small, *more])

    ended = run(training, folder)
    if ended.status:
        one_line(ended)
        if "Epochs kept" in ended.err:
            assert "in step" in ended.err or "in the test" in ended.err
            assert any(f"{term} is" in ended.err for term in ("loss", "recon", "KL"))
    else:
        assert not ended.err
    if (folder / "run" / "checkpoint.pt").exists():
        assert all(np.isfinite(list(row.values())).all() for row in numbers(folder / "run"))


def nan(i: int, folder: Path) -> None:
    """A loss that becomes NaN or infinite: stops in that step, names it, keeps the last epoch"""
    chance, out = random.Random(i), folder / "run"
    bad, where = chance.choice((float("nan"), float("inf"))), chance.choice((1, 2))
    epoch, step = chance.choice((1, 2, 3)), chance.randrange(1, 21)
    calls = 0

    def training() -> None:
        def loss(self, *args):
            nonlocal calls
            terms = list(honest(self, *args))
            if self.training:
                calls += 1
                if calls == 20 * (epoch - 1) + step:
                    terms[where] = terms[where] * bad
                    terms[0] = terms[0] + terms[where]
            return tuple(terms)

        honest = train.VAE.loss
        with patched(train.VAE, loss=loss):
            without_figures(options(out))

    ended = run(training, folder)
    term = ("recon", "KL")[where - 1]
    place = f"epoch {epoch}, in step {step} "
    one_line(ended, out, place, f"{term} is", "--lr", f"kept: {epoch - 1}")
    if epoch > 1:
        assert numbers(out) == numbers(reference())[: epoch - 1]
    ended = run(lambda: without_figures(options(out, "--resume")), folder)
    assert ended.status == 0, ended
    is_complete(out, figures=False)


def surroundings(i: int, folder: Path) -> None:
    """Jumping clocks, decimal commas, strange paths, a closed home, 20 columns, a closed pipe"""
    out, function, stdout, status = folder / "run", None, None, 0
    match i % 8:
        case 0:
            reading, stdout = os.pipe()
            os.close(reading)
            status = 2
        case 1 | 4:
            out = folder / ("数 字 $x_{$" if i % 8 == 1 else "a 'b' \"c\" %d {0} \\n")

            def function() -> None:
                train.main(options(out))
                viz.main([str(out), "--data-dir", str(home() / "data")])
                train.main(["--evaluate", str(out), "--num-samples", "2",
                            "--data-dir", str(home() / "data")])
        case 2:
            primary, stdout = pty.openpty()
            fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("4H", 5, 20, 0, 0))
        case 3:
            def function() -> None:
                with patched(time, time=lambda: random.uniform(-1e9, 1e10)):
                    train.main(options(out))
        case 5:
            stdout = os.open("/dev/full", os.O_WRONLY)
            status = 2
    if i % 8 < 6:
        function = function or (lambda: train.main(options(out)))
        ended = run(function, folder, stdout=stdout)
    else:  # these need a new interpreter
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if i % 8 == 6:
            env |= {"LC_ALL": "de_DE.UTF-8", "PYTHONIOENCODING": "ascii"}
            out = folder / "Größe 数"
        else:
            env |= {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
        command = [sys.executable, str(PROJECT / "train.py"), *options(out)]
        found = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        ended = Ended(found.returncode, found.stdout, found.stderr, 0)
    assert "Traceback" not in ended.err, ended.err
    if status:
        one_line(ended, "--resume goes on")
    else:
        assert ended.status == 0, ended
        assert i % 8 == 7 or not ended.err, ended.err  # matplotlib has a word on a closed home
        is_complete(out)


# ---------------------------------------------------------------------------- the table


ATTACKS = {  # how often: in make torture, in make test
    idx_file: (10_000, 300),
    no_idx_file: (20, 10),
    celeba_file: (400, 4),
    no_celeba_file: (30, 6),
    download: (100, 4),
    checkpoint: (540, 6),
    kill: (40, 1),
    interrupt: (40, 0),
    saving: (20, 1),
    at_once: (20, 4),
    extreme: (len(EXTREMES), 4),
    nan: (30, 1),
    surroundings: (16, 1),
}


def main() -> None:
    few, named = "--few" in sys.argv, [name for name in sys.argv[1:] if name != "--few"]
    torch.set_num_threads(1)  # those that are forked may have no more
    print(f"| attack | tries | survived | seconds |\n{4 * '| --- '}|", flush=True)
    failures = []
    try:
        reference()
        for attack, times in ATTACKS.items():
            if not times[few] or named and attack.__name__ not in named:
                continue
            start, survived = time.monotonic(), 0
            for i in range(times[few]):
                with tempfile.TemporaryDirectory(prefix="torture-") as folder:
                    try:
                        attack(i, Path(folder))
                        survived += 1
                    except Exception:
                        failures.append(f"{attack.__name__} {i}: {traceback.format_exc()}")
            seconds = time.monotonic() - start
            print(
                f"| {attack.__doc__} | {times[few]:,} | {survived:,} | {seconds:.0f} |", flush=True
            )
        if fallen:
            print(f"the kills fell into: {', '.join(f'{k} {n}' for k, n in fallen.most_common())}")
    finally:
        shutil.rmtree(home())
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
