"""Attacks on what a run stands on: its files, the network, its life (make torture; 4 minutes).

Every attack is a function of a number, from which its chances are drawn, and of an empty folder; it
raises if anything was lost that must not be. Forked processes need not import torch first.
"""

import atexit
import contextlib
import functools
import gzip
import http.server
import multiprocessing.context
import os
import pty
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

# A forked process can share neither a GPU nor threads.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "no_proxy": "*"}
import numpy as np
import torch
from conftest import assert_user_error, run_script, write_idx  # first: where all the others are
from celeba_files import write_celeba

import data
import draw
import train

DIGITS = data.Split(*draw.draw_digits(500, seed=1))
DEVNULL = os.open(os.devnull, os.O_WRONLY)
WELL = SimpleNamespace(returncode=0, stderr="")  # how a process ends


class Started(multiprocessing.context.ForkProcess):
    """function(), by way of train.run_cli, in a process of its own."""

    def __init__(self, function: Callable, stdout: int = DEVNULL):
        super().__init__(daemon=True)
        self.function, self.stdout = function, stdout
        self.stderr = tempfile.TemporaryFile("w+")
        self.start()

    def run(self) -> None:
        os.dup2(self.stdout, 1)
        os.dup2(self.stderr.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False)  # the old one may know that it was a file
        train.run_cli(self.function)

    def end(self) -> SimpleNamespace:
        self.join(60)
        assert self.exitcode is not None, "hangs: no end after 60 seconds"
        self.stderr.seek(0)
        return SimpleNamespace(returncode=self.exitcode, stderr=self.stderr.read())


def run(function: Callable, stdout: int = DEVNULL) -> SimpleNamespace:
    return Started(function, stdout).end()


def succeeds(function: Callable) -> None:
    ended = run(function)
    assert ended == WELL, ended


