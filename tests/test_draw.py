"""The drawn digits and faces: their form, and that each factor does what its name says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import draw
from draw import DIGIT_FACTORS, FACE_FACTORS, GLYPHS, draw_digits, draw_faces, paint_faces


@pytest.mark.parametrize("function, n", [(draw_digits, 300), (draw_faces, 60)])
def test_drawings_are_determined_by_their_seed_alone(function, n):
    one, same, other = ([f, g, *h.values()] for f, g, h in (function(n, s) for s in (5, 5, 6)))
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))


def test_drawings_have_the_stated_form(drawn, faces):
    assert drawn.images.shape == (6000, 1, 28, 28) and drawn.images.dtype == torch.uint8
    assert drawn.labels.dtype == torch.int64 and drawn.labels.bincount(minlength=10).min() > 500
    assert torch.equal(drawn.factors["class"], drawn.labels) and drawn.labels.max() == 9
    pairs = {*zip(drawn.labels.tolist(), drawn.factors["glyph"].tolist())}
    assert pairs == {(digit, i) for digit, ways in enumerate(GLYPHS) for i in range(len(ways))}
    assert (drawn.images.flatten(1).amax(dim=1) > 200).all()  # no faint ones
    for edge in (drawn.images[..., [0, -1], :], drawn.images[..., [0, -1]]):
        assert edge.float().mean() < 5  # they fit into the frame
    assert faces.images.shape == (400, 3, 64, 64) and faces.images.dtype == torch.uint8
    assert torch.equal(faces.labels, (faces.factors["smile"] > 0).long())
    assert 0.2 < faces.factors["glasses"].mean() < 0.4
    assert 0.5 < (faces.factors["beard"] == 0).double().mean() < 0.8
    for split, ranges, others in (
        (drawn, DIGIT_FACTORS, {"class", "glyph"}),
        (faces, FACE_FACTORS | {"beard": (0.0, 1.0), "glasses": (0.0, 1.0)}, set()),
    ):
        assert split.factors.keys() == ranges.keys() | others
        for name, (low, high) in ranges.items():
            values, margin = split.factors[name], 0.04 * (high - low)
            assert values.shape == split.labels.shape
            assert low <= values.min() < low + margin and high - margin < values.max() <= high


def test_factors_are_independent_of_each_other(drawn):
    digits = {name: drawn.factors[name] for name in ("class", *DIGIT_FACTORS)}
    for factors in (digits, draw.face_factors(20_000, 2)):
        table = torch.stack([values.double() for values in factors.values()])
        assert torch.corrcoef(table).triu(1).abs().max() < 5 / table.shape[1] ** 0.5


def test_a_spline_is_that_of_catmull_and_rom():
    """Through its points; between them, inside, evenly along a line, and half way as they say."""
    weights = draw.spline_weights(6)
    assert torch.equal(weights[::8], torch.eye(6))
    assert torch.allclose(weights[8:-8] @ torch.arange(6.0), torch.arange(1, 4.01, 1 / 8))
    half_way = torch.tensor([[8, 9, -1, 0, 0, 0], [0, -1, 9, 9, -1, 0]]) / 16
    assert torch.equal(weights[[4, 20]], half_way)  # an end point counts twice


def extent(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the pixels of each image, (m, height, width), and their centre: x and y."""
    area, (_, height, width) = images.sum(dim=(1, 2)), images.shape
    x = images.sum(dim=1) @ torch.arange(width).to(images) / area
    return area, x, images.sum(dim=2) @ torch.arange(height).to(images) / area


def test_factors_of_digits_are_what_their_names_say(drawn):
    """Each factor moves the statistic of the picture that it should, the right way."""
    ink, x, y = extent(images := drawn.images[:, 0].double() / 255)
    dx, dy = torch.arange(28) - x[:, None], torch.arange(28) - y[:, None]
    xx, yy = torch.einsum("nyx,nx->n", images, dx**2), torch.einsum("nyx,ny->n", images, dy**2)
    lean = -torch.einsum("nyx,nx,ny->n", images, dx, dy) / yy
    statistics = {"slant": lean, "rotation": lean, "size": yy / ink, "aspect": xx / yy,
                  "thickness": ink, "shift_x": x, "shift_y": y}
    for name in DIGIT_FACTORS:
        table = torch.stack([drawn.factors[name].double(), statistics[name]])
        within_class = [torch.corrcoef(table[:, drawn.labels == c])[0, 1] for c in range(10)]
        assert np.mean(within_class) > 0.3, (name, within_class)
    ones = [ink[(drawn.labels == 1) & (drawn.factors["glyph"] == i)].mean() for i in range(3)]
    assert ones == sorted(ones)  # every way to write a 1 has one more stroke


