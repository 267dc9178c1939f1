"""Exercise 6: the likelihood by importance sampling, against models whose log p(x) is known."""

import json
import math
import shutil
from pathlib import Path

import ex6_likelihood as ex6
import hypothesis.strategies as st
import pytest
import torch
import train
from conftest import assert_user_error, run_here
from data import binarize_once, load_dataset
from ex6_likelihood import IWAE, PaperVAE, draw_log_weights, evaluate, importance_weighted_bound
from ex6_likelihood import log_likelihood, log_weights
from hypothesis import given
from PIL import Image
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from vae import VAE, BaseVAE, ConvVAE


class LinearGaussian(BaseVAE):
    """x = W z + b + noise of standard deviation s, so p(x) = N(b, W W' + s^2 I), and the posterior
    is a Gaussian, too. W has orthogonal columns, so it is diagonal. The encoder returns it, or
    one that is off by shift sigmas, its own sigma being stretch times too wide."""

    def __init__(self, dims=5, latent_dim=2, s=0.5, shift=0.5, stretch=1.3):
        super().__init__()
        self.latent_dim, self.s, self.shift, self.stretch = latent_dim, s, shift, stretch
        basis = torch.linalg.qr(torch.randn(dims, latent_dim, dtype=torch.float64))[0]
        self.w = basis * torch.linspace(0.5, 2, latent_dim, dtype=torch.float64)
        self.b = torch.randn(dims, dtype=torch.float64)

    def encode(self, x):
        precision = 1 + self.w.pow(2).sum(dim=0) / self.s**2
        mu = (x - self.b) @ self.w / self.s**2 / precision
        logvar = (-precision.log() + 2 * math.log(self.stretch)).expand_as(mu)
        return mu + self.shift * precision.rsqrt(), logvar

    def decode_logits(self, z):
        return z @ self.w.T + self.b  # the mean of x, not a logit

    def recon_loss(self, mean, x):
        return -Normal(mean, self.s).log_prob(x).sum(dim=1)

    def exact(self, x):
        covariance = self.w @ self.w.T + self.s**2 * torch.eye(len(self.b), dtype=torch.float64)
        return MultivariateNormal(self.b, covariance).log_prob(x)

    def draw(self, n: int):
        z = torch.randn(n, self.latent_dim, dtype=torch.float64)
        return z @ self.w.T + self.b + self.s * torch.randn(n, len(self.b), dtype=torch.float64)


linear_gaussians = st.builds(
    lambda seed, *rest: (torch.manual_seed(seed), LinearGaussian(*rest))[1], st.integers(0, 1000),
    st.integers(3, 8), st.integers(1, 3), st.floats(0.3, 1.5), st.floats(-0.5, 0.5),
    st.floats(1, 1.5),
)


def mean_and_error(values):
    return values.mean(dim=0), values.std(dim=0) / len(values) ** 0.5


@given(linear_gaussians, st.integers(1, 40))
def test_a_perfect_encoder_gives_the_exact_likelihood_from_any_draw(model, rows):
    """Where q(z|x) is the posterior every weight is p(x), and the ELBO has no gap."""
    model.shift, model.stretch = 0.0, 1.0
    truth = model.exact(x := model.draw(5))
    torch.testing.assert_close(log_likelihood(model, x, 3, rows), truth, rtol=1e-9, atol=1e-9)
    result = evaluate(model, [(x[:2], None), (x[2:], None)], 3, rows)
    points = [(point["k"], point["bound"]) for point in result["bounds"]]
    assert points == [(k, pytest.approx(truth.mean().item(), abs=1e-9)) for k in (1, 2, 3)]
    assert result["bounds"][0]["spread"] == pytest.approx(0, abs=1e-9)
    assert result["standard_error"] == pytest.approx(truth.std().item() / 5**0.5, rel=1e-6)


