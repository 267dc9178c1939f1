"""How good are codes and samples? Measures from the literature, written out by hand.

Of codes:   active units, the Mutual Information Gap, DCI, a linear probe.
Of samples: the classes and the confidence that a classifier sees, precision and recall.
"""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import trained
from torch import Tensor

from train import MODELS

BINS = 20


# ----------------------------------------------------------------------- of codes


def active_units(mu: Tensor) -> int:
    """How many latents the encoder uses: those whose mean varies by more than 0.01 between
    images, Var_x(mu_j) > 0.01 (Burda, Grosse & Salakhutdinov 2016, section 5).

    mu: (n, latent_dim).
    """
    return int((mu.var(dim=0, correction=0) > 0.01).sum())


def total_correlation(z: Tensor) -> float:
    """How far the latents are from independent, in nats: KL( q(z) || prod_j q(z_j) ), if q(z),
    the codes of all images together, were Gaussian (as Locatello et al. 2019 measure it).

    z: draws from q(z|x), (n, latent_dim), latent_dim > 1.
    """
    return -0.5 * torch.logdet(torch.corrcoef(z.T.double())).item()


def discretize(values: Tensor) -> Tensor:
    """Numbers (n,) as classes 0, 1, ...: each value its own if they are few, else up to 20 bins
    with as equal numbers of values in each as ties allow."""
    distinct, classes = values.unique(return_inverse=True)
    if len(distinct) <= BINS:
        return classes
    edges = values.double().quantile(torch.arange(1, BINS, dtype=torch.float64) / BINS).unique()
    return torch.bucketize(values.double(), edges, right=True)


def mutual_information(a: Tensor, b: Tensor) -> float:
    """I(a; b) in nats of two discrete variables, (n,) classes each, from their joint counts."""
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones((), dtype=torch.float64), accumulate=True)
    joint /= len(a)
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    seen = joint > 0
    return (joint[seen] * (joint[seen] / independent[seen]).log()).sum().item()


def mutual_information_gap(z: Tensor, factors: dict[str, Tensor]) -> dict[str, float]:
    """MIG of each factor, in [0, 1] (Chen, Li, Grosse & Duvenaud 2018, eq. 6).

    z: draws from q(z|x), (n, latent_dim); factors: name -> (n,), what the images were made
    from. The gap between the latent that knows most about a factor and the next one,
    as a share of the entropy: 1 if one latent knows all of it and no other anything. Chen et
    al. compute the information from the densities q(z_j|x), here it is counted in bins, so
    compare scores only if they were computed alike.
    """
    codes = [discretize(column) for column in z.T]
    gaps = {}
    for name, values in factors.items():
        classes = discretize(values)
        information = sorted(mutual_information(code, classes) for code in codes)
        second, first = information[-2:]
        gaps[name] = (first - second) / mutual_information(classes, classes)  # I(v; v) = H(v)
    return gaps


def standardize(x: Tensor) -> Tensor:
    """Every column with mean 0 and variance 1; a constant one becomes 0."""
    return (x - x.mean(dim=0)) / x.std(dim=0, correction=0).clamp(min=1e-6)


