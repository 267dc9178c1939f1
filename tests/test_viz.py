"""The pictures: read back from their PNGs, against models whose output is known."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torch.testing import assert_close

import viz
from data import Batches
from vae import CelebAVAE


class Known(torch.nn.Module):
    """Codes that are the first pixels, and a decoder of one layer, which keeps what it is given. It
    insists on evaluation mode: in training mode a figure would change a BatchNorm's averages."""

    def __init__(self, latent_dim=2, shape=(1, 4, 4)):
        super().__init__()
        self.latent_dim, self.shape, self.z = latent_dim, shape, []
        self.weight = torch.nn.Parameter(torch.randn(latent_dim, math.prod(shape)))

    def encode(self, x):
        assert not self.training
        mu = x.flatten(1)[:, : self.latent_dim]
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        assert not self.training
        self.z.append(z)
        return torch.sigmoid(z @ self.weight).view(-1, *self.shape)

    def sample(self, num_samples, device=None):
        assert not self.training
        self.drawn = torch.rand(num_samples, 16)
        return self.drawn


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    found, save = [], viz.save
    monkeypatch.setattr(viz, "save", lambda *args: found.append(args[0]) or save(*args))
    return found


def labels(figure):
    """Those of the rows and of the columns of a grid, from the top and from the left."""
    (axes,) = figure.axes
    found = []
    for axis in (axes.yaxis, axes.xaxis):
        assert (np.diff(axis.get_ticklocs()) > 0).all()
        found.append([text.get_text() for text in axis.get_ticklabels()])
    return found


def read_tiles(path, rows, columns, side, scale, gap=2):
    """The images of a figure that save_tiles has drawn: (rows * columns, 3, side, side)."""
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    margin, middle, step = round(0.06 * viz.DPI), scale // 2, side + gap
    bottom, right = (length - margin for length in picture.shape[1:])
    top, left = bottom - (rows * step - gap) * scale, right - (columns * step - gap) * scale
    pixels = picture[:, top + middle : bottom : scale, left + middle : right : scale]
    corners = [(r * step, c * step) for r in range(rows) for c in range(columns)]
    return torch.stack([pixels[:, y : y + side, x : x + side] for y, x in corners])