def test_a_linear_map_reads_digits_and_how_they_are_written(drawn):
    """By least squares, a little shrunk, on images that it was not fitted to."""
    x = F.pad(drawn.images.flatten(1) / 255, (0, 1), value=1)
    y = 4 * drawn.labels + drawn.factors["glyph"]
    known, target = x[:5000], F.one_hot(y[:5000], 40).float()
    weights = torch.linalg.solve(known.T @ known + 30 * torch.eye(785), known.T @ target)
    read, y = (x[5000:] @ weights).argmax(dim=1), y[5000:]
    assert (read // 4 == y // 4).double().mean() > 0.85
    assert (read == y).double().mean() > 0.6


# In which rows of the image a factor may show.
FACE_ROWS = {
    "skin": (0, 64), "hair_colour": (0, 64), "hair_length": (0, 64), "fringe": (0, 48),
    "face_width": (0, 64), "jaw": (28, 64), "beard": (24, 60), "eye_size": (10, 40),
    "eye_colour": (18, 40), "gaze": (18, 40), "turn": (0, 64), "brows": (10, 32),
    "smile": (34, 58), "mouth_open": (38, 58), "shirt": (48, 64), "background": (0, 64),
    "glasses": (20, 42),
}  # fmt: skip


@pytest.mark.parametrize("name", FACE_ROWS)
def test_a_factor_of_faces_shows_where_it_should_and_is_smooth(faces, name):
    assert FACE_ROWS.keys() == faces.factors.keys()
    low, high = (0.0, 1.0) if name in ("glasses", "beard") else FACE_FACTORS[name]
    factors = {key: values[:2].repeat_interleave(101) for key, values in faces.factors.items()}
    factors[name] = torch.linspace(low, high, 101).repeat(2)
    path = paint_faces(factors).float().view(2, 101, 3, 64, 64)
    change = (path[:, -1] - path[:, 0]).abs().mean(dim=1)  # (2, 64, 64)
    rows = change.sum(dim=2)
    assert (rows[:, slice(*FACE_ROWS[name])].sum(dim=1) > 0.99 * rows.sum(dim=1)).all()
    assert (change.amax(dim=(1, 2)) > 15).all()
    # Edges are soft: a step, a third of a pixel at most, nowhere swaps one colour for another.
    assert path.diff(dim=1).abs().max() < 110


def paint(faces, *size: int, **changed: float) -> torch.Tensor:
    """The first 12 faces, with some factors changed: (12, 3, 64, 64), float; or of another size."""
    factors = {name: values[:12] for name, values in faces.factors.items()}
    factors |= {name: torch.full((12,), float(value)) for name, value in changed.items()}
    return paint_faces(factors, *size).float()


def test_a_face_is_what_it_would_be_if_drawn_four_times_as_large_and_averaged(faces):
    averaged = F.avg_pool2d(paint(faces, 256, 256, 256), 4)
    assert (paint(faces) - averaged).abs().mean() < 1.5  # levels of 256


AREA, X, Y = 0, 1, 2  # of an extent


@pytest.mark.parametrize("factor, low, high, statistic, colour, fixed", [
    ("gaze", -1, 1, X, "eye_colour", {}),
    ("turn", -1, 1, X, "eye_colour", {}),
    ("eye_size", 0.8, 1.25, AREA, "eye_colour", {"gaze": 0, "turn": 0}),
    ("face_width", 0.47, 0.57, AREA, "skin", {}),
    ("jaw", 0, 1, AREA, "skin", {"rows": (40, 64)}),
    ("hair_length", 0, 1, AREA, "hair_colour", {}),
    ("hair_length", 0, 1, Y, "hair_colour", {}),
    ("fringe", 0, 1, AREA, "hair_colour", {}),
    ("beard", 0, 1, AREA, "hair_colour", {"rows": (40, 60)}),
    ("mouth_open", 1, 0, AREA, "skin", {"rows": (38, 58)}),
    ("glasses", 1, 0, AREA, "eye_colour", {}),  # through which it is paler
    ("brows", -1, 1, Y, "hair_colour",
     {"rows": (14, 30), "columns": (26, 38), "fringe": 0, "turn": 0}),
])
def test_factors_of_faces_are_what_they_say(faces, factor, low, high, statistic, colour, fixed):
    """From low to high, in every face, what has that colour becomes larger, or moves."""
    fixed = {"beard": 0} | fixed
    rows, columns = (slice(*fixed.pop(key, (0, 64))) for key in ("rows", "columns"))

    def measure(value):
        one, other = (paint(faces, **{colour: c, **fixed, factor: value}) for c in (0, 1))
        return extent((one - other).abs().mean(dim=1)[:, rows, columns])[statistic]

    assert (measure(high) > measure(low)).all()


def test_a_smile_lifts_the_corners_of_the_mouth(faces):
    """What it makes darker there lies above what was dark."""
    fixed = {"turn": 0, "mouth_open": 0, "beard": 0, "skin": 0}
    change = (paint(faces, smile=1, **fixed) - paint(faces, smile=-1, **fixed)).mean(dim=1)
    for corner in (change[..., 23:26], change[..., 38:41]):
        darker, lighter = extent((-corner).clamp(min=0)), extent(corner.clamp(min=0))
        assert (darker[Y] < lighter[Y] - 1).all()
