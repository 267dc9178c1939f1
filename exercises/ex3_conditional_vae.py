"""Exercise 3: a VAE that draws the digit one asks for.

    python exercises/ex3_conditional_vae.py                    MNIST
    python exercises/ex3_conditional_vae.py --dataset digits   no download

The conditional VAE (Sohn, Lee & Yan 2015) gives the label y to both networks and maximises

    E_q(z|x,y)[ log p(x|z,y) ] - KL( q(z|x,y) || p(z) )  <=  log p(x|y)

(They write x and y the other way round, and also learn the prior. That it stays N(0, I) makes this
the model M2 of Kingma, Rezende, Mohamed & Welling 2014, with every label known.) The decoder is
told the class, so z need not pay for it: what is left for z is the style, or so one hopes. Does a
linear map still find the class in z? And does a classifier, trained on the same images, read a
digit as it was asked for, with a style drawn from the prior, and with that of a test image?
"""

import torch
import torch.nn.functional as F
from common import RESULTS, last_test, load_images, parse_args, report, run, trained
from metrics import linear_probe, sample_quality, train_classifier
from torch import Tensor

from data import CLASS_NAMES
from train import MODELS
from vae import VAE, VAEEncoder, vae_loss
from viz import as_images, interpolate_latent_space, save_tiles

CLASSES = 10
N_CODES = 10_000  # training images whose codes the linear probe learns from


class ConditionalVAE(VAE):
    """The MLP VAE; the class stands as a one-hot vector y beside the image and beside the code.

    The decoder takes zy, the code and y in one vector of latent_dim + 10 numbers.
    """

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__(input_dim, hidden_dim, latent_dim)
        del self.encoder_fc1, self.encoder_fc_mu, self.encoder_fc_logvar
        self.encoder = VAEEncoder(input_dim + CLASSES, hidden_dim, latent_dim)
        self.decoder_fc1 = torch.nn.Linear(latent_dim + CLASSES, hidden_dim)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...), y: (batch, 10) -> mu, logvar: (batch, latent_dim)."""
        return self.encoder(torch.cat([x.flatten(1), y], dim=1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x, y)
        z = self.reparameterize(mu, logvar)
        return self.decode_logits(join(z, y)), mu, logvar

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple:
        x_logits, mu, logvar = self(images, one_hot(labels))
        return vae_loss(x_logits, images, mu, logvar, beta, self.recon_loss)

    @torch.no_grad()
    def sample(self, labels: Tensor) -> Tensor:
        """An image of each class asked for, labels (n,), in a style drawn from the prior."""
        z = torch.randn(len(labels), self.latent_dim)
        return self.decode(join(z, one_hot(labels)))


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels.long(), CLASSES).float()


def join(z: Tensor, y: Tensor) -> Tensor:
    return torch.cat([z, y], dim=1)


MODELS["cvae"] = ConditionalVAE  # so that train.train_run can build it

KINDS = {"VAE": {}} | {f"CVAE, beta {b}": {"model": "cvae", "beta": b} for b in (1, 2, 4)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, "ex3_conditional_vae", __doc__, ("mnist", "digits", "fashion-mnist"))
    train_split, test_split = load_images(args)
    classifier, accuracy = train_classifier(args)
    x, labels = train_split.images[:N_CODES] / 255, train_split.labels[:N_CODES]
    test_x, test_labels = test_split.images / 255, test_split.labels
    asked = torch.arange(len(test_x)) % CLASSES

    def read_as_asked(images: Tensor) -> float:
        return (classifier(images).argmax(dim=1) == asked).float().mean().item()

    rows = []
    for kind, options in KINDS.items():
        for seed in args.seeds:
            model, history = trained(args, seed, **options)
            conditional = isinstance(model, ConditionalVAE)
            row = {"model": kind, "seed": seed} | last_test(history)
            torch.manual_seed(seed)
            z, test_z = draw_codes(model, x, labels), draw_codes(model, test_x, test_labels)
            row["class found in z"] = linear_probe(z, labels, test_z, test_labels)
            if conditional:
                samples = model.sample(asked)
                row["asked, random style"] = read_as_asked(samples)
                # The styles of test images, nine in ten of which were of other classes.
                row["asked, real style"] = read_as_asked(model.decode(join(test_z, one_hot(asked))))
            else:
                samples = model.sample(len(test_x))
            real = test_x[::2]  # not the first half: MNIST's test set is not in random order
            rows.append(row | sample_quality(classifier, samples[: len(real)], real))
            if conditional and seed == args.seeds[0]:
                path = f"{RESULTS}/{args.name}-beta{options['beta']}"
                draw(model, test_x, test_labels, CLASS_NAMES[args.dataset], path)
    formats = {"recon + KL": ".2f", "recon": ".2f", "KL": ".2f", "class found in z": ".3f"}
    formats |= {"asked, random style": ".3f", "asked, real style": ".3f"}
    formats |= {"precision": ".3f", "coverage": ".3f"}
    report(args, rows, "model", formats, classifier_accuracy=accuracy)
    print(f"the classifier is right on {accuracy:.2%} of the test images")


def draw_codes(model: VAE, x: Tensor, labels: Tensor) -> Tensor:
    """A draw from q(z|x), or from q(z|x,y)."""
    y = [one_hot(labels)] if isinstance(model, ConditionalVAE) else []
    return model.reparameterize(*model.encode(x, *y))


def draw(model: ConditionalVAE, x: Tensor, labels: Tensor, names: tuple, path: str) -> None:
    """<path>.png: a test image of each class, and its style, its mean code, in all ten classes.

    <path>-interpolation.png: from class to class in the style of one test image, and from the
    style of one to that of another within a class.
    """
    z, _ = model.encode(x, one_hot(labels))
    y = torch.eye(CLASSES)
    first, second = zip(*[(labels == k).nonzero()[:2, 0].tolist() for k in range(CLASSES)])
    rows = []
    for i in first:
        rows += [x[i : i + 1], as_images(model.decode(join(z[i].expand(CLASSES, -1), y)))]
    save_tiles(torch.cat(rows), CLASSES + 1, f"{path}.png", column_labels=["style of", *names])
    ends = {
        f"{names[a]} to {names[b]}": join(z[first[a]].expand(2, -1), y[[a, b]])
        for a, b in ((0, 6), (3, 8), (4, 9), (7, 1), (5, 2))
    }
    ends |= {
        f"{names[a]} to {names[a]}": join(z[[first[a], second[a]]], y[[a, a]])
        for a in (0, 2, 3, 4, 7)
    }
    lines = [interpolate_latent_space(model, *zy, 11) for zy in ends.values()]
    save_tiles(torch.cat(lines), 11, f"{path}-interpolation.png", row_labels=list(ends))


if __name__ == "__main__":
    run(main)
