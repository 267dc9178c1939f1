"""Drawn faces in the layout of CelebA, for a dry run without it:

    PYTHONPATH=.:tests python -c "from celeba_files import *; write_celeba('scratch', 10_000, True)"
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from draw import face_factors, paint_faces

# The forty attributes in the order of the official file.
CELEBA_ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
    "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee "
    "Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes "
    "No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling "
    "Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
).split()


def write_celeba(root: str | Path, n: int, zipped: bool = False, seed: int = 0) -> Path:
    """Write <root>/celeba/, which must not exist: JPEGs of 178 x 218, in a folder or a zip; the
    forty attributes, but for two -1; 80, 10 and 10 % for training, validation and test. Returns
    that folder."""
    folder = Path(root) / "celeba"
    folder.mkdir(parents=True)
    (folder / "img_align_celeba").mkdir()
    factors, names = face_factors(n, seed), [f"{i:06d}.jpg" for i in range(1, n + 1)]
    for i in range(0, n, 50):
        some = {name: values[i : i + 50] for name, values in factors.items()}
        images = paint_faces(some, 178, 218, 148).permute(0, 2, 3, 1).numpy()
        for name, image in zip(names[i:], images):
            Image.fromarray(image).save(folder / "img_align_celeba" / name, quality=95)
    if zipped:
        shutil.make_archive(folder / "img_align_celeba", "zip", folder, "img_align_celeba")
        shutil.rmtree(folder / "img_align_celeba")
    has = {"Eyeglasses": factors["glasses"].tolist(), "Smiling": (factors["smile"] > 0).tolist()}
    has = [has.get(name, [False] * n) for name in CELEBA_ATTRIBUTES]
    signs = [" ".join(" 1" if value else "-1" for value in values) for values in zip(*has)]
    lines = [str(n), " ".join(CELEBA_ATTRIBUTES), *map(" ".join, zip(names, signs)), ""]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines))
    parts = np.repeat((0, 1, 2), (n - n // 10 * 2, n // 10, n // 10))
    text = "".join(f"{name} {part}\n" for name, part in zip(names, parts))
    (folder / "list_eval_partition.txt").write_text(text)
    return folder
