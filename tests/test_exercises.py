"""The exercises' own mathematics, as properties, and that a sweep resumes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import common
from common import markdown_table
from conftest import PROJECT, assert_user_error, run_here
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal

import ex5_kl_annealing
import metrics
import data
import train
from data import Batches
from ex3_conditional_vae import ConditionalVAE, one_hot
from ex4_mse_vs_bce import SigmaVAE, best_gaussian
from ex5_kl_annealing import RowVAE
from vae import VAE, kl_divergence_gaussian, squared_error, vae_loss
from viz import encode_all, kl_per_latent

seeds = st.integers(0, 10**6)


# ------------------------------------------------------------ what train.py gained


@given(st.integers(0, 50), st.integers(1, 100))
def test_the_annealing_weight_rises_from_above_0_to_1_and_stays(kl_anneal, epoch):
    weight, later = (train.kl_weight(e, kl_anneal) for e in (epoch, epoch + 1))
    assert 0 < weight <= later <= 1
    assert (weight == 1) == (epoch >= kl_anneal)
    if epoch <= kl_anneal:
        assert weight == pytest.approx(epoch * train.kl_weight(1, kl_anneal))


def run(root, out, *options):
    argv = ["--data-dir", str(root), "--limit", "300", "--out", str(out), *options]
    return train.train_run(train.parse_args(argv))


def test_annealing_trains_at_its_weight_and_tests_at_the_full_beta(mnist_root, tmp_path):
    _, _, config, history, *_ = run(
        mnist_root, tmp_path / "run", "--epochs", "3", "--beta", "4", "--kl-anneal", "2"
    )
    assert config["kl_anneal"] == 2
    assert [row["beta"] for row in history] == [2, 4, 4]
    for row in history:
        weighted = row["train_recon"] + row["beta"] * row["train_kl"]
        assert row["train_loss"] == pytest.approx(weighted, rel=1e-6)
        assert row["test_loss"] == pytest.approx(row["test_recon"] + 4 * row["test_kl"], rel=1e-6)


def test_beta_1_is_the_vae_and_so_is_an_annealing_of_one_epoch(mnist_root, tmp_path):
    """A step on a bound written out with torch.distributions, that has no beta."""
    options = ["--epochs", "1", "--batch-size", "300", "--kl-anneal", "1"]
    _, trained, *_, loader, _ = run(mnist_root, tmp_path / "run", *options)
    torch.manual_seed(0)
    model = VAE()
    split = data.load_dataset("mnist", mnist_root)[0]
    torch.manual_seed(1_000_003)
    (x, _), = Batches(split.images[:300], split.labels[:300], 300, shuffle=True)
    mu, logvar = model.encode(x)
    posterior, prior = Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)
    pixels = Bernoulli(logits=model.decode_logits(posterior.rsample()), validate_args=False)
    kl = torch.distributions.kl_divergence(posterior, prior)
    (kl.sum() - pixels.log_prob(x.flatten(1)).sum()).div(300).backward()
    torch.optim.Adam(model.parameters(), lr=2e-3).step()
    for ours, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_recon_mse_trains_and_resumes_on_the_squared_error(mnist_root, tmp_path):
    options = ["--recon", "mse", "--beta", "0.1"]
    *_, history, loader, _ = run(mnist_root, tmp_path / "whole", "--epochs", "2", *options)
    run(mnist_root, tmp_path / "parts", "--epochs", "1", *options)
    again = run(mnist_root, tmp_path / "parts", "--epochs", "2", "--resume", *options)[3]
    for a, b in zip(history, again, strict=True):
        assert {k: a[k] for k in a if k != "seconds"} == {k: b[k] for k in b if k != "seconds"}
    model, _ = train.load_run(tmp_path / "parts")
    with torch.no_grad():
        x = loader.images / 255
        total, recon, kl = model.loss(x, loader.labels, 0.1)
        mu, logvar = model.encode(x)
    assert kl.item() == pytest.approx(kl_divergence_gaussian(mu, logvar).sum().item(), rel=1e-5)
    assert total.item() == pytest.approx(recon.item() + 0.1 * kl.item(), rel=1e-5)
    # The noise of z moves the mean of 300 images by less than a tenth.
    error = squared_error(model.decode_logits(mu), x).sum().item()
    assert 0.9 < recon.item() / error < 1.1


@pytest.mark.parametrize("options", [["--kl-anneal", "3"], ["--recon", "bce"]])
def test_the_autoencoder_has_neither_kl_nor_bce(options, mnist_root):
    result = run_here(train.main, "--model", "ae", "--data-dir", mnist_root, *options)
    assert_user_error(result, options[0], "--model ae")


# ----------------------------------------------------------------------- of codes


@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_mutual_information_is_that_of_the_joint_counts(seed, ka, kb):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(ka, size=200), rng.integers(kb, size=200)
    b = np.where(rng.random(200) < 0.5, a % kb, b)
    expected = 0.0
    for i in range(ka):
        for j in range(kb):
            p, q, r = np.mean((a == i) & (b == j)), np.mean(a == i), np.mean(b == j)
            expected += p * math.log(p / (q * r)) if p else 0
    a, b = torch.tensor(a), torch.tensor(b)
    assert metrics.mutual_information(a, b) == pytest.approx(expected, abs=1e-9)
    assert metrics.mutual_information(b, a) == pytest.approx(expected, abs=1e-9)


def factors_of(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Four independent factors, one of them a class."""
    generator = torch.Generator().manual_seed(seed)
    factors = {name: torch.rand(n, generator=generator) for name in "abc"}
    return factors | {"class": torch.randint(4, (n,), generator=generator)}


