"""The likelihood by importance sampling, against models whose log p(x) is known."""

import json
import math
import shutil

import hypothesis.strategies as st
import pytest
import torch
from conftest import assert_user_error, run_here
from hypothesis import given
from torch import Tensor

import train
import viz
from data import binarize_once, load_dataset
from vae import (
    VAE,
    ConvVAE,
    GaussianVAE,
    active_units,
    bce_from_logits,
    draw_log_weights,
    importance_weighted_bound,
    kl_divergence_gaussian,
    log_likelihood,
    log_weights,
)

LOG_2PI = math.log(2 * math.pi)


class LinearGaussian(GaussianVAE):
    """x = W z + b + noise of standard deviation s, so p(x) = N(b, W W' + s^2 I), and the posterior
    is a Gaussian, too. W has orthogonal columns, so it is diagonal. The encoder returns it, or
    one that is off by shift sigmas, its own sigma being stretch times too wide."""

    def __init__(self, dims=5, latent_dim=2, s=0.5, shift=0.0, stretch=1.0):
        super().__init__()
        self.latent_dim, self.s, self.shift, self.stretch = latent_dim, s, shift, stretch
        basis = torch.linalg.qr(torch.randn(dims, latent_dim, dtype=torch.float64))[0]
        self.w = basis * torch.linspace(0.5, 2, latent_dim, dtype=torch.float64)
        self.b = torch.randn(dims, dtype=torch.float64)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.w.pow(2).sum(dim=0) / self.s**2
        mu = (x - self.b) @ self.w / self.s**2 / precision
        logvar = (-precision.log() + 2 * math.log(self.stretch)).expand_as(mu)
        return mu + self.shift * precision.rsqrt(), logvar

    def decode_logits(self, z: Tensor) -> Tensor:
        return z @ self.w.T + self.b  # the mean of x, not a logit

    def recon_loss(self, mean: Tensor, x: Tensor) -> Tensor:
        squares = ((x - mean) / self.s).pow(2)
        return 0.5 * (squares + LOG_2PI + 2 * math.log(self.s)).sum(dim=1)

    def exact(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.s**2 * torch.eye(len(self.b), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)

    def draw(self, n: int) -> Tensor:
        z = torch.randn(n, self.latent_dim, dtype=torch.float64)
        return z @ self.w.T + self.b + self.s * torch.randn(n, len(self.b), dtype=torch.float64)


linear_gaussians = st.builds(
    lambda seed, *rest: (torch.manual_seed(seed), LinearGaussian(*rest))[1],
    st.integers(0, 1000),
    st.integers(3, 8),
    st.integers(1, 3),
    st.floats(0.3, 1.5),
    st.floats(-0.5, 0.5),
    st.floats(1.0, 1.5),
)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over the first dimension: the mean and its standard error."""
    return values.mean(dim=0), values.std(dim=0) / len(values) ** 0.5


# ------------------------------------------------------------------- against the truth


@given(linear_gaussians)
def test_a_perfect_encoder_gives_the_exact_likelihood_from_any_draw(model):
    """Where q(z|x) is the posterior every weight is p(x), and the ELBO has no gap."""
    model.shift, model.stretch = 0.0, 1.0
    x = model.draw(4)
    mu, logvar = model.encode(x)
    log_w, recon = log_weights(model, x, mu, logvar, torch.randn_like(mu.expand(7, 4, -1)))
    assert log_w.shape == recon.shape == (7, 4)
    torch.testing.assert_close(log_w, model.exact(x).expand(7, 4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_likelihood(model, x, 3), model.exact(x), rtol=1e-9, atol=1e-9)


@given(linear_gaussians)
def test_the_estimate_converges_to_the_truth(model):
    """The mean weight is p(x), within the error of the mean; so its logarithm is log p(x)."""
    x = model.draw(3)
    for image, truth in zip(x, model.exact(x)):
        weight = (draw_log_weights(model, image[None], 20_000) - truth).exp().squeeze(1)
        mean, error = mean_and_error(weight)
        assert abs(mean - 1) <= 5 * error + 1e-9
    estimate = log_likelihood(model, x, 20_000)
    torch.testing.assert_close(estimate, model.exact(x), rtol=0, atol=0.1)


@given(linear_gaussians, st.integers(1, 6))
def test_the_bound_is_below_the_truth_on_average(model, k):
    x = model.draw(1)
    log_w = draw_log_weights(model, x, k * 2000).view(k, 2000)
    mean, error = mean_and_error(importance_weighted_bound(log_w))
    assert mean <= model.exact(x) + 5 * error + 1e-9


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_bernoulli_pixels_agree_with_an_integral_over_a_grid(latent_dim):
    """No closed form here, but with one or two latents p(x) is a sum over a fine grid of z."""
    model = VAE(input_dim=12, hidden_dim=8, latent_dim=latent_dim).double().eval()
    for layer in (model.decoder_fc, model.encoder.fc_mu):
        torch.nn.init.normal_(layer.weight, std=0.5)
    x = (torch.rand(4, 12) < 0.5).double()
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * latent_dim).view(-1, latent_dim)
    with torch.no_grad():
        logits = model.decode_logits(grid)
    log_px_z = torch.stack([-bce_from_logits(logits, row.expand_as(logits)) for row in x])
    log_pz = -0.5 * (grid.pow(2) + LOG_2PI).sum(dim=1)
    cell = math.log(line[1] - line[0]) * latent_dim
    truth = torch.logsumexp(log_px_z + log_pz + cell, dim=1)
    for image, exact in zip(x, truth):
        mean, error = mean_and_error((draw_log_weights(model, image[None], 50_000) - exact).exp())
        assert abs(mean - 1) <= 5 * error
        assert error < 0.02  # or the line above says nothing


# ------------------------------------------------------------------- as a bound


@given(linear_gaussians, st.sampled_from([(1, 2), (2, 4), (1, 5), (5, 50)]))
def test_the_bound_does_not_fall_as_k_grows(model, sizes):
    """On average: both from the same draws, so most of the noise is common."""
    few, many = sizes
    log_w = draw_log_weights(model, model.draw(1), many * 1000).view(-1, many).T
    parts = torch.stack([importance_weighted_bound(part) for part in log_w.split(few)])
    gain = importance_weighted_bound(log_w) - parts.mean(dim=0)
    # For the same draws it is no matter of chance (Jensen), and the gain is 0 only if all
    # weights are equal.
    assert (gain >= -1e-9).all()
    assert gain.mean() > 0 or log_w.std() < 1e-6


@given(linear_gaussians)
def test_one_sample_gives_the_elbo_in_expectation(model):
    x = model.draw(1)
    mu, logvar = model.encode(x)
    log_w, recon = log_weights(model, x, mu, logvar, torch.randn(20_000, *mu.shape, dtype=mu.dtype))
    bound = importance_weighted_bound(log_w.view(1, -1))
    # recon is in both; without it less noise is left
    mean, error = mean_and_error(bound + recon.flatten())
    assert (abs(mean + kl_divergence_gaussian(mu, logvar)) <= 5 * error + 1e-9).all()


def test_the_estimate_does_not_depend_on_chunks_or_on_the_batch():
    model = VAE(hidden_dim=30, latent_dim=3).double().eval()
    x = torch.rand(3, 1, 28, 28).round().double()
    estimates = []
    for chunk_size in (1, 7, 64, 1000):
        torch.manual_seed(3)
        estimates.append(log_likelihood(model, x, 64, chunk_size))
    torch.manual_seed(3)
    estimates.append(torch.cat([log_likelihood(model, image[None], 64) for image in x]))
    for estimate in estimates[1:]:
        torch.testing.assert_close(estimate, estimates[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", [VAE, ConvVAE])
@pytest.mark.parametrize("logit", [1e3, -1e3])
def test_nothing_overflows_where_the_logits_are_huge(architecture, logit):
    model = architecture(latent_dim=2).eval()
    last = model.decoder_fc if architecture is VAE else model.decoder_conv[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, logit)
    x = torch.zeros(2, 1, 28, 28)
    x[1] = 1
    wrong, right = log_likelihood(model, x if logit > 0 else x.flip(0), 10).tolist()
    assert wrong == pytest.approx(-784e3, rel=1e-3)
    assert -50 < right < 10  # nothing but the weights p(z) / q(z|x)


def test_no_more_than_a_chunk_is_in_memory_whatever_the_batch(monkeypatch):
    model, x = VAE(hidden_dim=5, latent_dim=2).eval(), torch.rand(30, 1, 28, 28)
    rows = {"encode": [], "decode_logits": []}
    for name in rows:
        def counting(inputs, name=name, method=getattr(model, name)):
            rows[name].append(len(inputs))
            return method(inputs)
        monkeypatch.setattr(model, name, counting)
    log_likelihood(model, x, 250, chunk_size=100)
    assert rows["encode"] == 30 * [1]
    assert rows["decode_logits"] == 30 * [100, 100, 50]


# ------------------------------------------------------------------- as an objective


@given(st.floats(0, 4))
def test_beta_weighs_the_ratio_of_prior_and_posterior(beta):
    """log w = recon and ratio, of which the mean over draws is -KL."""
    model = LinearGaussian(shift=0.5, stretch=1.2)
    x = model.draw(2)
    mu, logvar = model.encode(x)
    epsilon = torch.randn(20_000, *mu.shape, dtype=mu.dtype)
    log_w, recon = log_weights(model, x, mu, logvar, epsilon, beta)
    mean, error = mean_and_error(log_w + recon)
    kl = kl_divergence_gaussian(mu, logvar)
    assert ((mean + beta * kl).abs() <= 5 * error + 1e-9).all()


def test_one_importance_sample_is_the_vae():
    torch.manual_seed(1)
    model, x = VAE(hidden_dim=20), torch.rand(5, 1, 28, 28)
    model.importance_samples = 1
    total, recon, kl = model.loss(x, None)
    assert total == recon + kl


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_gradient_is_that_of_every_draw_weighted_by_its_weight(beta):
    """Burda et al. 2016, section 3: sum_i w~_i grad log w_i, the w~_i summing to 1; by autograd
    through one draw at a time, at the same noise."""
    model, k = VAE(input_dim=9, hidden_dim=5, latent_dim=2).double(), 6
    x = torch.rand(4, 9).round().double()
    model.importance_samples = k
    torch.manual_seed(5)
    total, recon, kl = model.loss(x, None, beta)
    gradients = torch.autograd.grad(total, list(model.parameters()))
    torch.manual_seed(5)
    epsilon = torch.randn(k, 4, 2, dtype=x.dtype)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for image in range(4):
        q = model.encode(x[image : image + 1])
        log_w, _ = log_weights(model, x[image : image + 1], *q, epsilon[:, image : image + 1], beta)
        for weight, one in zip(log_w.softmax(dim=0).detach(), log_w):
            parts = torch.autograd.grad(-one, list(model.parameters()), retain_graph=True)
            expected = [sum_ + weight * part for sum_, part in zip(expected, parts)]
    for gradient, by_hand in zip(gradients, expected):
        torch.testing.assert_close(gradient, by_hand)
    log_w, recons = log_weights(model, x, *model.encode(x), epsilon, beta)
    assert total < -log_w.mean(dim=0).sum()  # Jensen, whatever the draws
    torch.testing.assert_close(recon, recons.mean(dim=0).sum())
    assert kl == kl_divergence_gaussian(*model.encode(x)).sum()


def test_a_latent_is_active_if_its_mean_moves():
    mu = torch.randn(1000, 4) * torch.tensor([1.0, 0.11, 0.09, 0.0]) + torch.tensor([0, 5, 5, 3.0])
    assert active_units(mu) == 2


# ------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory, mnist_root):
    """A small run on binary pixels."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    options = ["--binarize", "--epochs", "2", "--batch-size", "50", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viz, "draw_run", lambda *args: None)
        train.main([*options, "--data-dir", str(mnist_root)])
    return folder


def test_an_evaluation_is_of_all_test_images_and_agrees_with_the_test_loss(run, mnist_root):
    command = ["--evaluate", run, "--num-samples", 40, "--data-dir", mnist_root]
    result = run_here(train.main, *command)
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "evaluation.json").read_text())
    model, checkpoint = train.load_run(run)

    images = binarize_once(load_dataset("mnist", mnist_root)[1].images).float() / 255
    torch.manual_seed(0)
    log_w = torch.cat([draw_log_weights(model, image[None], 40) for image in images], dim=1)
    assert found["images"] == 300 and found["num_samples"] == 40
    mean = -importance_weighted_bound(log_w).mean().item()
    assert found["neg_log_likelihood"] == pytest.approx(mean, rel=1e-6)
    assert found["neg_elbo"] == pytest.approx(-log_w.mean().item(), rel=1e-6)
    assert found["neg_elbo"] == pytest.approx(checkpoint["history"][-1]["test_loss"], abs=0.5)
    assert found["gap"] == pytest.approx(found["neg_elbo"] - found["neg_log_likelihood"], abs=1e-3)
    assert found["active_units"] == active_units(model.encode(images)[0])
    assert [point["k"] for point in found["bounds"]] == [1, 2, 5, 10, 20, 40]
    bounds, spreads = ([p[key] for p in found["bounds"]] for key in ("bound", "spread"))
    assert bounds == sorted(bounds) and bounds[-1] == -found["neg_log_likelihood"]
    assert all(a > b > 0 for a, b in zip(spreads[:5], spreads[1:5])) and spreads[5] is None
    for number in (found["neg_elbo"], found["neg_log_likelihood"], found["gap"]):
        assert f"{number:.2f}" in result.stdout
    assert (run / "bounds.png").is_file()

    assert run_here(train.main, *command).returncode == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert run_here(train.main, *command, "--seed", 1).returncode == 0
    assert json.loads((run / "evaluation.json").read_text())["bounds"] != found["bounds"]


