"""Digits and faces, drawn: two datasets whose factors of variation are known, no download.

    images, labels, factors = draw_digits(1000, seed=0)     28 x 28 grey, from pen strokes
    images, labels, factors = draw_faces(1000, seed=0)      64 x 64 colour, from soft shapes

The same n and seed give the same images. What made each of them is in factors, name -> (n,):
that is what disentanglement can be measured against.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------- the drawn digits

# How each digit may be written, as pen strokes. A stroke is a list of points "x y" in a box of
# 100 x 100, y downwards, joined by a smooth curve; "/" lifts the pen.
GLYPHS = [
    ["56 3, 36 7, 21 28, 18 58, 30 88, 52 98, 73 86, 82 54, 77 22, 60 4, 46 4",
     "64 8, 46 2, 26 22, 18 56, 32 92, 58 96, 80 64, 76 22, 56 3, 42 10"],
    ["50 2, 50 35, 50 68, 50 98",
     "35 31, 45 18, 53 2 / 53 2, 52 35, 52 68, 51 98",
     "34 30, 44 17, 52 2 / 52 2, 52 35, 51 68, 51 96 / 28 97, 50 96, 74 96"],
    ["22 26, 34 6, 58 2, 77 18, 70 44, 46 70, 20 95 / 20 95, 50 94, 82 92",
     "22 22, 40 3, 66 5, 77 26, 62 54, 40 82, 24 94, 16 84, 30 76, 54 88, 84 92"],
    ["22 14, 44 2, 70 9, 72 32, 44 46 / 44 46, 74 54, 80 76, 58 97, 32 96, 18 84",
     "22 5, 50 4, 76 4 / 76 4, 58 24, 44 40 / 44 40, 72 48, 80 70, 64 94, 38 97, 18 86"],
    ["32 3, 25 32, 20 56 / 20 56, 50 56, 86 54 / 68 6, 66 50, 63 98",
     "62 3, 40 32, 15 64 / 15 64, 50 64, 88 63 / 62 3, 61 50, 60 98"],
    ["30 4, 28 22, 25 44 / 25 44, 48 36, 72 46, 78 68, 64 92, 38 97, 18 86 / 30 4, 54 4, 78 2",
     "76 5, 50 4, 34 7 / 34 7, 28 24, 26 42 / 26 42, 54 40, 76 56, 74 82, 50 97, 20 92"],
    ["66 3, 42 20, 24 50, 22 78, 42 97, 66 92, 76 72, 62 54, 40 56, 25 74",
     "52 2, 34 34, 22 68, 30 93, 54 98, 74 84, 72 62, 52 54, 32 64, 23 78"],
    ["20 6, 48 5, 80 5 / 80 5, 62 38, 48 68, 40 98",
     "20 6, 48 5, 80 5 / 80 5, 62 38, 48 68, 40 98 / 36 50, 56 49, 76 48",
     "20 18, 22 6 / 22 6, 52 6, 80 4 / 80 4, 66 34, 56 66, 52 98"],
    ["72 16, 50 2, 28 13, 34 36, 56 50, 76 70, 68 93, 44 98, 22 84, 30 62, 56 44, 74 24, 70 12",
     "50 2, 28 12, 28 36, 50 48, 72 36, 72 12, 50 2 / "
     "50 48, 26 60, 22 84, 50 98, 78 84, 74 60, 50 47"],
    ["75 22, 56 3, 32 9, 24 32, 40 50, 62 44, 75 22 / 75 22, 74 56, 68 98",
     "74 20, 52 2, 28 13, 26 38, 46 50, 68 40, 76 18 / 76 18, 78 60, 64 92, 36 97"],
]

# The factors of variation, each uniform in its range and independent of all others.
DIGIT_FACTORS = {
    "slant": (-0.15, 0.4),  # horizontal shift per unit of height, to the right
    "rotation": (-12.0, 12.0),  # degrees, clockwise
    "size": (17.0, 21.0),  # height of the box, pixels
    "aspect": (0.72, 1.08),  # its width over its height
    "thickness": (0.65, 1.15),  # standard deviation of the pen's Gaussian tip, pixels
    "shift_x": (-1.0, 1.0),  # pixels to the right
    "shift_y": (-1.0, 1.0),  # pixels downwards
}


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """n digits: images, (n, 1, 28, 28), uint8; labels, the classes, 0 to 9; and factors:
    DIGIT_FACTORS, the "class" and the "glyph" (which of the ways in GLYPHS to write it)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    labels = torch.randint(10, (n,), generator=generator)
    variants = torch.tensor([len(glyphs) for glyphs in GLYPHS])
    factors = {"class": labels, "glyph": (uniform(0, 1) * variants[labels]).long()}
    factors |= {name: uniform(*limits) for name, limits in DIGIT_FACTORS.items()}
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for digit, glyphs in enumerate(GLYPHS):
        for number, glyph in enumerate(glyphs):
            strokes = [  # in percent of the box, with its centre as the origin
                torch.tensor([[float(v) for v in p.split()] for p in stroke.split(",")]) / 100 - 0.5
                for stroke in glyph.split("/")
            ]
            chosen = ((labels == digit) & (factors["glyph"] == number)).nonzero().squeeze(1)
            for index in chosen.split(500):  # 500 at once need few megabytes
                style = {name: factors[name][index] for name in DIGIT_FACTORS}
                images[index, 0] = draw_glyph(strokes, style, generator)
    return images, labels, factors


