"""What check.py asks of each step of the workbook, and what the known slips would answer.

Each step is a function, which yields facts about the learner's answer: a question, what is right by
an independent oracle (torch.distributions, torch's losses, autograd, many draws), and slips: what
they are called, a hint, and what they give. The first fact that fails is the one to report.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, randn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import vae


class Fact(NamedTuple):
    words: str  # what is given and asked
    ask: Callable[[], object]
    right: object  # a tensor or text
    slips: dict[str, object] = {}  # "name: hint" -> what it gives
    tolerance: float = 1e-3  # absolute and relative; of estimates about five standard errors


def kl_oracle(mu: Tensor, logvar: Tensor) -> Tensor:
    return kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)


def bce_oracle(x_logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x_logits, x, reduction="none").sum(dim=1)


def shape(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shape, value))})"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)


def span(values: Tensor) -> str:
    if values.min() < 0:
        return "all real numbers"
    return "0 to 1" if values.max() <= 1 else "0 and more"


def compare(a: Tensor, b: Tensor) -> str:
    return "the same" if torch.allclose(a, b, rtol=1e-4, atol=1e-6) else "different"


def slopes(f: Callable, *inputs: Tensor) -> Tensor:
    """The gradients of the sum of f for its inputs; 0 for those that it does not reach."""
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    total = f(*inputs).sum() + sum(0 * part.sum() for part in inputs)
    return torch.stack(torch.autograd.grad(total, inputs))


def gradient(words: str, f: Callable, oracle: Callable, *inputs: Tensor) -> Fact:
    right = slopes(oracle, *inputs)
    return Fact(f"{words}: the gradient", lambda: slopes(f, *inputs), right, {
        "the gradient is lost: .item(), .detach(), numpy and torch.tensor() cut a result off its "
        "graph. From the inputs to the result, stay with tensors.": 0 * right}, 0.01)


def pixel_facts(loss: Callable, oracle: Callable, slips: dict[str, Callable]) -> Iterator[Fact]:
    """Of a loss that sums over the pixels of an image."""
    logits, x, image = torch.rand(3, 6), torch.rand(3, 6), (3, 1, 2, 3)
    right = oracle(logits, x)
    yield Fact("3 flat images of 6 pixels", lambda: loss(logits, x), right, {
        'averaged over the pixels ("beta = 784"): log p(x|z) is a sum over them. Their mean is 784 '
        "times too small beside the KL.": right / 6,
        "averaged over all: torch's losses do so, unless told not to.": right.mean() / 6,
        "one number for the batch: each image has a loss of its own.": right.sum(),
        "the sign: a loss is to fall in training, and this one is never negative.": -right,
        **{slip: gives(logits, x) for slip, gives in slips.items()}})
    for a, b in ((logits.view(image), x.view(image)), (logits, x.view(image))):
        yield Fact(f"x_logits of shape {shape(a)}, x of {shape(b)}", lambda: loss(a, b), right)
    yield gradient("3 images", lambda l: loss(l, x), lambda l: oracle(l, x), logits)


def layer_facts(name: str, f: Callable, inputs: Tensor) -> Iterator[Fact]:
    """Of a network with ReLU in between and nothing at its end."""
    a, b = inputs[:2].split(1)
    yield Fact(f"the range of {name}", lambda: span(f(1e3 * inputs)), "all real numbers", {
        f"{name} through a sigmoid: that is the loss's part. End with a linear layer.": "0 to 1",
        f"{name} never negative: let no ReLU or exp come last.": "0 and more"})
    yield Fact(f"{name} of an image, in a batch and alone",
               lambda: compare(f(inputs)[:1], f(a)), "the same")
    yield Fact(f"{name}: f(a + b) + f(0) and f(a) + f(b)",
               lambda: compare(f(a + b) + f(0 * a), f(a) + f(b)), "different",
               {f"{name} without ReLU: two linear layers in a row are but one.": "the same"})


# ------------------------------------------------------------------------- step by step


def reparameterize(draw: Callable) -> Iterator[Fact]:
    mu, logvar = torch.tensor([[2.0, -1.0], [1.5, -2.0]])[:, None].repeat(1, 4000, 1)
    std, given = (logvar[0] / 2).exp(), "4,000 images, mu = (2, -1), logvar = (1.5, -2): "
    z = draw(mu.clone(), logvar.clone())
    yield Fact(given + "z", lambda: shape(z), "(4000, 2)")
    yield Fact(given + "z of two calls", lambda: compare(z, draw(mu, logvar)), "different", {
        "no new noise: z = mu has none, and a seed set in here repeats the old.": "the same"})
    yield Fact(given + "the standard deviation of z", lambda: z.std(dim=0), std, {
        "variance for standard deviation: exp(logvar) is sigma^2. z spreads by its root.": std**2,
        "exp(0.5 logvar) used twice: once leads from log sigma^2 to sigma.": (std / 2).exp(),
        "logvar for standard deviation: undo the logarithm first.": logvar[0].abs(),
        "sigma left out: it says how sure the encoder is. Scale the noise by it.": std**0,
        "uniform noise: rand is between 0 and 1; epsilon is from N(0, 1).": std / 12**0.5,
        "one epsilon for the whole batch: each image needs noise of its own.": 0 * std}, 0.06)
    yield Fact(given + "the mean of z", lambda: z.mean(dim=0), mu[0], {}, 0.06)
    rows = torch.stack([z[1:, 0], z[1:, 1], z[:-1, 0]])
    yield Fact(given + "the correlations of two latents and of two images",
               lambda: torch.corrcoef(rows)[0, 1:], torch.zeros(2),
               {"one epsilon for all latents: each needs its own.": torch.eye(2)[0]}, 0.08)
    right = torch.stack([std**0, std / (2 * torch.pi) ** 0.5])
    yield Fact(given + "the mean size of its gradients for mu and for logvar",
               lambda: slopes(draw, mu, logvar).abs().mean(dim=1), right, {
        "no gradient: torch.normal, sample(), detach() and no_grad() return what autograd takes "
        "for constants. Only epsilon may be one.": 0 * right,
        "no gradient for logvar: sigma is cut off the graph, so no encoder can learn it.":
            torch.stack([std**0, 0 * std])}, 0.04)


def kl_divergence_gaussian(kl: Callable) -> Iterator[Fact]:
    mu, logvar = randn(2, 5, 3)
    right, std, given = kl_oracle(mu, logvar), (logvar / 2).exp(), "random mu, logvar of (5, 3)"
    yield Fact(given, lambda: kl(mu, logvar), right, {
        "the KL's sign: no KL is negative. Formula and code in 2.2 differ by a minus.": -right,
        "averaged over the latents: each costs nats of its own, and they add up.": right / 3,
        "one number for the batch: each image has a KL of its own.": right.sum(),
        "the factor 1/2 is missing: it stands before the sum.": 2 * right,
        "sigma for sigma^2: the last term is a variance.": right + (std - std**2).sum(dim=1) / 2,
        "sigma^4 for sigma^2: it is exp(logvar) itself.": right + (std**4 - std**2).sum(dim=1) / 2})
    yield gradient(given, kl, kl_oracle, mu, logvar)


def bce_from_logits(bce: Callable) -> Iterator[Fact]:
    yield from pixel_facts(bce, bce_oracle, {
        "logits taken for probabilities: a logit is any real number; p is its sigmoid.":
            lambda logits, x: F.binary_cross_entropy(logits, x, reduction="none").sum(dim=1),
        'the sigmoid taken twice: a loss "with logits" has its own.':
            lambda logits, x: bce_oracle(logits.sigmoid(), x)})
    signs, x, ones = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [1.0]]), torch.ones(2)
    paper = "log(1 - p) is infinite where p rounds to 1. Simplify log(sigmoid(l)) on paper first."
    for size, slip in ((20, f"BCE through the sigmoid: {paper}"), (1000, (
            "exp overflows: torch has log(1 + exp(l)) by the name of softplus, right for any l."))):
        yield Fact(f"x_logits = ({size}, -{size}), x = (0, 1): the loss is", lambda: (
            "finite" if bce(size * signs, x).isfinite().all() else "infinite"), "finite",
            {slip: "infinite"})
    yield Fact("x_logits = (1000, -1000), x = (0, 1): the loss / 1000",
               lambda: bce(1000 * signs, x) / 1000, ones, {
        f"BCE through sigmoid + epsilon: it hides that {paper}": 0.02 * ones,
        "BCE through F.binary_cross_entropy: it stops at 100 nats a pixel, and has "
        "no gradient at a logit of 20. Look for its sister.": 0.1 * ones}, 0.02)
    yield gradient("x_logits = (20, -20), x = (0, 1)", lambda l: bce(l, x),
                   lambda l: bce_oracle(l, x), 20 * signs)


def vae_loss(loss: Callable) -> Iterator[Fact]:
    pixels, latents = (randn(4, 5), torch.rand(4, 5)), randn(2, 4, 3)
    recon, kl = bce_oracle(*pixels).sum(), kl_oracle(*latents).sum()
    right, given = torch.stack([recon, kl]), "4 images of 5 pixels, 3 latents, beta = 3: "
    yield Fact(given + "the shapes of total, recon, kl",
               lambda: shape(loss(*pixels, *latents, 3.0)), "((), (), ())")
    yield Fact(given + "recon, kl", lambda: torch.stack(loss(*pixels, *latents, 3.0)[1:]), right, {
        "averaged over the batch: here all is summed. The training step divides.": right / 4,
        'recon averaged over the pixels ("beta = 784"): the KL is then 784 times too heavy.':
            right / torch.tensor([5, 1]),
        "recon averaged over pixels and images: torch's losses do so unless told to sum.":
            right / torch.tensor([20, 1]),
        "kl returned with its weight: beta is for total alone.": right * torch.tensor([1, 3])})
    yield Fact(given + "total", lambda: loss(*pixels, *latents, 3.0)[0], recon + 3 * kl, {
        "the total called the ELBO: the ELBO is to rise, a loss to fall.": -recon - 3 * kl,
        "KL subtracted: so it is in the ELBO, from log p. But recon is -log p.": recon - 3 * kl,
        "beta on the wrong term: it is the price of a nat of KL.": 3 * recon + kl,
        "beta left out: exercise 1 puts it before one of the terms.": recon + kl})
    yield Fact("no beta given: total", lambda: loss(*pixels, *latents)[0], recon + kl)
    yield gradient("total", lambda *q: loss(*pixels, *q)[0], kl_oracle, *latents)


def VAE(build: Callable, *label: int) -> Iterator[Fact]:
    x, z, model = torch.rand(40, 1, 3, 4), randn(40, 20), build(12, 64, 20)
    flat, many = x.flatten(1), 20 * x[:1].expand(4000, -1, -1, -1)

    def ask(method: Callable, inputs: Tensor) -> object:
        return method(inputs, *(torch.full((len(inputs),), k) for k in label))

    def spread() -> Tensor:
        mu, logvar = ask(model.encode, many)
        right = ask(model.decode_logits, Normal(mu, (logvar / 2).exp()).sample())
        came = (ask(model, many)[0] - right.mean(dim=0)) / right.std(dim=0)
        return torch.stack([came.mean(dim=0), came.std(dim=0)])

    given = "40 images of 12 pixels, " + "".join(f"all of class {k}, " for k in label)
    yield Fact(given + "flat: encode",
               lambda: shape(ask(model.encode, flat)), "((40, 20), (40, 20))")
    yield Fact(given + "of shape (40, 1, 3, 4): encode gives for them and for flat ones",
               lambda: compare(ask(model.encode, x)[0], ask(model.encode, flat)[0]), "the same")
    for i, name in enumerate(("mu", "logvar")):
        yield from layer_facts(name, lambda x: ask(model.encode, x)[i], flat - 0.5)
    yield Fact(given + "codes: decode_logits",
               lambda: shape(ask(model.decode_logits, z)), "(40, 12)")
    yield from layer_facts("decode_logits", lambda z: ask(model.decode_logits, z), z)
    yield Fact(given + "forward",
               lambda: shape(ask(model, x)), "((40, 12), (40, 20), (40, 20))")
    yield Fact("mu and logvar of encode and of forward", lambda: compare(
        torch.cat(ask(model.encode, x)), torch.cat(ask(model, x)[1:])), "the same")
    yield Fact("x_logits of two calls",
               lambda: compare(ask(model, x)[0], ask(model, x)[0]), "different",
               {"z = mu in training: decode a draw, or no image can tell sigma.": "the same"})
    yield Fact("the range of forward's x_logits",
               lambda: span(ask(model, x)[0]), "all real numbers",
               {"forward returns probabilities: what the loss wants are logits.": "0 to 1"})
    yield Fact("z ~ N(mu, sigma^2) in forward: the mean and standard deviation of 4,000 x_logits, "
               "standardised", spread, torch.tensor([[0.0], [1.0]]).expand(2, 12), {}, 0.12)


def ConvVAE(build: Callable) -> Iterator[Fact]:
    z, model = randn(20, 5), build(3, 5).eval()
    yield Fact("20 codes, 3 channels: decode_logits",
               lambda: shape(model.decode_logits(z)), "(20, 3, 28, 28)", {
        "24 x 24: the chapter's layers go 3, 6, 12, 24. Which argument adds a row at the edge?":
            "(20, 3, 24, 24)"})
    yield from layer_facts("decode_logits", model.decode_logits, z)
    yield Fact("the share of pixels that change with z",
               lambda: (model.decode_logits(z).std(dim=0) > 1e-9).float().mean(), torch.tensor(1.0))


def train_step(step: Callable) -> Iterator[Fact]:
    """By plain gradient descent, whose steps are the gradient, scaled."""
    model, images, stale = vae.VAE(6, 8, 2), torch.rand(5, 1, 2, 3), 0.0
    model.reparameterize = lambda mu, logvar: mu
    torch.nn.init.zeros_(model.encoder_fc_logvar.weight)  # and next to no noise for those who
    torch.nn.init.constant_(model.encoder_fc_logvar.bias, -9.9)  # do not call its forward
    weights, losses = [*model.parameters()][::-1], []
    optimizer = torch.optim.SGD(weights, lr=0.1)

    def loss(beta: float) -> Tensor:
        x_logits, mu, logvar = model(images)
        return (bce_oracle(x_logits, images.flatten(1)) + beta * kl_oracle(mu, logvar)).mean()

    def slope(beta: float) -> Tensor:
        return parameters_to_vector(torch.autograd.grad(loss(beta), weights))

    def moved() -> Tensor:
        before = parameters_to_vector(weights).detach()
        losses.append(step(model, images, optimizer, 0.5))
        return 10 * (before - parameters_to_vector(weights).detach())

    for which in (1, 2):
        right, value = slope(0.5), loss(0.5).detach()
        yield Fact(f"SGD, beta = 0.5: the move of the weights in step {which}", moved, right, {
            "nothing is learned: clear the old gradients, then backward, then step.": 0 * right,
            "no zero_grad: backward adds to the gradients that are there.": right + stale,
            "the sum for the mean: divide by the number of images.": 5 * right,
            "the sum for the mean, and beta left out: see the docstring.": 5 * slope(1.0),
            "beta left out: vae_loss wants it.": slope(1.0)}, 0.03)
        stale = right
    yield Fact("the loss", lambda: torch.as_tensor(losses[-1]).detach(), value, {}, 0.02)
    yield Fact("does the loss hold its graph?",
               lambda: str(getattr(losses[-1], "requires_grad", False)), "False",
               {"the loss returned with its graph: all of the batch stays in memory.": "True"})


def squared_error(loss: Callable) -> Iterator[Fact]:
    yield from pixel_facts(loss, lambda logits, x: (logits.sigmoid() - x).pow(2).sum(dim=1), {
        "logits compared with pixels: the image is the sigmoid of its logits.":
            lambda logits, x: (logits - x).pow(2).sum(dim=1)})


def kl_weight(weight: Callable) -> Iterator[Fact]:
    line = torch.arange(8) / 5
    for n, right in ((5, line[1:].clamp(max=1)), (1, torch.ones(7)), (0, torch.ones(7))):
        yield Fact(f"kl_anneal = {n}, epochs 1 to 7", lambda: torch.tensor(
            [float(weight(epoch, n)) for epoch in range(1, 8)]), right, {
            "a weight that starts at 0: epochs count from 1.": line[:7].clamp(max=1),
            "a weight from 0 to 1: the first of n has 1 / n.": (1.25 * line[:7]).clamp(max=1),
            "a weight beyond 1: from epoch n on it stays at 1.": line[1:]})


def CVAE(build: Callable) -> Iterator[Fact]:
    yield from VAE(build, 3)
    model, labels = build(12, 64, 20), torch.arange(10).repeat(40)

    def effect(method: str, size: int) -> str:
        out = getattr(model, method)(randn(40, size).repeat_interleave(10, dim=0), labels)
        ten = (out if method == "decode_logits" else out[0]).view(40, 10, -1)
        step, far = ten.diff(dim=1).norm(dim=2).mean(), (ten[:, 9] - ten[:, 0]).norm(dim=1).mean()
        return "none" if step < 1e-6 else "as on a ruler" if far > 3 * step else "ten kinds"

    for method, size, other in (("encode", 12, "decoder"), ("decode_logits", 20, "encoder")):
        yield Fact(f"the effect of labels on {method}", lambda: effect(method, size), "ten kinds", {
            f"the label given to the {other} only: both networks want to know it.": "none",
            "the label as a number: then 9 is far from 0, and 1 is near. A one-hot vector has no "
            "order.": "as on a ruler"})


def importance_weighted_bound(bound: Callable) -> Iterator[Fact]:
    log_w, given = randn(5, 3), "log w of 5 draws for 3 images"
    right = log_w.exp().mean(dim=0).log()
    yield Fact(given, lambda: bound(log_w), right, {
        "without -log k: a mean is a sum divided by k.": log_w.exp().sum(dim=0).log(),
        "the mean of the logarithms: that is the ELBO. The logarithm comes last.":
            log_w.mean(dim=0)})
    for shift in (1000, -1000):
        yield Fact(f"{given}, {shift:+}", lambda: bound(log_w + shift), right + shift, {
            "exp overflows: e^1000 is infinite, e^-1000 is 0. Take the largest log w out of the "
            "sum first, or look for a function that does.": right * torch.inf})
    yield gradient(given, bound, lambda w: w.exp().mean(dim=0).log(), log_w)


STEPS = (reparameterize, kl_divergence_gaussian, bce_from_logits, vae_loss, VAE, ConvVAE,
         train_step, squared_error, kl_weight, CVAE, importance_weighted_bound)