def assert_same(shown, images):
    assert (shown - (images * 255).round()).abs().max() <= 1


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(3, 9))
def test_figures_show_every_pixel_at_its_place(tmp_path_factory, n, columns, channels, side):
    path = tmp_path_factory.mktemp("figure") / "tiles.png"
    images = torch.randint(256, (n, channels, side, side)) / 255
    viz.save_tiles(images, columns, path, scale=3)
    rows = -(-n // columns)
    shown = read_tiles(path, rows, columns, side, 3)
    assert_same(shown[:n], images)
    assert (shown[n:] == 255).all()


@given(st.integers(1, 6), st.integers(2, 12))
def test_interpolation_has_its_ends_exactly_and_is_linear(latent_dim, steps):
    model, (start, end) = Known(latent_dim), torch.randn(2, latent_dim)
    images = viz.interpolate_latent_space(model, start, end, steps)
    (z,) = model.z
    assert torch.equal(z[0], start) and torch.equal(z[-1], end)
    assert_close(z.diff(dim=0), ((end - start) / (steps - 1)).expand(steps - 1, -1))
    assert_close(images, model.decode(z))


def test_the_manifold_has_equal_steps_in_probability_right_and_up(tmp_path, saved):
    model = Known(shape=(1, 3, 3))
    model.weight.data = torch.tensor([[0.5], [1.5]]).expand(2, 9)
    viz.visualize_latent_manifold(model, "cpu", tmp_path / "m.png", n=5, digit_size=3)
    picture = read_tiles(tmp_path / "m.png", 5, 5, 3, 2, gap=0)[:, 0, 1, 1].view(5, 5)
    z = torch.tensor([-1.2816, -0.5244, 0, 0.5244, 1.2816])  # where N(0, 1) has 10, 30, ... 90 %
    assert_same(picture, torch.sigmoid(0.5 * z + 1.5 * z.flip(0)[:, None]))
    assert labels(saved[0]) == [["z2=1.3", "0.5", "0.0", "-0.5", "-1.3"],
                                ["z1=-1.3", "-0.5", "0.0", "0.5", "1.3"]]


def test_traversals_are_ordered_by_kl_and_move_one_latent_at_a_time(tmp_path, saved):
    """If they cannot have a row each, the last row is the latent that is used least."""
    images = torch.randint(100, (50, 1, 4, 4), dtype=torch.uint8)
    codes = images.view(50, -1)[:, :3]
    codes *= torch.tensor([1, 2, 0], dtype=torch.uint8)
    model, loader = Known(3), Batches(images, torch.arange(50), 20)
    for num_dims, order in ((10, [1, 0, 2]), (2, [1, 2])):
        viz.visualize_traversals(model, loader, "cpu", tmp_path / "t.png", num_dims, num_steps=5)
        expected = (codes[0] / 255).repeat(len(order), 5, 1)
        for row, moved in enumerate(order):
            expected[row, :, moved] = torch.linspace(-2.5, 2.5, 5)
        assert_close(model.z.pop(), expected.flatten(0, 1))
    kl = (codes / 255).pow(2).mean(dim=0) / 2  # where sigma = 1
    assert labels(saved[0]) == [[f"z{j + 1}: {kl[j]:.2f} nats" for j in (1, 0, 2)],
                                ["-2.5", "-1.2", "0.0", "1.2", "2.5"]]


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_and_interpolations_show_the_inputs(tmp_path, channels, saved):
    images = torch.randint(256, (6, channels, 28, 28), dtype=torch.uint8)
    loader, x = Batches(images, torch.arange(6), 6), images / 255
    model = Known(2, (channels, 28, 28))
    decoded = torch.sigmoid(x.flatten(1)[:, :2] @ model.weight).view(x.shape)
    viz.visualize_reconstruction(model, loader, "cpu", tmp_path / "r.png", num_samples=6)
    assert_same(read_tiles(tmp_path / "r.png", 2, 6, 28, 3), torch.cat([x, decoded]))
    path = tmp_path / "i.png"
    viz.visualize_interpolation(model.train(), loader, "cpu", path, num_pairs=2, num_steps=4)
    shown = read_tiles(path, 2, 6, 28, 3)
    assert_same(shown[[0, 5, 6, 11]], x[:4])  # at the ends of the rows
    assert_same(shown[[1, 4, 7, 10]], decoded[:4])
    assert labels(saved[0])[0] == ["input", "decoded"]
    assert labels(saved[1])[1] == ["input", "0.00", "0.33", "0.67", "1.00", "input"]


def test_the_scatter_shows_every_class_at_its_codes_in_its_own_colour(tmp_path, saved):
    classes, model = torch.arange(10).repeat(30), Known()
    codes = torch.stack([classes, -classes], dim=1) + 0.1 * torch.rand(300, 2)
    model.encode = lambda x: x  # a code and no logvar, as an autoencoder's
    loader = list(zip(codes.split(150), classes.split(150)))
    names = [f"a long name {c}" for c in range(10)]
    viz.visualize_latent_space_2d(model, loader, "cpu", tmp_path / "s.png", names)
    (axes,), (legend,) = saved[0].axes, saved[0].legends
    for c, points in enumerate(axes.collections):
        np.testing.assert_allclose(points.get_offsets(), codes[classes == c], rtol=1e-6)
        assert points.get_label() == names[c]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 10
    beside, inside = legend.get_window_extent(), axes.get_window_extent()
    left, width = axes.get_tightbbox().x0, saved[0].bbox.width
    assert 0 <= left < inside.x1 <= beside.x0 < beside.x1 <= width  # nothing is cut off
    prior = torch.randn(100_000, 2).norm(dim=1)
    shares = [(prior < circle.radius).double().mean().item() for circle in axes.patches]
    assert shares == pytest.approx([0.5, 0.95], abs=0.01)


def test_attributes_are_added_and_taken_away_along_the_difference_of_means(tmp_path, saved):
    """Codes are the first pixels: an attribute that is the second, one that is the third."""
    images = torch.randint(100, (40, 3, 4, 4), dtype=torch.uint8)
    flat = images.view(40, -1)
    even = torch.arange(40) % 2 == 0
    flat[:, 1] = torch.where(even, 200, 50)
    loader = [(x / 255, y) for x, y in zip(images.split(15), torch.arange(40).split(15))]
    model = Known(3, (3, 4, 4))
    some = torch.arange(40.0) ** 2  # the first above the mean, 23, is in the second batch
    attributes = {"even": even.to(torch.uint8), "real": some}
    viz.visualize_attributes(model, loader, "cpu", tmp_path / "a.png", attributes)
    rows, columns = labels(saved[0])
    assert rows == ["even", "real"]
    assert columns == ["input", "+0", "+0.5", "+1", "+1.5", "+2",
                       "input", "-0", "-0.5", "-1", "-1.5", "-2"]
    z, steps = flat[:, :3] / 255, torch.linspace(0, 2, 5)[:, None]
    for has, walks in ((even, model.z[:2]), (some > some.mean(), model.z[2:])):
        direction = z[has].mean(dim=0) - z[~has].mean(dim=0)
        assert_close(walks, [z[~has][0] + steps * direction, z[has][0] - steps * direction])
    shown = read_tiles(tmp_path / "a.png", 2, 12, 4, 21)
    assert_same(shown[[0, 6, 12, 18]], images[[1, 0, 0, 23]] / 255)  # the inputs


@pytest.mark.parametrize("n", [20, 1])
def test_every_figure_has_its_note_and_leaves_batchnorm_as_it_is(n, tmp_path, faces, figures):
    """One image for testing has no other beside it."""
    model = CelebAVAE(latent_dim=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = Batches(faces.images[:n], faces.labels[:n], 7)
    config = {"model": "celeba", "dataset": "faces", "notice": "drawn", "seed": 0, "recon": "bce",
              "latent_dim": 2}
    history = [{"epoch": 1} | {f"{a}_{b}": 1.0 for a in ("train", "test")
                               for b in ("loss", "recon", "kl")}]
    factors = {name: values[:n] for name, values in faces.factors.items()}
    viz.draw_run(tmp_path, model, config, history, loader, factors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = ["latent_space", "manifold", "reconstruction", "samples", "training", "traversals"]
    names += ["attributes", "interpolation"] if n > 1 else []
    assert {name: note for name, (_, note) in figures.items()} == {
        f"{name}.png": "drawn" for name in names}


def test_samples_are_what_the_model_draws(tmp_path):
    model = Known()
    viz.visualize_samples(model, "cpu", tmp_path / "s.png", num_samples=9)
    assert_same(read_tiles(tmp_path / "s.png", 3, 3, 4, 21)[:, 0].flatten(1), model.drawn)
    assert viz.as_images(torch.rand(2, 3 * 25)).shape == (2, 3, 5, 5)  # flat colour images


def test_training_curves_are_those_of_the_history(tmp_path, saved):
    terms = [f"{split}_{term}" for term in ("loss", "recon", "kl") for split in ("train", "test")]
    history = [{"epoch": e, **{t: 10.0 * e + i for i, t in enumerate(terms)}} for e in (1, 2, 3)]
    viz.visualize_training(history, tmp_path / "t.png", unit="nats")
    lines = [line for axes in saved[0].axes for line in axes.lines]
    assert [line.get_label() for line in lines] == ["train", "test"] * 3
    for line, term in zip(lines, terms):
        assert line.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata().tolist() == [row[term] for row in history]
    history = [row | {"train_kl": 0.0, "test_kl": 0.0} for row in history]  # an autoencoder's
    viz.visualize_training(history, tmp_path / "t.png")
    assert [axes.get_title() for axes in saved[1].axes] == ["loss"]
    assert saved[0].axes[0].get_ylabel() == "nats" and (tmp_path / "t.png").stat().st_size > 5000


def test_a_note_is_printed_on_the_figure(tmp_path):
    for note in ("built-in digits, not mnist", ""):
        viz.save_tiles(torch.zeros(1, 1, 28, 28), 1, tmp_path / "tiles.png", note, scale=20)
        picture = np.array(Image.open(tmp_path / "tiles.png").convert("RGB")).astype(int)
        red = (picture[..., 0] - picture[..., 1] > 80).sum()
        assert red > 50 if note else red == 0
