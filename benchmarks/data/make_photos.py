"""Build three folders of unlabelled photographs: training, validation and test, of different pictures.

    apt-get update && apt-get download mate-backgrounds gnome-backgrounds lomiri-wallpapers-16.04 \
        lomiri-wallpapers-20.04 ukui-wallpapers          # about 130 MB, Debian packages of desktop pictures
    python make_photos.py DIRECTORY_WITH_THE_DEBS OUT     # needs Pillow and dpkg-deb

Writes OUT/train (52 pictures x 19 crops), OUT/validation (8 others; for all choices) and OUT/test (the rest; looked at
once a row), JPEG, shorter side 256. Crops cover 4 to 60 % of a picture, drawn with a fixed seed. No picture is in two
folders. The pictures have free licences, named in each package's copyright file: cut them when they are needed.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image


CROPS, SIDE = 19, 256
TRAIN, VALIDATION = 52, 8  # pictures


def pictures(folder: Path):
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp") or path.is_symlink():
            continue
        try:
            picture = Image.open(path).convert("RGB")
        except OSError:
            continue
        if min(picture.size) >= 600:
            picture.thumbnail((2400, 2400), Image.LANCZOS)
            yield path.name, picture


def crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    width, height = picture.size
    area, ratio = rng.uniform(0.04, 0.6) * width * height, rng.uniform(0.75, 1.33)
    w, h = min(width, int((area * ratio) ** 0.5)), min(height, int((area / ratio) ** 0.5))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    scale = SIDE / min(w, h)
    return picture.crop((left, top, left + w, top + h)).resize((max(SIDE, int(w * scale)), max(SIDE, int(h * scale))))


def main(debs: str, out: str) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as unpacked:
        for deb in sorted(Path(debs).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", deb, Path(unpacked) / deb.name.split("_")[0]], check=True)
        named = dict(pictures(Path(unpacked)))  # the same picture may be in two packages
        names = sorted(named)
        rng.shuffle(names)
        cut = TRAIN + VALIDATION
        for split, chosen in (("train", names[:TRAIN]), ("validation", names[TRAIN:cut]), ("test", names[cut:])):
            folder = Path(out) / split
            folder.mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(chosen):
                for take in range(CROPS):
                    crop(named[name], rng).save(folder / f"{number:03d}_{take:02d}.jpg", quality=92)
            print(split, len(chosen), "pictures,", CROPS * len(chosen), "crops")


if __name__ == "__main__":
    main(*sys.argv[1:])
