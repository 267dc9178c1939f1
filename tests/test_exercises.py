"""The exercises: their mathematics as properties, and what their main functions find."""

import json
import re
from pathlib import Path

import common
import data
import draw
import ex1_beta_vae as ex1
import ex2_latent_dim as ex2
import ex3_conditional_vae as ex3
import ex4_mse_vs_bce as ex4
import ex5_kl_annealing as ex5
import ex6_likelihood
import metrics
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train
from conftest import PROJECT, run_here
from data import load_dataset
from hypothesis import given, settings, strategies as st
from torch.autograd.functional import jacobian
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal, kl_divergence
from vae import vae_loss

generators = st.builds(lambda seed: torch.Generator().manual_seed(seed), st.integers(0, 10**6))


def entropy(classes) -> float:
    return Categorical(classes.bincount().double()).entropy().item()


@given(generators, st.integers(2, 12), st.integers(2, 12))
def test_mutual_information_is_what_the_entropies_have_in_common(generator, ka, kb):
    a, b, change = (torch.randint(k, (200,), generator=generator) for k in (ka, kb, 2))
    b = torch.where(change > 0, a % kb, b)
    expected = pytest.approx(entropy(a) + entropy(b) - entropy(kb * a + b), abs=1e-9)
    assert metrics.mutual_information(a, b) == expected == metrics.mutual_information(b, a)


def scores(z, factors) -> tuple[float, float, float]:
    gaps = metrics.mutual_information_gap(z, factors)
    assert gaps.keys() == factors.keys() and all(-1e-9 <= gap <= 1 + 1e-9 for gap in gaps.values())
    dci = metrics.dci(z, factors)
    assert -0.05 <= dci.pop("informativeness") <= 1  # not 0 on images that it was not fitted to
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in dci.values())
    return sum(gaps.values()) / 4, dci["disentanglement"], dci["completeness"]


HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


@settings(max_examples=4)
@given(generators)
def test_disentanglement_is_high_if_aligned_low_if_rotated_0_for_noise(generator):
    factors = {name: torch.rand(2000, generator=generator) for name in "abc"}
    factors["class"] = torch.randint(4, (2000,), generator=generator)
    noise = torch.randn(2000, 4, generator=generator)
    aligned = torch.stack(list(factors.values()), dim=1)
    # Noise on top, for the values of a class are not enough to tell bins apart.
    aligned = metrics.standardize(aligned + 1e-3 * noise)
    assert min(scores(aligned, factors)) > 0.8
    assert min(scores(torch.cat([aligned, noise], dim=1), factors)) > 0.75
    assert min(metrics.mutual_information_gap(aligned, factors).values()) > 0.9
    twice = torch.cat([aligned, aligned], dim=1)  # nothing has a latent of its own
    assert max(metrics.mutual_information_gap(twice, factors).values()) < 0.01
    assert max(scores(aligned @ HADAMARD, factors)) < 0.3
    assert max(scores(noise, factors)) < 0.05
    mixed = aligned @ HADAMARD + 0.3 * noise
    changed = mixed[:, [2, 0, 3, 1]] * torch.tensor([0.25, 1, 8, 2]) - 1  # order, scale, place
    assert scores(changed, factors) == pytest.approx(scores(mixed, factors), abs=1e-4)


def test_dci_is_of_weights_fitted_on_one_half_and_of_errors_on_the_other():
    a, b = torch.rand(2, 5000)
    dci = metrics.dci(torch.cat([(a + b)[:, None], torch.randn(5000, 3)], dim=1), {"a": a, "b": b})
    # One latent of two factors is complete, but not disentangled.
    assert dci["completeness"] > 0.95 and dci["disentanglement"] < 0.05
    assert dci["informativeness"] == pytest.approx(0.5, abs=0.1)
    for half in (slice(2500), slice(2500, 5000)):  # in which alone the factor is known
        z = torch.randn(5000, 2)
        z[half, 0] = (a[half] - 0.5) * 12**0.5
        assert metrics.dci(z, {"a": a})["informativeness"] < 0.1


