"""What the tests share: paths, a small data folder, and a way to run the scripts."""

import contextlib
import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import torch

GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.init()
    torch.cuda.device_count()  # which it remembers from here on
torch.set_num_threads(1)  # the attacks take the other core
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for test_cuda.py alone, which takes it away again

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "exercises")]

import data  # noqa: E402
import draw  # noqa: E402
import train  # noqa: E402
import viz  # noqa: E402

# No time limit, for a busy machine is no failure; always the same examples.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.load_profile("here")


def write_idx(path: Path, array: np.ndarray) -> Path:
    """Write an array of unsigned bytes as an IDX file; gzip-compressed if named .gz."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def write_mnist(root: Path, train: data.Split, test: data.Split) -> None:
    for prefix, split in (("train", train), ("t10k", test)):
        path = root / "mnist" / prefix
        write_idx(Path(f"{path}-images-idx3-ubyte.gz"), split.images[:, 0].numpy())
        write_idx(Path(f"{path}-labels-idx1-ubyte"), split.labels.numpy())


@pytest.fixture(scope="session", autouse=True)
def beside(request, mnist_root, tmp_path_factory):
    """What mostly waits, started before the other tests: a few tries of the attacks of torture.py,
    and the two processes of test_scale.py."""
    files, processes = {item.path.name for item in request.session.items}, {}
    if "test_torture.py" in files:
        command = [sys.executable, str(PROJECT / "tests" / "torture.py"), "--few"]
        processes["attacks"] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "test_scale.py" in files:
        import test_scale

        processes["two"] = test_scale.start(mnist_root, tmp_path_factory.mktemp("two"))
    yield processes
    for process in processes.values():
        process.terminate()


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    if request.path.name == "test_cuda.py":
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def drawn() -> data.Split:
    return data.Split(*draw.draw_digits(6000, seed=1))


@pytest.fixture(scope="session")
def faces() -> data.Split:
    return data.Split(*draw.draw_faces(400, seed=1))


@pytest.fixture(scope="session")
def mnist_root(drawn, tmp_path_factory) -> Path:
    """A data folder in MNIST's format, with 1,000 + 300 drawn digits in it."""
    root = tmp_path_factory.mktemp("data")
    parts = (slice(1000), slice(1000, 1300))
    write_mnist(root, *(data.Split(drawn.images[p], drawn.labels[p], {}) for p in parts))
    return root


@pytest.fixture
def no_figures(monkeypatch):
    """Do not draw, which takes longer than to train on so few images."""
    monkeypatch.setattr(train, "draw_run", lambda *args: None)


@pytest.fixture
def figures(monkeypatch):
    """Of viz.py's figures only what they would have been saved as: name -> (figure, note)."""
    saved = {}
    monkeypatch.setattr(viz, "save", lambda figure, path, note="":
                        saved.update({Path(path).name: (figure, note)}))
    return saved


def run_script(*args, cwd: Path) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user does, without a network."""
    env = {k: v for k, v in os.environ.items() if k not in ("VAE_DATA_DIR", "no_proxy", "NO_PROXY")}
    env |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, str(PROJECT / args[0]), *map(str, args[1:])]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def run_here(main, *args) -> subprocess.CompletedProcess:
    """The same in this process, which saves the seconds of importing torch."""
    out, err, argv = io.StringIO(), io.StringIO(), [str(arg) for arg in args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as exit_:
            train.run_cli(lambda: main(argv))
    return subprocess.CompletedProcess(args, exit_.value.code, out.getvalue(), err.getvalue())


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr that has the words in it, and exit status 2."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert all(word in result.stderr for word in words), result.stderr
