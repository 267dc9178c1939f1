"""In several processes and in bfloat16: the same numbers."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, assert_user_error, run_here

import train
from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE

AE = ["--model", "ae", "--batch-size", 50, "--limit", 402]  # its last batch: an image for each
MLP = ["--batch-size", 50, "--epochs", 3]
# Each process has a disk of its own, and the data folder that a run names for it. It keeps of every
# run the losses, a digest of the weights, and of each epoch the labels and some noise.
PROCESS = """
import hashlib, json, os, pathlib, sys, torch, data, train

def train_epoch(model, batches, *rest):
    batches = list(batches)
    with torch.random.fork_rng():
        epochs.append([[labels.tolist() for _, labels in batches], torch.randn(3).tolist()])
    return real_epoch(model, batches, *rest)

def train_run(args):
    folder, model, config, history, *rest = real_run(args)
    content = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    losses = [row | {"seconds": 0} for row in history]
    kept[str(folder)] = config, losses, hashlib.sha256(content).hexdigest(), epochs
    return folder, model, config, history, *rest

rank, kept, real_run, real_epoch = os.environ["RANK"], {}, train.train_run, train.train_epoch
train.train_run, train.train_epoch, train.draw_run = train_run, train_epoch, lambda *run: None
data.DRAWN = {name: (draw, 30, 21) for name, (draw, *_) in data.DRAWN.items()}
data.IDX_SETS["mnist"] = ("raw", (), "")
os.chdir(f"disk{rank}")
for folders, options in json.loads(sys.argv[1]):
    os.environ["VAE_DATA_DIR"], epochs = folders[int(rank)], []
    if "end" in options:
        pathlib.Path("kept.json").write_text(json.dumps(kept))
        train.run_cli(lambda: train.main(options))
    try:
        train.main(options)
    except (train.UserError, SystemExit) as error:
        kept[options[-1]] = repr(error)