@given(generators)
def test_the_lasso_satisfies_the_conditions_of_its_minimum(generator):
    x, noise = torch.randn(2, 300, 6, generator=generator, dtype=torch.double)
    x[:, 1] += x[:, 0]  # correlated columns
    x = metrics.standardize(x)
    y = x @ torch.randn(6, 2, generator=generator, dtype=torch.double)
    y = metrics.standardize(y + noise[:, :2])
    w = metrics.lasso(x, y, penalty=0.1)
    gradient = x.T @ (y - x @ w) / len(x)
    assert (gradient.abs() <= 0.1 + 1e-6).all()
    assert torch.allclose(gradient[w != 0], 0.1 * w[w != 0].sign(), atol=1e-6)


@given(generators, st.integers(1, 5))
def test_precision_recall_and_coverage_count_balls_that_hold_something(generator, k):
    """Far from 0, where float32 would lose the distances."""
    real, images = 1000 + torch.randn(2, 30, 3, generator=generator)
    images[:15] += 1

    def within(points, centres):  # a row a point, a column a ball
        to, between = ((a[:, None] - centres).norm(dim=2) for a in (points, centres))
        return (to <= between.sort(dim=0).values[k]).numpy()

    in_real, in_images = within(images, real), within(real, images)
    shares = in_real.any(axis=1).mean(), in_images.any(axis=1).mean(), in_real.any(axis=0).mean()
    assert metrics.precision_recall(real, images, k) == pytest.approx(shares)


def test_the_loss_of_the_conditional_vae_tells_both_networks_the_class(drawn):
    model, x, labels = ex3.ConditionalVAE(), drawn.images[:8] / 255, drawn.labels[:8]
    torch.manual_seed(1)
    terms = model.loss(x, labels, 3.0)
    torch.manual_seed(1)
    x_logits, mu, logvar = model(x, ex3.one_hot(labels))
    assert torch.equal(torch.stack(terms), torch.stack(vae_loss(x_logits, x, mu, logvar, 3.0)))
    terms[0].backward()
    for layer in (model.encoder.fc1, model.decoder_fc1):
        reached = layer.weight.grad[:, -10:].abs().sum(dim=0) > 0
        assert reached.tolist() == [digit in labels for digit in range(10)]


def test_the_sigma_vae_has_the_variance_that_is_best_for_its_batch(drawn):
    model, x, labels = ex4.SigmaVAE(), drawn.images[:50] / 255, drawn.labels[:50]
    torch.manual_seed(1)
    total, recon, kl = model.loss(x, labels, 2.0)
    torch.manual_seed(1)
    x_logits, mu, logvar = model(x)
    off = x.flatten(1) - torch.sigmoid(x_logits)
    best = -Normal(0, off.pow(2).mean().sqrt()).log_prob(off).sum()
    expected = kl_divergence(Normal(mu, logvar.exp().sqrt()), Normal(0, 1)).sum()
    terms = best + 2 * expected, best, expected
    torch.testing.assert_close((total, recon, kl), terms, rtol=1e-4, atol=0)


def test_a_row_is_predicted_from_the_code_and_the_rows_above_it():
    model, z, x = ex5.RowVAE(), torch.randn(2, 20), torch.rand(2, 1, 28, 28)
    assert (model.decode_logits(z + 1, x)[:, 0] != model.decode_logits(z, x)[:, 0]).any()
    slopes = jacobian(lambda x: model.decode_logits(z, x).sum(dim=(0, 2)), x)
    assert torch.equal(slopes.abs().sum(dim=(1, 2, 4)) > 0, torch.ones(28, 28).tril(-1) > 0)


@pytest.fixture
def solve(mnist_root, tmp_path, monkeypatch):
    """Run an exercise's main function, small; return what it has written as JSON."""

    def solve(exercise, *options):
        options = "--data-dir", mnist_root, "--limit=300", "--seeds=0", "--epochs=2", *options
        result = run_here(lambda argv: common.run(lambda: exercise.main(argv)), *options)
        assert result.returncode == 0, result.stderr
        path, = Path("runs/exercises").glob(f"{exercise.__name__}-*-epochs2-seeds0-limit300.json")
        assert path.with_suffix(".md").read_text() in result.stdout
        return json.loads(path.read_text())

    monkeypatch.chdir(tmp_path)
    return solve