@given(linear_gaussians, st.integers(1, 6))
def test_the_estimate_converges_to_the_truth_from_below(model, k):
    """The mean weight is p(x), within the error of the mean; so its logarithm is log p(x)."""
    truth, log_w = model.exact(x := model.draw(3)), draw_log_weights(model, x, 12_000)
    mean, error = mean_and_error((log_w - truth).exp())
    assert ((mean - 1).abs() <= 5 * error + 1e-9).all()
    halves = log_w.view(k, 2, -1, 3)
    few = importance_weighted_bound(halves)  # (2, estimates, images)
    mean, error = mean_and_error(few.flatten(0, 1))
    assert (mean <= truth + 5 * error + 1e-9).all()
    gain = importance_weighted_bound(halves.flatten(0, 1)) - few.mean(dim=0)
    assert (gain >= -1e-9).all()  # twice the draws: more, whatever they are (Jensen)
    assert gain.mean() > 0 or log_w.std(dim=0).max() < 1e-6  # not only if all weights are equal


@pytest.mark.parametrize("architecture, latent_dim", [(VAE, 1), (PaperVAE, 2)])
def test_bernoulli_pixels_agree_with_an_integral_over_a_grid(architecture, latent_dim):
    """No closed form here, but with one or two latents p(x) is a sum over a fine grid of z."""
    model = architecture(input_dim=12, hidden_dim=8, latent_dim=latent_dim).double().eval()
    for name, parameter in model.named_parameters():
        if "decoder" in name or "mu.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    x = (torch.rand(4, 12) < 0.5).double()
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * latent_dim).view(-1, latent_dim)
    with torch.no_grad():
        pixels = Bernoulli(logits=model.decode_logits(grid)[:, None])
    log_p = pixels.log_prob(x).sum(dim=2) + Normal(0, 1).log_prob(grid).sum(dim=1)[:, None]
    truth = torch.logsumexp(log_p, dim=0) + math.log(line[1] - line[0]) * latent_dim
    mean, error = mean_and_error((draw_log_weights(model, x, 50_000) - truth).exp())
    assert ((mean - 1).abs() <= 5 * error).all()
    assert (error < 0.05).all()  # or the line above says nothing


@pytest.mark.parametrize("architecture", [VAE, ConvVAE])
@pytest.mark.parametrize("logit", [1e3, -1e3])
def test_nothing_overflows_where_the_logits_are_huge(architecture, logit):
    model, x = architecture(latent_dim=2).eval(), torch.zeros(2, 1, 28, 28)
    last = model.decoder_fc2 if architecture is VAE else model.decoder_conv[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, logit)
    x[int(logit > 0)] = 1  # the second image is like the outputs
    wrong, right = log_likelihood(model, x, 10).tolist()
    assert wrong == pytest.approx(-784e3, rel=1e-3)
    assert -50 < right < 10  # nothing but the weights p(z) / q(z|x)


def test_the_estimate_does_not_depend_on_how_images_and_draws_are_grouped():
    """Their number in memory does."""
    model, k, seen = LinearGaussian(), 600, []
    x = model.draw(6)
    truth = model.exact(x)  # differs between images far more than the estimates of one
    torch.manual_seed(3)
    single = torch.cat([draw_log_weights(model, image[None], k) for image in x], dim=1)
    (mean, error), (elbo, elbo_error) = map(mean_and_error, ((single - truth).exp(), single))
    decode = model.decode_logits
    model.decode_logits = lambda z: seen.append(len(z)) or decode(z)
    for rows in (7, k, 3 * k, 7 * k):  # parts of an image's draws, one image, three, all
        seen.clear()
        torch.manual_seed(3)
        grouped = log_likelihood(model, x, k, rows)
        if rows <= k:
            torch.testing.assert_close(grouped, importance_weighted_bound(single))
        assert (((grouped - truth).exp() - mean).abs() <= 6 * error).all()
        result = evaluate(model, [(x, None)], k, rows)
        assert max(seen) == min(rows, 6 * k)
        assert abs(result["neg_elbo"] + elbo.mean()) <= 6 * elbo_error.mean()
        assert result["standard_error"] == pytest.approx(truth.std().item() / 6**0.5, rel=0.1)


