"""Exercise 0: an autoencoder beside a VAE of the same size, and what sampling needs (chapter 2.1).

    python exercises/ex0_autoencoder.py                      on MNIST
    python exercises/ex0_autoencoder.py --dataset digits     the options are those of train.py

Where do the codes of the two models lie, and what does noise decode into?
"""

import sys

import torch
import torch.nn as nn
from common import train
from matplotlib.figure import Figure
from torch import Tensor

from data import UserError
from vae import reparameterize
from viz import interpolate_latent_space, mean_codes, save, tile


@torch.no_grad()
def compare(models: dict[str, nn.Module], images: Tensor, path: str, note: str = "") -> None:
    """Print and draw where the codes of the models lie, and what noise decodes into.

    models: name -> trained model, on the CPU, all of one latent_dim; images: at least 6,
    (n, channels, height, width) in [0, 1]. The codes of a VAE are draws from q(z|x), as
    its decoder gets them.
    """
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    panels = figure.subplots(4, len(models), height_ratios=(4, 3, 3, 3), sharey="row")
    statistics, noise = {}, torch.randn(24, next(iter(models.values())).latent_dim)
    for (name, model), axes in zip(models.items(), panels.T):
        codes = model.encode(images)
        z = reparameterize(*codes) if isinstance(codes, tuple) else codes
        mean, std = z.mean(dim=0), z.std(dim=0)
        error = (images.flatten(1) - model.decode(z)).pow(2).sum(dim=1).mean()
        statistics[name] = mean, std, error

        ends = mean_codes(model, images[:6])
        steps = [interpolate_latent_space(model, ends[i], ends[i + 1], 8) for i in (0, 2, 4)]
        axes[0].axhspan(-1, 1, color="tab:green", alpha=0.3, linewidth=0)
        axes[0].errorbar(range(1, len(mean) + 1), mean, std, fmt=".", color="black", linewidth=1)
        axes[0].set(title=name, xticks=[1, len(mean)])
        axes[1].imshow(tile(model.decode(noise), columns=8))
        axes[2].imshow(tile(model.decode(mean + std * noise), columns=8))
        axes[3].imshow(tile(torch.cat(steps), columns=8))
        for panel in axes[1:]:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    labels = "codes, mean ± std", "noise, N(0, I)", "noise, scaled\nas the codes", "interpolation"
    for axes, label in zip(panels[:, 0], labels):
        axes.set_ylabel(label)
    save(figure, path, note)

    print("\ncode dimension" + "".join(f"{name + ' mean':>18}{'std':>7}" for name in models))
    for j in range(noise.shape[1]):
        cells = (f"{mean[j]:18.2f}{std[j]:7.2f}" for mean, std, _ in statistics.values())
        print(f"{j + 1:14d}" + "".join(cells))
    errors = ", ".join(f"{name} {error:.2f}" for name, (_, _, error) in statistics.items())
    print(f"squared error of a reconstruction, mean over the images: {errors}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = train.parse_args(argv, __doc__)
    usual = train.parse_args([])
    for key in ("model", "beta", "kl_anneal", "recon", "binarize", "out"):
        if getattr(args, key) != getattr(usual, key):
            raise UserError("exercise 0 trains --model ae and mlp as they are, on grey images: "
                            f"leave out --{key.replace('_', '-')} and colour datasets")
    models = {}
    for name, title in (("ae", "autoencoder"), ("mlp", "VAE")):
        folder = train.main([*argv, "--model", name])
        models[title], checkpoint = train.load_run(folder)
    config = checkpoint["config"]
    test = train.load_test_split(config, args.data_dir)
    torch.manual_seed(args.seed)
    path = f"{folder}/ae-vs-vae.png"
    compare(models, test.images / 255, path, config["notice"])
    print(f"saved {path}")
    if config["notice"]:
        print(f"*** REMEMBER: these are the {config['notice'].upper()}. ***")


if __name__ == "__main__":
    train.run_cli(main, "the same command begins again")