@functools.cache
def home() -> Path:
    """A folder for all attacks: 400 + 100 images in data/mnist/; in zip/, folder/ and decoded/ the
    same 20 faces as CelebA, of the last also the pixels; and later reference/."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    atexit.register(shutil.rmtree, folder)
    folder.chmod(0o755)
    for stem in data.IDX_FILES:
        array = DIGITS.images[:, 0] if "images" in stem else DIGITS.labels
        part = slice(400) if "train" in stem else slice(400, 500)
        write_idx(folder / "data" / "mnist" / f"{stem}.gz", array[part].numpy())
    for name in ("zip", "folder", "decoded"):
        write_celeba(folder / name, 20, zipped=name != "folder")
    succeeds(lambda: data.load_dataset("celeba", folder / "decoded"))
    return folder


def options(out: Path | None, *more: object) -> list[str]:
    """A short training run."""
    sizes = ["--epochs", 12, "--batch-size", 20, "--hidden-dim", 32, "--latent-dim", 4]
    places = ["--data-dir", home() / "data", *(["--out", out] if out else [])]
    return [str(option) for option in (*sizes, *places, *more)]


def train_short(out: Path | None, *more: object) -> None:
    with patch.object(train, "draw_run"):  # which takes as long as to train
        train.main(options(out, *more))


@functools.cache
def reference() -> tuple[Path, float]:
    """That run, which nothing has interrupted, and the seconds that it took a processor."""
    folder, begin = home() / "reference", os.times()
    succeeds(lambda: train.main(options(folder)))
    return folder, sum(os.times()[2:4]) - sum(begin[2:4])


def numbers(folder: Path) -> list[dict]:
    """The history, without its times; of a run that has not saved any, none."""
    if not (folder / "checkpoint.pt").exists():
        return []
    return [row | {"seconds": 0} for row in train.load_run(folder)[1]["history"]]


def is_complete(folder: Path, figures: bool = False) -> None:
    """The run in the folder is the reference, bit for bit, with every figure."""
    ideal = reference()[0]
    assert numbers(folder) == numbers(ideal)
    one, other = (train.load_run(run)[0].state_dict() for run in (folder, ideal))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert not figures or {*os.listdir(ideal)} <= {*os.listdir(folder)}


# ---------------------------------------------------- attacks on files and downloads


def idx_file(i: int, folder: Path) -> None:
    """IDX: cut short, too long, any byte of the header or of the gzip stream changed"""
    chance, kind, path = random.Random(i), i % 5, folder / "x"
    array = chance.choice([DIGITS.images[:3, 0], DIGITS.labels[:50].byte()]).numpy()
    content, header = bytearray(write_idx(path, array).read_bytes()), 4 + 4 * array.ndim
    if kind == 4:  # sizes at random, up to 2^96 bytes
        sizes = chance.choices((0, 1, 28, 2**16, 2**31, 2**32 - 1), k=array.ndim)
        content[4:header] = np.array(sizes, ">u4").tobytes()
    if gzipped := chance.random() < 0.5:
        content = bytearray(gzip.compress(content, 1))
    if kind == 0:  # every length of the header, then any
        del content[i // 5 % (2 * header) if i % 2 else chance.randrange(len(content)) :]
    elif kind < 3:
        content[chance.randrange(len(content) if gzipped else header)] ^= chance.randrange(1, 256)
    elif kind == 3:
        content += chance.randbytes(chance.choice((1, 4, 1000)))
    path.write_bytes(content)
    try:
        read = data.read_idx(path, array.ndim)
        # a gzip stream has bytes without a meaning, such as its time; a plain file has none
        assert gzipped or kind == 4, "is not refused"
        assert np.array_equal(read, array) or read.size == 0, "is read as something else"
    except data.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def load_faces(root: Path, exact: bool = True) -> None:
    """They are those of home()/decoded/; or, if not exact, may be others."""
    load = functools.partial(data.load_dataset, "celeba")
    for split, expected in zip(load(root), load(home() / "decoded")):
        assert not exact or torch.equal(split.images, expected.images)
        assert len(split.images) == len(split.labels)
        assert all(set(values.tolist()) <= {0, 1} for values in split.factors.values())


def celeba_file(i: int, folder: Path) -> None:
    """CelebA: bytes of the archive, its JPEGs or its lists changed, or cut short"""
    chance = random.Random(i)
    shutil.copytree(home() / ("zip", "folder")[i % 2], folder, dirs_exist_ok=True)
    path = chance.choice(sorted(folder.rglob("*.txt" if i % 4 < 2 else "*.*")))
    content = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.choice((1, 1, 10))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    load = functools.partial(load_faces, folder, exact=path.suffix == ".zip")  # it has checksums
    ended = run(load)
    if ended != WELL:
        assert_user_error(ended, str(folder / "celeba"))
    assert run(load) == ended  # no half of it was kept
    assert not list(folder.rglob("*.part"))


def decoding(i: int, folder: Path) -> None:
    """CelebA: kill -9 at any moment while it is decoded, and others that decode it meanwhile"""
    load = functools.partial(load_faces, folder)
    shutil.copytree(home() / ("zip", "folder")[i % 2], folder, dirs_exist_ok=True)
    victim, *others = [Started(load) for _ in range(3)]
    time.sleep(random.Random(i).uniform(0, 0.1))
    victim.kill()
    assert not victim.end().stderr and [other.end() for other in others] == [WELL, WELL]
    succeeds(load)


def reply(content: bytes, length: int = 0, status: str = "200 OK", header: str = "") -> bytes:
    """That content by HTTP, as if it had this length."""
    length = length or len(content)
    return f"HTTP/1.0 {status}\r\n{header}Content-Length: {length}\r\n\r\n".encode() + content


KINDS = {
    "full": reply,  # the disk
    "good": reply,
    "missing": lambda content: reply(b"", status="404 Not Found"),
    "wrong": lambda content: reply(content[:-9] + b"x" + content[-8:]),
    "cut-and-sure": lambda content: reply(content[: len(content) // 2]),
    "silent": lambda content: b"",
    "failing": lambda content: reply(b"", status="500 Internal Server Error"),
    "stalling": lambda content: reply(content[:100], 1000),
    "cut": lambda content: reply(content[: len(content) // 2], len(content)),
    "long": lambda content: reply(content + b"more"),
    "no-http": lambda content: b"\0\1\2\3 not HTTP at all\n\n" * 10,
    "astray": lambda content: reply(b"", status="302 Found", header="Location: http://[\r\n"),
    "refusing": reply,  # at a port that is closed
}


class BadServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        _, kind, name = self.path.split("/")
        with contextlib.suppress(OSError):  # who asked may be gone
            self.wfile.write(KINDS[kind]((home() / "data" / "mnist" / name).read_bytes()))
        if kind in ("silent", "stalling"):
            time.sleep(1000)


def download(i: int, folder: Path) -> None:
    """Downloads: 404, 500, refused, stalled, cut, too long, wrong; a full disk; two at once"""
    name, kind = ("mnist", "fashion-mnist", "kmnist")[i % 3], [*KINDS][i % len(KINDS)]
    served = {path.name: path.read_bytes() for path in (home() / "data" / "mnist").iterdir()}
    sums = " ".join(data.checksum(served[f"{stem}.gz"]) for stem in data.IDX_FILES)

    def load(*kinds: str) -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports = (9 if way == "refusing" else server.server_port for way in kinds)
        mirrors = [f"http://127.0.0.1:{port}/{way}/" for port, way in zip(ports, kinds)]
        if kinds == ("full",):
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with patch.multiple(data, DOWNLOAD_TIMEOUT=0.2, IDX_SETS={name: ("raw", mirrors, sums)}):
            split, _ = data.load_dataset(name, folder)
        assert torch.equal(split.images, DIGITS.images[:400])

    message = "File too large" if kind == "full" else "cannot be downloaded"
    for ended in [one.end() for one in [Started(lambda: load(kind)) for _ in range(2)]]:
        if kind == "good":
            assert ended == WELL, ended
        else:
            assert_user_error(ended, message)
    for path in filter(Path.is_file, folder.rglob("*")):  # on a full disk, the small ones
        assert path.parent == folder / name and path.read_bytes() == served[path.name]
    succeeds(lambda: load(kind, "good"))
    succeeds(lambda: load("refusing"))  # all is there


# ------------------------------------------------------------------- attacks on runs


def checkpoint(i: int, folder: Path) -> None:
    """A checkpoint that is cut, empty, changed, malicious, or of another run"""
    chance, out, harmed = random.Random(i), folder / "run", folder / "harmed"
    shutil.copytree(reference()[0], out)
    path, resume, kind = out / "checkpoint.pt", i % 2, i // 2 % 4
    content, found = path.read_bytes(), train.load_run(out)[1]
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    malice = type("", (), {"__reduce__": lambda self: (os.mkdir, (str(harmed),))})()
    changes = [{"config": found["config"] | {"hidden_dim": 16}}, {"history": malice}]
    bad = [content[: chance.randrange(len(content))], chance.randbytes(i % 3 * 99), changed,
           found | chance.choice(changes)][kind]
    torch.save(bad, path) if kind == 3 else path.write_bytes(bad)
    ended = run(lambda: train_short(out, "--resume") if resume else train.load_run(out))
    if kind == 2 and ended.returncode == 0:  # a byte without a meaning, such as a time
        is_complete(out, figures=True)
    else:
        assert_user_error(ended, str(out))
    assert not harmed.exists(), "it was run"


def kill(i: int, folder: Path) -> None:
    """kill -9 at five moments of a run, which goes on each time, and ends as if nothing had been"""
    chance, out, (ideal, seconds) = random.Random(i), folder / "run", reference()
    for _ in range(5):
        started = Started(lambda: train.main(options(out, "--resume")))
        time.sleep(chance.uniform(0, seconds / 2))
        started.kill()
        ended = started.end()
        assert ended == WELL or ended.returncode == -signal.SIGKILL and not ended.stderr, ended
        found = numbers(out)
        assert found == numbers(ideal)[: len(found)]
    succeeds(lambda: train.main(options(out, "--resume")))
    is_complete(out, figures=True)


def interrupt(i: int, folder: Path) -> None:
    """Ctrl-C at any moment of train.py after its imports: an end in one line, and it can go on"""
    out, delay = folder / "a run", random.Random(i).uniform(0, reference()[1])

    def training() -> None:
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # which answers Ctrl-C
        signal.setitimer(signal.ITIMER_REAL, delay)
        train.main(options(out))
        signal.setitimer(signal.ITIMER_REAL, 0)

    ended = run(training)
    if ended.returncode == 130:
        unfinished = out.exists() and numbers(out) != numbers(reference()[0])
        hint = f"the same command with --out '{out}' --resume" if unfinished else ""
        assert ended.stderr.startswith(f"\ninterrupted; {hint}"), ended
        assert ended.stderr.count("\n") == 2, ended
    elif ended != WELL:  # amid what is imported late, or drawn: both may catch it, or lose it
        assert re.search("importlib|matplotlib", ended.stderr), ended
    assert not list(folder.rglob("*.part"))
    succeeds(lambda: train_short(out, "--resume"))
    is_complete(out)


def saving(i: int, folder: Path) -> None:
    """A full disk, or a closed folder, while a checkpoint is saved: the old one stays"""
    out, full = folder / "run", i % 2 == 0
    succeeds(lambda: train_short(out, "--epochs", 2))
    kept = (out / "checkpoint.pt").read_bytes()

    def training() -> None:
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        elif os.getuid() == 0:  # whom no mode stops
            os.setuid(65534)
        train_short(out, "--resume")

    folder.chmod(0o755)
    out.chmod(0o755 if full else 0o555)
    ended = run(training)
    out.chmod(0o755)
    assert_user_error(ended, str(out), "File too large" if full else "Permission denied")
    assert (out / "checkpoint.pt").read_bytes() == kept
    succeeds(lambda: train_short(out, "--resume"))
    is_complete(out)


def at_once(i: int, folder: Path) -> None:
    """Runs at once: of one name, each gets a folder; into one --out, only the first"""
    out = folder / "run" if i % 2 else None

    def training() -> None:
        os.chdir(folder)
        train_short(out, "--epochs", 1)

    ends = [one.end() for one in [Started(training) for _ in range(3)]]
    for refused in (one for one in ends if one != WELL):
        assert_user_error(refused, "is there already")
    runs = [out] if out else list((folder / "runs").iterdir())
    assert ends.count(WELL) == len(runs) == (1 if out else 3), ends
    assert all(numbers(run) == numbers(reference()[0])[:1] for run in runs)


EXTREMES = [text.split() for text in """
    --beta 1e6, --lr 10, --lr 1e9, --latent-dim 4096, --batch-size 60000, --batch-size 7, --seed -1,
    --batch-size 1, --beta 0, --recon mse --lr 1e6, --lr 1e30, --amp --lr 1e6, --latent-dim 1,
    --beta 1e9, --batch-size 0, --lr nan, --beta inf, --latent-dim 1000000, --kl-anneal 1000000,
    --model ae --lr 1e9, --epochs 0, --limit 1 --lr 1e9, --lr 0, --lr -1""".split(",")]


def extreme(i: int, folder: Path) -> None:
    """Options at their extremes: they work, or a line says what is wrong"""
    out, more = folder / "run", EXTREMES[i % len(EXTREMES)]
    ended = run(lambda: train_short(out, "--epochs", 2, *more))
    if ended != WELL:
        exploded = "epochs kept: "
        assert_user_error(ended, exploded if exploded in ended.stderr else more[-2])
    assert out.exists() == (out / "checkpoint.pt").exists()
    assert all(np.isfinite([*row.values()]).all() for row in numbers(out))


def surroundings(i: int, folder: Path) -> None:
    """Jumping clocks, decimal commas, strange paths, a closed home, a closed pipe"""
    out, kind = folder / "Größe 数 $x_{$ 'b' \"c\" %d {0} \\n", i % 8
    reading, closed = os.pipe()
    os.close(reading)
    stdouts = {0: closed, 2: pty.openpty()[1], 5: os.open("/dev/full", os.O_WRONLY)}
    variables = {6: {"LC_ALL": "de_DE.UTF-8", "PYTHONIOENCODING": "ascii"},
                 7: {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}}

    def function() -> None:
        with patch.object(time, "time", lambda: random.uniform(-1e9, 1e10)):
            train.main(options(out))

    if kind in variables:  # which need a new interpreter
        with patch.dict(os.environ, variables[kind]):
            ended = run_script("train.py", *options(out), cwd=folder)
        assert_user_error(run_script("train.py", *options(out), cwd=folder), "is there already")
    else:
        ended = run(function, stdouts.get(kind, DEVNULL))
    if kind in (0, 5):
        assert_user_error(ended)
        assert not out.exists()
    else:  # matplotlib has a word on a closed home
        assert ended.returncode == 0 and (kind == 7 or not ended.stderr), ended
        is_complete(out, figures=True)


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
    reference()
    print(f"| attack | tries | survived | seconds |\n{4 * '| --- '}|", flush=True)
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
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
