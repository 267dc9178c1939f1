"""The loop of train.py as functions, and its command line as a user runs it."""

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from celeba_files import write_celeba
from conftest import assert_user_error, run_here, run_script
from torch.distributions import Normal, kl_divergence

import data
import train
import viz
from data import Batches, UserError
from vae import VAE

FILES = {"config.json", "history.csv", "checkpoint.pt"}
FIGURES = {"training.png", "reconstruction.png", "samples.png", "interpolation.png"}
pytestmark = pytest.mark.usefixtures("no_figures")


# ----------------------------------------------------------------------- the loop


def test_testing_changes_nothing_and_uses_evaluation_mode(drawn):
    loader = Batches(drawn.images[:500], drawn.labels[:500], batch_size=64)
    norm, vae, modes = torch.nn.BatchNorm2d(1), VAE(), []
    vae.register_module("norm", norm)
    norm.register_forward_hook(lambda *_: modes.append((norm.training, torch.is_grad_enabled())))
    vae.register_forward_pre_hook(lambda model, x: norm(*x))
    before = {name: values.clone() for name, values in vae.state_dict().items()}
    train.test_epoch(vae, loader, "cpu")
    torch.testing.assert_close(dict(vae.state_dict()), before, rtol=0, atol=0)
    assert not vae.training and all(p.grad is None for p in vae.parameters())
    train.train_epoch(vae, loader, torch.optim.Adam(vae.parameters()), "cpu")
    assert modes == [(False, False)] * 8 + [(True, True)] * 8


def test_progress_on_a_terminal_shows_the_time_left(monkeypatch, capsys):
    clock, batches = iter(range(1000)), list(range(8))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert list(train.progress(iter(batches), 8, epoch=2, epochs=3)) == batches
    lines = capsys.readouterr().out.split("\r\033[K")
    # A step a second: 4 steps done are 4 left here and 8 in the next epoch.
    assert "epoch 2/3   50 %  12 s left" in lines
    assert lines[-1] == ""


# --------------------------------------------------------------------- whole runs


