"""Exercise 6: the likelihood by importance sampling, against models whose log p(x) is known."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import ex6_likelihood as ex6
import numpy as np
import pytest
import torch
import train
import viz
from conftest import assert_user_error, run_here
from data import binarize_once, load_dataset
from ex6_likelihood import IWAE, PaperVAE, log_weights, optimise, posterior_on_grid
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from vae import VAE


def weigh(model, x, mu, logvar, epsilon, beta=1.0):
    """log w and log p(x|z), both (draws, batch), by torch.distributions."""
    q, prior = Normal(mu, logvar.exp().sqrt()), Normal(0, 1)
    z = q.loc + q.scale * epsilon
    log_px = Bernoulli(logits=model.decode_logits(z)).log_prob(x.flatten(1)).sum(dim=2)
    return log_px + beta * (prior.log_prob(z) - q.log_prob(z)).sum(dim=2), log_px


def small_network(n):
    """Of two latents and twelve pixels, with a posterior far from Gaussian, and n images."""
    model = PaperVAE(input_dim=12, hidden_dim=8, latent_dim=2).double().eval()
    for name, parameter in model.named_parameters():
        if "decoder" in name or "mu.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False), (torch.rand(n, 12) < 0.5).double()


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_likelihood_and_best_gaussian_are_found_where_they_are_known(correlation):
    """Of x = W z + b + noise of standard deviation s: there p(x) = N(b, W W' + s^2 I), and p(z|x) =
    N(m, P^-1), with P = I + W' W / s^2. The best q has the mean m and the variances 1 / P_jj; what
    is left of the gap is -1/2 the log determinant of P with its diagonal scaled to 1. That is 0
    where latents do not correlate, and then every single weight is p(x)."""
    s, eye = 0.5, torch.eye(5).double()
    w = torch.linalg.qr(torch.randn(5, 2).double())[0] * torch.tensor([0.5, 2.0])
    w = w @ torch.tensor([[1, correlation], [0, (1 - correlation**2) ** 0.5]]).double()
    p_x = MultivariateNormal(b := torch.randn(5).double(), w @ w.T + s**2 * eye)
    precision, x = eye[:2, :2] + w.T @ w / s**2, p_x.sample((6,))
    mean = (x - b) @ w / s**2 @ precision.inverse()
    logvar = -precision.diag().log().expand(6, 2)
    model = SimpleNamespace(decode_logits=lambda z: z @ w.T + b,
                            recon_loss=lambda mu, x: -Normal(mu, s).log_prob(x).sum(dim=1))
    found = optimise(model, x, mean + 0.5, logvar + 1.4, steps=600)
    torch.testing.assert_close(found[0], mean, atol=0.05, rtol=0)
    torch.testing.assert_close(found[1], logvar, atol=0.1, rtol=0)
    left = p_x.log_prob(x) - ex6.evaluate(model, x, mean, logvar, 500)[0]
    scaled = precision / precision.diag().outer(precision.diag()).sqrt()
    expected = -0.5 * torch.logdet(scaled).item()
    assert left.mean().item() == pytest.approx(expected, abs=0.1 if correlation else 1e-9)


def test_the_grid_holds_the_posterior_and_q_and_its_sum_is_what_draws_tell():
    """No closed form here, but with two latents p(x) is a sum over a fine grid of z."""
    model, x = small_network(1)
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_joint = Bernoulli(logits=model.decode_logits(z)).log_prob(x).sum(dim=1)
    log_joint += Normal(0, 1).log_prob(z).sum(dim=1)
    truth = torch.logsumexp(log_joint, dim=0) + 2 * math.log(line[1] - line[0])
    posterior, log_p_x = posterior_on_grid(model, x, line)
    torch.testing.assert_close(posterior.flatten(), log_joint - truth)
    mu, logvar = torch.randn(2, 1, 2).double()
    log_q = Normal(mu, logvar.exp().sqrt()).log_prob(z).sum(dim=1)
    torch.testing.assert_close(ex6.gaussian_on_grid(mu, logvar, line).flatten(), log_q)
    assert log_p_x == pytest.approx(truth.item())
    drawn = ex6.evaluate(model, x, *model.encode(x), 5000)[-1]
    assert drawn.item() == pytest.approx(log_p_x, abs=0.05)


@pytest.mark.parametrize("count", [1, 7, 600])
def test_the_bounds_are_means_over_groups_of_draws(count):
    """And however many images, no more than 500 codes (or one an image) are decoded at once."""
    (model, x), decoded = small_network(count), []
    decode, (mu, logvar) = model.decode_logits, model.encode(x)
    model.decode_logits = lambda z: decoded.append(len(z)) or decode(z)
    torch.manual_seed(3)
    bounds = ex6.evaluate(model, x, mu, logvar, 500)
    assert max(decoded) <= max(500, count) and sum(decoded) == 500 * count
    torch.manual_seed(3)
    log_w, _ = weigh(model, x, mu, logvar, torch.randn(500, *mu.shape, dtype=mu.dtype))
    for k, bound in zip((1, 5, 50, 500), bounds, strict=True):
        expected = [log_w[i : i + k].exp().mean(dim=0).log() for i in range(0, 500, k)]
        torch.testing.assert_close(bound, torch.stack(expected).mean(dim=0))


@pytest.mark.parametrize("beta, k", [(1.0, 6), (0.3, 6), (1.0, 1)])
def test_weights_bound_and_gradients_are_those_of_the_densities(beta, k):
    """Those of torch.distributions, at the same noise, through every path of the gradient."""
    model, x = IWAE(input_dim=9, hidden_dim=5, latent_dim=2).double(), torch.rand(4, 9).double()
    model.importance_samples, x = k, x.round()
    torch.manual_seed(5)
    terms = model.loss(x, None, beta)
    torch.manual_seed(5)
    given = model, x, *model.encode(x), torch.randn(k, 4, 2, dtype=x.dtype), beta
    log_w, log_px = weigh(*given)
    torch.testing.assert_close(log_weights(*given), (log_w, -log_px))
    total = -log_w.exp().mean(dim=0).log().sum()  # of so few pixels nothing underflows
    kl = kl_divergence(Normal(given[2], given[3].exp().sqrt()), Normal(0, 1)).sum()
    torch.testing.assert_close(terms, (total, -log_px.sum() / k, kl))
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in (terms[0], total)]
    torch.testing.assert_close(*gradients)


def test_the_papers_network_and_that_recipes_are_options_of_train():
    model, x, z = IWAE(), torch.rand(3, 784), torch.randn(3, 50)
    mu = model.fc_mu(model.encoder[2](model.encoder[0](x).tanh()).tanh())
    torch.testing.assert_close(model.encode(x.view(3, 1, 28, 28))[0], mu)
    x_logits = model.decoder[4](model.decoder[2](model.decoder[0](z).tanh()).tanh())
    torch.testing.assert_close(model.decode_logits(z), x_logits)
    shapes = [(200, 784), (200, 200), *[(50, 200)] * 2, (200, 50), (200, 200), (784, 200)]
    assert [p.shape for p in model.parameters() if p.dim() == 2] == shapes
    assert model.importance_samples == 5
    assert all(train.parse_args(text.split()).recon == "bce" for text in ex6.RECIPES.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mnist_root):
    folder = tmp_path_factory.mktemp("runs") / "small"
    options = f"--binarize --epochs 2 --batch-size 50 --hidden-dim 100 --data-dir {mnist_root}"
    train.train_run(train.parse_args([*options.split(), "--out", str(folder)]))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A small run on binary pixels."""
    return shutil.copytree(trained, tmp_path / "$run")


def binary_test_images(root):
    return binarize_once(load_dataset("mnist", root)[1].images) / 255


@pytest.fixture
def evaluate_here(mnist_root, monkeypatch):
    """Evaluate a run, with a short search for the best q: what was printed, and what was found."""
    monkeypatch.setattr(ex6, "optimise", lambda *args: optimise(*args, steps=evaluate_here.steps))

    def evaluate_here(folder, *options, draws=50):
        options += "--num-samples", draws, "--data-dir", mnist_root
        result = run_here(ex6.main, folder, *options)
        assert result.returncode == 0, result.stderr
        found = json.loads((folder / "evaluation.json").read_text())
        return result.stdout, found | {"seconds": 0}

    evaluate_here.steps = 2
    return evaluate_here


def test_an_evaluation_agrees_with_one_by_hand(run, mnist_root, evaluate_here):
    """On binarized test images; and on every third, what a q of its own gains, and what is left."""
    evaluate_here.steps = 60
    printed, found = evaluate_here(run)
    model, x = train.load_run(run)[0].requires_grad_(False), binary_test_images(mnist_root)

    def elbo_and_bound(x, mu, logvar):
        log_w, _ = weigh(model, x, mu, logvar, torch.randn(50, *mu.shape))
        return log_w.mean(dim=0), torch.logsumexp(log_w, dim=0) - math.log(50)

    mu, logvar = model.encode(x)
    elbo, bound = elbo_and_bound(x, mu, logvar)
    expected = -elbo.mean(), -bound.mean(), (mu.var(dim=0) > 0.01).sum(), bound.std() / 300**0.5
    keys = "neg_elbo", "neg_log_likelihood", "active_units", "standard_error"
    numbers = [found[key] for key in keys]
    difference = torch.tensor(numbers) - torch.tensor(expected)
    assert (difference.abs() <= torch.tensor([0.3, 0.3, 0, 0.03])).all(), difference
    assert "-ELBO {0:.2f}  -log p(x) <= {1:.2f} +- {3:.2f} nats".format(*numbers) in printed
    assert found["images"] == 300 and found["num_samples"] == 50 and found["epochs"] == 2
    assert [*found["bounds"]] == ["1", "5", "50"]
    means = torch.tensor(found["values"]).mean(dim=0).tolist()
    assert [*found["bounds"].values()] == pytest.approx(means) == sorted(means)
    assert (-means[0], -means[-1]) == pytest.approx(numbers[:2])
    few = x[::3], mu[::3], logvar[::3]
    best, best_bound = elbo_and_bound(few[0], *optimise(model, *few, steps=60))
    gained, left = best - elbo[::3], best_bound.maximum(bound[::3]) - best
    expected = pytest.approx([gained.mean().item(), left.mean().item()], abs=0.9)  # about 8 and 2
    assert [found["gaps"][name] for name in ("amortization", "approximation")] == expected


def test_ctrl_c_loses_nothing_and_only_the_same_is_not_measured_again(
    run, mnist_root, evaluate_here, monkeypatch
):
    whole, calls, honest = evaluate_here(run)[1], [], ex6.evaluate
    (run / "evaluation.json").unlink()

    def counted(*args):
        calls.append(torch.initial_seed())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(ex6, "evaluate", counted)
    result = run_here(ex6.main, run, "--num-samples", 50, "--data-dir", mnist_root)
    assert result.returncode == 130
    assert len(json.loads((run / "evaluation.json").read_text())["values"]) == 30  # 10 at a time
    assert evaluate_here(run)[1] == whole
    assert len(calls) == 4 + 27 + 1  # and one for the gap
    assert len(set(calls)) == 30  # each part of the images has noise of its own
    assert evaluate_here(run)[1] == whole and len(calls) == 32
    few = evaluate_here(run, draws=5)[1]
    assert few["num_samples"] == 5
    for text in ("[", "[]", '{"epochs": 2}'):
        (run / "evaluation.json").write_text(text)
        assert evaluate_here(run, draws=5)[1] == few
    options = "--binarize --batch-size 50 --hidden-dim 100 --epochs 3 --resume".split()
    options += ["--data-dir", str(mnist_root), "--out", str(run)]
    train.train_run(train.parse_args(options))
    assert evaluate_here(run, draws=5)[1]["epochs"] == 3


def test_the_figure_shows_the_posterior_and_the_identity(tmp_path, monkeypatch):
    """In place, upright, and with numbers that add up."""
    torch.manual_seed(1)
    model = VAE(hidden_dim=30, latent_dim=2).eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder_fc1.weight, std=0.5)
    z = torch.tensor([[1.5, -0.5], [-1.0, 1.0]])
    x = torch.bernoulli(model.decode(z)).view(2, 1, 28, 28)
    figures = []
    monkeypatch.setattr(ex6, "save", lambda *args: figures.append(args) or viz.save(*args))
    monkeypatch.setattr(ex6, "optimise", lambda *args: optimise(*args, steps=100))
    ex6.visualize_posterior(model, x, tmp_path / "posterior.png", "a note")
    (figure, _, note), = figures
    assert note == "a note" and (tmp_path / "posterior.png").stat().st_size > 20_000
    line = torch.linspace(-6, 6, 101)  # every fifth of the figure's 501
    for above, below, image in zip(figure.axes[:2], figure.axes[2:], x, strict=True):
        assert torch.equal(torch.tensor(above.images[0].get_array()), image[0])
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d\d", below.get_xlabel())]
        elbo, kl, total, log_p_x, l_5, l_50, l_5000, least = numbers
        assert elbo + kl == pytest.approx(total, abs=0.02)
        assert total == pytest.approx(log_p_x, abs=0.1 + kl / 20)  # of 5,000 draws
        assert elbo <= l_5 <= l_50 <= l_5000 < log_p_x + 0.5 and 0 <= least < kl
        posterior, _ = posterior_on_grid(model, image[None], line)
        a, b = divmod(posterior.argmax().item(), len(line))
        shown = below.collections[0].get_array().reshape(501, 501)[::5, ::5]
        assert np.unravel_index(shown.argmax(), shown.shape) == (b, a)  # rows go up the y-axis
        (left, right), (low, high) = below.get_xlim(), below.get_ylim()
        assert left < line[a] < right and low < line[b] < high