def scores(z, factors) -> tuple[float, float, float]:
    gaps = metrics.mutual_information_gap(z, factors)
    assert gaps.keys() == factors.keys() and all(-1e-9 <= gap <= 1 + 1e-9 for gap in gaps.values())
    dci = metrics.dci(z, factors)
    assert -0.02 <= dci.pop("informativeness") <= 1  # not 0 on images that it was not fitted to
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in dci.values())
    return sum(gaps.values()) / 4, dci["disentanglement"], dci["completeness"]


HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


@given(seeds)
def test_disentanglement_is_high_if_aligned_low_if_rotated_0_for_noise(seed):
    factors = factors_of(2000, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2000, 4, generator=generator)
    aligned = torch.stack(list(factors.values()), dim=1).float()
    # Noise on top, for the values of a class are not enough to tell bins apart.
    aligned = metrics.standardize(aligned + 1e-3 * noise)
    assert min(scores(aligned, factors)) > 0.8
    assert min(scores(torch.cat([aligned, noise], dim=1), factors)) > 0.75
    assert min(metrics.mutual_information_gap(aligned, factors).values()) > 0.9
    twice = torch.cat([aligned, aligned], dim=1)  # nothing has a latent of its own
    assert max(metrics.mutual_information_gap(twice, factors).values()) < 0.01
    assert max(scores(aligned @ HADAMARD, factors)) < 0.3
    assert max(scores(noise, factors)) < 0.05


@given(seeds)
def test_disentanglement_ignores_order_and_scale_of_codes(seed):
    factors = factors_of(500, seed)
    generator = torch.Generator().manual_seed(seed)
    z = torch.stack(list(factors.values()), dim=1) @ torch.randn(4, 6, generator=generator)
    z += 0.3 * torch.randn(500, 6, generator=generator)
    order, scale = torch.randperm(6, generator=generator), 2.0 ** torch.arange(-3, 3)
    assert scores(z[:, order] * scale - 1, factors) == pytest.approx(scores(z, factors), abs=1e-4)


def test_one_latent_of_two_factors_is_complete_but_not_disentangled():
    generator = torch.Generator().manual_seed(0)
    factors = {name: torch.rand(5000, generator=generator) for name in "ab"}
    both = (factors["a"] + factors["b"])[:, None]
    noise = torch.randn(5000, 3, generator=generator)
    dci = metrics.dci(torch.cat([both, noise], dim=1), factors)
    assert dci["completeness"] > 0.95 and dci["disentanglement"] < 0.05
    assert dci["informativeness"] == pytest.approx(0.5, abs=0.1)


@given(seeds)
def test_the_lasso_satisfies_the_conditions_of_its_minimum(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 6, generator=generator, dtype=torch.double)
    x[:, 1] += x[:, 0]  # correlated columns
    x = metrics.standardize(x)
    y = x @ torch.randn(6, 2, generator=generator, dtype=torch.double)
    y = metrics.standardize(y + torch.randn(300, 2, generator=generator, dtype=torch.double))
    w = metrics.lasso(x, y, penalty=0.1)
    gradient = x.T @ (y - x @ w) / len(x)
    assert (gradient.abs() <= 0.1 + 1e-6).all()
    used = w != 0
    assert torch.allclose(gradient[used], 0.1 * w[used].sign(), atol=1e-6)