def test_the_spread_of_a_bound_is_that_of_its_estimates():
    """Not that between images, and no smaller where an image has but two estimates."""
    model = LinearGaussian(shift=0.5, stretch=1.3)
    x = model.draw(2)
    x[1] += 3
    loader = [(x.repeat(100, 1), None)]
    points = {p["k"]: p for p in train.evaluate(model, loader, 2000)["bounds"]}
    for k in (1, 5, 1000):
        log_w = [draw_log_weights(model, image[None], 200 * k).view(k, -1) for image in x]
        variances = torch.stack([importance_weighted_bound(w).var() for w in log_w])
        assert points[k]["spread"] == pytest.approx(variances.mean().sqrt().item(), rel=0.15)
    assert points[2000]["spread"] is None
    assert points[2000]["bound"] == pytest.approx(model.exact(x).mean().item(), abs=0.01)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("options", [["--model", "conv"], ["--importance-samples", "3"]])
def test_a_run_on_grey_pixels_is_evaluated_on_binary_ones_too(options, mnist_root, tmp_path):
    run, root = tmp_path / "run", ["--data-dir", str(mnist_root)]
    train.main(["--epochs", "1", "--latent-dim", "2", "--out", str(run), *options, *root])
    train.main(["--evaluate", str(run), "--num-samples", "2", *root])
    found = json.loads((run / "evaluation.json").read_text())
    model, _ = train.load_run(run)
    torch.manual_seed(0)
    images = binarize_once(load_dataset("mnist", mnist_root)[1].images).float() / 255
    mean = -log_likelihood(model, images, 2).mean().item()
    assert found["neg_log_likelihood"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.usefixtures("no_figures")
def test_training_on_takes_an_evaluation_away(run, mnist_root, tmp_path):
    """It would be of weights that are no more; --resume without a further epoch leaves it."""
    copy, root = tmp_path / "run", ["--data-dir", str(mnist_root)]
    shutil.copytree(run, copy)
    train.main(["--evaluate", str(copy), "--num-samples", "2", *root])
    options = ["--binarize", "--batch-size", "50", "--out", str(copy), "--resume", *root]
    for epochs, kept in ((2, True), (3, False)):
        train.main([*options, "--epochs", str(epochs)])
        assert (copy / "evaluation.json").exists() == kept == (copy / "bounds.png").exists()


def test_the_fallback_is_named_at_the_end_and_in_the_figure(run, mnist_root, tmp_path, monkeypatch):
    model, checkpoint = train.load_run(run)
    checkpoint["config"]["notice"] = "built-in digits, not mnist"
    monkeypatch.setattr(train, "load_run", lambda folder: (model, checkpoint))
    notes = []
    monkeypatch.setattr(viz, "save", lambda figure, path, note="": notes.append(note))
    options = ["--num-samples", 2, "--data-dir", mnist_root]
    result = run_here(train.main, "--evaluate", run, *options)
    assert "BUILT-IN DIGITS, NOT MNIST" in result.stdout.splitlines()[-1]
    assert notes == ["built-in digits, not mnist"]


def test_redrawing_shows_the_binary_pixels_of_a_binarized_run(run, mnist_root, monkeypatch):
    def record(folder, model, config, history, test_loader, factors):
        seen.extend(test_loader)

    seen = []
    monkeypatch.setattr(viz, "draw_run", record)
    viz.main([str(run), "--data-dir", str(mnist_root)])
    images = torch.cat([images for images, _ in seen])
    expected = binarize_once(load_dataset("mnist", mnist_root)[1].images).float() / 255
    assert torch.equal(images, expected)


def test_bounds_of_two_runs_in_one_figure(run, mnist_root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "evaluation.json").unlink(missing_ok=True)
    assert_user_error(run_here(viz.main, run, "--beside", other), "evaluation.json", "--evaluate")
    for folder in (run, other):
        run_here(train.main, "--evaluate", folder, "--num-samples", 4, "--data-dir", mnist_root)
    (run / "bounds.png").unlink()
    result = run_here(viz.main, run, "--beside", other)
    assert result.returncode == 0 and (run / "bounds.png").is_file()
    point = '{"k": 1, "bound": "x", "spread": 1}'
    for bad in (b"", b"[]", b'{"bounds": [1]}', b"\xff", b'{"bounds": [], "notice": ""}',
                f'{{"bounds": [{point}], "notice": ""}}'.encode()):
        (other / "evaluation.json").write_bytes(bad)
        assert_user_error(run_here(viz.main, run, "--beside", other), "evaluation.json", "damaged")


@pytest.mark.parametrize("key, value", [("recon", "mse"), ("dataset", "faces"), ("model", "ae")])
def test_a_run_without_a_likelihood_is_refused(run, monkeypatch, key, value):
    model, checkpoint = train.load_run(run)
    checkpoint["config"] |= {key: value} | ({"recon": "mse"} if value == "ae" else {})
    monkeypatch.setattr(train, "load_run", lambda folder: (model, checkpoint))
    assert_user_error(run_here(train.main, "--evaluate", run), str(run), value)


def test_an_evaluation_needs_the_images_of_its_run(run, mnist_root, tmp_path):
    wrong = tmp_path / "run"
    shutil.copytree(run, wrong)
    for path, load, save in (
        (wrong / "checkpoint.pt", torch.load, torch.save),
        (wrong / "config.json", lambda p: {"config": json.loads(p.read_text())},
         lambda c, p: p.write_text(json.dumps(c["config"]))),
    ):
        content = load(path)
        content["config"]["test_images"] = 299
        save(content, path)
    (wrong / "evaluation.json").unlink(missing_ok=True)
    result = run_here(train.main, "--evaluate", wrong, "--data-dir", mnist_root)
    assert_user_error(result, "tested on 299 images", "--data-dir")
    assert not (wrong / "evaluation.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_testing_decodes_no_more_images_at_a_time_however_many_draws(
    mnist_root, tmp_path, monkeypatch
):
    """Or the test would need K times the memory of training."""
    sizes = []
    monkeypatch.setattr(
        train, "test_epoch",
        lambda model, loader, *args: sizes.append(loader.batch_size) or (0.0, 0.0, 0.0),
    )
    for samples in (1, 50, 2000):
        options = ["--limit", "20", "--epochs", "1", "--importance-samples", str(samples)]
        options += ["--batch-size", "1", "--hidden-dim", "2", "--data-dir", str(mnist_root)]
        train.main([*options, "--out", str(tmp_path / str(samples))])
    assert sizes == [1000, 20, 1]