def test_redrawing_shows_the_binary_pixels_of_a_binarized_run(run, mnist_root, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "draw_run", lambda *args: seen.extend(args[4]))
    train.redraw([str(run), "--data-dir", str(mnist_root)])
    assert torch.equal(torch.cat([images for images, _ in seen]), binary_test_images(mnist_root))


@pytest.mark.parametrize("changed, words", [
    ({"recon": "mse"}, ["--recon mse"]), ({"model": "celeba"}, ["celeba on mnist", "grey"]),
    ({"model": "ae", "recon": "mse"}, ["ae on mnist"]),
])
def test_a_run_that_cannot_be_evaluated_is_refused(run, mnist_root, monkeypatch, changed, words):
    checkpoint = train.load_run(run)[1]
    checkpoint["config"] |= changed
    monkeypatch.setattr(train, "load_run", lambda folder: (None, checkpoint))
    assert_user_error(run_here(ex6.main, run, "--data-dir", mnist_root), str(run), *words)
    assert not (run / "evaluation.json").exists()


def test_a_recipe_is_trained_drawn_and_evaluated(
    mnist_root, tmp_path, monkeypatch, evaluate_here, figures
):
    """On binary pixels, even if trained on grey ones; with figures of 8 x 8 samples and 10 images,
    however many draws an IWAE takes; and with other options on the validation images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IWAE, "importance_samples", 51)
    monkeypatch.setitem(ex6.RECIPES, "iwae", "--model iwae --limit 100 --epochs 1")
    seen, honest = [], ex6.evaluate
    monkeypatch.setattr(ex6, "evaluate", lambda *args: seen.append(args[1]) or honest(*args))
    args = "--num-samples", 5, "--data-dir", mnist_root, "--recipe", "iwae"
    assert run_here(ex6.main, *args).returncode == 0
    images, test = (split.images for split in load_dataset("mnist", mnist_root))
    assert torch.equal(torch.cat(seen[:-1]), binarize_once(test) / 255)
    for name, columns, rows in (("samples", 8, 8), ("reconstruction", 10, 2)):
        width, height = figures[f"{name}.png"][0].get_size_inches() * viz.DPI
        assert (width // 90, height // 90) == (columns, rows)  # 28 + 2 pixels, three times as large
    seen.clear()
    posteriors = []
    monkeypatch.setattr(train, "draw_run", lambda *args: None)
    monkeypatch.setattr(ex6, "visualize_posterior", lambda *args: posteriors.append(args[2]))
    args += "--dataset", "mnist-validation", "--latent-dim", 2, "--out", "runs/other"
    assert run_here(ex6.main, *args).returncode == 0
    held_out = images[-(len(images) // 6) :]
    assert torch.equal(torch.cat(seen[:-1])[: len(held_out)], binarize_once(held_out) / 255)
    assert posteriors == [Path("runs/other/posterior.png")]
    for wrong in ((), ("--recipe",), ("--recipe", "none"), ("runs/other", "--recipe", "iwae")):
        assert_user_error(run_here(ex6.main, *wrong), "--recipe")
