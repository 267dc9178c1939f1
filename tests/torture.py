"""Attacks on what a run stands on: its files, the network, its life (make torture; 6 minutes).

Every attack is a function of a number, from which its chances are drawn, and of an empty folder;
it raises if anything was lost that must not be. The table shows what it stands for. `make test`
makes a few tries (--few). Forked processes are as real as new ones, and need not import torch.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import pickle
import pty
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

# A forked process can share neither a GPU nor threads.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "no_proxy": "*", "NO_PROXY": "*"}
import numpy as np
import torch
from conftest import PROJECT, write_idx, write_mnist  # first: it says where the others are
from celeba_files import write_celeba

import data
import draw
import train

EPOCHS, STEPS = 12, 20
NOWHERE = "http://127.0.0.1:9/"
DEVNULL = os.open(os.devnull, os.O_WRONLY)


# ------------------------------------------------------------------------- the means


class Ended(NamedTuple):
    status: int  # of exit, or the negative number of a signal
    err: str


def start(function: Callable, folder: Path, stdout: int = DEVNULL) -> tuple[int, Path]:
    """function() by way of train.run_cli in a process: its number, and the file of its errors."""
    stderr, err = tempfile.mkstemp(dir=folder)
    if pid := os.fork():
        os.close(stderr)
        return pid, Path(err)
    try:  # sys.exit() would run what this script has left to do
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        train.run_cli(function)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stderr.flush()
        sys.stdout.flush()
    except OSError:  # as a new interpreter does
        os.write(2, traceback.format_exc().encode())
        status = 120
    finally:
        os._exit(status)


def end(started: tuple[int, Path], limit: float = 60) -> Ended:
    """The end of that process; an error if it does not come."""
    (pid, err), begin = started, time.monotonic()
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - begin > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs: no end after {limit} seconds")
        time.sleep(0.002)
    return Ended(os.waitstatus_to_exitcode(ended[1]), err.read_text())


def run(function: Callable, folder: Path, stdout: int = DEVNULL) -> Ended:
    return end(start(function, folder, stdout))


def succeeds(function: Callable, folder: Path) -> None:
    ended = run(function, folder)
    assert ended == (0, ""), ended


def one_line(ended: Ended, *words: object) -> None:
    """It ended as an error of the user's does: status 2, one line on stderr, with the words."""
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert all(str(word) in ended.err for word in words), (words, ended.err)


@functools.cache
def digits() -> data.Split:
    return data.Split(*draw.draw_digits(500, seed=1))


def small_mnist(root: Path) -> Path:
    """400 + 100 images, as MNIST's files below root."""
    (a, b), (c, d) = (part.split((400, 100)) for part in digits()[:2])
    write_mnist(root, data.Split(a, c, {}), data.Split(b, d, {}))
    return root / "mnist"