def draw_glyph(strokes: list[Tensor], style: dict[str, Tensor],
               generator: torch.Generator) -> Tensor:
    """Draw one glyph in m styles: (m, 28, 28), uint8. strokes: (points, 2) each, in [-0.5, 0.5];
    style: the factors, (m,) each."""
    style = {name: values[:, None] for name, values in style.items()}
    m = len(style["size"])
    bend = 0.24 * torch.randn(m, 7, 2, generator=generator)  # how this hand distorts the plane
    angle = style["rotation"].deg2rad()
    paths = []
    for points in strokes:
        x, y = points.T
        terms = torch.stack([x * x, x * y, y * y, x * x * y, x * y * y, x**3, y**3], dim=1)
        tremor = 0.02 * torch.randn(m, len(points), 2, generator=generator)
        x, y = (points + terms @ bend + tremor).unbind(dim=2)
        x = x * style["aspect"] - style["slant"] * y
        x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
        paths.append(spline_weights(len(points)) @ torch.stack([x, y], dim=2))

    everything = torch.cat(paths, dim=1)
    middle = (everything.amin(dim=1) + everything.amax(dim=1)) / 2
    centre = 13.5 + torch.cat([style["shift_x"], style["shift_y"]], dim=1)
    paths = [(path - middle[:, None]) * style["size"][:, None] + centre[:, None] for path in paths]

    # The pen leaves a Gaussian blob on every piece of its path, as heavy as the piece
    # is long. A blob is the product of its profiles in x and in y, so the sum of all
    # blobs on the pixel grid is one matrix product.
    pieces = torch.cat([(path[:, 1:] + path[:, :-1]) / 2 for path in paths], dim=1)
    lengths = torch.cat([(path[:, 1:] - path[:, :-1]).norm(dim=2) for path in paths], dim=1)
    width = style["thickness"][:, None]
    profile = torch.exp(-0.5 * ((pieces[..., None] - torch.arange(28.0)) / width[..., None]) ** 2)
    weight = lengths[..., None] / (width * math.sqrt(2 * math.pi))  # a long line's ridge is 1
    ink = (profile[:, :, 1] * weight).transpose(1, 2) @ profile[:, :, 0]
    return (255 * (1.6 * ink - 0.12).clamp(0, 1)).round().byte()  # a full core, soft edges


def spline_weights(k: int) -> Tensor:
    """The (8k - 7, k) matrix that turns k points into a Catmull-Rom spline through them (Catmull &
    Rom 1974), with 8 steps between neighbours; the end points are repeated."""
    t = torch.arange(8 * k - 7) / 8
    segment = t.floor().clamp(max=k - 2)
    t = t - segment
    weights = torch.stack([
        -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2
    ], dim=1) / 2
    neighbours = (segment[:, None].long() + torch.arange(-1, 3)).clamp(0, k - 1)
    return (weights[..., None] * F.one_hot(neighbours, k)).sum(dim=1)


# -------------------------------------------------------------------- the drawn faces

# The factors of variation, each uniform in its range and independent of all others. A
# factor that is a colour runs through the colours of FACE_COLOURS; "glasses" is 0 or 1.
FACE_FACTORS = {
    "skin": (0.0, 1.0),
    "hair_colour": (0.0, 1.0),
    "hair_length": (0.0, 1.0),  # from above the ears to the shoulders
    "fringe": (0.0, 1.0),  # how far down the forehead it comes
    "face_width": (0.47, 0.57),  # half of it; lengths are in units of 35 pixels of 64
    "jaw": (0.0, 1.0),  # from pointed to square
    "beard": (-2.0, 1.0),  # its opacity, clamped to 0: two faces in three have none
    "eye_size": (0.8, 1.25),  # relative
    "eye_colour": (0.0, 1.0),
    "gaze": (-1.0, 1.0),  # to our left or right
    "turn": (-1.0, 1.0),  # of the head, likewise
    "brows": (-1.0, 1.0),  # from worried to angry
    "smile": (-1.0, 1.0),  # from frown to smile
    "mouth_open": (0.0, 1.0),
    "shirt": (0.0, 1.0),
    "background": (0.0, 1.0),
}
FACE_COLOURS = {
    "skin": ["fbe0cf", "f0c3a0", "d79b6e", "a9683f", "6b3f26"],
    "hair_colour": ["1d1a1e", "4a2c1c", "8f4a21", "e0b054", "dcd8d2"],
    "eye_colour": ["3b1a08", "5f9a2a", "2f86e0"],
    "shirt": ["c8453b", "e0a030", "4f9d69", "3a7ca5", "7a5195"],
    "background": ["f7c9b6", "f5e3a8", "c4e3c1", "b9dcec", "cdc3e6"],
}