def lasso(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The weights w, (d, k), that minimise ||y - x w||^2 / 2n + penalty * |w|_1, by coordinate
    descent. x: (n, d) and y: (n, k), both standardized."""
    gram, correlation = x.T @ x / len(x), x.T @ y / len(x)
    w = torch.zeros_like(correlation)
    for _ in range(1000):
        before = w.clone()
        for j in range(len(w)):
            # What is left for x_j to explain, itself excluded; small remains become exactly 0.
            rest = correlation[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = F.softshrink(rest, penalty) / gram[j, j].clamp(min=1e-6)
        if (w - before).abs().max() < 1e-6:
            break
    return w


def dci(z: Tensor, factors: dict[str, Tensor]) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (Eastwood & Williams 2018), in [0, 1].

    Predict each factor from the codes with a lasso; its |weights| say which latent matters for
    which factor. Disentanglement is 1 if each latent matters for one factor only,
    completeness is 1 if one latent does for each factor; neither says anything where little is
    known at all. So look at informativeness first: the share of the variance of the factors
    that is explained, in the half of the images that the lasso has not seen: at worst a little
    below 0 (Eastwood & Williams give the error). A class is predicted as its one-hot vector.
    """
    x = standardize(z.double())
    half = len(z) // 2
    # The correlation of n independent pairs is 0 ± 1 / sqrt(n); five times that is no accident.
    penalty = 5 / half**0.5
    importance, explained = [], []
    for values in factors.values():
        if values.is_floating_point():
            targets = values[:, None].double()
        else:
            targets = F.one_hot(values.long()).double()
        y = standardize(targets)
        w = lasso(x[:half], y[:half], penalty)
        importance.append(w.abs().mean(dim=1))
        explained.append(1 - (y - x @ w)[half:].square().mean().item())
    importance = torch.stack(importance, dim=1)  # (latent_dim, factors)

    def concentration(rows: Tensor) -> Tensor:
        """1 - the entropy of each row, as a share of its maximum; 0 for a row of zeros."""
        p = rows / rows.sum(dim=1, keepdim=True)
        entropy = -torch.xlogy(p, p).sum(dim=1) / math.log(rows.shape[1])
        return (1 - entropy).nan_to_num(0)

    weight = importance.sum(dim=1) / importance.sum().clamp(min=1e-12)
    return {
        "disentanglement": (weight @ concentration(importance)).item(),
        "completeness": concentration(importance.T).mean().item(),
        "informativeness": sum(explained) / len(explained),
    }


def linear_probe(codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> float:
    """The share of test labels that a linear map of the codes gets right: least squares on
    one-hot labels, so there is nothing to tune. codes: (n, d), draws from q(z|x), as the decoder
    gets them: a mean may hold traces that drown in the noise. labels: (n,)."""

    def with_bias(x: Tensor) -> Tensor:
        return F.pad(x, (0, 1), value=1.0)

    weights = torch.linalg.lstsq(with_bias(codes), F.one_hot(labels).float()).solution
    return ((with_bias(test_codes) @ weights).argmax(dim=1) == test_labels).float().mean().item()


# --------------------------------------------------------------------- of samples


class Classifier(nn.Module):
    """A small convolutional network for 28 x 28 images in ten classes.

    It trains in the project's own loop: its loss is (cross-entropy, number of errors, 0), so
    the column recon of its history is the share of errors.
    """

    def __init__(self, latent_dim: int = 128):
        super().__init__()
        self.latent_dim = latent_dim  # of the features
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1), nn.ReLU(),  # 28 -> 14
            nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1), nn.ReLU(),  # 14 -> 7
            nn.Flatten(), nn.Linear(64 * 7 * 7, latent_dim), nn.ReLU(),
        )
        self.head = nn.Linear(latent_dim, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: flat or square grey images -> (batch, latent_dim)."""
        return self.body(x.reshape(-1, 1, 28, 28))

    def forward(self, x: Tensor) -> Tensor:
        """x -> the log-probabilities of the classes, (batch, 10)."""
        return F.log_softmax(self.head(self.features(x)), dim=1)

    def loss(self, images: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        log_p = self(images)
        errors = (log_p.argmax(dim=1) != labels).float().sum()
        return F.nll_loss(log_p, labels, reduction="sum"), errors, torch.zeros_like(errors)


MODELS["classifier"] = Classifier  # so that train.train_run can build it


def train_classifier(args: argparse.Namespace) -> tuple[Classifier, float]:
    """A classifier of args.dataset, trained for three epochs or read from disk, and the share of
    the test images that it gets right."""
    model, history = trained(args, seed=0, epochs=min(3, args.epochs), model="classifier")
    return model, 1 - history[-1]["test_recon"]


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float, float]:
    """Precision, recall (Kynkaanniemi et al. 2019) and coverage (Naeem et al. 2020), in [0, 1].

    real, generated: features, (n, d) and (m, d), with n, m > k. The real images are taken to
    fill the balls around each of them that reach to its k-th nearest neighbour. Precision is
    the share of generated images in one of these balls (are they realistic?). Recall is the
    same with the roles exchanged (is everything real generated?); generated images that lie far
    out have large balls, so bad ones can raise it. Coverage has no such weakness: the share
    of the balls of real images with a generated one in them.
    """

    def radius(points: Tensor) -> Tensor:
        # The nearest neighbour of a point is itself, so the k-th is number k + 1.
        return torch.cdist(points, points).kthvalue(k + 1, dim=1).values

    real, generated = real.double(), generated.double()  # cdist in float32 loses small distances
    distance = torch.cdist(generated, real)
    in_real, in_generated = distance <= radius(real), distance.T <= radius(generated)
    shares = in_real.any(dim=1), in_generated.any(dim=1), in_real.any(dim=0)
    return tuple(share.double().mean().item() for share in shares)


def sample_quality(classifier: Classifier, images: Tensor, real: Tensor) -> dict[str, float]:
    """What a classifier makes of generated images: realism first, then diversity.

    images: (n, ...) in [0, 1]; real: real ones that the classifier was not trained on.
    Confidence is the mean probability of the likeliest class; class entropy, in nats, is of
    the classes among the images, at most log 10 = 2.30.
    """
    probabilities = classifier(images).exp()
    shares = F.one_hot(probabilities.argmax(dim=1), 10).double().mean(dim=0)
    features = classifier.features(real), classifier.features(images)
    precision, recall, coverage = precision_recall(*features)
    return {
        "confidence": probabilities.max(dim=1).values.mean().item(),
        "precision": precision,
        "recall": recall,
        "coverage": coverage,
        "class entropy": -torch.xlogy(shares, shares).sum().item(),
    }