def test_the_kl_of_the_latents_adds_up_to_the_kl(drawn):
    loader = Batches(drawn.images[:300], drawn.labels[:300], 70)
    mu, logvar, labels = encode_all(VAE(), loader, "cpu")
    assert torch.equal(labels, drawn.labels[:300]) and mu.shape == logvar.shape == (300, 20)
    kl = kl_per_latent(mu, logvar)
    assert kl.shape == (20,)
    expected = kl_divergence_gaussian(mu, logvar).mean().item()
    assert kl.sum().item() == pytest.approx(expected, rel=1e-5)


def test_the_linear_probe_finds_what_is_linear_and_nothing_in_noise():
    labels = torch.arange(4000) % 10
    codes = torch.randn(4000, 20)
    assert metrics.linear_probe(codes[:3000], labels[:3000], codes[3000:], labels[3000:]) < 0.15
    codes[:, :10] += 20 * one_hot(labels)
    assert metrics.linear_probe(codes[:3000], labels[:3000], codes[3000:], labels[3000:]) == 1
    z, y = torch.randn(200, 1) + 10, torch.arange(200) % 2  # two classes, none of them around 0
    z = z + 10 * y[:, None]
    assert metrics.linear_probe(z, y, z, y) == 1


def test_the_total_correlation_is_that_of_a_gaussian_and_0_if_independent():
    z = torch.randn(50_000, 3)
    assert metrics.total_correlation(z) == pytest.approx(0, abs=1e-3)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]  # two of correlation 0.6: -log(1 - 0.36) / 2 nats
    assert metrics.total_correlation(5 * z + 1) == pytest.approx(-math.log(0.64) / 2, abs=0.01)


# --------------------------------------------------------------------- of samples


@given(seeds, st.integers(1, 5))
def test_precision_and_recall_are_1_if_identical_0_if_disjoint(seed, k):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 100, 8, generator=generator)
    assert metrics.precision_recall(a, a, k) == (1, 1, 1)
    assert metrics.precision_recall(a, b + 100, k) == (0, 0, 0)
    precision, recall, coverage = metrics.precision_recall(a, b, k)
    assert metrics.precision_recall(b, a, k)[:2] == (recall, precision)
    assert metrics.precision_recall(3 * a - 1, 3 * b - 1, k) == (precision, recall, coverage)


def test_a_missing_mode_costs_recall_and_an_invented_one_precision():
    real = torch.cat([torch.randn(300, 8), torch.randn(100, 8) + 50])
    half = torch.randn(400, 8)
    precision, recall, coverage = metrics.precision_recall(real, half)
    assert precision > 0.7 and 0.5 < recall <= 0.75 and 0.5 < coverage <= 0.75
    precision, recall, coverage = metrics.precision_recall(half, real)
    assert 0.5 < precision <= 0.75 and recall > 0.7 and coverage > 0.7
    # One image far out has a ball around everything: recall believes it, coverage does not.
    outlier = torch.cat([torch.full((1, 8), 1000.0), half[:3] + 3000])
    assert metrics.precision_recall(half, outlier)[1:] == (1, 0)


def test_precision_is_the_share_within_the_k_nearest_neighbours():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    generated = torch.tensor([[-0.9], [4.9], [18.0]])
    # Radii of the real points: k = 1: 1, 1, 2, 7; k = 2: 3, 2, 3, 9.
    # -0.9 is in the ball of 0 only, 4.9 in those of 3 and 10, 18 in that of 10 if k is 2.
    precision, _, coverage = metrics.precision_recall(real, generated, k=1)
    assert (precision, coverage) == pytest.approx((2 / 3, 3 / 4))
    precision, _, coverage = metrics.precision_recall(real, generated, k=2)
    assert (precision, coverage) == (1, 1)


def test_sample_quality_sees_confidence_and_classes():
    class Sure(metrics.Classifier):
        """Reads its class from the first pixel, with certainty."""

        def features(self, x):
            return x.flatten(1)

        def forward(self, x):
            return torch.log(F.one_hot((x.flatten(1)[:, 0] * 10).long(), 10) + 1e-12)

    real = torch.cat([torch.rand(100, 784), torch.rand(100, 784) + 10])
    images = torch.rand(200, 784)
    images[:, 0] = torch.arange(200) % 5 / 10 + 0.05
    quality = metrics.sample_quality(Sure(), images, real)
    assert quality["confidence"] == pytest.approx(1)
    assert quality["class entropy"] == pytest.approx(math.log(5))
    # Nothing is like the other half of what is real.
    assert quality["precision"] > 0.5 >= quality["recall"] > 0.25
    assert quality["coverage"] <= 0.5