def run_train(*args, root):
    result = run_here(train.main, "--data-dir", root, "--epochs", 2, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_history(folder) -> list[list[float]]:
    """The numbers in history.csv, without the seconds."""
    rows = (folder / "history.csv").read_text().splitlines()[1:]
    return [list(map(float, row.split(",")))[:-1] for row in rows]


def numbers(folder):
    model = train.load_run(folder)[1]["model"]
    return read_history(folder), [values.numpy().tobytes() for values in model.values()]


def test_a_run_is_the_loop_written_out_by_hand(tmp_path, mnist_root, drawn, monkeypatch):
    """Though Ctrl-C ends it and it goes on. Losses by torch's functions, Adam by its formula
    (Kingma & Ba 2015), on the mean of a batch. An epoch's seed gives its order, then its noise; a
    batch is measured before its step; tests are at the whole beta. Nothing decays the weights."""

    def interrupted(*args):
        save_run(*args)
        raise KeyboardInterrupt

    save_run, folder = train.save_run, tmp_path / "the run"
    options = ["--beta", 2, "--kl-anneal", 2, "--lr", 0.003, "--lr-schedule", "cosine", "--seed", 7,
               "--batch-size", 100, "--limit", 450, "--hidden-dim", 50, "--latent-dim", 3,
               "--data-dir", mnist_root, "--out", folder, "--epochs"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", interrupted)
        result = run_here(train.main, *options, 3)
    hint = f"\ninterrupted; the same command with --out '{folder}' --resume goes on\n"
    assert result.returncode == 130 and result.stderr == hint
    assert_user_error(run_here(train.main, *options, 4, "--resume"), "epochs 3, not 4")
    run_train(*options, 3, "--resume", root=mnist_root)

    torch.manual_seed(7)
    p = dict(VAE(784, 50, 3).named_parameters())
    dead = drawn.images[:450].amax((0, 1)).flatten() == 0  # pixels from which no gradient comes
    untouched = p["encoder_fc1.weight"][:, dead].clone()
    w, m, v, t = list(p.values()), [0.0] * len(p), [0.0] * len(p), 0

    def loss(images, beta):
        def layer(h, name):
            return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

        x = images.flatten(1) / 255
        h = F.relu(layer(x, "encoder_fc1"))
        q = Normal(layer(h, "encoder_fc_mu"), torch.exp(layer(h, "encoder_fc_logvar") / 2))
        z = q.mean + q.stddev * torch.randn(q.mean.shape)
        logits = layer(F.relu(layer(z, "decoder_fc1")), "decoder_fc2")
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = kl_divergence(q, Normal(0, 1)).sum()
        return torch.stack([recon + beta * kl, recon, kl])

    for epoch, row in enumerate(read_history(folder), start=1):
        torch.manual_seed(7 + 1_000_003 * epoch)
        beta, lr = 2 * min(1, epoch / 2), 0.003 * (1 + math.cos(math.pi * (epoch - 1) / 3)) / 2
        sums = torch.zeros(3)
        for index in torch.randperm(450).split(100):
            terms = loss(drawn.images[index], beta)
            sums, t = sums + terms.detach(), t + 1
            for i, g in enumerate(torch.autograd.grad(terms[0] / len(index), w)):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
                w[i].data -= lr * m_hat / (v_hat.sqrt() + 1e-8)
        tested = loss(drawn.images[1000:1300], 2.0).detach() / 300
        expected = [epoch, beta, *(sums / 450).tolist(), *tested.tolist()]
        assert row == pytest.approx(expected, rel=1e-4)
    found = train.load_run(folder)[0].state_dict()
    torch.testing.assert_close(found, {k: q.detach() for k, q in p.items()}, rtol=0, atol=1e-3)
    assert dead.sum() > 50 and torch.equal(found["encoder_fc1.weight"][:, dead], untouched)


def test_data_are_where_they_are_said_to_be(tmp_path, mnist_root, drawn, monkeypatch):
    """And binary ones are drawn anew for training, but for testing once, whatever the seed."""
    made, grey = [], drawn.images[1000:1300]
    monkeypatch.setattr(train, "Batches",
                        lambda *args, **more: made.append(Batches(*args, **more)) or made[-1])
    monkeypatch.chdir(tmp_path)
    for variable, options in (
        (mnist_root, ["--limit", "5000"]),
        (tmp_path, ["--data-dir", str(mnist_root)]),  # the option before the variable
        (mnist_root, ["--binarize"]), (mnist_root, ["--binarize", "--seed", "1"]),
    ):
        monkeypatch.setenv("VAE_DATA_DIR", str(variable))
        train.main(["--epochs", "1", *options])
        (trained, *tests), binary = made[-3:], "--binarize" in options
        assert torch.equal(trained.images, drawn.images[:1000]) and trained.binarize is binary
        for test in tests:  # and to draw
            assert torch.equal(test.images, data.binarize_once(grey) if binary else grey)
            assert torch.equal(test.labels, drawn.labels[1000:1300])
            assert not (test.shuffle or test.binarize)


# Every option that makes a run what it is, with a value that is not the default; and the others.
CHANGES = {
    "model": "conv", "latent_dim": 5, "hidden_dim": 200, "beta": 4.0, "kl_anneal": 1,
    "recon": "mse", "dataset": "fashion-mnist", "binarize": True, "limit": 500, "batch_size": 50,
    "lr": 0.01, "lr_schedule": "cosine", "seed": 3, "amp": True,
}
OTHERS = {"epochs", "device", "data_dir", "fallback", "out", "resume"}


def as_option(key, value):
    return [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]


def test_a_run_is_entered_only_to_go_on_with_it_as_it_was(tmp_path, mnist_root):
    """But its data and device may be named otherwise, and one of its files may be lost."""
    root, folder, usual = tmp_path / "data", tmp_path / "run", vars(train.parse_args([]))
    for name in ("mnist", "fashion-mnist"):
        shutil.copytree(mnist_root / "mnist", root / name)
    assert usual.keys() == CHANGES.keys() | OTHERS
    run_train("--out", folder, root=root)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    common = ["--data-dir", root, "--out", folder, "--epochs", 2]
    assert_user_error(run_here(train.main, *common), str(folder), "is there already", "--resume")
    for key, value in CHANGES.items():
        result = run_here(train.main, *common, "--resume", *as_option(key, value))
        assert_user_error(result, str(folder), f"{key} {usual[key]}, not {value}")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    kept = numbers(folder)
    (folder / "history.csv").unlink()
    others = ["--data-dir", mnist_root, "--device", "cpu", "--fallback", "digits", "--epochs", 1]
    output = run_train(*common, "--resume", *others, root=root)
    assert "nothing left to train" in output and "has 2 epochs" in output
    assert numbers(folder) == kept and '"epochs": 2' in (folder / "config.json").read_text()
    (folder / "checkpoint.pt").unlink()
    for name in ("config.json", "history.csv"):  # somebody else's
        (folder / name).write_text("mine")
        result = run_here(train.main, *common, "--resume")
        assert_user_error(result, str(folder), name, "no checkpoint.pt")
        assert (folder / name).read_text() == "mine"
        (folder / name).rename(folder / f"my {name}")
    assert run_here(train.main, *common, "--resume").returncode == 0
    assert {p.name for p in folder.iterdir()} == FILES | {"my config.json", "my history.csv"}


def test_the_name_of_a_run_tells_all_that_is_not_the_default(monkeypatch):
    def name(*options):
        args = train.parse_args([*map(str, options), "--out", "x", "--device", "cpu"])
        return train.run_name(vars(args) | {"notice": ""})

    assert name() == name("--model", "mlp", "--latent-dim", 20, "--beta", 1) == "mnist-mlp"
    options = ["--latent-dim", 2, "--beta", 4, "--recon", "mse", "--binarize", "--seed", 1]
    assert name(*options) == "mnist-mlp-latent-dim2-beta4-reconmse-binarize-seed1"
    changes = [as_option(key, value) for key, value in {**CHANGES, "epochs": 3}.items()]
    pairs = [(*a, *b) for i, a in enumerate(changes) for b in ([], *changes[:i])
             if {"--hidden-dim", "--model"} - {*a, *b}]
    assert len({name(*pair) for pair in pairs}) == len(pairs) > 100
    monkeypatch.setattr(train, "WORLD_SIZE", 3)  # of which the default is no multiple
    assert name("--batch-size", 129) == "mnist-mlp-batch-size129"


def test_a_run_is_saved_file_by_file_and_each_is_whole(tmp_path, mnist_root, monkeypatch):
    """The disk is full at any one of its writes. The checkpoint is first: whatever else is there,
    the run can be gone on with."""

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == full:
            raise OSError(errno.ENOSPC, "No space left on device")

    options = ["--data-dir", mnist_root, "--hidden-dim=20", "--limit=300", "--epochs=2", "--out"]
    assert run_here(train.main, *options, tmp_path / "whole").returncode == 0
    for full in range(1, 7):
        folder, calls = tmp_path / str(full), []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            result = run_here(train.main, *options, folder)
        name = ("checkpoint.pt", "config.json", "history.csv")[(full - 1) % 3]
        assert_user_error(result, str(folder / name), "No space left")
        # what holds nothing is not left behind
        kept = train.load_run(folder)[1]["history"] if folder.exists() else []
        assert len(kept) == (full + 1) // 3 and {p.name for p in folder.glob("*")} <= FILES
        assert run_here(train.main, *options, folder, "--resume").returncode == 0
        assert read_history(folder) == read_history(tmp_path / "whole")


def test_an_exploding_loss_ends_in_one_line_and_keeps_the_last_good_epoch(tmp_path, mnist_root):
    options = ["--data-dir", mnist_root, "--hidden-dim=20", "--out", folder := tmp_path / "run"]
    run_train(*options, root=mnist_root)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["decoder_fc2.bias"][0] = math.inf
    torch.save(checkpoint, folder / "checkpoint.pt")
    result = run_here(train.main, *options, "--epochs=3", "--resume")
    assert_user_error(result, str(folder), "epoch 3", "train_recon is", "epochs kept: 2", "--lr")
    kept = train.load_run(folder)[1]
    assert len(kept["history"]) == 2 == len(read_history(folder))
    torch.testing.assert_close(kept["model"], checkpoint["model"], rtol=0, atol=0)


def test_a_fallback_is_said_everywhere(tmp_path, monkeypatch, figures):
    """And going on with it under its own name does not launder it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.IDX_SETS, "mnist", ("raw", ["http://127.0.0.1:9/"], "0 0 0 0"))
    monkeypatch.setitem(data.DRAWN, "digits", (data.DRAWN["digits"][0], 40, 20))
    monkeypatch.setattr(train, "draw_run", viz.draw_run)
    common = ["--data-dir", tmp_path, "--epochs", 1]
    folder, notice = Path("runs/digits-instead-of-mnist-mlp-epochs1"), "built-in digits, not mnist"
    first = run_train(*common, "--fallback", "digits", root=tmp_path)
    again = run_train(*common, "--dataset", "digits", "--out", folder, "--resume", root=tmp_path)
    assert "\n*** MNIST IS NOT AVAILABLE: training on the built-in digits" in f"\n{first}"
    for output in (first, again):
        assert output.endswith(f"\n*** REMEMBER: these are the {notice.upper()}. ***\n")
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == "digits" and config["notice"] == notice
    assert figures.keys() > FIGURES and {note for _, note in figures.values()} == {notice}


def test_faces_from_files_to_figures(tmp_path, monkeypatch, figures):
    """CelebA's layout, zipped; limited, and resumed with BatchNorm's averages; drawn again, from
    the newest run, with all that it was drawn with."""
    runs, parts = [], Path("runs/parts")
    write_celeba(tmp_path, 60, zipped=True)
    options = ["--model", "celeba", "--limit", 30, "--batch-size", 10, "--latent-dim", 8]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_run", lambda *run: runs.append(run) or viz.draw_run(*run))
    run_train(*options, "--epochs", 1, "--out", parts, "--resume", root=tmp_path)
    run_train(*options, "--out", parts, "--resume", root=tmp_path)
    os.utime(parts / "checkpoint.pt", (2**30, 2**30))
    run_train(*options, root=tmp_path)
    assert run_here(train.redraw, "--data-dir", tmp_path).returncode == 0
    whole = Path("runs/celeba-celeba-latent-dim8-limit30-epochs2-batch-size10")
    assert figures.keys() == FIGURES | {"traversals.png", "attributes.png"}
    (folder, model, *told, loader, factors), (again, loaded, *retold, test, known) = runs[-2:]
    assert folder == again == whole and numbers(whole) == numbers(parts) and told == retold
    assert (told[0]["train_images"], told[0]["test_images"], len(factors)) == (30, 6, 40)
    assert told[0]["parameters"] == 4_531_779 - 248 * 12_290  # the chapter's, of 256 latents
    assert not (found := train.load_run(whole))[0].training  # or BatchNorm would go by the batch
    assert found[1]["optimizer"]["param_groups"][0]["lr"] == 0.002  # no schedule
    for drawn, redrawn in ((model.state_dict(), loaded.state_dict()), (factors, known),
                           (loader.images, test.images), (loader.labels, test.labels)):
        torch.testing.assert_close(drawn, redrawn, rtol=0, atol=0)


def test_what_is_no_run_is_refused(tmp_path, mnist_root, monkeypatch):
    class Malicious:
        __reduce__ = lambda self: (exec, ("open('ran', 'w')",))  # noqa: E731

    monkeypatch.chdir(tmp_path)
    assert_user_error(run_here(train.redraw), "name the folder of a run")
    assert_user_error(run_here(train.redraw, "nothing"), "nothing", "is missing")
    run_train("--hidden-dim", 20, "--out", "run", root=mnist_root)
    path = Path("run/checkpoint.pt")
    good, whole = path.read_bytes(), torch.load(path, weights_only=True)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # in the weights, where torch itself would not notice
    parts = [{k: v for k, v in whole.items() if k != missing} for missing in whole]
    for bad in (b"", good[: len(good) // 2], b"PK" + good[2:2000], bytes(flipped), *parts, [],
                {"config": Malicious()}):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        with pytest.raises(UserError, match="checkpoint.pt"):
            train.load_run("run")
    assert not Path("ran").exists()


# ------------------------------------------------------------------------- errors


def test_options_follow_each_other_and_are_explained():
    for options, expected in (
        ("", "mlp mnist 20 400 bce"), ("--model ae", "ae mnist 20 400 mse"),
        ("--model conv", "conv mnist 128 None bce"), ("--dataset digits", "mlp digits 20 400 bce"),
        ("--model celeba", "celeba celeba 256 None bce"),
        ("--dataset faces", "celeba faces 256 None bce"),
    ):
        args = vars(train.parse_args(options.split()))
        keys = ("model", "dataset", "latent_dim", "hidden_dim", "recon")
        assert [str(args[key]) for key in keys] == expected.split()
    result = run_here(train.main, "--help")
    assert result.returncode == 0 and "--lr-schedule {constant,cosine}" in result.stdout


@pytest.mark.parametrize("options, words", [option.split(" | ") for option in (
    "--beta -1 | --beta", "--beta nan | --beta", "--latent-dim 0 | --latent-dim", "--lr 0 | --lr",
    "--epochs 0 | --epochs", "--limit 0 | --limit", "--lr inf | --lr", "--seed x | --seed int",
    "--unknown | --unknown --help", "--data-dir nowhere | nowhere", "--seed 1 | variable",
    "--resume | --resume --out",
    "--model ae --beta 4 | ae --beta", "--model ae --kl-anneal 2 | ae --kl-anneal",
    "--model ae --recon bce | ae --recon mse", "--kl-anneal 3 --epochs 2 | --kl-anneal 3 epochs 2",
    "--dataset cifar --data-dir . | cifar folder mnist",
    "--dataset cifar --data-dir . --model conv | cifar folder mnist",
    "--model conv --hidden-dim 200 | --hidden-dim conv",
    "--model celeba --dataset mnist | celeba 64", "--model conv --dataset faces | conv faces",
    "--model celeba --fallback digits | celeba 64", "--batch-size 128 | 128 3 processes",
    "--device cuda | --device cuda 0", "--device cuda --batch-size 3 | cuda 2 process fewer",
)])
def test_bad_options_end_in_one_line(tmp_path, monkeypatch, options, words):
    """Some of them, in the third of three processes, on a machine of two GPUs."""
    parallel = "--batch-size" in options
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if parallel else 0)
    monkeypatch.setattr(train, "WORLD_SIZE", 3 if parallel else 1)
    monkeypatch.setattr(train, "PARALLEL", parallel)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("VAE_DATA_DIR", "the variable")
    monkeypatch.chdir(tmp_path)
    assert_user_error(result := run_here(train.main, *options.split()), *words.split())
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_bad_surroundings_end_in_one_line(tmp_path, mnist_root, monkeypatch):
    common = ["--data-dir", mnist_root, "--out", "run"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mnist_root, "data")
    Path("data/mnist/t10k-labels-idx1-ubyte").write_text("<html>not found</html>")
    result = run_here(train.main, *common, "--data-dir", "data", "--fallback", "digits")
    assert_user_error(result, "t10k-labels-idx1-ubyte", "IDX")  # broken is not missing
    Path("file").write_text("")
    for out in ("file/run", "file", *(["/proc/run"] if Path("/proc/self").is_dir() else [])):
        assert_user_error(run_here(train.main, *common, "--out", out), out)
    Path("runs").symlink_to("a disk that is not there")
    monkeypatch.setattr(train.itertools, "count", lambda n=0: iter(range(n, n + 9)))
    assert_user_error(run_here(train.main, *common[:2]), "runs")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "file", "runs"}


def test_a_users_error_is_one_line_and_a_programmers_is_raised():
    for error, line in (
        (UserError("no\nsuch   thing"), "error: no such thing\n"),
        (OSError(errno.ENOSPC, "No space left", "here"), "No space left: 'here'"),
        (MemoryError(), "the memory is full"), (torch.OutOfMemoryError(), "the memory is full"),
    ):
        assert_user_error(run_here(Mock(side_effect=error)), line)
    with pytest.raises(RuntimeError):
        run_here(Mock(side_effect=RuntimeError("closed by peer; can't allocate memory")))


def test_a_closed_pipe_ends_in_one_line(monkeypatch, capsys):
    """As head closes it, before the rest of what is printed is written at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match="2"):
            train.run_cli(lambda: print("the end"))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Broken pipe" in message and message.count("\n") == 1


def test_the_scripts_leave_a_run_that_is_repeated_bit_for_bit(tmp_path, mnist_root, monkeypatch):
    """Where a notebook's shell tells to draw by a module that is not there, at a path that the
    terminal cannot print; and a second run goes into a folder of its own."""
    home, folder = tmp_path / "潜在 空間", Path("runs/mnist-mlp-latent-dim2-epochs2")
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    options = ["--latent-dim", 2, "--epochs", 2, "--data-dir", mnist_root]
    result = run_script("train.py", *options, cwd=home)
    assert result.returncode == 0 and f"saved in {folder}" in result.stdout, result.stderr
    header, *rows = (folder / "history.csv").read_text().splitlines()
    form = ("epoch {0:2.0f}/2  train loss {2:.2f} (recon {3:.2f}, KL {4:.2f})  "
            "test loss {5:.2f} (recon {6:.2f}, KL {7:.2f})  {8:.1f} s")
    told = [form.format(*map(float, row.split(","))) for row in rows]
    assert [line for line in result.stdout.splitlines() if line.startswith("epoch")] == told
    names = "epoch,beta,train_loss,train_recon,train_kl,test_loss,test_recon,test_kl,seconds"
    assert header == names and len(rows) == 2 and "\r" not in result.stdout
    figures = {path: path.read_bytes() for path in folder.iterdir() if path.name not in FILES}
    more = {"traversals.png", "latent_space.png", "manifold.png", "explore.html"}
    assert {path.name for path in figures} == FIGURES | more

    for path in figures:
        path.unlink()
    result = run_script("viz.py", "--data-dir", mnist_root, home / folder, cwd=home)
    assert result.returncode == 0 and r"\u6f5c\u5728 \u7a7a\u9593" in result.stdout, result.stderr
    assert {path: path.read_bytes() for path in figures} == figures
    run_train(*options, root=mnist_root)
    run_train(*options, "--amp", root=mnist_root)
    same, other = Path(f"{folder}-2"), Path(f"{folder}-amp")
    assert numbers(folder) == numbers(same) and read_history(folder) != read_history(other)