def draw_faces(n: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """n faces: images, (n, 3, 64, 64), uint8; labels, 1 where the mouth smiles, else 0; and
    factors: FACE_FACTORS and "glasses"."""
    factors = face_factors(n, seed)
    images = torch.cat([paint_faces({key: values[i : i + 250] for key, values in factors.items()})
                        for i in range(0, n, 250)])  # so many fit into the processor's cache
    return images, (factors["smile"] > 0).long(), factors


def face_factors(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = {name: low + (high - low) * torch.rand(n, generator=generator)
               for name, (low, high) in FACE_FACTORS.items()}
    factors["beard"].clamp_(min=0)
    return factors | {"glasses": (torch.rand(n, generator=generator) < 0.3).float()}


def paint_faces(factors: dict[str, Tensor], width: int = 64, height: int = 64,
                side: float = 64) -> Tensor:
    """Paint m faces, one soft shape over the other: (m, 3, height, width), uint8. factors: (m,)
    each; side: the centre square that holds a face, in pixels. The edge of a shape is one pixel
    wide, so a small change of a factor is a small change of the image."""
    m, unit = len(factors["skin"]), side * 35 / 64
    colour = {name: mix_colours(factors[name], colours)[:, :, None, None]
              for name, colours in FACE_COLOURS.items()}
    f = {name: values.view(m, 1, 1, 1) for name, values in factors.items()}
    x = ((torch.arange(width) + 0.5 - width / 2) / unit).view(1, 1, 1, width)
    y = ((torch.arange(height) + 0.5 - height / 2) / unit).view(1, 1, height, 1) + 0.04
    image = colour["background"].repeat(1, 1, height, width)

    def paint(mask: Tensor, colour: Tensor) -> None:
        torch.lerp(image, colour, mask, out=image)

    def inside(depth: Tensor) -> Tensor:
        """The share of a pixel that is inside a shape whose edge is `depth` away."""
        return (depth * unit + 0.5).clamp_(0, 1)

    def ellipse(cx, cy, rx, ry) -> Tensor:
        q = ((x - cx) / rx).square() + ((y - cy) / ry).square()
        return inside((1 - q) * torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry)) / 2)

    def glow(cx, cy, rx, ry) -> Tensor:
        return torch.exp(-((x - cx) / rx).square()) * torch.exp(-((y - cy) / ry).square())

    def on_head(s: float) -> tuple[Tensor, Tensor]:
        """Where s in [-1, 1] across the face comes to lie when the head turns, how squeezed."""
        angle = math.asin(s) + turn
        return half * angle.sin(), angle.cos() / math.cos(math.asin(s))

    def rgb(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)

    white, black = rgb(1, 1, 1), rgb(0.08, 0.08, 0.1)
    skin, hair = colour["skin"], colour["hair_colour"]
    shade = skin * rgb(0.84, 0.76, 0.72)
    half, turn, size = f["face_width"], 0.33 * f["turn"], f["eye_size"]  # turn: radians
    middle, squeeze = on_head(0.0)
    paint((0.45 - 0.4 * y).clamp(0, 1), white)

    # The hair behind the head: a box with round corners.
    bottom = -0.05 + 1.05 * f["hair_length"]
    box_w, box_h = half + 0.09 + 0.05 * f["hair_length"], (bottom + 0.78) / 2
    corner = torch.minimum(box_w, box_h)
    out_x = (x.abs() - (box_w - corner)).clamp(min=0)
    out_y = ((y - (bottom - 0.78) / 2).abs() - (box_h - corner)).clamp(min=0)
    mane = inside(corner - (out_x.square() + out_y.square()).sqrt())
    paint(mane, 0.82 * hair)

    # Neck, shoulders, ears, head.
    paint(inside(0.24 - x.abs()) * inside(y - 0.3), shade)
    shoulders = (x / 0.98).square() + ((y - 1.22).clamp(max=0) / 0.44).square()
    paint(inside((1 - shoulders) * 0.22), colour["shirt"])
    paint(ellipse(0, 0.8, 0.27, 0.12), shade)
    for s in (-1, 1):
        paint(ellipse(0.98 * s * half - 0.1 * turn, 0.06, 0.1, 0.14), shade)
    chin = ((y - 0.05).clamp(min=0) / 0.65).square()
    u = x / (half * (1 - (0.6 - 0.6 * f["jaw"]) * chin))
    head = inside((1 - u.square() - ((y + 0.04) / 0.7).square()) * half / 2)
    paint(head, skin)
    paint(head * (0.1 + 0.15 * u + 0.3 * turn).clamp(0, 0.5), shade)
    for s in (-0.55, 0.55):  # cheeks
        cx, k = on_head(s)
        paint(0.35 * head * glow(cx, 0.27, 0.15 * k, 0.1), skin * rgb(1, 0.62, 0.58))

    # Beard, nose, mouth.
    edge = 0.3 - 0.42 * ((x - middle) / half).square().clamp(max=1)
    paint(head * inside(y - edge) * 0.9 * f["beard"], 0.9 * hair)
    paint(ellipse(1.25 * middle, 0.185, 0.075, 0.05), shade)
    paint(ellipse(1.25 * middle, 0.165, 0.07, 0.05) * inside(y - 0.13), skin)
    t = (x - 1.05 * middle) / (0.25 * squeeze)  # -1 and 1 are the corners of the mouth
    bow, gap = (1 - t.square()).clamp(min=0), 0.1 * f["mouth_open"]
    line = 0.43 - 0.14 * f["smile"] * (t.square() - 0.45)
    off = (y - line - 0.3 * gap * bow).abs()
    mouth = inside((1 - t.abs()) * 0.25 * squeeze)
    paint(mouth * inside(bow * (gap + 0.045) - off), skin * rgb(0.78, 0.42, 0.42))
    opening = mouth * inside(bow * gap - off - 0.003)
    paint(opening, rgb(0.35, 0.08, 0.1))
    paint(opening * inside(line - 0.35 * gap * bow - y), white)  # teeth

    # The hair before the head, and light on it.
    u = (x - 0.6 * middle) / half
    above = -0.64 + 0.36 * f["fringe"] + 0.62 * u**4 - y
    steep = (1 + (4 * 0.62 * u**3 / half).square()).sqrt()  # its distance is not vertical
    front = ellipse(0, -0.04, half + 0.055, 0.76) * inside(above / steep)
    paint(front, hair)
    paint(0.45 * front * glow(-0.18, -0.62, 0.2, 0.09), 0.5 + 0.5 * hair)
    curtain = half * (0.9 - 0.12 * f["hair_length"]) + 0.1 * (y - 0.2).square()
    for s in (-1, 1):
        paint(mane * inside(s * (x - 0.12 * turn) - curtain), 0.94 * hair)

    # Eyes, brows, glasses.
    for s in (-1, 1):
        cx, k = on_head(0.44 * s)
        rx, ry = 0.15 * size * k, 0.105 * size
        paint(ellipse(cx, -0.082, 1.06 * rx, 1.05 * ry), skin * rgb(0.45, 0.33, 0.32))  # lashes
        eye = ellipse(cx, -0.06, rx, ry)
        paint(eye, white)
        iris = cx + 0.062 * f["gaze"] * size * k
        paint(eye * ellipse(iris, -0.06, 0.085 * size * k, 0.09 * size), colour["eye_colour"])
        paint(eye * ellipse(iris, -0.06, 0.042 * size * k, 0.045 * size), black)
        paint(ellipse(iris - 0.02, -0.09, 0.022, 0.022), white)
        v = s * (x - on_head(0.46 * s)[0]) / (0.17 * k)  # 1 is the outer end of the brow
        brow = -0.23 - 0.03 * size - f["brows"] * (0.055 * v + 0.01) + 0.03 * v.square()
        depth = 0.03 * (1.2 - 0.4 * v) - (y - brow).abs()
        paint(inside(depth) * inside((1 - v.abs()) * 0.17 * k), 0.75 * hair)
        lens = (((x - cx) / (0.215 * k)).square() + ((y + 0.06) / 0.19).square()).sqrt()
        paint(f["glasses"] * 0.12 * inside((1 - lens) * 0.19), white)
        paint(f["glasses"] * inside(0.02 - 0.19 * (lens - 1).abs()), black)
    (left, _), (right, _) = on_head(-0.44), on_head(0.44)
    bridge = inside((right - left) / 2 - 0.2 - (x - (left + right) / 2).abs())
    paint(f["glasses"] * bridge * inside(0.016 - (y + 0.08).abs()), black)
    return image.mul_(255).round_().clamp_(0, 255).byte()


def mix_colours(t: Tensor, colours: list[str]) -> Tensor:
    """Run through the colours, from the first (t = 0) to the last (t = 1): (m,) -> (m, 3)."""
    table = torch.tensor([list(bytes.fromhex(colour)) for colour in colours]) / 255
    t = t * (len(colours) - 1)
    low = t.long().clamp(max=len(colours) - 2)
    return torch.lerp(table[low], table[low + 1], (t - low)[:, None])