def trained(kind: str, *inputs) -> tuple:
    """The model of a run that has just been trained, and q(z|x) of these inputs."""
    model = train.load_run(f"runs/exercises/{kind}-epochs2")[0].requires_grad_(False)
    mu, logvar = model.encode(*inputs)
    return model, Normal(mu, torch.exp(0.5 * logvar))


def kl_and_active_units(q: Normal) -> tuple:
    kl = kl_divergence(q, Normal(0, 1)).sum(dim=1).mean().item()
    return pytest.approx(kl, rel=1e-4), (q.loc.numpy().var(axis=0) > 0.01).sum()


def probe(train_q: Normal, labels, q: Normal, test_labels):
    """The share of classes that a linear map finds in draws; the draws of test images."""
    torch.manual_seed(0)
    z, test_z = (part.loc + part.scale * torch.randn_like(part.loc) for part in (train_q, q))
    with_bias = [np.pad(part.numpy(), ((0, 0), (0, 1)), constant_values=1) for part in (z, test_z)]
    weights = np.linalg.lstsq(with_bias[0], np.eye(10)[labels], rcond=None)[0]
    share = np.mean((with_bias[1] @ weights).argmax(axis=1) == test_labels.numpy())
    return pytest.approx(share, abs=0.007), test_z


def quality(classifier, images, real) -> dict:
    features = classifier.features(images)
    p = torch.softmax(classifier.head(features), dim=1)
    found = {"confidence": p.amax(dim=1).mean().item(), "class entropy": entropy(p.argmax(dim=1))}
    shares = metrics.precision_recall(classifier.features(real), features)
    return pytest.approx(found | dict(zip(("precision", "recall", "coverage"), shares)), rel=1e-4)


def test_exercise_1_compares_codes_with_factors(solve, tmp_path, monkeypatch):
    monkeypatch.setattr(ex1, "BETAS", (1, 8))
    monkeypatch.setitem(data.DRAWN, "digits", (draw.draw_digits, 600, 300))
    rows = solve(ex1, "--dataset=digits", "--data-dir", tmp_path)["rows"]
    (images, _, factors), (test_images, *_) = load_dataset("digits", tmp_path)
    factors.pop("glyph")
    for row, kind in zip(rows, ("digits-mlp", "digits-mlp-beta8"), strict=True):
        _, q = trained(f"{kind}-limit300", test_images / 255)
        assert (row["KL"], row["active units"]) == kl_and_active_units(q)
        _, q = trained(f"{kind}-limit300", images / 255)
        torch.manual_seed(0)
        z = q.loc + q.scale * torch.randn_like(q.loc)
        cov = torch.cov(z.T.double())
        q_z, product = (MultivariateNormal(0 * cov[0], c) for c in (cov, cov.diag().diag()))
        assert row["total correlation"] == pytest.approx(kl_divergence(q_z, product).item())
        gaps = metrics.mutual_information_gap(z, factors)
        assert row["MIG of each factor"] == pytest.approx(gaps, abs=1e-3)
        means = metrics.dci(z, factors) | {"MIG": np.mean([*gaps.values()])}
        assert {key: row[key] for key in means} == pytest.approx(means, abs=1e-3)
    assert len([*Path("runs/exercises").glob("*.png")]) == 4


