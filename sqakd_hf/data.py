"""Image datasets with an `Image` feature, and the transform that feeds them to a model."""

import gzip
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import InputError, suggest


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL.Image import Image

logger = logging.getLogger(__name__)

BUILT_IN = ("digits", "fashion_mnist")
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_HUB_ID = "zalando-datasets/fashion_mnist"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ImageData:
    """Images to train on and to test on, with the column `image` and, only where labels exist, `label`.

    `class_names` is `None` where there are no labels.
    """

    train: "Dataset"
    test: "Dataset"
    class_names: list[str] | None


def load_image_data(
    name: str,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    test_fraction: float = 0.2,
    max_train_images: int | None = None,
    max_test_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load images by the name of a dataset.

    Args:
        name (`str`): `"digits"` (scikit-learn's, embedded), `"fashion_mnist"`, a folder (with a sub-folder for each
            class, or flat and unlabelled, or of parquet files; `train/` and `test/` inside it are splits), a
            `.parquet` file, or the id of a dataset on the Hub.
        train_split (`str`, *optional*, defaults to `"train"`): Name of the split to train on.
        test_split (`str`, *optional*): Name of the split to test on; by default `test`, `validation` or `val`,
            whichever exists.
        test_fraction (`float`, *optional*, defaults to 0.2): Share of the images to test on where no split is made
            for it.
        max_train_images, max_test_images (`int`, *optional*): Keep a seeded random choice of so many.
        seed (`int`, *optional*, defaults to 0): Seed of every random choice here.

    Raises:
        `InputError`: A dataset that can't be found, is empty, or has no images.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction must lie between 0 and 1, got {test_fraction!r}.")
    for field, limit in (("max_train_images", max_train_images), ("max_test_images", max_test_images)):
        if limit is not None and limit < 1:
            raise InputError(f"{field} must be at least 1, got {limit!r}; leave it out to use all images.")
    splits = {"digits": _digits, "fashion_mnist": _fashion_mnist}.get(name, lambda: _load(name))()
    if train_split not in splits:
        raise InputError(f"Dataset {name!r} has no split {train_split!r}; it has: {', '.join(sorted(splits))}.")
    train = _standard_columns(splits[train_split], name)
    wanted = [test_split] if test_split is not None else ["test", "validation", "val"]
    found = [split for split in wanted if split in splits]
    if test_split is not None and not found:
        raise InputError(f"Dataset {name!r} has no split {test_split!r}; it has: {', '.join(sorted(splits))}.")
    if found:
        test = _standard_columns(splits[found[0]], name)
    else:
        if len(train) < 2:
            raise InputError(f"Dataset {name!r} has {len(train)} image; at least 2 are needed to train and test.")
        train, test = _split(train, test_fraction, seed)
    class_names = train.features["label"].names if "label" in train.features else None
    if class_names and "label" in test.features and test.features["label"].names != class_names:
        raise InputError(
            f"Dataset {name!r}: the test images have the classes {', '.join(test.features['label'].names)}, "
            f"the training images {', '.join(class_names)}. Give both splits the same classes."
        )
    return ImageData(_take(train, max_train_images, seed), _take(test, max_test_images, seed), class_names)


def split_holdout(dataset: "Dataset", fraction: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
    """Split training images into a part to train on and a part, without labels, to choose a checkpoint by.

    Raises:
        `InputError`: A fraction outside (0, 1), or one that leaves either part empty.
    """
    if not 0 < fraction < 1 or not 0 < round(len(dataset) * fraction) < len(dataset):
        raise InputError(
            f"The held-out fraction must lie between 0 and 1 and leave images on both sides, got {fraction!r} of "
            f"{len(dataset)} images."
        )
    parts = dataset.train_test_split(test_size=round(len(dataset) * fraction), seed=seed)
    holdout = parts["test"]
    return parts["train"], holdout.remove_columns([column for column in holdout.column_names if column != "image"])


# --- sources ---------------------------------------------------------------------------------------------------------


def _digits() -> "dict[str, Dataset]":
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), sixteen steps of grey
    return {"train": _from_arrays(pixels, digits.target, [str(digit) for digit in range(10)])}


def _fashion_mnist() -> "Mapping[str, Dataset]":
    if not FASHION_MNIST_FOLDER.is_dir():
        return _load(FASHION_MNIST_HUB_ID)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        splits[split] = _from_arrays(pixels, labels, list(FASHION_MNIST_CLASSES))
    return splits


def _read_idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def _from_arrays(pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> "Dataset":
    """Encode grey images `(N, H, W)` as PNG bytes, exactly."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    def encode(image: np.ndarray) -> dict[str, bytes | None]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=class_names)})
    columns = {"image": [encode(image) for image in pixels], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=features)


def _load(name: str) -> "Mapping[str, Dataset]":
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".parquet":
        return _load_files("parquet", name, data_files=str(path))
    return _load_files(name, name)


def _load_folder(path: Path) -> "Mapping[str, Dataset]":
    files = [file for file in path.rglob("*") if file.is_file()]
    if any(file.suffix == ".parquet" for file in files):
        return _load_files("parquet", str(path), data_dir=str(path))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"The folder {str(path)!r} holds no images; accepted: image files ({', '.join(sorted(IMAGE_SUFFIXES))}), "
            "in sub-folders that name their classes or flat and unlabelled, or parquet files."
        )
    # The builder takes the folder's own name for a class where some images lie at the top.
    flat = any(file.parent == path for file in images)
    return _load_files("imagefolder", str(path), data_dir=str(path), drop_labels=flat or None)


def _load_files(builder: str, name: str, **kwargs: Any) -> "DatasetDict":
    from datasets import load_dataset

    try:
        return load_dataset(builder, **kwargs)
    except Exception as error:
        # datasets raises a dozen types here, its own and fsspec's and the Hub client's: all mean "not loadable".
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"Dataset {name!r} can't be loaded: {reason} Accepted: {', '.join(map(repr, BUILT_IN))}, a folder of "
            f"images, parquet, or a dataset that the Hub or the local cache has.{suggest(name, BUILT_IN)}"
        ) from error


# --- columns and subsets ---------------------------------------------------------------------------------------------


def _standard_columns(dataset: "Dataset", name: str) -> "Dataset":
    """Reduce to `image`, left encoded so that a corrupt file can be named, and `label` where there is one."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    if len(dataset) == 0:
        raise InputError(f"Dataset {name!r} is empty.")
    images = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    labels = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if not images:
        raise InputError(f"Dataset {name!r} has no image column; its columns are: {', '.join(dataset.column_names)}.")
    dataset = dataset.select_columns([images[0], *labels[:1]])
    for column, standard in ((images[0], "image"), *((label, "label") for label in labels[:1])):
        if column != standard:
            dataset = dataset.rename_column(column, standard)
    return dataset.cast_column("image", ImageFeature(decode=False))


def _split(dataset: "Dataset", fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    stratify = "label" if "label" in dataset.features else None
    try:
        parts = dataset.train_test_split(test_size=fraction, seed=seed, stratify_by_column=stratify)
    except ValueError:
        # A class of one image can't be on both sides.
        parts = dataset.train_test_split(test_size=fraction, seed=seed)
    return parts["train"], parts["test"]


def _take(dataset: "Dataset", limit: int | None, seed: int) -> "Dataset":
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


# --- the transform ---------------------------------------------------------------------------------------------------


def _augmentations(size: int) -> dict[str, Callable[[], list]]:
    from torchvision.transforms import v2

    margin = max(size // 8, 1)
    return {
        "none": lambda: [],
        "crop": lambda: [v2.RandomCrop(size, padding=margin, padding_mode="reflect")],
        "crop-flip": lambda: [
            v2.RandomCrop(size, padding=margin, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
        ],
    }


AUGMENTATIONS = ("none", "crop", "crop-flip")


class ImageTransform:
    """Decode, resize, centre-crop, augment and normalise; made for `dataset.with_transform(transform)`.

    Takes a batch of columns and returns `{"pixel_values": [(C, size, size) float32, …]}`, with `labels` only where
    the batch has a column `label`. Random augmentation draws from torch's generator alone.

    Args:
        size (`int`): Side of the square images.
        mean, std (`Sequence[float]`): One value a channel, for pixels in [0, 1]. Three make images RGB, one grey.
        crop_pct (`float`, *optional*, defaults to 1.0): The centre that is kept, as a ratio of the shorter side.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): `nearest`, `bilinear` or `bicubic`.
        augment (`str`, *optional*, defaults to `"none"`): `crop` (pad by an eighth, random crop) or `crop-flip`.

    Raises:
        `InputError`: An unknown augmentation or interpolation, a size below 1; and, when called, an image that can't
            be read, by its file name.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        augment: str = "none",
    ):
        from torchvision.transforms import InterpolationMode, v2

        if augment not in AUGMENTATIONS:
            raise InputError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}.")
        if interpolation not in (modes := ("nearest", "bilinear", "bicubic")):
            raise InputError(f"interpolation must be one of {', '.join(modes)}, got {interpolation!r}.")
        if size < 1:
            raise InputError(f"The image size must be at least 1 pixel, got {size!r}.")
        self.mode = "RGB" if len(mean) == 3 else "L"
        self.size, self.resize_to = size, round(size / crop_pct)
        self.resize = v2.Resize(self.resize_to, InterpolationMode(interpolation), antialias=True)
        self.center_crop = v2.CenterCrop(size)
        self.augment = v2.Compose([*_augmentations(size)[augment](), v2.Identity()])
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.said_converted = False

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        out = {"pixel_values": [self.pixel_values(item, index) for index, item in enumerate(batch["image"])]}
        if "label" in batch:
            out["labels"] = batch["label"]
        return out

    def pixel_values(self, item: Mapping[str, Any], index: int = 0) -> torch.Tensor:
        """Return one stored image as normalised pixels, `(C, size, size)` float32."""
        from torchvision.transforms.v2 import functional as V

        image = self._decode(item, index)
        if min(image.size) != self.resize_to:
            image = self.resize(image)
        pixels = V.pil_to_tensor(image)
        if pixels.shape[1:] != (self.size, self.size):
            pixels = self.center_crop(pixels)
        return (self.augment(pixels).float() / 255 - self.mean) / self.std

    def _decode(self, item: Mapping[str, Any], index: int) -> "Image":
        from PIL import Image, ImageOps

        try:
            source = io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]
            with Image.open(source) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = item["path"] or f"number {index} of its batch"
            raise InputError(f"The image {name} can't be read ({error}). Remove or replace it.") from error
        if image.mode == self.mode:
            return image
        if not self.said_converted:
            self.said_converted = True
            logger.info("Images of mode %s are converted to %s, as the model expects.", image.mode, self.mode)
        if image.mode == "P" or "A" in image.mode:
            image = image.convert("RGB")  # palette colours; transparency is dropped
        if image.mode.startswith("I"):
            # 16-bit grey: keep the upper byte, which convert() would clip instead.
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        return image.convert(self.mode)
