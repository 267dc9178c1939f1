"""Faster, and on several processes: the same numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, assert_user_error, overfit, run_here
from torch.nn.utils import parameters_to_vector

import data
import train
from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE, kl_divergence_gaussian

CPU = torch.device("cpu")


# ------------------------------------------------------------------- two processes


AE = ["--model", "ae", "--limit", 401, "--batch-size", 50]
MLP = ["--epochs", 3, "--batch-size", 50]
RUN_ALL = """
import json, sys, train, viz
viz.draw_run = lambda *args: None
train.run_cli(lambda: [train.main(options) for options in json.loads(sys.argv[1])])
"""


@pytest.fixture(scope="module")
def two(mnist_root, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Runs under torchrun, one after the other, since a start takes seconds: an autoencoder that
    goes on after its first epoch, a VAE, and one that fails. The folder that they are in."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "taken").mkdir()
    (folder / "taken" / "checkpoint.pt").touch()  # only the first process looks for it
    runs = [
        [*AE, "--out", folder / "ae", "--epochs", 1],
        [*AE, "--out", folder / "ae", "--epochs", 3, "--resume"],
        [*MLP, "--out", folder / "mlp"],
        [*MLP, "--out", folder / "taken"],
    ]
    runs = [[str(option) for option in [*run, "--data-dir", mnist_root]] for run in runs]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--no-python", sys.executable, "-c", RUN_ALL, json.dumps(runs)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.count("saved in") == 3, result  # only one of them prints
    return folder, result


def losses(folder) -> torch.Tensor:
    history = train.load_run(folder)[1]["history"]
    return torch.tensor([[row[k] for k in row if k.endswith("_loss")] for row in history])


@pytest.mark.usefixtures("no_figures")
def test_two_processes_train_an_autoencoder_to_the_numbers_of_one(two, tmp_path, mnist_root):
    """It draws no noise. Of the last batch one process gets an image, and the other none."""
    folder, options = two[0] / "ae", [*AE, "--data-dir", mnist_root, "--epochs", 3]
    assert run_here(train.main, *options, "--out", tmp_path).returncode == 0
    torch.testing.assert_close(losses(folder), losses(tmp_path), rtol=1e-5, atol=0)
    weights = [parameters_to_vector(train.load_run(f)[0].parameters()) for f in (folder, tmp_path)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
    other = run_here(train.main, *options, "--out", folder, "--resume")
    assert_user_error(other, "processes 2, not 1")


@pytest.mark.usefixtures("no_figures")
def test_two_processes_train_a_vae_to_the_losses_of_one_within_the_noise(two, tmp_path, mnist_root):
    found = []
    for seed in (0, 1, 2):
        options = [*MLP, "--data-dir", mnist_root, "--out", tmp_path / str(seed), "--seed", seed]
        assert run_here(train.main, *options).returncode == 0
        found.append(losses(tmp_path / str(seed)))
    mean, std = torch.stack(found).mean(dim=0), torch.stack(found).std(dim=0)
    assert ((losses(two[0] / "mlp") - mean).abs() <= 5 * std + 0.02 * mean).all()


def test_what_ends_one_process_ends_all_with_its_message(two):
    folder, result = two
    assert result.returncode != 0
    assert re.search("^error: --out .*holds a run already", result.stderr, re.MULTILINE)
    assert os.listdir(folder / "taken") == ["checkpoint.pt"]


def test_the_noise_of_the_processes_differs_but_not_their_order(monkeypatch):
    """Both start from one seed, and each gets its part of the same batches."""
    images, labels = torch.arange(10).view(10, 1, 1, 1).byte(), torch.arange(10)
    monkeypatch.setattr(train, "PROCESSES", 2)
    parts, noise = [], []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        torch.manual_seed(7)
        batches = train.with_own_noise(data.Batches(images, labels, 7, shuffle=True))
        parts.append([train.share(labels).tolist() for _, labels in batches])
        noise.append(torch.randn(3))
    torch.manual_seed(7)
    order = torch.randperm(10).tolist()
    assert parts == [[order[:7:2], order[7::2]], [order[1:7:2], order[8::2]]]
    assert not torch.equal(*noise)
    assert torch.equal(noise[0], torch.randn(3))  # of the first process, that of one alone


# ------------------------------------------------------------------- bfloat16, compiled


@pytest.mark.parametrize("architecture", [Autoencoder, VAE, ConvVAE, CelebAVAE])
def test_bfloat16_is_for_the_networks_and_float32_for_the_losses(architecture):
    torch.manual_seed(0)
    model = architecture(latent_dim=8)
    images = torch.rand(6, *((3, 64, 64) if architecture is CelebAVAE else (1, 28, 28)))
    exact, z = model.encode(images), torch.randn(6, 8)
    exact_logits = model.decode_logits(z)
    train.prepare(model, CPU, amp=True, compile=False)
    codes = model.encode(images)
    single = isinstance(codes, torch.Tensor)
    for code, expected in zip([codes] if single else codes, [exact] if single else exact):
        assert code.dtype == torch.float32
        assert 0 < (code - expected).abs().max() < 0.05
    logits = model.decode_logits(z)
    assert logits.dtype == torch.float32 and 0 < (logits - exact_logits).abs().max() < 0.1
    total, recon, kl = model.loss(images, None, 1.0)
    assert total.dtype == recon.dtype == torch.float32
    if not single:
        assert kl == kl_divergence_gaussian(*codes).sum()
    total.backward()
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", [VAE, ConvVAE])
def test_training_in_bfloat16_ends_where_float32_does(architecture, drawn):
    images, ends = drawn.images[:40].float() / 255, []
    for amp in (False, True):
        torch.manual_seed(0)
        model = architecture(latent_dim=4)
        train.prepare(model, CPU, amp, compile=False)
        ends.append(sum(overfit(model, images, steps=60)[-10:]) / 10)
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_loss_and_its_gradient_are_those_of_the_plain_one():
    """With the same noise: a seed means the same."""
    results, images = [], torch.rand(6, 1, 28, 28)
    for compile in (False, True):
        torch.manual_seed(0)
        model = VAE(hidden_dim=16, latent_dim=3)
        train.prepare(model, CPU, amp=False, compile=compile)
        terms = model.loss(images, None, 0.5)
        terms[0].backward()
        results.append((*terms, *(p.grad for p in model.parameters())))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain)


def test_without_a_compiler_one_line_says_so(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*args):
        raise InvalidCxxCompiler

    monkeypatch.setattr(train, "train_run", fail)
    assert_user_error(run_here(train.main, "--compile"), "C++ compiler", "--compile")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    model = Autoencoder(latent_dim=2)
    optimizer = torch.optim.Adam(model.parameters())
    for rank, files in ((1, []), (0, sorted(train.RUN_FILES))):
        monkeypatch.setattr(train, "RANK", rank)
        train.save_run(tmp_path, {}, model, optimizer, [{"epoch": 1}])
        assert sorted(os.listdir(tmp_path)) == files