@functools.cache
def home() -> Path:
    """A folder with data/mnist/, and later reference/, for all attacks."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    small_mnist(folder / "data")
    folder.chmod(0o755)
    return folder


def options(out: Path | None, *more: object) -> list[str]:
    """A short training run."""
    sizes = ["--epochs", EPOCHS, "--batch-size", 400 // STEPS, "--hidden-dim", 32]
    named = ["--latent-dim", 4, "--data-dir", home() / "data", *(["--out", out] if out else [])]
    return [str(option) for option in (*sizes, *named, *more)]


def train_short(out: Path | None, *more: object) -> None:
    with patch.multiple(train, draw_run=lambda *args: None):  # which takes as long as to train
        train.main(options(out, *more))


@functools.cache
def reference() -> tuple[Path, float]:
    """That run, which nothing has interrupted, and the seconds that it took a processor."""
    folder, begin = home() / "reference", os.times()
    succeeds(lambda: train.main(options(folder)), home())
    return folder, sum(os.times()[2:4]) - sum(begin[2:4])


def numbers(folder: Path) -> list[dict]:
    """The history, without its times."""
    history = train.load_run(folder)[1]["history"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def is_complete(folder: Path, figures: bool = False) -> None:
    """The run in the folder is the reference, bit for bit, with every figure."""
    runs = folder, reference()[0]
    assert numbers(folder) == numbers(runs[1])
    one, other = (train.load_run(run)[0].state_dict() for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert len({(run / "history.csv").read_text().count("\n") for run in runs}) == 1
    missing = set(os.listdir(runs[1])) - set(os.listdir(folder))
    assert not (figures and missing), missing


# ------------------------------------------------------------------------ input files


def idx_file(i: int, folder: Path) -> None:
    """IDX: cut short, too long, any byte of the header or of the gzip stream changed"""
    chance, kind = random.Random(i), i % 5
    ndim, array = chance.choice([(3, digits().images[:3, 0]), (1, digits().labels[:50])])
    array, gzipped, header = array.numpy(), chance.random() < 0.5, 4 + 4 * ndim
    path = write_idx(folder / ("x.gz" if gzipped else "x"), array)
    content = bytearray(path.read_bytes())
    if kind == 0:  # every length of the header, then any
        del content[i // 5 % (2 * header) if i % 2 else chance.randrange(len(content)) :]
    elif kind < 3:
        content[chance.randrange(len(content) if gzipped else header)] ^= chance.randrange(1, 256)
    elif kind == 3:
        content += chance.randbytes(chance.choice((1, 4, 1000)))
    else:  # sizes at random, up to 2^96 bytes
        sizes = (chance.choice((0, 1, 28, 2**16, 2**31, 2**32 - 1)) for _ in range(ndim))
        plain = bytearray(gzip.decompress(content) if gzipped else content)
        plain[4:header] = struct.pack(f">{ndim}I", *sizes)
        content = gzip.compress(plain, 1) if gzipped else plain
    path.write_bytes(content)
    try:
        read = data.read_idx(path, ndim)
        # a gzip stream has bytes without a meaning, such as its time; a plain file has none
        assert gzipped or kind == 4, "is not refused"
        assert np.array_equal(read, array) or read.size == 0, "is read as something else"
    except data.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@functools.cache
def celeba() -> tuple[torch.Tensor, torch.Tensor]:
    """The images of 20 faces, which are in home()/folder/celeba/ and in home()/zip/celeba/."""
    for name in ("folder", "zip"):
        write_celeba(home() / name, 20, zipped=name == "zip")
    shutil.copytree(home() / "zip", home() / "decoded")
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        return tuple(split.images for split in data.load_dataset("celeba", home() / "decoded"))


def celeba_file(i: int, folder: Path) -> None:
    """CelebA: bytes of the archive, its JPEGs or its lists changed, or cut short"""
    chance, images = random.Random(i), celeba()
    shutil.copytree(home() / ("zip", "folder")[i % 2], root := folder / "data")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = chance.choice([path for path in files if path.suffix == ".txt"] if i % 4 < 2 else files)
    content = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.choice((1, 1, 10))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)

    def load() -> None:
        for split, expected in zip(data.load_dataset("celeba", root), images):
            if path.suffix == ".zip":  # its members have checksums
                assert torch.equal(split.images, expected)
            assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 64, 64)
            assert len(split.images) == len(split.labels)
            assert all(set(values.tolist()) <= {0, 1} for values in split.factors.values())

    ended = run(load, folder)
    if ended != (0, ""):
        one_line(ended, root / "celeba")
    assert run(load, folder) == ended  # no half of it was kept
    assert not list(folder.rglob("*.part"))


def decoding(i: int, folder: Path) -> None:
    """CelebA: kill -9 at any moment while it is decoded, and others that decode it meanwhile"""
    images = celeba()
    shutil.copytree(home() / ("zip", "folder")[i % 2], root := folder / "data")

    def load() -> None:
        for split, expected in zip(data.load_dataset("celeba", root), images):
            assert torch.equal(split.images, expected)

    victim, *others = [start(load, folder) for _ in range(3)]
    time.sleep(random.Random(i).uniform(0, 0.1))
    os.kill(victim[0], signal.SIGKILL)
    ends = [end(one) for one in (victim, *others)]
    assert not ends[0].err and ends[1:] == [(0, "")] * 2, ends
    succeeds(load, folder)


# -------------------------------------------------------------------------- downloads


class BadServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        kind, name = self.path.strip("/").split("/")
        with contextlib.suppress(OSError):
            KINDS[kind](self, (home() / "mirror" / name).read_bytes())

    def answer(self, content: bytes, length: int = 0, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for header in ({"Content-Length": str(length or len(content))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


KINDS = {
    "good": BadServer.answer,
    "missing": lambda self, content: self.send_error(404),
    "wrong": lambda self, content: self.answer(content[:-9] + b"x" + content[-8:]),
    "cut-and-sure": lambda self, content: self.answer(content[: len(content) // 2]),
    "silent": lambda self, content: time.sleep(1000),
    "failing": lambda self, content: self.send_error(500),
    "stalling": lambda self, content: (self.answer(content[:100], 1000), time.sleep(1000)),
    "cut": lambda self, content: self.answer(content[: len(content) // 2], len(content)),
    "long": lambda self, content: self.answer(content + b"more"),
    "no-http": lambda self, content: self.wfile.write(b"\0\1\2\3 not HTTP at all\n\n" * 10),
    "astray": lambda self, content: self.answer(content, code=302, Location="http://["),
}


@functools.cache
def server() -> str:
    """The address of the server, with a mirror of small files to serve."""
    mirror, parent = home() / "mirror", os.getpid()
    mirror.mkdir()
    for path in (home() / "data" / "mnist").iterdir():
        content = path.read_bytes()
        content = content if path.suffix else gzip.compress(content)
        (mirror / f"{path.name.removesuffix('.gz')}.gz").write_bytes(content)
    # in a process of its own: what is forked from one with threads may hang
    bound = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    if os.fork() == 0:
        bound.service_actions = lambda: os.getppid() == parent or os._exit(0)
        bound.serve_forever()
    return f"http://127.0.0.1:{bound.server_port}"


def download(i: int, folder: Path) -> None:
    """Downloads: 404, 500, refused, stalled, cut, too long, wrong; a full disk; two at once"""
    address, root, name = server(), folder / "data", ("mnist", "fashion-mnist", "kmnist")[i % 3]
    root.mkdir()
    mirrored = (home() / "mirror").iterdir()
    sums = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in mirrored}
    kind = ["full", *KINDS, "refusing"][i % (len(KINDS) + 2)]
    good, bad = f"{address}/good/", NOWHERE if kind == "refusing" else f"{address}/{kind}/"

    def load(*mirrors: str, limit: int = resource.RLIM_INFINITY) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sets = {name: ("raw", mirrors, [sums[stem] for stem in data.IDX_FILES])}
        with patch.multiple(data, DOWNLOAD_TIMEOUT=0.2, IDX_SETS=sets):
            split, _ = data.load_dataset(name, root)
        assert torch.equal(split.images, digits().images[:400])

    if kind == "good":  # by two at once
        two = [start(lambda: load(good), folder) for _ in range(2)]
        assert [end(one) for one in two] == [(0, "")] * 2
    elif kind == "full":
        one_line(run(lambda: load(good, limit=5000), folder), "File too large")
    else:
        one_line(run(lambda: load(bad), folder), "cannot be downloaded")
    for path in filter(Path.is_file, root.rglob("*")):  # on a full disk, the small ones
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.stem], path
        assert path.parent == root / name
    succeeds(lambda: load(good if kind == "full" else bad, good), folder)
    succeeds(lambda: load(NOWHERE), folder)  # all is there


# --------------------------------------------------------------- checkpoints and runs


def checkpoint(i: int, folder: Path) -> None:
    """A checkpoint that is cut, empty, changed, malicious, or of another run"""
    chance, out = random.Random(i), folder / "run"
    shutil.copytree(reference()[0], out)
    path, harmed = out / "checkpoint.pt", folder / "harmed"
    content = path.read_bytes()
    found, changed = torch.load(path, weights_only=True), bytearray(content)
    changed[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    malice = type("", (), {"__reduce__": lambda self: (os.mkdir, (str(harmed),))})()
    resume, kind = i % 2, i // 2 % 5
    if kind < 4:
        path.write_bytes([content[: chance.randrange(len(content))], chance.randbytes(i % 3 * 99),
                          pickle.dumps(malice), changed][kind])
    else:  # of another model, half of one, or one with more in it than numbers
        another = train.build_model(found["config"] | {"hidden_dim": 16}).state_dict()
        changes = [{"model": another}, {"model": {}}, {"config": {}}, {"history": malice}]
        changes += [{"config": found["config"] | {"beta": 2.0}}] * resume
        halves = [{key: found[key] for key in found if key != missing} for missing in found]
        torch.save(chance.choice([found | change for change in changes] + halves), path)
    redraw = [str(out), "--data-dir", str(home() / "data")]
    ended = run(lambda: train_short(out, "--resume") if resume else train.redraw(redraw), folder)
    if kind == 3 and ended.status == 0:  # a byte without a meaning, such as a time
        is_complete(out, figures=True)
    else:
        one_line(ended, out)
    assert not harmed.exists(), "it was run"


def kill(i: int, folder: Path) -> None:
    """kill -9 at five moments of a run, which goes on each time, and ends as if nothing had been"""
    chance, out, kills, (ideal, seconds) = random.Random(i), folder / "run", 0, reference()
    training = lambda: train.main(options(out, "--resume"))  # noqa: E731
    while kills < 5:
        started = start(training, folder)
        time.sleep(chance.uniform(0, seconds))
        os.kill(started[0], signal.SIGKILL)
        assert (ended := end(started)) in ((0, ""), (-signal.SIGKILL, "")), ended
        kills += ended.status != 0  # else it was at its end already
        found = numbers(out) if (out / "checkpoint.pt").exists() else []
        assert found == numbers(ideal)[: len(found)]
        if len(found) == EPOCHS or kills == 5:
            succeeds(training, folder)
            is_complete(out, figures=True)
            out = folder / f"run-{kills}"


def interrupt(i: int, folder: Path) -> None:
    """Ctrl-C at any moment of train.py after its imports: an end in one line, and it can go on"""
    out, script = folder / "a run", i % 3 == 2

    def training() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL if script else signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if script:
            os.execv(sys.executable, [sys.executable, str(PROJECT / "train.py"), *options(out)])
        train.main(options(out))

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # or it may come too early
    started = start(training, folder)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    time.sleep(random.Random(i).uniform(0, reference()[1] + 5 * script))
    os.kill(started[0], signal.SIGINT)
    ended = end(started, limit=10)
    if ended == (-signal.SIGINT, "") and script:  # before Python has begun, or as it ends
        assert not out.exists() or is_complete(out, figures=True) is None
    elif ended.status not in (0, 130) and ("run_cli" not in ended.err or "importlib" in ended.err):
        assert "Traceback" in ended.err, ended  # amid imports
    elif ended.status:
        assert ended.status == 130 and ended.err.startswith("\ninterrupted; "), ended
        unfinished = out.exists() and len(numbers(out)) < EPOCHS
        assert not unfinished or f"--out '{out}' --resume" in ended.err, ended
        assert ended.err.count("\n") == 2, ended
    assert not list(folder.rglob("*.part"))
    succeeds(lambda: train_short(out, "--resume"), folder)
    is_complete(out)


def saving(i: int, folder: Path) -> None:
    """A full disk, or a closed folder, while a checkpoint is saved: the old one stays"""
    out = folder / "run"
    succeeds(lambda: train_short(out, "--epochs", 2), folder)
    before, kept = numbers(out), (out / "checkpoint.pt").read_bytes()

    def training() -> None:
        if i % 2 == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        elif os.getuid() == 0:
            os.setuid(65534)
        train_short(out, "--resume")

    folder.chmod(0o755)
    out.chmod(0o555 if i % 2 else 0o755)
    one_line(run(training, folder), out, ("File too large", "Permission denied")[i % 2])
    assert numbers(out) == before and (out / "checkpoint.pt").read_bytes() == kept
    out.chmod(0o755)
    succeeds(lambda: train_short(out, "--resume"), folder)
    is_complete(out)
    assert not list(out.glob("*.part"))


def at_once(i: int, folder: Path) -> None:
    """Runs at once: of one name, each gets a folder; into one --out, only the first"""

    def training() -> None:
        os.chdir(folder)
        train_short(folder / "run" if i % 2 else None, "--epochs", 1)

    started = [start(training, folder) for _ in range(3)]
    ends = [end(one) for one in started]
    for refused in (one for one in ends if one.status):
        one_line(refused, "is there already")
    runs = [folder / "run"] if i % 2 else list((folder / "runs").iterdir())
    assert ends.count((0, "")) == len(runs) == (1 if i % 2 else 3), ends
    assert all(numbers(run) == numbers(reference()[0])[:1] for run in runs)


# --------------------------------------------------------- numbers, and surroundings


EXTREMES = [text.split() for text in """
    --beta 1e6, --lr 10, --lr 1e9, --latent-dim 4096, --batch-size 60000, --batch-size 7, --seed -1,
    --batch-size 1, --beta 0, --recon mse --lr 1e6, --lr 1e30, --amp --lr 1e6, --latent-dim 1,
    --beta 1e9, --batch-size 0, --lr nan, --beta inf, --latent-dim 1000000, --kl-anneal 1000000,
    --model ae --lr 1e9, --epochs 0, --limit 1 --lr 1e9, --lr 0, --lr -1""".split(",")]


def extreme(i: int, folder: Path) -> None:
    """Options at their extremes: they work, or a line says what is wrong"""
    out, more = folder / "run", EXTREMES[i % len(EXTREMES)]
    ended = run(lambda: train_short(out, "--epochs", 2, *more), folder)
    if ended != (0, ""):
        one_line(ended)
        terms = ("_loss is", "_recon is", "_kl is") if "epochs kept" in ended.err else more[-2:-1]
        assert any(term in ended.err for term in terms), ended.err
    assert out.exists() == (out / "checkpoint.pt").exists()
    assert not out.exists() or all(np.isfinite([*row.values()]).all() for row in numbers(out))


def surroundings(i: int, folder: Path) -> None:
    """Jumping clocks, decimal commas, strange paths, a closed home, 20 columns, a closed pipe"""
    names = {1: "数 字 $x_{$", 4: "a 'b' \"c\" %d {0} \\n", 6: "Größe 数"}
    kind, stdout, columns, clock = i % 8, DEVNULL, "", time.time
    out, env = folder / names.get(kind, "run"), {}
    match kind:
        case 0:
            reading, stdout = os.pipe()
            os.close(reading)
        case 2:
            columns, (_, stdout) = "20", pty.openpty()
        case 3:
            clock = lambda: random.uniform(-1e9, 1e10)  # noqa: E731
        case 5:
            stdout = os.open("/dev/full", os.O_WRONLY)
        case 6:
            env = {"LC_ALL": "de_DE.UTF-8", "PYTHONIOENCODING": "ascii"}
        case 7:
            env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}

    def function() -> None:
        if env:  # needs a new interpreter
            command = [sys.executable, str(PROJECT / "train.py"), *options(out)]
            os.execve(sys.executable, command, os.environ | env)
        os.environ["COLUMNS"] = columns
        with patch.multiple(time, time=clock):
            train.main(options(out))
        train.redraw([str(out), "--data-dir", str(home() / "data")])

    ended = run(function, folder, stdout)
    if kind in (0, 5):
        one_line(ended)
        assert not out.exists()
    else:
        assert ended.status == 0 and "Traceback" not in ended.err, ended
        assert kind == 7 or not ended.err, ended.err  # matplotlib has a word on a closed home
        is_complete(out, figures=True)


# ---------------------------------------------------------------------------- the table


ATTACKS = {  # how often: in make torture, in make test
    idx_file: (10_000, 300),
    celeba_file: (400, 4),
    decoding: (60, 2),
    download: (91, 7),
    checkpoint: (400, 10),
    kill: (30, 1),
    interrupt: (60, 2),
    saving: (20, 2),
    at_once: (20, 2),
    extreme: (len(EXTREMES), 4),
    surroundings: (16, 2),
}


def main() -> None:
    failures, few, named = [], "--few" in sys.argv, set(sys.argv[1:]) - {"--few"}
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # or each would import what it needs
    print(f"| attack | tries | survived | seconds |\n{4 * '| --- '}|", flush=True)
    try:
        reference()
        for attack in (a for a in ATTACKS if not named or a.__name__ in named):
            begin, failed, tries = time.monotonic(), len(failures), ATTACKS[attack][few]
            for i in range(tries):
                with tempfile.TemporaryDirectory(prefix="torture-") as folder:
                    try:
                        attack(i, Path(folder))
                    except Exception:
                        failures.append(f"{attack.__name__} {i}: {traceback.format_exc()}")
            survived, took = tries - len(failures) + failed, time.monotonic() - begin
            print(f"| {attack.__doc__} | {tries:,} | {survived:,} | {took:.0f} |", flush=True)
    finally:
        shutil.rmtree(home())
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