def test_how_many_rows_fit(monkeypatch):
    assert ex6.rows_at_once(torch.device("cpu")) == 250
    for free, rows in ((8e9, 20_000), (80e9, 65_536)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(90e9)))
        assert ex6.rows_at_once(torch.device("cuda")) == rows


def test_the_spread_of_a_bound_is_that_of_its_estimates():
    """Not that between images, and no smaller where an image has but two estimates."""
    model = LinearGaussian()
    x = model.draw(2) + torch.tensor([[0.0], [3.0]])
    points = {p["k"]: p for p in evaluate(model, [(x.repeat(300, 1), None)], 2000)["bounds"]}
    for k in (1, 5, 1000):
        log_w = draw_log_weights(model, x, 600 * k, 10**5).view(k, -1, 2)
        variance = importance_weighted_bound(log_w).var(dim=0).mean().item()
        assert points[k]["spread"] == pytest.approx(variance**0.5, rel=0.18)
    assert points[2000]["spread"] is None


@pytest.mark.parametrize("beta, k", [(1.0, 6), (0.3, 6), (1.0, 1)])
def test_weights_bound_and_gradients_are_those_of_the_densities(beta, k):
    """Those of torch.distributions, at the same noise, through every path of the gradient."""
    model, x = IWAE(input_dim=9, hidden_dim=5, latent_dim=2).double(), torch.rand(4, 9).double()
    model.importance_samples, x = k, x.round()
    torch.manual_seed(5)
    terms = model.loss(x, None, beta)
    torch.manual_seed(5)
    epsilon = torch.randn(k, 4, 2, dtype=x.dtype)
    mu, logvar = model.encode(x)
    posterior, prior = Normal(mu, logvar.exp().sqrt()), Normal(torch.zeros_like(mu), 1.0)
    z = posterior.loc + posterior.scale * epsilon
    log_px = Bernoulli(logits=model.decode_logits(z)).log_prob(x).sum(dim=2)
    log_w = log_px + beta * (prior.log_prob(z) - posterior.log_prob(z)).sum(dim=2)
    for ours, theirs in zip(log_weights(model, x, mu, logvar, epsilon, beta), (log_w, -log_px)):
        torch.testing.assert_close(ours, theirs)
    total = -log_w.exp().mean(dim=0).log().sum()  # of so few pixels nothing underflows
    expected = total, -log_px.sum() / k, kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected))
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in (terms[0], total)]
    torch.testing.assert_close(*gradients)


