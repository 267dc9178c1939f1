"""The GPU path. Skipped where there is no GPU; the other tests stay on the CPU."""

import json
import os
import subprocess
import sys

import ex6_likelihood
import pytest
import torch
from ex5_kl_annealing import RowVAE
from conftest import GPU, PROJECT, assert_user_error, run_here

import train
from ae import Autoencoder
from data import Batches, binarize_once
from vae import VAE, CelebAVAE, ConvVAE

pytestmark = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
MODELS = [Autoencoder, VAE, ConvVAE, CelebAVAE]
LOOP_MODELS = [*MODELS, ex6_likelihood.IWAE, RowVAE]


def images_for(architecture, drawn, faces, n=256):
    return (faces if architecture is CelebAVAE else drawn).images[:n]


def terms_and_gradient(model, images, device):
    """Of one batch, in full float32, with the same noise on every device."""
    noise = torch.Generator().manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like",
                      lambda t: torch.randn(t.shape, generator=noise).to(t.device))
        model = model.to(train.find_device(device, "ieee"), memory_format=torch.channels_last)
        terms = model.loss(images.to(device) / 255, None, 0.7)
    model.zero_grad()
    (terms[0] / len(images)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.stack(terms).detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("architecture", MODELS)
def test_the_loss_and_its_gradient_are_the_cpus(architecture, drawn, faces):
    model, images = architecture(), images_for(architecture, drawn, faces)
    expected = terms_and_gradient(model, images, "cpu")
    for ours, theirs in zip(terms_and_gradient(model, images, "cuda"), expected):
        # BatchNorm in training magnifies rounding: the CPU is 1e-4 off its own float64.
        limit = 1e-3 if architecture is CelebAVAE else 1e-4
        assert (ours - theirs).norm() < limit * theirs.norm()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("architecture", LOOP_MODELS)
def test_an_epoch_lowers_the_loss_and_no_step_waits_for_the_device(
    architecture, amp, drawn, faces
):
    device = train.find_device("cuda")
    model = train.Loss(architecture(latent_dim=8).to(device), amp)
    images = images_for(architecture, drawn, faces, 1990).to(device)  # the last batch is smaller
    loader = Batches(images, torch.zeros(len(images), device=device), 20, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def watched(batches):
        for number, batch in enumerate(batches, start=1):
            yield batch
            # CUDA's own set-up in the first step, and the recording in the fourth, may wait
            torch.cuda.set_sync_debug_mode("default" if number == 3 else "error")
        torch.cuda.set_sync_debug_mode("default")

    before = train.test_epoch(model, loader, device)
    try:
        trained = train.train_epoch(model, watched(iter(loader)), optimizer, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert train.test_epoch(model, loader, device)[0] < trained[0] < before[0]


def test_training_in_bfloat16_ends_where_float32_does(mnist_root, tmp_path):
    ends = []
    for amp in ([], ["--amp"]):
        argv = ["--epochs", "5", "--data-dir", str(mnist_root), "--out", f"{tmp_path}/{len(amp)}"]
        ends.append(train.load_run(train.main(argv + amp))[1]["history"][-1]["test_loss"])
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_a_run_moves_between_devices_with_its_order_of_images(mnist_root, tmp_path, monkeypatch):
    """The autoencoder draws no noise, so its losses must be the CPU's, too; figures are drawn."""
    orders, batch = {}, Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, index: (
        orders.setdefault(out, []).append(index.cpu()) or batch(self, index)
    ))
    options = ["--model", "ae", "--data-dir", str(mnist_root), "--resume"]
    for out, devices in (("cpu", ["cpu"] * 3), ("both", ["cpu", "cuda", "cpu"])):
        for epochs, device in enumerate(devices, start=1):
            folder = train.main([*options, "--epochs", str(epochs), "--device", device,
                                 "--out", str(tmp_path / out)])
            assert (folder / "samples.png").is_file()
    assert all(map(torch.equal, orders["cpu"], orders["both"]))
    one, other = (train.load_run(tmp_path / out)[1]["history"] for out in ("cpu", "both"))
    for a, b in zip(one, other, strict=True):
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-2)  # TF32


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_log_p_x_is_the_cpus_within_its_error(model, mnist_root, tmp_path, drawn):
    run, root = str(tmp_path / "run"), ["--data-dir", str(mnist_root)]
    train.main(["--model", model, "--binarize", "--epochs", "3", "--out", run, *root])
    found = []
    for device in ("cpu", "cuda"):
        ex6_likelihood.main([run, "--num-samples", "500", "--device", device, *root])
        result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        found.append(torch.tensor(result["values"])[:, -1])
        (tmp_path / "run" / "evaluation.json").unlink()
    difference = found[0] - found[1]  # of independent estimates, image by image
    assert difference.mean().abs() < 5 * difference.std() / len(difference) ** 0.5
    assert difference.abs().max() > 0
    network, _ = train.load_run(run)
    x = binarize_once(drawn.images[:10]).float() / 255
    exact, ours = (network.to(d).encode(x.to(d))[0].cpu() for d in ("cpu", "cuda"))
    assert (exact - ours).norm() < 1e-4 * exact.norm()  # full float32, not TF32


def test_torchrun_trains_on_a_gpu_and_ends_cleanly(mnist_root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["train.py", "--data-dir", mnist_root, "--epochs", 2, "--out", tmp_path / "run"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    result = subprocess.run(list(map(str, command)), cwd=PROJECT, env=env, capture_output=True,
                            text=True, timeout=300)
    assert result.returncode == 0 and "saved in" in result.stdout, result
    assert "cuda:0" in result.stdout and "Error" not in result.stderr, result.stderr
    assert len(train.load_run(tmp_path / "run")[1]["history"]) == 2


def test_memory_that_is_full_ends_in_one_line(mnist_root, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        result = run_here(train.main, "--data-dir", mnist_root, "--latent-dim", 2**16,
                          "--out", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_user_error(result, "memory is full", "--batch-size")


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_replayed_steps_are_the_steps_themselves(architecture, amp, drawn, faces, monkeypatch):
    """At a learning rate so small that rounding cannot grow, and with the noise of one seed."""
    device, found = train.find_device("cuda", "ieee"), []
    images = images_for(architecture, drawn, faces, 390).to(device)
    for record in (train.recorded, lambda step: step):
        monkeypatch.setattr(train, "recorded", record)
        torch.manual_seed(0)
        model = train.Loss(architecture(latent_dim=8).to(device), amp)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)
        loader = Batches(images, torch.zeros(len(images), device=device), 20, shuffle=True)
        terms = [train.train_epoch(model, loader, optimizer, device, b) for b in (1.0, 3.0)]
        found.append(torch.tensor(terms))
    loose = amp or architecture is CelebAVAE  # whose gradients CUDA sums in no fixed order
    assert torch.allclose(*found, rtol=2e-3 if loose else 1e-4, atol=1e-6), found
