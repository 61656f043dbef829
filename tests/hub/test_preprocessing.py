import numpy as np
import PIL.Image
import pytest
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
)

from sqakd_hf import ImageTransform
from sqakd_hf.hub.preprocessing import Preprocessing, image_processor, read_processor


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def photo(height, width):
    """A smooth image: ways of resampling differ little."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 127 + 0 * rows], -1)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def prepared(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0]


def prepared_here(found, image):
    transform = ImageTransform(
        found.image_size, found.mean, found.std, crop_pct=found.crop_pct, interpolation=found.interpolation
    )
    return transform({"image": [image]})["pixel_values"][0]


EXPRESSIBLE = {
    "shortest edge and crop": BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    ),
    "crop ratio": ConvNextImageProcessor(size={"shortest_edge": 28}, crop_pct=0.875, image_mean=MEAN, image_std=STD),
    "another factor": BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        rescale_factor=1 / 127.5,
        image_mean=MEAN,
        image_std=STD,
    ),
    "no factor": BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        do_rescale=False,
        image_mean=[120.0, 110.0, 100.0],
        image_std=[60.0, 50.0, 40.0],
    ),
    "no normalisation": BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    ),
    "neither": BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    ),
}


class TestReadProcessor:
    @pytest.mark.parametrize("processor", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
    def test_images_are_prepared_as_the_processor_does(self, processor):
        found, others = read_processor(processor, 3)
        assert others == []
        for image in (photo(60, 60), photo(50, 70)):
            expected = prepared(processor, image)
            ours = prepared_here(found, image)
            assert ours.shape == expected.shape
            # Pillow and torchvision round the position and the value of a pixel differently.
            assert (ours - expected).abs().max() <= 0.03 * (expected.max() - expected.min())

    @pytest.mark.parametrize("expected", [(224, 0.875), (160, 0.95), (32, 1.0)])
    def test_is_the_way_back_of_image_processor(self, expected):
        size, crop_pct = expected
        said = Preprocessing(size, tuple(MEAN), tuple(STD), crop_pct, "bilinear")
        found, others = read_processor(image_processor(said), 3)
        assert others == [] and image_processor(found).to_dict() == image_processor(said).to_dict()
        assert (found.mean, found.std, found.image_size) == (said.mean, said.std, size)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_processors_of_other_channels_work(self, channels):
        said = Preprocessing(16, (0.5,) * channels, (0.25,) * channels)
        processor = image_processor(said)
        image = PIL.Image.new("L", (20, 18)) if channels == 1 else np.zeros((channels, 18, 20), np.uint8)
        values = processor(image, return_tensors="pt")["pixel_values"]
        assert values.shape == (1, channels, 16, 16) and values.unique().tolist() == [-2.0]
        assert read_processor(processor, channels) == (said, [])

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (ViTImageProcessor(size={"height": 32, "width": 32}), "changes the shape of images that are not square"),
            (ViTImageProcessor(size={"height": 32, "width": 48}), "its images have 32 x 48 pixels"),
            (ConvNextImageProcessor(size={"shortest_edge": 384}), "changes the shape of images that are not square"),
            (BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False), "its images keep their shape"),
            (
                BitImageProcessor(do_resize=False, crop_size={"height": 32, "width": 32}),
                "it does not resize",
            ),
            (
                BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}),
                "it pads images of 24 pixels to 32",
            ),
            (
                BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=1),
                "it resamples by Pillow's method 1, not bicubically",
            ),
            (
                MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
                "it makes other numbers of pixels",
            ),
            (
                EfficientNetImageProcessor(size={"height": 32, "width": 32}, rescale_offset=True),
                "it makes other numbers of pixels",
            ),
            (EfficientNetImageProcessor(size={"height": 32, "width": 32}), "it makes other numbers of pixels"),
        ],
    )
    def test_what_can_not_be_expressed_is_told(self, processor, message):
        assert any(message in other for other in read_processor(processor, 3)[1]), read_processor(processor, 3)

    def test_a_size_that_the_model_does_not_take_is_told(self):
        found, others = read_processor(ViTImageProcessor(size={"height": 32, "width": 32}), 3, image_size=16)
        assert found.image_size == 16 and "its images have 32 pixels, the model states 16" in others