"""


def start(mnist_root, home) -> subprocess.Popen:
    """Runs under torchrun, one after the other, as a start takes seconds."""
    for folder in ("disk0/taken", "disk1", "none0", "none1"):
        (home / folder).mkdir(parents=True)
    both, none = [str(mnist_root)] * 2, [str(home / "none0"), str(home / "none1")]
    runs = [
        (both, [*AE, "--epochs", 1, "--out", "ae"]),
        (both, [*AE, "--epochs", 3, "--resume", "--out", "ae"]),  # the second one's disk has none
        (both, [*AE[:-1], 401, "--epochs", 2, "--seed", 1, "--out", "odd"]),
        (both, [*MLP, "--out", "mlp"]),
        (none, ["--dataset", "faces", "--epochs", 1, "--batch-size", 10, "--out", "faces"]),
        (both, [*MLP, "--out", "taken"]),
        ([none[0], both[1]], [*MLP, "--fallback", "digits", "--out", "fallback"]),
        ([both[0], none[1]], [*MLP, "--fallback", "digits", "--out", "end"]),
    ]
    runs = json.dumps([(folders, list(map(str, options))) for folders, options in runs])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--no-python", sys.executable, "-c", PROCESS, runs]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, cwd=home, env=env, stdout=open(home / "out", "w"),
                               stderr=open(home / "err", "w"))
    process.home = home
    return process


@pytest.fixture(scope="module")
def two(beside):
    """The folder of the disks, what each process kept, and how it ended."""
    home, status = beside["two"].home, beside["two"].wait(timeout=300)
    out, err = ((home / name).read_text() for name in ("out", "err"))
    kept = [path.read_text() for path in sorted(home.glob("disk?/kept.json"))]
    assert len(kept) == 2, err
    return home, list(map(json.loads, kept)), subprocess.CompletedProcess((), status, out, err)


@pytest.mark.usefixtures("no_figures")
def test_two_processes_train_an_autoencoder_to_the_numbers_of_one(two, tmp_path, mnist_root):
    """It draws no noise."""
    folder, common = two[0] / "disk0" / "ae", [*AE, "--data-dir", mnist_root, "--epochs", 3]
    assert run_here(train.main, *common, "--out", tmp_path / "one").returncode == 0
    (model, run), (other, alone) = map(train.load_run, (folder, tmp_path / "one"))
    for row, expected in zip(run["history"], alone["history"], strict=True):
        assert row == pytest.approx(expected | {"seconds": row["seconds"]}, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-5)
    resumed = run_here(train.main, *common, "--out", folder, "--resume")
    assert_user_error(resumed, "processes 2, not 1")


def test_the_first_process_decides_and_the_others_follow(two):
    """Which data, from which epoch on, whether a run is in the way. In the end all have the same
    weights, those of BatchNorm, too; and the first one alone has printed and written. Data that
    only the first one has end the run: the other one does not train on its fallback."""
    home, (first, second), end = two
    runs = {"ae": "mnist", "odd": "mnist", "mlp": "mnist", "faces": "faces", "fallback": "digits"}
    for name, dataset in runs.items():
        (config, *same), (other, *as_first) = first[name][:3], second[name][:3]
        assert config["dataset"] == other["dataset"] == dataset and same == as_first
        assert config["processes"] == 2 and len(first[name][1]) == config["epochs"]
    assert first["fallback"][0]["notice"] == "built-in digits, not mnist"
    assert "taken: is there already" in first["taken"] and second["taken"] == "SystemExit(2)"
    assert os.listdir(home / "disk0" / "taken") == []
    assert os.listdir(home / "disk1") == ["kept.json"] and end.stdout.count("\nepoch") == 12
    assert end.returncode != 0 and not list(home.glob("disk?/end/*"))
    assert re.search("^error: mnist: .*none1/mnist/.* is missing", end.stderr, re.MULTILINE)
    assert not (home / "none1" / "digits.npz").exists()


def test_the_processes_share_an_order_and_no_noise(two, drawn):
    """The first one's noise is that of a single process; the other's, of no epoch of any seed."""

    def of_one(seed, epoch, n):
        torch.manual_seed(seed + 1_000_003 * epoch)
        return torch.randperm(n), torch.randn(3).tolist()

    used = [of_one(seed, epoch, n)[1]
            for n in (0, 401, 402, 1000) for seed in range(20) for epoch in range(10)]
    runs = [("ae", 0, 402, (2, 3)), ("odd", 1, 401, (1, 2)), ("mlp", 0, 1000, (1, 2, 3))]
    for name, seed, n, epochs in runs:
        for epoch, *kept in zip(epochs, *(kept[name][3] for kept in two[1]), strict=True):
            order, expected = of_one(seed, epoch, n)
            batches = drawn.labels[:1000][order[: n - n % 2]].split(50)
            for rank, (labels, noise) in enumerate(kept):
                assert labels == [batch[rank::2].tolist() for batch in batches]
                assert (noise == expected) is (rank == 0) and (noise in used) is (rank == 0)
    ae, odd, mlp = ([tuple(noise) for _, noise in two[1][1][name][3]] for name, *_ in runs)
    assert mlp[1:] == ae and len({*mlp, *odd}) == 5  # by seed and epoch


# ------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("architecture", [Autoencoder, VAE, ConvVAE, CelebAVAE])
def test_bfloat16_is_for_the_networks_and_float32_for_the_losses(architecture):
    model, z, found = architecture(latent_dim=8), torch.randn(6, 8), []
    images = torch.rand(6, *((3, 64, 64) if architecture is CelebAVAE else (1, 28, 28)))
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            codes = [model.encode(images)] if architecture is Autoencoder else model.encode(images)
            found.append([*codes, model.decode_logits(z)])
    for expected, values in zip(*found):
        assert values.dtype == torch.float32 and 0 < (values - expected).abs().max() < 0.1
    total, recon, kl = train.Loss(model, amp=True).loss(images, None, 1.0)
    assert total.dtype == recon.dtype == kl.dtype == torch.float32
    recon.backward()  # reaches the encoder through z alone
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_a_folder_that_is_still_empty_is_the_first_processs(tmp_path, mnist_root, monkeypatch):
    """Another process ends its only epoch while the first one is about to save it."""
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "first_decides", lambda decide: decide())
    train.main(["--epochs", "1", "--data-dir", str(mnist_root), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run").is_dir() and not list((tmp_path / "run").iterdir())
