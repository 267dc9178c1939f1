"""Pictures of a trained model and its latent space (chapter 2.5 - 2.7).

    python viz.py runs/mnist-mlp        redraw every figure of a run
    python viz.py                       of the newest run

The functions take a model that is already trained, and the path of the PNG to write.
`note` is printed at the foot of a figure. No window is opened.
"""

import copy
import itertools
import json
import math
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import CLASS_NAMES, write_atomically
from vae import LOGVAR_RANGE, kl_divergence_gaussian

# A notebook tells what is started in its shell to draw by a module of its own, without which
# matplotlib cannot even be imported.
if "matplotlib_inline" in os.environ.get("MPLBACKEND", "") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]

import matplotlib  # noqa: E402
import matplotlib.backends.backend_agg  # noqa: E402, F401; now, for Ctrl-C later could break it
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Circle  # noqa: E402

# The attributes that attributes.png adds to faces and takes away.
ATTRIBUTES = {
    "celeba": ("Smiling", "Eyeglasses", "Male"),
    "faces": ("smile", "glasses", "hair_length", "turn"),
}
DPI = 150
matplotlib.rcParams["font.size"] = 8


# ------------------------------------------------------------------ shared pieces


def as_images(x: Tensor) -> Tensor:
    """Flat square images, grey or RGB, as (n, channels, side, side); others unchanged."""
    if x.dim() == 2:
        channels = 1 if math.isqrt(x.shape[1]) ** 2 == x.shape[1] else 3
        side = math.isqrt(x.shape[1] // channels)
        if channels * side**2 != x.shape[1]:
            raise ValueError(f"{x.shape[1]} values are no square image: view them as (n, c, h, w)")
        x = x.view(-1, channels, side, side)
    return x


def mean_codes(model: nn.Module, images: Tensor) -> Tensor:
    """The code of each image, (batch, latent_dim); of a VAE, the mean of q(z|x)."""
    codes = model.encode(images)
    return codes[0] if isinstance(codes, tuple) else codes


@torch.no_grad()
def encode_all(model: nn.Module, loader: Iterable, device) -> tuple[Tensor, ...]:
    """q(z|x) of every image: mu and logvar, (n, latent_dim), and the labels, on the CPU. Of a model
    without a logvar, the codes and the labels."""
    model.eval()
    batches = []
    for images, labels in loader:
        codes = model.encode(images.to(device))
        batches.append((*codes, labels) if isinstance(codes, tuple) else (codes, labels))
    return tuple(torch.cat(part).cpu() for part in zip(*batches))


def kl_per_latent(mu: Tensor, logvar: Tensor) -> Tensor:
    """The mean KL of each latent by itself, nats: (n, latent_dim) -> (latent_dim,)."""
    # As if each were the only latent of an image of its own.
    each = kl_divergence_gaussian(mu.reshape(-1, 1), logvar.reshape(-1, 1))
    return each.view(mu.shape).mean(dim=0)


def tile(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images in [0, 1], row by row, as one RGB picture (height, width, 3) with white gaps."""
    images = as_images(images).cpu()
    n, _, height, width = images.shape
    rows = -(-n // columns)
    picture = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        picture[:, y : y + height, x : x + width] = image  # grey spreads over the 3 channels
    return picture.permute(1, 2, 0).numpy()


def save_tiles(images: Tensor, columns: int, path, note: str = "", row_labels: Sequence = (),
               column_labels: Sequence = (), gap: int = 2, scale: int | None = None) -> None:
    """Save a grid of images, each pixel as scale x scale pixels, labels outside it. By default, an
    image is about 84 pixels high."""
    picture = tile(images, columns, gap)
    high, wide = as_images(images).shape[2:]
    scale = scale or max(1, round(84 / high))
    h, w = picture.shape[0] * scale, picture.shape[1] * scale
    left = round(DPI * (0.15 + 0.06 * max(map(len, row_labels), default=0)))
    top, bottom = (round(DPI * (0.25 if text else 0.06)) for text in (column_labels, note))
    right = round(DPI * 0.06)
    # A tenth of a pixel more, for some versions of matplotlib round the size down.
    total_w, total_h = left + w + right + 0.1, top + h + bottom + 0.1
    figure = Figure(figsize=(total_w / DPI, total_h / DPI))
    axes = figure.add_axes((left / total_w, bottom / total_h, w / total_w, h / total_h))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_yticks([high / 2 + i * (high + gap) for i in range(len(row_labels))], row_labels)
    axes.set_xticks([wide / 2 + i * (wide + gap) for i in range(len(column_labels))], column_labels)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    save(figure, path, note)


def save(figure: Figure, path: str | Path, note: str = "") -> None:
    if note:
        figure.supxlabel(note, fontsize=9, color="firebrick")
    with write_atomically(path) as file:
        figure.savefig(file, dpi=DPI, format="png", pil_kwargs={"optimize": True})


# -------------------------------------------------- what a model makes of its data


@torch.no_grad()
def visualize_reconstruction(model: nn.Module, test_loader: Iterable, device, path,
                             num_samples: int = 10, note: str = "") -> None:
    """Test images above their reconstructions, decoded from the mean of q(z|x)."""
    model.eval()
    images = next(iter(test_loader))[0][:num_samples].to(device)
    x_recon = model.decode(mean_codes(model, images)).view(images.shape)
    save_tiles(torch.cat([images, x_recon]), len(images), path, note, ["input", "decoded"])


@torch.no_grad()
def visualize_samples(model: nn.Module, device, path, num_samples: int = 16,
                      note: str = "") -> None:
    """Decoded draws from the prior: what the model has learned to imagine."""
    model.eval()
    columns = math.ceil(num_samples**0.5)
    save_tiles(model.sample(num_samples, device), columns, path, note)


def visualize_training(history: list[dict], path, unit: str = "nats per image",
                       note: str = "") -> None:
    """Loss, reconstruction and KL of every epoch, training and test, in the given unit. Of an
    autoencoder, which has no KL, the loss alone: recon is the same."""
    epochs = [row["epoch"] for row in history]
    terms = ("loss", "recon", "kl") if any(row["train_kl"] for row in history) else ("loss",)
    figure = Figure(figsize=(0.5 + 2.5 * len(terms), 2.8), layout="constrained")
    panels = figure.subplots(1, len(terms), squeeze=False)[0]
    for axes, term in zip(panels, terms):
        for split, style in (("train", ".--"), ("test", ".-")):
            axes.plot(epochs, [row[f"{split}_{term}"] for row in history], style, label=split)
        axes.set(xlabel="epoch", title=term)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(unit)
    panels[0].legend()
    save(figure, path, note)


# ------------------------------------------------------------------ the latent space


@torch.no_grad()
def visualize_latent_space_2d(model: nn.Module, test_loader: Iterable, device, path,
                              class_names: Sequence = tuple("0123456789"), note: str = "") -> None:
    """Every test image at its code, coloured by its class; for latent_dim = 2. The circles hold
    50 % and 95 % of the prior N(0, I)."""
    z, *_, labels = (part.numpy() for part in encode_all(model, test_loader, device))
    figure = Figure(figsize=(6.2, 5.4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    for label in np.unique(labels):
        x, y = z[labels == label].T
        name = class_names[label] if label < len(class_names) else str(label)
        axes.scatter(x, y, s=3, alpha=0.5, linewidths=0, color=colours(label % 10), label=name)
    for share in (0.5, 0.95):
        radius = (-2 * np.log(1 - share)) ** 0.5  # |z|^2 is exponential with mean 2
        axes.add_patch(Circle((0, 0), radius, fill=False, linestyle=":", color="black"))
    axes.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    legend = figure.legend(loc="outside right center", markerscale=5, frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    save(figure, path, note)


@torch.no_grad()
def interpolate_latent_space(model: nn.Module, z_start: Tensor, z_end: Tensor,
                             num_steps: int = 10) -> Tensor:
    """Decode num_steps points on the straight line from z_start to z_end, (latent_dim,) each, both
    included. Returns (num_steps, channels, height, width)."""
    model.eval()
    alphas = torch.linspace(0, 1, num_steps, device=z_start.device)[:, None]
    return as_images(model.decode((1 - alphas) * z_start + alphas * z_end))


@torch.no_grad()
def visualize_interpolation(model: nn.Module, test_loader: Iterable, device, path,
                            num_pairs: int = 3, num_steps: int = 10, note: str = "") -> None:
    """Between the codes of two test images, which stand at the ends of each row."""
    model.eval()
    images = next(iter(test_loader))[0][: 2 * num_pairs].to(device)
    codes = mean_codes(model, images)
    rows = []
    for i in range(0, len(images) - 1, 2):
        steps = interpolate_latent_space(model, codes[i], codes[i + 1], num_steps)
        steps = steps.view(-1, *images.shape[1:])
        rows += [images[i : i + 1], steps, images[i + 1 : i + 2]]
    labels = ["input", *[f"{a:.2f}" for a in np.linspace(0, 1, num_steps)], "input"]
    save_tiles(torch.cat(rows), num_steps + 2, path, note, column_labels=labels)


@torch.no_grad()
def visualize_latent_manifold(model: nn.Module, device, path, n: int = 20, digit_size: int = 28,
                              note: str = "") -> None:
    """An n x n grid over a 2-D latent space, decoded: z_1 to the right, z_2 upwards. The steps are
    equal in probability (through the inverse of the normal CDF), so every picture stands for 1/n^2
    of the prior. Equal steps in z would spend most pictures where there is little of it."""
    model.eval()
    z = torch.special.ndtri((torch.arange(n, device=device) + 0.5) / n)
    z2, z1 = torch.meshgrid(z.flip(0), z, indexing="ij")
    images = model.decode(torch.stack([z1, z2], dim=-1).view(n * n, 2))
    images = images.view(n * n, -1, digit_size, digit_size)
    labels = [f"{value:.1f}" for value in z.tolist()]
    rows, columns = [f"z2={labels[-1]}", *labels[-2::-1]], [f"z1={labels[0]}", *labels[1:]]
    save_tiles(images, n, path, note, rows, columns, gap=0, scale=2 if digit_size < 64 else 1)


@torch.no_grad()
def visualize_traversals(model: nn.Module, test_loader: Iterable, device, path, num_dims: int = 10,
                         num_steps: int = 11, note: str = "") -> None:
    """Move one latent at a time, the others at the code of the first test image. A row a latent,
    ordered by KL (nats, mean over the test set): the num_dims - 1 with the largest, and the one
    with the smallest. Where that is near 0, the decoder does not use the latent."""
    mu, logvar, _ = encode_all(model, test_loader, device)
    kl = kl_per_latent(mu, logvar)
    order = kl.argsort(descending=True).tolist()
    order = order[: num_dims - 1] + order[num_dims - 1 :][-1:]
    values = torch.linspace(-2.5, 2.5, num_steps, device=device)
    z = mu[:1].to(device).repeat(len(order), num_steps, 1)
    for row, j in enumerate(order):
        z[row, :, j] = values
    row_labels = [f"z{j + 1}: {kl[j]:.2f} nats" for j in order]
    column_labels = [f"{value:.1f}" for value in values.tolist()]
    save_tiles(model.decode(z.flatten(0, 1)), num_steps, path, note, row_labels, column_labels)


@torch.no_grad()
def visualize_attributes(model: nn.Module, test_loader: Iterable, device, path,
                         attributes: dict[str, Tensor], note: str = "") -> None:
    """Add each attribute to a test face without it, and take it from one that has it.

    attributes: name -> (n,), a value for every image of test_loader. An image has the attribute
    where its value is above the mean. The direction of an attribute is the mean code of the images
    that have it minus the mean code of those that have not.
    """
    z, *_ = encode_all(model, test_loader, device)
    steps, rows = torch.linspace(0, 2, 5), []
    for values in attributes.values():
        has = values > values.double().mean()
        direction = z[has].mean(dim=0) - z[~has].mean(dim=0)
        for which, sign in ((~has, 1), (has, -1)):
            i = which.nonzero()[0].item()  # the first such face
            walk = model.decode((z[i] + sign * steps[:, None] * direction).to(device))
            faces = (face for images, _ in test_loader for face in images)
            rows += [next(itertools.islice(faces, i, None))[None].to(device), as_images(walk)]
    columns = ["input", *(f"{step:+g}" for step in steps.tolist())]
    columns += ["input", *(f"{-step:+g}" for step in steps.tolist())]
    save_tiles(torch.cat(rows), len(columns), path, note, list(attributes), columns)


# ------------------------------------------------------- the page to play with a model

LAYERS = {nn.Linear, nn.Tanh, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d}  # and relu


def export_layers(model: nn.Module, function: Callable, x: Tensor) -> list[dict]:
    """The layers that function(x) passes, or [] if more than relu lies between. The hooks stay."""
    x = 1000 * (x - x.flip(0))  # rows and their negatives: every unit is below 0 in one of them
    passed, layers, last, start = [], [], x, x
    plain = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros", "affine": True}
    for layer in model.modules():
        if type(layer) in LAYERS and all(getattr(layer, k, v) == v for k, v in plain.items()):
            layer.register_forward_hook(lambda *step: passed.append(step))
    function(x)
    for layer, (x,), y in passed:  # an encoder's second head starts where the first one did
        relu, *same = (torch.equal(x.flatten(1), t.flatten(1)) for t in (F.relu(last), last, start))
        if not relu and not any(same):
            return []
        out = {key: value for key, value in vars(layer).items() if key[0] != "_"}
        out |= {"kind": type(layer).__name__, "from": x.shape[1:], "to": y.shape[1:]}
        out |= {"bias": y.new_zeros(y.shape[1])} | dict(layer.named_parameters())
        if isinstance(layer, nn.BatchNorm2d):  # in evaluation mode it is x * scale + shift
            out["scale"] = layer.weight / (layer.running_var + layer.eps).sqrt()
            out["shift"] = layer.bias - layer.running_mean * out["scale"]
        layers += [{"kind": "ReLU"}] * relu + [out]
        last, start = y, x
    return layers


@torch.no_grad()
def write_explorer(folder: Path, model: nn.Module, config: dict, loader: Iterable) -> None:
    """Fill explore.html with the model, 20 test images and the codes of two batches. No page for a
    model that export_layers does not see through, or of more than 8 million parameters (21 MB)."""
    model = copy.deepcopy(model).cpu().float().eval()
    images, labels = (torch.cat(part).cpu() for part in zip(*itertools.islice(loader, 2)))
    q = model.encode(images)
    mu, use = (q[0], kl_per_latent(*q)) if isinstance(q, tuple) else (q, q.std(0, correction=0))
    layers = {"encoder": export_layers(model, model.encode, images[:64]),
              "decoder": export_layers(model, model.decode_logits, mu[:64])}
    if not all(layers.values()) or sum(p.numel() for p in model.parameters()) > 8_000_000:
        return
    shown = labels[:200].argsort(stable=True)[::10]  # a few of every class
    run = {key: config[key] for key in ("model", "dataset", "notice", "recon")} | layers | {
        "classes": CLASS_NAMES.get(config["dataset"], ["pictures"]),
        "folder": folder.resolve().name,
        "beta": config.get("beta", 1), "is_vae": isinstance(q, tuple), "logvar_range": LOGVAR_RANGE,
        "shape": images.shape[1:], "images": images[shown], "shown": shown.tolist(),
        "labels": labels.tolist(), "codes": mu[:, :2], "use": use.tolist(),
        "low": min(-3, mu.min().item()) - 0.2, "high": max(3, mu.max().item()) + 0.2,
    }
    run = json.dumps(run, default=lambda t: {"f16": b64encode(t.half().numpy().tobytes()).decode()})
    page = Path(__file__).with_name("explore.html").read_text("utf-8")
    with write_atomically(folder / "explore.html") as file:  # without a "<" no name ends the script
        file.write(page.replace('"UNFILLED"', run.replace("<", "\\u003c"), 1).encode())


# -------------------------------------------------------------------- a whole run


def loss_unit(config: dict) -> str:
    bce, ae = config["recon"] == "bce", config["model"] == "ae"
    return "nats per image" if bce else f"squared error per image{'' if ae else ', KL in nats'}"


def draw_run(folder: str | Path, model: nn.Module, config: dict, history: list[dict],
             loader: Iterable, factors: dict[str, Tensor]) -> None:
    """Draw into folder every figure that applies to the run. loader: its test images; factors: what
    is known about them, name -> (n,)."""
    folder, device, note = Path(folder), next(model.parameters()).device, config["notice"]
    torch.manual_seed(config["seed"])
    visualize_training(history, folder / "training.png", loss_unit(config), note)
    visualize_reconstruction(model, loader, device, folder / "reconstruction.png", note=note)
    visualize_samples(model, device, folder / "samples.png", num_samples=64, note=note)
    if len(next(iter(loader))[0]) > 1:
        visualize_interpolation(model, loader, device, folder / "interpolation.png", note=note)
    if config["model"] != "ae":  # it has no KL to order its latents by
        visualize_traversals(model, loader, device, folder / "traversals.png", note=note)
    attributes = {name: factors[name] for name in ATTRIBUTES.get(config["dataset"], ())
                  if name in factors and len(factors[name].unique()) > 1}
    if attributes:
        visualize_attributes(model, loader, device, folder / "attributes.png", attributes, note)
    if config["latent_dim"] == 2:
        names = CLASS_NAMES.get(config["dataset"], ["pictures"])
        visualize_latent_space_2d(model, loader, device, folder / "latent_space.png", names, note)
        path, side = folder / "manifold.png", next(iter(loader))[0].shape[-1]
        visualize_latent_manifold(model, device, path, digit_size=side, note=note)
    write_explorer(folder, model, config, loader)


if __name__ == "__main__":
    import train

    train.run_cli(train.redraw)
