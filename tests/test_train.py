"""The loop of train.py as functions, and its command line as a user runs it."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from conftest import assert_user_error, run_here, run_script
from hypothesis import given
from torch.utils.data import DataLoader, TensorDataset

import ae
import data
import train
import viz
from ae import Autoencoder
from data import Batches, write_celeba
from vae import VAE, CelebAVAE, ConvVAE

FILES = {"config.json", "history.csv", "checkpoint.pt"}
FIGURES = {"training.png", "reconstruction.png", "samples.png", "interpolation.png"}


@pytest.fixture
def loader(drawn):
    return Batches(drawn.images[:500], drawn.labels[:500], batch_size=64)


# ----------------------------------------------------------------------- the loop


@pytest.mark.parametrize("architecture", [Autoencoder, VAE, ConvVAE])
def test_an_epoch_of_training_lowers_the_test_loss(architecture, loader):
    model = architecture()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = train.test_epoch(model, loader, "cpu")
    trained = train.train_epoch(model, loader, optimizer, "cpu")
    after = train.test_epoch(model, loader, "cpu")
    assert after[0] < trained[0] < before[0]


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_a_step_follows_the_gradient_of_the_mean_loss_with_its_beta(beta):
    """One parameter w, recon = sum of w x, kl = batch x w^2: SGD steps known by hand."""

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(2.0))

        def loss(self, images, labels, beta):
            assert self.training
            recon, kl = (self.w * images).sum(), len(images) * self.w**2
            return recon + beta * kl, recon, kl

    model = Toy().eval()
    batches = [(torch.full((n, 1), x), torch.zeros(n)) for n, x in ((4, 1.0), (4, 3.0), (2, 5.0))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, recon, kl = train.train_epoch(model, batches, optimizer, "cpu", beta)
    w, sums = 2.0, [0.0, 0.0]
    for n, x in ((4, 1.0), (4, 3.0), (2, 5.0)):
        sums = [sums[0] + n * w * x, sums[1] + n * w**2]
        w -= 0.1 * (x + beta * 2 * w)
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert (recon, kl) == pytest.approx((sums[0] / 10, sums[1] / 10), rel=1e-5)
    assert loss == pytest.approx(recon + beta * kl, rel=1e-5)


def test_losses_are_means_per_image_whatever_the_batches(drawn):
    """The autoencoder has no noise, so batches of 7 and of 500 must agree."""
    model = Autoencoder()
    x = drawn.images[:500] / 255
    expected = (model(x)[0] - x.flatten(1)).pow(2).sum(dim=1).mean().item()
    for batch_size in (7, 64, 500):
        loader = Batches(drawn.images[:500], drawn.labels[:500], batch_size)
        loss, recon, kl = train.test_epoch(model, loader, "cpu")
        assert loss == recon == pytest.approx(expected, rel=1e-5) and kl == 0


def test_beta_weighs_the_kl_and_nothing_else(loader):
    model = VAE()
    results = {}
    for beta in (0.0, 1.0, 4.0):
        torch.manual_seed(1)
        results[beta] = loss, recon, kl = train.test_epoch(model, loader, "cpu", beta)
        assert loss == pytest.approx(recon + beta * kl, rel=1e-6)
        assert (recon, kl) == results[0.0][1:]


def test_a_torch_dataloader_is_as_good(drawn, loader):
    images, labels = drawn.images[:500] / 255, drawn.labels[:500]
    other = DataLoader(TensorDataset(images, labels), batch_size=64)
    losses = []
    for source in (loader, other):
        torch.manual_seed(2)
        model = Autoencoder()  # a DataLoader draws from torch's generator, so no noise here
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses.append(train.train_epoch(model, source, optimizer, "cpu"))
    assert losses[0] == losses[1]


def test_testing_changes_nothing_and_uses_evaluation_mode(loader):
    model = torch.nn.Sequential(torch.nn.Dropout())  # a module that the mode changes
    modes = []

    def loss(images, labels, beta):
        modes.append((model.training, torch.is_grad_enabled()))
        return images.sum(), images.sum(), images.sum()

    model.loss = loss
    train.test_epoch(model, loader, "cpu")
    assert modes == [(False, False)] * len(loader)
    vae = VAE()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    train.test_epoch(vae, loader, "cpu")
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())


def test_an_epoch_on_faces_lowers_the_test_loss(faces):
    """Measured with the running averages of BatchNorm, which have to have come along."""
    model, loader = CelebAVAE(), Batches(faces.images, faces.labels, batch_size=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    before = train.test_epoch(model, loader, "cpu")
    trained = train.train_epoch(model, loader, optimizer, "cpu")
    assert train.test_epoch(model, loader, "cpu")[0] < trained[0] < before[0]


def test_progress_on_a_terminal_shows_throughput_and_time_left(loader, monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 9)))
    batches = list(train.progress(loader, epoch=2, epochs=3))
    assert len(batches) == 8
    lines = capsys.readouterr().out.split("\r\033[K")
    # A step a second: 4 steps done are 4 left here and 8 in the next epoch.
    assert "epoch 2/3   50 %  64 images/s  12 s left" in lines
    assert lines[-1] == "" and all(len(line) < 60 for line in lines)


# --------------------------------------------------------------- the command line


def run_train(*args, root):
    result = run_here(train.main, "--data-dir", root, "--epochs", 2, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_history(folder):
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds")
    return rows


def test_a_run_leaves_its_files_and_figures(tmp_path, mnist_root):
    options = ["--latent-dim", 2, "--epochs", 2, "--data-dir", mnist_root]
    result = run_script("train.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    folder = tmp_path / "runs" / "mnist-mlp-latent2"
    expected = FILES | FIGURES | {"traversals.png", "latent_space.png", "manifold.png"}
    assert {path.name for path in folder.iterdir()} == expected
    assert "saved in runs/mnist-mlp-latent2" in output
    epoch_lines = [line for line in output.splitlines() if line.startswith("epoch")]
    assert len(epoch_lines) == 2 and "\r" not in output

    header = (folder / "history.csv").read_text().splitlines()[0]
    assert header == (
        "epoch,beta,train_loss,train_recon,train_kl,test_loss,test_recon,test_kl,seconds"
    )
    first, second = read_history(folder)
    assert (first["epoch"], second["epoch"]) == ("1", "2")
    assert float(second["test_loss"]) < float(first["test_loss"])
    total = float(second["test_recon"]) + float(second["test_kl"])
    assert float(second["test_loss"]) == pytest.approx(total, rel=1e-6)
    assert f"test loss {float(second['test_loss']):.2f}" in epoch_lines[1]
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == "mlp" and config["latent_dim"] == 2 and config["notice"] == ""


@pytest.mark.usefixtures("no_figures")
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tmp_path, mnist_root, monkeypatch
):
    """Bit for bit, in another process; and a second run goes into a folder of its own. A path that
    the terminal cannot print is no error."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--data-dir", mnist_root, "--epochs", 2, "--out", "潜在 空間"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONIOENCODING", "ascii")
        result = run_script("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run_train(root=mnist_root)
    run_train("--seed", 1, root=mnist_root)
    folders = ["潜在 空間", "runs/mnist-mlp", "runs/mnist-mlp-2"]
    one, same, other = (tmp_path / folder for folder in folders)
    assert read_history(one) == read_history(same) != read_history(other)
    weights = [train.load_run(folder)[1]["model"] for folder in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["decoder_fc.weight"], weights[2]["decoder_fc.weight"])


@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(tmp_path, mnist_root):
    options = ["--data-dir", str(mnist_root), "--model", "conv", "--latent-dim", "5"]
    options += ["--beta", "2", "--resume", "--out"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train.main([*options, whole, "--epochs", "3"])
    for epochs in ("1", "2", "3", "3"):  # the last finds nothing left to do
        train.main([*options, parts, "--epochs", epochs])
        (tmp_path / "parts" / "history.csv").unlink()  # lost between two files: written anew
    train.main([*options, parts, "--epochs", "2"])  # less than there is: nothing is lost
    (_, one), (_, other) = train.load_run(whole), train.load_run(parts)
    assert read_history(tmp_path / "whole") == read_history(tmp_path / "parts")
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


@pytest.mark.usefixtures("no_figures")
def test_the_cosine_schedule_survives_an_interruption_but_not_another_length(
    tmp_path, mnist_root, monkeypatch
):
    options = ["--lr-schedule", "cosine", "--lr", 0.01, "--epochs", 4]
    run_train("--out", tmp_path / "whole", *options, root=mnist_root)
    optimizer = train.load_run(tmp_path / "whole")[1]["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == train.learning_rate(4, 4, 0.01, "cosine")

    def interrupted(*args):
        save_run(*args)
        if len(args[-1]) == 2:
            raise KeyboardInterrupt

    save_run, parts = train.save_run, ["--data-dir", mnist_root, "--out", tmp_path / "parts"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", interrupted)
        assert run_here(train.main, *parts, *options).returncode == 130
    longer = ["--resume", *options[:-1], 6]
    assert_user_error(run_here(train.main, *parts, *longer), "cosine", "--epochs 4")
    run_train("--out", tmp_path / "parts", "--resume", *options, root=mnist_root)
    assert read_history(tmp_path / "whole") == read_history(tmp_path / "parts")


@given(st.integers(1, 200), st.floats(1e-5, 1))
def test_the_cosine_schedule_falls_from_the_learning_rate_towards_nothing(epochs, lr):
    rates = [train.learning_rate(epoch, epochs, lr, "cosine") for epoch in range(1, epochs + 1)]
    assert rates[0] == lr and all(a > b > 0 for a, b in zip(rates, rates[1:]))
    assert sum(rates) == pytest.approx(lr * (epochs + 1) / 2)
    if epochs > 3:  # slowly at both ends, fast between them
        falls = [a - b for a, b in zip(rates, rates[1:])]
        assert max(falls[0], falls[-1]) < max(falls)
    assert train.learning_rate(epochs, epochs, lr, "constant") == lr


@pytest.mark.usefixtures("no_figures")
def test_binarized_runs_train_on_fresh_draws_and_test_on_a_fixed_one(
    tmp_path, mnist_root, drawn, monkeypatch
):
    def recorded(epoch_function, seen):
        def record(model, loader, *args):
            loader = list(loader)
            seen.append(torch.cat([images for images, _ in loader]))
            return epoch_function(model, loader, *args)
        return record

    trained, tested = [], []
    monkeypatch.setattr(train, "train_epoch", recorded(train.train_epoch, trained))
    monkeypatch.setattr(train, "test_epoch", recorded(train.test_epoch, tested))
    for seed in (0, 1):
        run_train("--binarize", "--seed", seed, "--out", tmp_path / str(seed), root=mnist_root)
    for images in trained + tested:
        assert ((images == 0) | (images == 1)).all()
    assert all(torch.equal(images, tested[0]) for images in tested)
    grey = drawn.images[1000:1300].float() / 255
    assert 0 < (tested[0] - grey).abs().mean() and (tested[0] - grey).mean().abs() < 0.005
    ink = [images.sum() for images in trained]  # the same images, in another order
    assert len(set(ink)) == len(ink)


@pytest.mark.usefixtures("no_figures")
def test_the_networks_size_is_that_of_the_options(tmp_path, mnist_root):
    options = ["--hidden-dim", 200, "--hidden-layers", 2, "--latent-dim", 50]
    options += ["--activation", "tanh"]
    run_train("--out", tmp_path / "run", *options, "--importance-samples", 3, root=mnist_root)
    model, checkpoint = train.load_run(tmp_path / "run")
    layers = [(784, 200), (200, 200), (200, 50), (200, 50), (50, 200), (200, 200), (200, 784)]
    assert [tuple(p.T.shape) for p in model.parameters() if p.dim() == 2] == layers
    assert checkpoint["config"]["parameters"] == sum(a * b + b for a, b in layers)
    assert model.importance_samples == 3
    hidden = [type(module).__name__ for module in (*model.encoder.hidden, *model.decoder)]
    assert hidden == 4 * ["Linear", "Tanh"]
    for row in checkpoint["history"]:
        assert row["test_loss"] < row["test_recon"] + row["test_kl"]


@pytest.mark.usefixtures("no_figures")
def test_main_shuffles_training_images_only_and_finds_data_by_the_environment(
    tmp_path, mnist_root, monkeypatch
):
    def batches(images, labels, batch_size, shuffle=False, binarize=False):
        made.append((len(images), batch_size, shuffle))
        return Batches(images, labels, batch_size, shuffle, binarize)

    made = []
    monkeypatch.setattr(train, "Batches", batches)
    monkeypatch.setenv("VAE_DATA_DIR", str(mnist_root))
    train.main(["--epochs", "1", "--batch-size", "50", "--out", str(tmp_path / "run")])
    assert made == [(1000, 50, True), (300, 1000, False)]
    monkeypatch.setenv("VAE_DATA_DIR", str(tmp_path / "nowhere"))
    assert_user_error(run_here(train.main), "nowhere")


@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, mnist_root, monkeypatch):
    """The disk is full from the second file on: that is the checkpoint, after config.json."""

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    folder, calls = tmp_path / "run", []
    run_train("--out", folder, root=mnist_root)
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "history.csv").read_bytes()
    options = ["--data-dir", mnist_root, "--out", folder, "--resume", "--epochs", 3]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert_user_error(run_here(train.main, *options), "No space left")
    after = (folder / "checkpoint.pt").read_bytes(), (folder / "history.csv").read_bytes()
    assert after == before and not list(folder.glob(".*"))
    assert run_here(train.main, *options).returncode == 0 and len(read_history(folder)) == 3


@pytest.mark.usefixtures("no_figures")
def test_main_passes_its_options_on(tmp_path, mnist_root):
    for name, options in (("one", ()), ("four", ("--beta", 4)), ("fast", ("--lr", 0.005))):
        run_train("--out", tmp_path / name, *options, root=mnist_root)
    runs = {name: train.load_run(tmp_path / name)[1] for name in ("one", "four", "fast")}
    for name, beta in (("one", 1.0), ("four", 4.0)):
        for row in runs[name]["history"]:
            assert row["beta"] == beta
            for split in ("train", "test"):
                total = row[f"{split}_recon"] + beta * row[f"{split}_kl"]
                assert row[f"{split}_loss"] == pytest.approx(total, rel=1e-6)
    assert runs["four"]["history"][1]["train_kl"] < 0.7 * runs["one"]["history"][1]["train_kl"]
    assert runs["fast"]["optimizer"]["param_groups"][0]["lr"] == 0.005
    assert runs["fast"]["history"][1]["test_loss"] < runs["one"]["history"][1]["test_loss"]


@pytest.mark.usefixtures("no_figures")
def test_runs_of_different_seeds_share_no_random_numbers(tmp_path, mnist_root, monkeypatch):
    """Not even shifted by an epoch, as seed + epoch would have it."""
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    used = []
    for seed in (0, 1):
        seeds.clear()
        run_train("--seed", seed, "--epochs", 3, "--out", tmp_path / str(seed), root=mnist_root)
        assert len(set(seeds)) == 4  # one to begin with (and for the figures), one an epoch
        used.append(set(seeds))
    assert not used[0] & used[1]


@pytest.mark.usefixtures("no_figures")
def test_resume_refuses_another_run(tmp_path, mnist_root):
    folder = tmp_path / "run"
    run_train("--out", folder, root=mnist_root)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    common = ["--data-dir", mnist_root, "--out", folder]
    assert_user_error(run_here(train.main, *common), str(folder), "--resume")
    (folder / "config.json").rename(tmp_path / "aside")
    assert_user_error(run_here(train.main, *common), str(folder), "--resume")
    (tmp_path / "aside").rename(folder / "config.json")
    for option, value, word in (
        ("--model", "conv", "model mlp"),
        ("--beta", 4, "beta 1.0"),
        ("--seed", 3, "seed 0"),
        ("--hidden-dim", 200, "hidden_dim 400"),
        ("--importance-samples", 5, "importance_samples 1"),
    ):
        result = run_here(train.main, *common, "--resume", option, value)
        assert_user_error(result, str(folder), word)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_fallback_is_said_everywhere_and_never_silent(tmp_path, digits_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.IDX_MIRRORS, "mnist", ["http://127.0.0.1:9/"])
    arguments = ["--data-dir", digits_root, "--epochs", 1, "--limit", 2000]
    refused = run_here(train.main, *arguments, "--dataset", "mnist")
    assert_user_error(refused, "mnist", "cannot be downloaded", "--dataset digits")
    assert not (tmp_path / "runs").exists()

    result = run_here(train.main, *arguments, "--fallback", "digits")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("*** MNIST IS NOT AVAILABLE") for line in lines)
    assert lines[-1] == "*** REMEMBER: these are the BUILT-IN DIGITS, NOT MNIST. ***"
    folder = tmp_path / "runs" / "digits-instead-of-mnist-mlp-first2000"
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == "digits" and config["notice"] == "built-in digits, not mnist"
    assert {path.name for path in folder.iterdir()} >= FILES | FIGURES

    # Going on with it under its own name does not launder it.
    options = [*arguments, "--out", folder, "--resume", "--dataset", "digits"]
    again = run_here(train.main, *options)
    assert again.stdout.splitlines()[-1].startswith("*** REMEMBER")
    assert json.loads((folder / "config.json").read_text()) == config


def test_faces_from_files_to_figures(tmp_path, monkeypatch):
    """CelebA's layout, zipped, to figures; limited, and resumed with BatchNorm's averages."""
    write_celeba(tmp_path, 60, zipped=True)
    options = ["--model", "celeba", "--limit", 30, "--batch-size", 10, "--latent-dim", 8]
    monkeypatch.chdir(tmp_path)
    run_train(*options, root=tmp_path)
    run_train(*options, "--epochs", 1, "--out", "parts", "--resume", root=tmp_path)
    run_train(*options, "--out", "parts", "--resume", root=tmp_path)
    whole = Path("runs/celeba-celeba-latent8-first30")
    expected = FILES | FIGURES | {"traversals.png", "attributes.png"}
    assert {path.name for path in whole.iterdir()} == expected
    (model, one), (_, other) = train.load_run(whole), train.load_run("parts")
    assert not model.training  # or BatchNorm would go by the batch
    assert one["config"]["train_images"] == 30 and one["config"]["test_images"] == 6
    assert read_history(whole) == read_history(Path("parts"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    refused = run_here(train.main, *options, "--data-dir", tmp_path, "--limit", 31,
                       "--out", "parts", "--resume")
    assert_user_error(refused, "train_images 30")

    path = whole / "attributes.png"
    drawn = path.read_bytes()
    path.unlink()
    assert run_here(viz.main, whole, "--data-dir", tmp_path).returncode == 0
    assert path.read_bytes() == drawn
    write_celeba(tmp_path / "other", 70)
    redrawn = run_here(viz.main, whole, "--data-dir", tmp_path / "other")
    assert_user_error(redrawn, "tested on 6 images of celeba", "--data-dir")


@pytest.mark.usefixtures("no_figures")
def test_limit_takes_the_first_images(tmp_path, mnist_root, drawn, monkeypatch):
    def batches(images, labels, batch_size, shuffle=False, binarize=False):
        made.append((images, labels))
        return Batches(images, labels, batch_size, shuffle, binarize)

    made = []
    monkeypatch.setattr(train, "Batches", batches)
    monkeypatch.chdir(tmp_path)
    for limit, name in ((100, "mnist-mlp-first100"), (5000, "mnist-mlp")):
        made.clear()
        run_train("--limit", limit, root=mnist_root)
        (images, labels), (test_images, _) = made
        assert torch.equal(images, drawn.images[: min(limit, 1000)])
        assert torch.equal(labels, drawn.labels[: min(limit, 1000)])
        assert len(test_images) == 300 and Path("runs", name).is_dir()


def test_broken_faces_stop_a_run_or_are_left_out(tmp_path):
    path = write_celeba(tmp_path, 20) / "img_align_celeba" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    options = ["--dataset", "celeba", "--latent-dim", 4, "--out", tmp_path / "run"]
    refused = run_here(train.main, *options, "--data-dir", tmp_path)
    assert_user_error(refused, "000003.jpg is broken", "--skip-broken")
    assert "left out 1 of 20" in run_train(*options, "--skip-broken", root=tmp_path)
    assert train.load_run(tmp_path / "run")[1]["config"]["train_images"] == 15
    assert run_here(viz.main, tmp_path / "run", "--data-dir", tmp_path).returncode == 0


def test_one_test_image_without_attributes_is_enough(tmp_path, monkeypatch):
    folder, names = write_celeba(tmp_path, 8), []
    for path in folder.glob("*.txt"):
        path.unlink()
    scatter = viz.visualize_latent_space_2d
    monkeypatch.setattr(viz, "visualize_latent_space_2d",
                        lambda *args: names.append(args[4]) or scatter(*args))
    options = ["--dataset", "celeba", "--latent-dim", 2, "--out", tmp_path / "run"]
    output = run_train(*options, root=tmp_path)
    assert "split 9 to 1" in output and "no attributes" in output
    assert names == [("unknown",)]
    drawn = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert not drawn & {"attributes.png", "interpolation.png"} and "samples.png" in drawn


def test_without_celeba_the_fallback_is_faces(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DRAWN, "faces", (data.draw_faces, 40, 20))
    monkeypatch.chdir(tmp_path)
    output = run_train("--model", "celeba", "--fallback", "faces", root=tmp_path)
    lines = output.splitlines()
    assert lines[0].startswith("*** CELEBA IS NOT AVAILABLE: training on the built-in faces")
    assert lines[-1] == "*** REMEMBER: these are the BUILT-IN FACES, NOT CELEBA. ***"
    folder = Path("runs/faces-instead-of-celeba-celeba")
    config = json.loads((folder / "config.json").read_text())
    assert config["notice"] == "built-in faces, not celeba"
    assert (folder / "attributes.png").is_file()


def test_model_and_dataset_follow_each_other():
    for options, expected in (
        ([], ("mlp", "mnist")),
        (["--model", "celeba"], ("celeba", "celeba")),
        (["--dataset", "faces"], ("celeba", "faces")),
        (["--dataset", "digits"], ("mlp", "digits")),
        (["--model", "conv"], ("conv", "mnist")),
    ):
        args = train.parse_args(options)
        assert (args.model, args.dataset) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        (["--beta", "-1"], ["--beta", "-1"]),
        (["--beta", "nan"], ["--beta", "nan"]),
        (["--latent-dim", "0"], ["--latent-dim", "0"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--batch-size", "x"], ["--batch-size", "int"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--dataset", "cifar"], ["--dataset", "cifar", "mnist"]),
        (["--data-dir", "nowhere"], ["nowhere", "is no folder"]),
        (["--resume"], ["--resume", "--out"]),
        (["--model", "ae", "--beta", "4"], ["--beta", "ae"]),
        (["--unknown"], ["--unknown"]),
        (["--limit", "0"], ["--limit", "0"]),
        (["--skip-broken"], ["--skip-broken", "mnist"]),
        (["--model", "celeba", "--dataset", "mnist"], ["--model celeba", "mnist", "64 x 64"]),
        (["--model", "conv", "--dataset", "faces"], ["--model conv", "faces", "64 x 64"]),
        (["--model", "celeba", "--fallback", "digits"], ["--model celeba", "digits"]),
        (["--model", "conv", "--hidden-dim", "200"], ["--hidden-dim", "mlp", "conv"]),
        (["--hidden-layers", "0"], ["--hidden-layers", "0"]),
        (["--model", "ae", "--activation", "tanh"], ["--activation", "mlp", "ae"]),
        (["--dataset", "faces", "--binarize"], ["--binarize", "faces"]),
        (["--model", "ae", "--importance-samples", "5"], ["ae", "one code"]),
        (["--importance-samples", "5", "--beta", "4"], ["--importance-samples", "--beta 1"]),
        (["--evaluate", "nothing"], ["nothing", "is missing"]),
        (["--evaluate", ""], ["config.json", "is missing"]),
        (["--evaluate", "nothing", "--beta", "4"], ["--beta", "--evaluate"]),
        (["--num-samples", "50"], ["--num-samples", "--evaluate"]),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = run_here(train.main, *options)
    assert_user_error(result, *words)
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_bad_surroundings_end_in_one_line(tmp_path, mnist_root):
    real = run_script("train.py", "--beta", "-1", cwd=tmp_path)  # as a user meets it
    assert_user_error(real, "--beta")
    common = ["--data-dir", mnist_root, "--out", tmp_path / "run"]
    assert_user_error(run_here(train.main, *common, "--device", "cuda"), "--device cuda")
    broken = tmp_path / "data"
    shutil.copytree(mnist_root, broken)
    path = broken / "mnist" / "t10k-labels-idx1-ubyte"
    path.write_text("<html>not found</html>")
    result = run_here(train.main, *common, "--data-dir", broken, "--fallback", "digits")
    assert_user_error(result, str(path), "IDX")  # broken is not missing: no fallback
    assert {p.name for p in tmp_path.iterdir()} == {"data"}


def test_an_output_folder_that_cannot_be_made_ends_in_one_line(tmp_path, mnist_root):
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "run", tmp_path / "file"]
    if Path("/proc/self").is_dir():
        folders.append("/proc/run")  # read-only, even to root
    for folder in folders:
        result = run_here(train.main, "--data-dir", mnist_root, "--out", folder)
        assert_user_error(result, str(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_figures")
def test_an_exploding_loss_ends_in_one_line_and_keeps_the_last_good_epoch(tmp_path, mnist_root):
    folder = tmp_path / "run"
    run_train("--out", folder, root=mnist_root)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["decoder_fc.bias"][0] = math.inf
    torch.save(checkpoint, folder / "checkpoint.pt")
    options = ["--data-dir", mnist_root, "--out", folder, "--resume", "--epochs", 3]
    assert_user_error(run_here(train.main, *options), "epoch 3, in step 1 ", "recon is", "--lr")
    new = ["--data-dir", mnist_root, "--out", tmp_path / "new", "--epochs", 1]
    assert_user_error(run_here(train.main, *new, "--lr", 1e9), "epoch 1, in step", "--lr")
    assert run_here(train.main, *new).returncode == 0  # what has no epoch holds no run
    kept = train.load_run(folder)[1]
    assert len(kept["history"]) == 2 == len(read_history(folder))
    assert all(torch.equal(kept["model"][k], v) for k, v in checkpoint["model"].items())


# ---------------------------------------------------------------- damaged runs


class Malicious:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def test_viz_redraws_a_run_and_refuses_what_is_none(tmp_path, mnist_root, monkeypatch):
    mlp, other = tmp_path / "mlp", tmp_path / "ae"
    run_train("--out", mlp, root=mnist_root)
    run_train("--out", other, "--model", "ae", root=mnist_root)
    figures = {path.name: path.read_bytes() for path in mlp.glob("*.png")}
    assert figures.keys() == FIGURES | {"traversals.png"}
    assert {path.name for path in other.glob("*.png")} == FIGURES
    for name in figures:
        (mlp / name).unlink()
    result = run_script("viz.py", "--data-dir", mnist_root, "mlp", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in mlp.glob("*.png")} == figures

    assert_user_error(run_here(viz.main, tmp_path / "nothing"), "nothing", "is missing")
    good = (mlp / "checkpoint.pt").read_bytes()
    shutil.copy(other / "checkpoint.pt", mlp / "checkpoint.pt")
    assert_user_error(run_here(viz.main, mlp), "model ae, not mlp")
    for bad in (b"", good[:1000], good[: len(good) // 2], b"PK" + good[2:2000]):
        (mlp / "checkpoint.pt").write_bytes(bad)
        with pytest.raises(train.UserError, match="checkpoint.pt"):
            train.load_run(mlp)
    whole = torch.load(other / "checkpoint.pt", weights_only=True)
    for missing in whole:
        (mlp / "config.json").write_bytes((other / "config.json").read_bytes())
        torch.save({k: v for k, v in whole.items() if k != missing}, mlp / "checkpoint.pt")
        with pytest.raises(train.UserError, match="checkpoint.pt"):
            train.load_run(mlp)
    torch.save({"config": Malicious()}, mlp / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    assert_user_error(run_here(viz.main, mlp), "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
    (mlp / "checkpoint.pt").write_bytes(good)
    for bad in (b"", b"[]", b"{}", b"null", b"\xff"):
        (mlp / "config.json").write_bytes(bad)
        with pytest.raises(train.UserError, match="config.json"):
            train.load_run(mlp)


def test_ae_script_trains_both_and_draws_them(tmp_path, mnist_root):
    result = run_script("ae.py", "--data-dir", mnist_root, "--epochs", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "autoencoder mean" in result.stdout
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mnist-ae", "mnist-mlp"}
    assert (tmp_path / "runs" / "mnist-mlp" / "ae-vs-vae.png").is_file()
    for option in (("--model", "conv"), ("--beta", 4), ("--binarize",), ("--evaluate", "x")):
        assert_user_error(run_here(ae.main, *option), option[0])
    (tmp_path / "x" / "mlp").mkdir(parents=True)
    result = run_here(ae.main, "--data-dir", mnist_root, "--out", tmp_path / "x")
    assert_user_error(result, "x/mlp")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mlp"]


def test_help_explains_every_option():
    result = run_here(train.main, "--help")
    assert result.returncode == 0
    for option in ("model", "dataset", "beta", "latent-dim", "epochs", "batch-size", "lr", "seed",
                   "device", "data-dir", "fallback", "out", "resume", "binarize", "hidden-dim",
                   "hidden-layers", "activation", "importance-samples", "lr-schedule", "evaluate",
                   "num-samples", "amp", "compile"):
        assert f"--{option}" in result.stdout


def test_full_memory_ends_in_one_line_and_other_errors_keep_their_traceback(monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(train, "train_run", fail)
    full = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    for error in (RuntimeError(full), torch.OutOfMemoryError("CUDA out of memory")):
        assert_user_error(run_here(train.main), "memory is full", "--batch-size")
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        train.run_cli(lambda: train.main([]))


@pytest.mark.usefixtures("no_figures")
def test_files_that_are_not_of_a_run_are_left_alone(tmp_path, mnist_root):
    options = ["--data-dir", mnist_root, "--out", tmp_path, "--epochs", 1]
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / ".notes.part").write_text("mine")
    assert_user_error(run_here(train.main, *options), "holds a run already")
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "config.json").unlink()
    (tmp_path / f".checkpoint.pt.{os.getpid()}.part").touch()  # of a run that was killed
    assert run_here(train.main, *options).returncode == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.part"]


def test_more_processes_than_gpus_end_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "PROCESSES", 3)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert train.find_device("auto") == torch.device("cuda", int(rank))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(train.UserError, match="2 GPUs"):
        train.find_device("auto")


def test_an_interruption_says_how_to_go_on(capsys):
    for hint, words in (("", "what was saved is kept"), ("--out x --resume", "--out x --resume")):
        def interrupted(hint=hint):
            raise KeyboardInterrupt(*filter(None, [hint]))

        with pytest.raises(SystemExit) as end:
            train.run_cli(interrupted)
        train.on_interrupt(signal.default_int_handler)
        assert end.value.code == 130 and capsys.readouterr().err == f"\ninterrupted; {words}\n"
