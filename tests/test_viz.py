"""The pictures: read back from their PNGs, against models whose output is known."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

import viz
from data import Batches
from vae import CelebAVAE


class Known(torch.nn.Module):
    """A model with a linear decoder, and codes that are the first pixels."""

    def __init__(self, latent_dim=2, shape=(1, 4, 4), kl=None):
        super().__init__()
        self.latent_dim, self.shape, self.kl = latent_dim, shape, kl
        self.weight = torch.nn.Parameter(torch.randn(latent_dim, int(np.prod(shape))))

    def encode(self, x):
        mu = x.flatten(1)[:, : self.latent_dim]
        if self.kl is not None:  # KL = mu^2 / 2 where sigma = 1
            mu = torch.tensor(self.kl).mul(2).sqrt().expand(len(x), -1)
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        return (z @ self.weight).view(-1, *self.shape)

    def sample(self, num_samples, device=None):
        return self.decode(torch.rand(num_samples, self.latent_dim))


def read_tiles(path, rows, columns, side, scale, gap=2):
    """The images of a figure that save_tiles has drawn: (rows * columns, side, side, 3)."""
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    step = (side + gap) * scale
    height, width = rows * step - gap * scale, columns * step - gap * scale
    right = picture.shape[1] - round(0.06 * viz.DPI)
    bottom = picture.shape[0] - round(0.06 * viz.DPI)
    area = picture[bottom - height : bottom, right - width : right]
    middle = scale // 2
    return torch.stack([
        area[r * step + middle : r * step + side * scale : scale,
             c * step + middle : c * step + side * scale : scale]
        for r in range(rows) for c in range(columns)
    ])


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(3, 9))
def test_figures_show_every_pixel_at_its_place(tmp_path_factory, n, columns, channels, side):
    path = tmp_path_factory.mktemp("figure") / "tiles.png"
    images = torch.randint(256, (n, channels, side, side)) / 255
    viz.save_tiles(images, columns, path, scale=3)
    rows = -(-n // columns)
    shown = read_tiles(path, rows, columns, side, 3)
    expected = (images.expand(-1, 3, -1, -1) * 255).round().permute(0, 2, 3, 1)
    assert (shown[:n] - expected).abs().max() <= 1
    assert (shown[n:] == 255).all()


@given(st.integers(1, 6), st.integers(2, 12))
def test_interpolation_has_its_ends_exactly_and_is_linear(latent_dim, steps):
    model = Known(latent_dim)
    start, end = torch.randn(2, latent_dim)
    images = viz.interpolate_latent_space(model, start, end, steps)
    assert images.shape == (steps, 1, 4, 4)
    torch.testing.assert_close(images[:1], model.decode(start[None]))
    torch.testing.assert_close(images[-1:], model.decode(end[None]))
    differences = images.diff(dim=0)
    torch.testing.assert_close(differences, differences[:1].expand_as(differences))

    codes = []
    model.decode = lambda z: codes.append(z) or torch.zeros(len(z), 1, 4, 4)
    viz.interpolate_latent_space(model, start, end, steps)
    assert torch.equal(codes[0][0], start) and torch.equal(codes[0][-1], end)


def test_the_manifold_has_equal_steps_in_probability_right_and_up(tmp_path):
    codes = []

    class Ramp(torch.nn.Module):
        """A picture as bright as the probability below z_1, plus that below z_2."""

        def decode(self, z):
            codes.append(z)
            share = torch.special.ndtr(z)
            return (0.25 * share[:, :1] + 0.75 * share[:, 1:]).expand(-1, 9)

    viz.visualize_latent_manifold(Ramp(), "cpu", tmp_path / "m.png", n=5, digit_size=3)
    shares = torch.special.ndtr(codes[0]).view(5, 5, 2)
    middles = (torch.arange(5) + 0.5) / 5
    torch.testing.assert_close(shares[0, :, 0], middles)
    torch.testing.assert_close(shares[:, 0, 1], middles.flip(0))
    picture = read_tiles(tmp_path / "m.png", 5, 5, 3, 2, gap=0)[:, 0, 0, 0].view(5, 5).float()
    expected = 255 * (0.25 * middles[None, :] + 0.75 * middles.flip(0)[:, None])
    assert (picture - expected).abs().max() <= 1


def test_traversals_are_ordered_by_kl_and_move_one_latent_at_a_time(tmp_path, drawn):
    model = Known(3, (1, 28, 28), kl=[0.5, 2.0, 0.0])
    codes = []
    decode = model.decode
    model.decode = lambda z: codes.append(z) or decode(z).sigmoid()
    loader = Batches(drawn.images[:50], drawn.labels[:50], 20)
    viz.visualize_traversals(model, loader, "cpu", tmp_path / "t.png", num_steps=5)
    z = codes[0].view(3, 5, 3)
    mu = model.encode(torch.zeros(1, 1))[0][0]
    assert z.shape == (3, 5, 3)
    for row, moved in enumerate([1, 0, 2]):
        torch.testing.assert_close(z[row, :, moved], torch.linspace(-2.5, 2.5, 5))
        still = [j for j in range(3) if j != moved]
        torch.testing.assert_close(z[row][:, still], mu[still].expand(5, 2))

    # With fewer rows than latents, the last row is the latent that is used least.
    viz.visualize_traversals(model, loader, "cpu", tmp_path / "t.png", num_dims=2, num_steps=5)
    z = codes[1].view(2, 5, 3)
    assert [row.std(dim=0).argmax().item() for row in z] == [1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_and_interpolations_show_the_inputs(tmp_path, channels):
    images = torch.randint(256, (6, channels, 28, 28), dtype=torch.uint8)
    loader = Batches(images, torch.arange(6), 6)
    model = Known(2, (channels, 28, 28))
    decode = model.decode
    model.decode = lambda z: decode(z).sigmoid()
    x = images / 255
    expected = (torch.cat([x, model.decode(model.encode(x)[0])]) * 255).round()
    viz.visualize_reconstruction(model, loader, "cpu", tmp_path / "r.png", num_samples=6)
    shown = read_tiles(tmp_path / "r.png", 2, 6, 28, 3).permute(0, 3, 1, 2)
    assert (shown - expected).abs().max() <= 1
    viz.visualize_interpolation(model, loader, "cpu", tmp_path / "i.png", num_pairs=2, num_steps=4)
    shown = read_tiles(tmp_path / "i.png", 2, 6, 28, 3).permute(0, 3, 1, 2)
    for tile, image in ((0, 0), (5, 1), (6, 2), (11, 3)):  # the ends of the rows
        assert (shown[tile] - expected[image]).abs().max() <= 1
    for tile, image in ((1, 0), (4, 1), (7, 2), (10, 3)):  # and their reconstructions
        assert (shown[tile] - expected[6 + image]).abs().max() <= 1


def test_the_scatter_shows_every_class_at_its_codes_in_its_own_colour(tmp_path, monkeypatch):
    labels = torch.arange(10).repeat(30)
    codes = torch.stack([labels, -labels], dim=1) + 0.1 * torch.rand(300, 2)
    model = Known(2)
    model.encode = lambda x: x  # a code and no logvar, as an autoencoder's
    loader = [(codes[:150], labels[:150]), (codes[150:], labels[150:])]
    figures, save = [], viz.save
    monkeypatch.setattr(viz, "save", lambda *args: figures.append(args[0]) or save(*args))
    names = [f"name {c}" for c in range(10)]
    viz.visualize_latent_space_2d(model, loader, "cpu", tmp_path / "s.png", names)
    (axes,) = figures[0].axes
    for c, points in enumerate(axes.collections):
        expected = codes[labels == c].numpy()
        np.testing.assert_allclose(points.get_offsets(), expected, rtol=1e-6)
        assert points.get_label() == names[c]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 10
    prior = torch.randn(100_000, 2).norm(dim=1)
    shares = [(prior < circle.radius).double().mean().item() for circle in axes.patches]
    assert shares == pytest.approx([0.5, 0.95], abs=0.01)
    assert Image.open(tmp_path / "s.png").size[0] > 800


def test_attributes_are_added_and_taken_away_along_the_difference_of_means(
    tmp_path, monkeypatch
):
    """Codes are the first pixels: an attribute that is the second, one that is the third."""
    images = torch.randint(100, (40, 3, 4, 4), dtype=torch.uint8)
    flat = images.view(40, -1)
    even = torch.arange(40) % 2 == 0
    flat[:, 1] = torch.where(even, 200, 50)
    loader = [(x / 255, y) for x, y in zip(images.split(15), torch.arange(40).split(15))]
    model, codes, labels = Known(3, (3, 4, 4)), [], []
    model.decode = lambda z: codes.append(z) or torch.rand(len(z), 3, 4, 4)
    some = torch.rand(40).sort().values  # the first that is above the mean is in a later batch
    attributes = {"even": even.to(torch.uint8), "real": some}
    save_tiles = viz.save_tiles
    monkeypatch.setattr(viz, "save_tiles", lambda *a: labels.extend(a[4:]) or save_tiles(*a))
    viz.visualize_attributes(model, loader, "cpu", tmp_path / "a.png", attributes)
    rows, columns = labels
    assert rows == ["even", "real"]
    assert columns == ["input", "+0", "+0.5", "+1", "+1.5", "+2",
                       "input", "-0", "-0.5", "-1", "-1.5", "-2"]
    z = flat[:, :3] / 255
    for number, has in enumerate((even, some > some.mean())):
        direction = z[has].mean(dim=0) - z[~has].mean(dim=0)
        added, taken = codes[2 * number : 2 * number + 2]
        without, with_it = z[~has][0], z[has][0]
        for step in range(5):
            torch.testing.assert_close(added[step], without + step / 2 * direction)
            torch.testing.assert_close(taken[step], with_it - step / 2 * direction)
    shown = read_tiles(tmp_path / "a.png", 2, 12, 4, 21).permute(0, 3, 1, 2)
    first_above = (some > some.mean()).nonzero()[0].item()
    assert first_above >= 15
    for tile, image in ((0, 1), (6, 0), (12, 0), (18, first_above)):  # the inputs
        assert (shown[tile] - images[image].float()).abs().max() <= 1


def test_figures_leave_batchnorm_as_it_is(tmp_path, faces):
    model = CelebAVAE(latent_dim=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = Batches(faces.images[:20], faces.labels[:20], 7)
    config = {"model": "celeba", "dataset": "faces", "notice": "", "seed": 0, "recon": "bce",
              "latent_dim": 2, "test_images": 20}
    history = [{"epoch": 1} | {f"{a}_{b}": 1.0 for a in ("train", "test")
                               for b in ("loss", "recon", "kl")}]
    factors = {name: values[:20] for name, values in faces.factors.items()}
    viz.draw_run(tmp_path, model, config, history, loader, factors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "training", "reconstruction", "samples", "interpolation", "traversals", "attributes",
        "latent_space", "manifold",
    }


def test_samples_are_what_the_model_draws(tmp_path):
    class Uniform(torch.nn.Module):
        def sample(self, num_samples, device=None):
            self.drawn = torch.rand(num_samples, 16)
            return self.drawn

    model = Uniform()
    viz.visualize_samples(model, "cpu", tmp_path / "s.png", num_samples=9)
    shown = read_tiles(tmp_path / "s.png", 3, 3, 4, 21)[..., 0].flatten(1)
    assert (shown - (model.drawn * 255).round()).abs().max() <= 1
    assert viz.as_images(torch.rand(2, 3 * 25)).shape == (2, 3, 5, 5)  # flat colour images


def test_training_curves_are_those_of_the_history(tmp_path, monkeypatch):
    terms = [f"{split}_{term}" for term in ("loss", "recon", "kl") for split in ("train", "test")]
    history = [{"epoch": e, **{t: 10.0 * e + i for i, t in enumerate(terms)}} for e in (1, 2, 3)]
    figures, save = [], viz.save
    monkeypatch.setattr(viz, "save", lambda *args: figures.append(args[0]) or save(*args))
    viz.visualize_training(history, tmp_path / "t.png", unit="nats")
    lines = [line for axes in figures[0].axes for line in axes.lines]
    assert [line.get_label() for line in lines] == ["train", "test"] * 3
    for line, term in zip(lines, terms):
        assert line.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata().tolist() == [row[term] for row in history]
    history = [row | {"train_kl": 0.0, "test_kl": 0.0} for row in history]  # an autoencoder's
    viz.visualize_training(history, tmp_path / "t.png")
    assert [axes.get_title() for axes in figures[1].axes] == ["loss"]
    assert figures[0].axes[0].get_ylabel() == "nats" and (tmp_path / "t.png").stat().st_size > 5000


def test_a_note_is_printed_on_the_figure(tmp_path):
    images = torch.zeros(1, 1, 28, 28)
    for name, note in (("with", "built-in digits, not mnist"), ("without", "")):
        viz.save_tiles(images, 1, tmp_path / name, note, scale=20)
    with_note, without = (np.array(Image.open(tmp_path / n).convert("RGB")).astype(int)
                          for n in ("with", "without"))
    red = lambda p: ((p[..., 0] - p[..., 1]) > 80).sum()  # noqa: E731
    assert red(with_note) > 50 and red(without) == 0