def test_exercise_2_shows_samples_to_a_classifier(solve, mnist_root, monkeypatch):
    monkeypatch.setattr(ex2, "LATENT_DIMS", (2, 5))
    found = solve(ex2)
    x, labels, _ = load_dataset("mnist", mnist_root)[1]
    x, run = x / 255, train.load_run("runs/exercises/mnist-classifier-limit300-epochs2")
    classifier, history = run[0], run[1]["history"]
    gradients = torch.autograd.grad(classifier.loss(x, labels, 1.0)[0], [*classifier.parameters()])
    assert all(gradient.any() for gradient in gradients)
    logits = classifier.head(classifier.features(x))
    assert history[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    right = (logits.argmax(dim=1) == labels).sum().item()
    assert found["classifier_accuracy"] == pytest.approx(right / 300)
    assert found["other_test_images"] == quality(classifier, x[1::2], x[::2])
    for row, latent_dim in zip(found["rows"], (2, 5), strict=True):
        model, q = trained(f"mnist-mlp-latent-dim{latent_dim}-limit300", x)
        assert (row["KL"], row["active units"]) == kl_and_active_units(q)
        torch.manual_seed(0)
        samples = model.decode(torch.randn(150, latent_dim))
        judged = {key: row[key] for key in found["other_test_images"]}
        assert judged == quality(classifier, samples, x[::2])


def test_exercise_3_asks_for_classes(solve, mnist_root, monkeypatch):
    monkeypatch.setattr(ex3, "KINDS", {k: ex3.KINDS[k] for k in ("VAE", "CVAE, beta 1")})
    classifier, project = metrics.Classifier(), torch.randn(784, 10)
    classifier.forward = lambda x: F.log_softmax((x - x.mean(0)).flatten(1) @ project, dim=1)
    monkeypatch.setattr(ex3, "train_classifier", lambda args: (classifier, 0.5))
    vae, cvae = solve(ex3)["rows"]
    (x, labels, _), (test_x, test_labels, _) = load_dataset("mnist", mnist_root)
    for row, kind, conditions in ((vae, "mlp", []), (cvae, "cvae", [labels, test_labels])):
        y = [[ex3.one_hot(part)] for part in conditions] or [[], []]
        _, train_q = trained(f"mnist-{kind}-limit300", x / 255, *y[0])
        model, q = trained(f"mnist-{kind}-limit300", test_x / 255, *y[1])
        share, z = probe(train_q, labels, q, test_labels)
        assert row["class found in z"] == share and row["KL"] == kl_and_active_units(q)[0]
    for style, z in (("random", torch.randn(300, 20)), ("real", z)):
        images = model.decode(torch.cat([z, torch.eye(10).repeat(30, 1)], dim=1))
        right = (classifier(images).argmax(dim=1) == torch.arange(10).repeat(30)).sum().item()
        assert cvae[f"asked, {style} style"] == pytest.approx(right / 300)


def test_exercise_4_judges_by_both_losses(solve, mnist_root):
    found = solve(ex4)
    x = load_dataset("mnist", mnist_root)[1].images / 255
    model, q = trained("mnist-mlp-beta0.1-reconmse-limit300", x)
    torch.manual_seed(0)
    logits = model.decode_logits(q.loc + q.scale * torch.randn(300, 20))
    off, x = x.flatten(1) - torch.sigmoid(logits), x.flatten(1)
    bce = -Bernoulli(logits=logits, validate_args=False).log_prob(x).sum().item() / 300
    variance, kl = off.pow(2).mean().item(), kl_and_active_units(q)[0].expected
    density = -Normal(0, variance**0.5).log_prob(off).sum().item() / 300
    expected = {"BCE": bce, "squared error": 784 * variance, "KL": kl, "BCE + KL": bce + kl,
                "best variance": variance, "-ELBO, Gaussian": density + kl}
    row, = (row for row in found["rows"] if row["loss"] == "mse, variance 0.05")
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    _, run = train.load_run("runs/exercises/mnist-mlp-beta0.1-reconmse-limit300-epochs2")
    assert run["history"][-1]["test_recon"] == pytest.approx(784 * variance, rel=0.1)  # other draws
    way = sorted((row["loss"], row["epochs"]) for row in found["on_the_way"])
    assert way == sorted({(loss, 2) for loss in ex4.LOSSES} | {(loss, 1) for loss in ex4.FOLLOWED})


def test_exercise_5_anneals_and_goes_on_where_it_was(solve, mnist_root, monkeypatch):
    """Four models, two epochs each; with fewer than five, the annealing is as short."""
    train_epoch, calls = train.train_epoch, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", counted)
    with pytest.raises(AssertionError, match="the same command goes on from there"):
        solve(ex5)
    found = solve(ex5)
    assert len(calls) == 4 * 2 + 1  # the fourth call was lost, and with it nothing else
    assert solve(ex5) == found and len(calls) == 4 * 2 + 1
    names = ["mlp", "mlp, annealed", "rows", "rows, annealed"]
    assert [row["run"] for row in found["rows"]] == [*found["curves"]] == names
    assert [row["beta"] for row in found["curves"]["rows, annealed"][0]] == [0.5, 1]
    (x, labels, _), (test_x, test_labels, _) = load_dataset("mnist", mnist_root)
    for row, kind in zip(found["rows"][1::2], ("mlp", "rows")):
        (_, train_q), (_, q) = (
            trained(f"mnist-{kind}-kl-anneal2-limit300", part / 255) for part in (x, test_x))
        assert (row["KL"], row["active units"]) == kl_and_active_units(q)
        assert row["class found in z"] == probe(train_q, labels, q, test_labels)[0]
        first, last = (epoch["test_loss"] for epoch in found["curves"][row["run"]][0])
        assert first > last == pytest.approx(row["recon + KL"])


def test_sums_tables_and_the_names_of_results():
    history = [{}, {"test_loss": 100.0, "test_recon": 60.0, "test_kl": 10.0}]  # beta was 4
    assert common.last_test(history) == {"recon + KL": 70, "recon": 60, "KL": 10}
    rows = [{"beta": b, "kl": v} for b, v in ((1, 2.0), (4, 1.0), (1, 4.0), (4, 1.0))]
    table = common.markdown_table(rows, "beta", {"kl": ".2f"}).splitlines()
    assert table == ["| beta | kl |", "| --- | --- |", "| 1 | 3.00 ± 1.41 |", "| 4 | 1.00 ± 0.00 |"]
    assert common.markdown_table(rows[:2], "beta", {"kl": ".1f"}).endswith("| 4 | 1.0 |")
    name = lambda text: common.parse_args(text.split(), "ex1", "", ("mnist", "digits")).name
    assert name("") == name("--seeds 0 1 2 2") == "ex1-mnist"
    assert name("--dataset digits --epochs 1") == "ex1-digits-epochs1"
    assert name("--seeds 0 3 --limit 60") == "ex1-mnist-seeds0-3-limit60"


def test_the_answers_quote_tables_that_follow_from_every_run():
    answers = (PROJECT / "exercises/README.md").read_text()
    tables = sorted((PROJECT / "exercises/results").glob("*.md"))
    assert len(tables) >= 7
    for path in tables:
        table, found = path.read_text().strip(), json.loads(path.with_suffix(".json").read_text())
        assert table in answers and found["seeds"] == [0, 1, 2] and found["limit"] is None
        (key, *_), *columns = zip(*(line[2:-2].split(" | ") for line in table.splitlines()))
        means = {name: max(cells, key=len).partition(" ")[0] for name, _, *cells in columns}
        formats = {name: f".{len(mean.partition('.')[2])}f" for name, mean in means.items()}
        assert common.markdown_table(found["rows"], key, formats) == table
        assert [row["seed"] for row in found["rows"]] == [0, 1, 2] * (len(columns[0]) - 2)


def test_the_answers_quote_the_likelihoods_that_were_measured():
    answers = (PROJECT / "exercises/README.md").read_text()
    rows = json.loads((PROJECT / "exercises/results/ex6_likelihood.json").read_text())["rows"]
    assert {row["recipe"] for row in rows} == ex6_likelihood.RECIPES.keys()
    for row in rows:
        line, = re.findall(rf"^\| `{row['recipe']}` .*", answers, re.MULTILINE)
        numbers = [row["neg_elbo"], -row["bounds"]["5"], -row["bounds"]["50"]]
        numbers += [row["neg_log_likelihood"], row["standard_error"]]
        numbers += [row[key][gap] for gap in row["gaps"] for key in ("gaps", "gap_errors")]
        assert re.findall(r"\d+\.\d\d", line) == [f"{number:.2f}" for number in numbers]
        assert f"| {row['epochs']}, {row['minutes']:.{row['minutes'] < 1:d}f} |" in line
        assert f"| {row['active_units']} of {row['latent_dim']} |" in line
        config = train.parse_args(ex6_likelihood.RECIPES[row["recipe"]].split())
        assert row["epochs"] == config.epochs and row["num_samples"] == 5000