def test_the_classifier_learns_in_the_projects_loop(drawn):
    model = metrics.Classifier()
    loader = Batches(drawn.images[:2000], drawn.labels[:2000], 50, shuffle=True)
    test_loader = Batches(drawn.images[2000:3000], drawn.labels[2000:3000], 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(3):
        train.train_epoch(model, loader, optimizer, "cpu")
    loss, errors, _ = train.test_epoch(model, test_loader, "cpu")
    images, labels = drawn.images[2000:3000] / 255, drawn.labels[2000:3000]
    right = (model(images).argmax(dim=1) == labels).float().mean().item()
    assert errors == pytest.approx(1 - right, abs=1e-6) and right > 0.85
    expected = F.cross_entropy(model.head(model.features(images)), labels).item()
    assert loss == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------- conditional VAE


def test_labels_reach_both_networks_of_the_conditional_vae(drawn):
    model = ConditionalVAE()
    x, labels = drawn.images[:64] / 255, drawn.labels[:64]
    model.loss(x, labels)[0].backward()
    for layer in (model.encoder.hidden[0], model.decoder[0]):
        reached = layer.weight.grad[:, -10:].abs().sum(dim=0) > 0
        assert reached.tolist() == [digit in labels for digit in range(10)]
    with torch.no_grad():
        y, others = one_hot(labels), one_hot((labels + 1) % 10)
        mu, logvar = model.encode(x, y)
        assert mu.shape == logvar.shape == (64, 20)
        assert ((model.encode(x, others)[0] - mu).abs().sum(dim=1) > 0).all()
        images, changed = (model.decode(torch.cat([mu, label], dim=1)) for label in (y, others))
        assert images.shape == (64, 784)
        assert ((images - changed).abs().sum(dim=1) > 0).all()


def test_the_loss_of_the_conditional_vae_is_that_of_its_parts(drawn):
    model = ConditionalVAE()
    x, labels = drawn.images[:8] / 255, drawn.labels[:8]
    torch.manual_seed(1)
    terms = model.loss(x, labels, 3.0)
    torch.manual_seed(1)
    x_logits, mu, logvar = model(x, one_hot(labels))
    assert torch.equal(torch.stack(terms), torch.stack(vae_loss(x_logits, x, mu, logvar, 3.0)))


def test_the_conditional_vae_draws_what_it_is_asked_for():
    """Two classes of plain images, told apart by the label alone."""
    x = torch.zeros(64, 784)
    labels = torch.arange(64) % 2
    x[labels == 1, :392] = 1
    model = ConditionalVAE(hidden_dim=32, latent_dim=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(x, labels)[0].backward()
        optimizer.step()
    means = model.sample(torch.arange(100) % 2)[:, :392].view(50, 2, -1).mean(dim=(0, 2))
    assert means[0] < 0.1 and means[1] > 0.9


# ------------------------------------------------- squared errors as likelihoods


@given(st.floats(0.5, 200), st.floats(0.2, 5))
def test_the_best_gaussian_is_a_density_and_no_variance_beats_it(error, factor):
    def negative_log_density(variance):  # of 100 pixels that are all off by the same
        off = torch.full((100,), (error / 100) ** 0.5, dtype=torch.float64)
        return -Normal(0, variance**0.5).log_prob(off).sum().item()

    best = best_gaussian(torch.tensor(error, dtype=torch.float64), 100).item()
    assert best == pytest.approx(negative_log_density(error / 100), abs=1e-3)
    assert negative_log_density(factor * error / 100) >= best - 1e-3


@given(st.floats(0.01, 2))
def test_the_squared_error_with_a_beta_is_a_gaussian_of_variance_half_of_it(beta):
    """Their gradients are the same up to the factor beta."""
    x = torch.rand(5, 784)
    gradients = []
    for kind in ("mse", "gaussian"):
        torch.manual_seed(2)
        model = VAE(hidden_dim=8)
        x_logits, mu, logvar = model(x)
        if kind == "mse":
            total = vae_loss(x_logits, x, mu, logvar, beta, squared_error)[0]
        else:
            pixels = Normal(torch.sigmoid(x_logits), (beta / 2) ** 0.5)
            kl = kl_divergence_gaussian(mu, logvar).sum()
            total = beta * (kl - pixels.log_prob(x).sum())
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_the_sigma_vae_uses_the_variance_of_its_batch(drawn):
    model = SigmaVAE()
    x, labels = drawn.images[:50] / 255, drawn.labels[:50]
    torch.manual_seed(1)
    total, recon, kl = model.loss(x, labels, 2.0)
    torch.manual_seed(1)
    x_logits, mu, logvar = model(x)
    off = (x.flatten(1) - torch.sigmoid(x_logits)).detach()
    density = Normal(0, off.pow(2).mean().sqrt()).log_prob(off).sum().item()
    assert recon.item() == pytest.approx(-density, rel=1e-4)
    assert kl.item() == pytest.approx(kl_divergence_gaussian(mu, logvar).sum().item(), rel=1e-5)
    assert total.item() == pytest.approx(recon.item() + 2 * kl.item(), rel=1e-5)


# ------------------------------------------------------------------ rows of pixels


@given(st.integers(0, 27))
def test_a_row_is_predicted_from_the_code_and_the_rows_above_it(row):
    model = RowVAE()
    z, x = torch.randn(2, 20), torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        logits = model.decode_logits(z, x)
        assert logits.shape == (2, 28, 28)
        changed = x.clone()
        changed[:, :, row] = 1 - changed[:, :, row]
        after = model.decode_logits(z, changed)
        assert torch.equal(after[:, : row + 1], logits[:, : row + 1])
        if row < 27:
            assert (after[:, row + 1] != logits[:, row + 1]).any()
        assert (model.decode_logits(z + 1, x)[:, 0] != logits[:, 0]).any()


def test_the_row_vae_learns_in_the_projects_loop(drawn):
    model = RowVAE()
    loader = Batches(drawn.images[:500], drawn.labels[:500], 50)
    before = train.test_epoch(model, loader, "cpu")
    trained = train.train_epoch(model, loader, torch.optim.Adam(model.parameters(), 2e-3), "cpu")
    assert train.test_epoch(model, loader, "cpu")[0] < trained[0] < before[0]


# ------------------------------------------------------------------------- sweeps


def test_the_table_has_mean_and_spread_of_every_setting():
    rows = [{"beta": b, "kl": v} for b, v in ((1, 2.0), (4, 1.0), (1, 4.0), (4, 1.0))]
    table = markdown_table(rows, "beta", {"kl": ".2f"}).splitlines()
    assert table == ["| beta | kl |", "| --- | --- |", "| 1 | 3.00 ± 1.41 |", "| 4 | 1.00 ± 0.00 |"]
    assert markdown_table(rows[:2], "beta", {"kl": ".1f"}).endswith("| 4 | 1.0 |")


def test_an_interrupted_sweep_goes_on_where_it_was(mnist_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_epoch, calls = train.train_epoch, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", counted)
    options = ["--data-dir", mnist_root, "--epochs", "2", "--seeds", "0", "--limit", "256"]
    assert run_here(ex5_kl_annealing.main, *options).returncode == 130
    result = run_here(ex5_kl_annealing.main, *options)
    # Four models, two epochs each; the fourth call was lost, and with it nothing else.
    assert result.returncode == 0 and len(calls) == 4 * 2 + 1, result.stderr
    results = tmp_path / "runs/exercises/ex5_kl_annealing-mnist-epochs2-seeds0-limit256"
    first = json.loads(results.with_suffix(".json").read_text())
    assert run_here(ex5_kl_annealing.main, *options).stdout == result.stdout
    assert len(calls) == 4 * 2 + 1
    runs = [row["run"] for row in first["rows"]]
    assert runs == ["mlp", "mlp, annealed", "rows", "rows, annealed"]
    assert results.with_suffix(".png").stat().st_size > 0
    assert results.with_suffix(".md").read_text() in result.stdout


def test_a_quick_look_does_not_overwrite_the_full_results():
    def name(*options):
        return common.parse_args(list(options), "ex1", "", ("mnist", "digits")).name

    assert name() == name("--seeds", "0", "1", "2", "2") == "ex1-mnist"
    assert name("--dataset", "digits") == "ex1-digits"
    assert name("--epochs", "1", "--seeds", "0", "3", "--limit", "60") == (
        "ex1-mnist-epochs1-seeds0-3-limit60"
    )


def test_the_answers_quote_the_tables_of_the_results():
    answers = (PROJECT / "exercises/README.md").read_text()
    tables = sorted((PROJECT / "exercises/results").glob("*.md"))
    assert len(tables) >= 7
    for table in tables:
        assert table.read_text().strip() in answers, table.name
        asked = json.loads(table.with_suffix(".json").read_text())
        assert asked["seeds"] == [0, 1, 2] and asked["limit"] is None