def test_the_papers_network_and_that_recipes_are_options_of_train():
    model, x = IWAE(), torch.rand(3, 784)
    h = torch.tanh(model.encoder[2](torch.tanh(model.encoder[0](x))))
    torch.testing.assert_close(model.encode(x.view(3, 1, 28, 28))[0], model.fc_mu(h))
    h = torch.tanh(model.decoder[2](torch.tanh(model.decoder[0](z := torch.randn(3, 50)))))
    torch.testing.assert_close(model.decode_logits(z), model.decoder[4](h))
    shapes = [(200, 784), (200, 200), *[(50, 200)] * 2, (200, 50), (200, 200), (784, 200)]
    assert [p.shape for p in model.parameters() if p.dim() == 2] == shapes
    assert model.importance_samples == 5
    assert all(train.parse_args(text.split()).recon == "bce" for text in ex6.RECIPES.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mnist_root):
    folder = tmp_path_factory.mktemp("runs") / "small"
    options = f"--binarize --epochs 2 --batch-size 50 --device cpu --data-dir {mnist_root}"
    train.train_run(train.parse_args([*options.split(), "--out", str(folder)]))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A small run on binary pixels."""
    return shutil.copytree(trained, tmp_path / "$run")


@pytest.fixture
def evaluate_here(mnist_root, monkeypatch):
    """Evaluate runs; return what was printed, and found of the first; keep figures and notes."""
    save = lambda figure, path, note="": evaluate_here.figures.append((figure, note))
    monkeypatch.setattr(ex6, "save", save)

    def evaluate_here(folder, *options, draws=40):
        options += "--num-samples", draws, "--data-dir", mnist_root
        result = run_here(ex6.main, folder, *options)
        assert result.returncode == 0, result.stderr
        return result.stdout, json.loads((folder / "evaluation.json").read_text())

    evaluate_here.figures = []
    return evaluate_here


def evaluate_by_hand(folder, root, k=40):
    """By torch.distributions, on binarized test images: -ELBO, -L_k, active units, error of L_k."""
    model, _ = train.load_run(folder)
    x = binarize_once(load_dataset("mnist", root)[1].images) / 255
    with torch.no_grad():
        mu, logvar = model.encode(x)
        posterior = Normal(mu, logvar.exp().sqrt())
        z = posterior.sample((k,))
        pixels = Bernoulli(logits=model.decode_logits(z.flatten(0, 1)).view(k, 300, 784))
    log_w = pixels.log_prob(x.flatten(1)).sum(dim=2)
    log_w += (Normal(0, 1).log_prob(z) - posterior.log_prob(z)).sum(dim=2)
    bound = torch.logsumexp(log_w, dim=0) - math.log(k)
    active, error = (mu.var(dim=0) > 0.01).sum().item(), bound.std().item() / 300**0.5
    return [-log_w.mean().item(), -bound.mean().item(), active, error]


def test_an_evaluation_agrees_with_one_by_hand(run, mnist_root, evaluate_here):
    printed, found = evaluate_here(run)
    keys = "neg_elbo", "neg_log_likelihood", "active_units", "standard_error"
    elbo, bound, _, error = numbers = [found[key] for key in keys]
    assert found["images"] == 300 and found["num_samples"] == 40 and found["epochs"] == 2
    difference = torch.tensor(numbers) - torch.tensor(evaluate_by_hand(run, mnist_root))
    assert (difference.abs() <= torch.tensor([0.3, 0.3, 0, 0.03])).all(), difference
    assert elbo == pytest.approx(train.load_run(run)[1]["history"][-1]["test_loss"], abs=0.5)
    assert found["gap"] == pytest.approx(elbo - bound) and found["gap"] > 1
    bounds, spreads = ([p[key] for p in found["bounds"]] for key in ("bound", "spread"))
    assert [point["k"] for point in found["bounds"]] == [1, 2, 5, 10, 20, 40]
    assert bounds == sorted(bounds) and (-bounds[0], -bounds[-1]) == (elbo, bound)
    assert all(a > b > 0 for a, b in zip(spreads[:5], spreads[1:5])) and spreads[5] is None
    line = f"-ELBO {elbo:.2f}  -log p(x) {bound:.2f} +- {error:.2f}  gap {found['gap']:.2f} nats"
    assert line in printed


def test_only_the_same_evaluation_is_not_repeated(run, mnist_root, evaluate_here, monkeypatch):
    calls = []
    monkeypatch.setattr(ex6, "evaluate", lambda *args: calls.append(args) or evaluate(*args))
    first = evaluate_here(run)[1]
    assert evaluate_here(run)[1] == first and len(calls) == 1
    assert evaluate_here(run, "--seed", 1)[1]["bounds"] != first["bounds"] and len(calls) == 2
    assert evaluate_here(run, draws=2)[1]["num_samples"] == 2 and len(calls) == 3
    (run / "evaluation.json").write_text("[")
    assert evaluate_here(run)[1] | {"seconds": 0} == first | {"seconds": 0} and len(calls) == 4
    options = f"--binarize --batch-size 50 --resume --epochs 3 --data-dir {mnist_root} --out {run}"
    train.train_run(train.parse_args(options.split()))
    assert evaluate_here(run)[1]["epochs"] == 3 and len(calls) == 5


def test_the_figure_has_every_bound_and_the_notice(run, evaluate_here, monkeypatch):
    other = shutil.copytree(run, run.with_name("$x^$"))  # which is no formula
    model, checkpoint = train.load_run(run)
    replaced = {"config": checkpoint["config"] | {"notice": "built-in digits, not mnist"}}
    load = lambda folder: (model, checkpoint | (replaced if folder == other else {}))
    monkeypatch.setattr(train, "load_run", load)
    printed, first = evaluate_here(run, other, draws=8)
    (figure, note), = evaluate_here.figures
    figure.draw_without_rendering()
    assert note == "built-in digits, not mnist"
    assert str(other) in printed.splitlines()[-1] and note.upper() in printed.splitlines()[-1]
    found = first, json.loads((other / "evaluation.json").read_text())
    axes, = figure.axes
    for line, band, evaluation in zip(axes.lines, axes.collections, found, strict=True):
        points = [(p["k"], p["bound"], p["spread"]) for p in evaluation["bounds"]]
        assert [k for k, *_ in points] == [1, 2, 5, 8]
        assert [*map(tuple, line.get_xydata())] == [(k, bound) for k, bound, _ in points]
        edges = {(k, bound + sign * spread) for k, bound, spread in points[:2] for sign in (-1, 1)}
        assert edges <= {*map(tuple, band.get_paths()[0].vertices)}
        assert f"{points[0][1]:.2f} to {points[-1][1]:.2f}" in line.get_label()


def test_redrawing_shows_the_binary_pixels_of_a_binarized_run(run, mnist_root, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "draw_run", lambda *args: seen.extend(args[4]))
    train.redraw([str(run), "--data-dir", str(mnist_root)])
    expected = binarize_once(load_dataset("mnist", mnist_root)[1].images).float() / 255
    assert torch.equal(torch.cat([images for images, _ in seen]), expected)


@pytest.mark.parametrize("changed, words", [
    ({"recon": "mse"}, ["--recon mse"]), ({"dataset": "faces"}, ["faces", "grey"]),
    ({"model": "ae", "recon": "mse"}, ["ae on mnist"]),
    ({"test_images": 299}, ["tested on 299 images", "--data-dir"]),
])
def test_a_run_that_cannot_be_evaluated_is_refused(run, mnist_root, monkeypatch, changed, words):
    checkpoint = train.load_run(run)[1]
    checkpoint["config"] |= changed
    monkeypatch.setattr(train, "load_run", lambda folder: (None, checkpoint))
    assert_user_error(run_here(ex6.main, run, "--data-dir", mnist_root), str(run), *words)
    assert not (run / "evaluation.json").exists()


def test_a_recipe_is_trained_drawn_and_evaluated(mnist_root, tmp_path, monkeypatch):
    """On binary pixels, even if trained on grey ones; with figures of 8 x 8 samples and 10 images,
    however many draws an IWAE takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IWAE, "importance_samples", 101)
    monkeypatch.setitem(ex6.RECIPES, "iwae", "--model iwae --limit 100 --epochs 1")
    seen = []
    monkeypatch.setattr(ex6, "evaluate", lambda *args: seen.append(args[1:3]) or evaluate(*args))
    args = "--recipe=iwae", "--num-samples=2", "--data-dir", mnist_root
    assert run_here(ex6.main, *args).returncode == 0
    assert_user_error(run_here(ex6.main), "--recipe")
    (loader, draws), = seen
    assert torch.equal(loader.images, binarize_once(load_dataset("mnist", mnist_root)[1].images))
    assert draws == 2 and Path("runs/likelihood/iwae/bounds.png").is_file()
    for name, columns, rows in (("samples", 8, 8), ("reconstruction", 10, 2)):
        width, height = Image.open(f"runs/likelihood/iwae/{name}.png").size
        assert (width // 90, height // 90) == (columns, rows)  # 28 + 2 pixels, three times as large
