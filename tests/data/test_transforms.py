import io
import pickle
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from sqakd_hf import load_image_data
from sqakd_hf.data import transforms
from sqakd_hf.data.transforms import AUGMENTATIONS, ImageTransform
from sqakd_hf.errors import InputError


HALF = [0.5]


@pytest.fixture(scope="module")
def digits():
    return load_image_data("digits", test_split=None).train


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


class TestImageTransform:
    @pytest.mark.parametrize("size", [2, 8])
    def test_pixels_without_resize_follow_the_formula(self, size):
        rgb = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        result = ImageTransform(size, mean, std)({"image": [encode(PIL.Image.fromarray(rgb))]})
        expected = (rgb.astype(np.float64) / 255 - np.array(mean)) / np.array(std)  # (H, W, C)
        (pixels,) = result["pixel_values"]
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        # float32 against float64: three roundings of values below 3
        torch.testing.assert_close(pixels.double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)

    def test_labels_are_integers_and_only_there_where_the_dataset_has_them(self, digits):
        item = digits.with_transform(ImageTransform(8, HALF, HALF))[0]
        assert item["labels"] == digits[0]["label"] and set(item) == {"pixel_values", "labels"}
        unlabelled = digits.remove_columns("label").with_transform(ImageTransform(8, HALF, HALF))
        assert set(unlabelled[0]) == {"pixel_values"}

    @pytest.mark.parametrize("augment", AUGMENTATIONS)
    @pytest.mark.parametrize("shape", [(9, 20), (20, 9), (4, 4), (8, 8)], ids=str)
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_every_augmentation_gives_squares_of_the_size(self, augment, shape, mode):
        channels = len(mode)
        transform = ImageTransform(8, HALF * channels, HALF * channels, crop_pct=0.875, augment=augment)
        (pixels,) = transform({"image": [encode(PIL.Image.new(mode, shape))]})["pixel_values"]
        assert pixels.shape == (channels, 8, 8)

    def test_crop_pct_keeps_the_centre(self):
        image = PIL.Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 2))  # white 4x4 in black 8x8
        (pixels,) = ImageTransform(4, [0.0], [1.0], crop_pct=0.5)({"image": [encode(image)]})["pixel_values"]
        assert torch.equal(pixels, torch.ones(1, 4, 4))

    @pytest.mark.parametrize("augment", [name for name in AUGMENTATIONS if name != "none"])
    def test_augmentation_depends_on_the_generator_of_torch_alone(self, augment, digits):
        dataset = digits.select(range(16)).with_transform(ImageTransform(8, HALF, HALF, augment=augment))

        def draw(seed):
            torch.manual_seed(seed)
            return torch.stack(dataset[:]["pixel_values"])

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))

    @pytest.mark.parametrize("augment", ["crop", "crop-flip"])
    def test_crop_shifts_by_the_mirrored_margin_and_flips_only_if_told_to(self, augment):
        image = np.arange(64, dtype=np.uint8).reshape(8, 8)
        padded = np.pad(image, 1, mode="reflect")
        crops = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        possible = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
        transform = ImageTransform(8, [0.0], [1.0], augment=augment)
        torch.manual_seed(0)
        drawn = [
            (pixels[0] * 255).round().to(torch.uint8).numpy()
            for pixels in transform({"image": [encode(PIL.Image.fromarray(image))] * 60})["pixel_values"]
        ]
        assert {crop.tobytes() for crop in drawn} <= possible
        flipped = [crop[4, 4] > crop[4, 5] for crop in drawn]
        assert any(flipped) == (augment == "crop-flip") and not all(flipped)

    def test_resized_crop_takes_a_third_of_the_area_or_more_and_flips(self):
        ramp = np.arange(200, dtype=np.uint8)
        image = PIL.Image.fromarray(np.stack([*np.meshgrid(ramp, ramp), np.zeros((200, 200), np.uint8)], axis=-1))
        transform = ImageTransform(40, [0.0] * 3, [1.0] * 3, interpolation="bilinear", augment="resized-crop")
        torch.manual_seed(0)
        pixels = 255 * torch.stack(transform({"image": [image] * 100})["pixel_values"])
        width = (pixels[:, 0, 20, 35] - pixels[:, 0, 20, 5]) * 40 / 30  # the ramp's rise between two columns
        height = (pixels[:, 1, 35, 20] - pixels[:, 1, 5, 20]) * 40 / 30
        area = (width * height).abs() / 200**2
        assert 0.33 < area.min() < 0.45 and 0.9 < area.max() < 1.02  # 0.35 to 1, rounded to whole pixels
        assert (height > 0).all() and 0.3 < (width < 0).float().mean() < 0.7

    def test_without_augmentation_keeps_everything_else(self):
        transform = ImageTransform(
            8, HALF, [0.25], crop_pct=0.9, interpolation="bilinear", augment="crop-flip"
        ).without_augmentation()
        expected = ImageTransform(8, HALF, [0.25], crop_pct=0.9, interpolation="bilinear")
        assert transform == expected

    def test_mean_and_std_are_kept_as_they_were_given(self):
        mean, std = [0.5], [0.25]
        transform = ImageTransform(8, mean, std)
        mean[0] = std[0] = 9
        assert transform == ImageTransform(8, (0.5,), (0.25,))

    def test_pickling_keeps_the_result(self, digits):
        transform = ImageTransform(12, HALF * 3, HALF * 3, augment="resized-crop")
        copy = pickle.loads(pickle.dumps(transform))
        batch = digits[:4]
        torch.manual_seed(0)
        expected = transform(batch)["pixel_values"]
        torch.manual_seed(0)
        assert all(map(torch.equal, copy(batch)["pixel_values"], expected))
        assert copy == transform

    @pytest.mark.parametrize(
        ("mode", "channels", "message"),
        [("L", 3, "Grey images are converted to RGB"), ("RGB", 1, "Colour images are converted to grey")],
        ids=["grey-to-rgb", "rgb-to-grey"],
    )
    def test_a_conversion_of_channels_is_said_once(self, mode, channels, message, caplog):
        transforms.warn_once.cache_clear()
        batch = {"image": [encode(PIL.Image.new(mode, (4, 4)))] * 3}
        for _ in range(2):  # two transforms, as for training and for testing
            ImageTransform(4, HALF * channels, HALF * channels)(batch)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert message in caplog.text

    def test_matching_channels_are_silent(self, caplog):
        transforms.warn_once.cache_clear()
        for mode in ("1", "L", "LA", "I;16", "F"):
            ImageTransform(4, HALF, HALF)({"image": [PIL.Image.new(mode, (4, 4))]})
        for mode in ("RGB", "P", "RGBA", "PA", "CMYK"):
            ImageTransform(4, HALF * 3, HALF * 3)({"image": [PIL.Image.new(mode, (4, 4))]})
        assert not caplog.records


class TestDecoding:
    @staticmethod
    def decode(value, channels=3):
        (pixels,) = ImageTransform(2, [0.0] * channels, [1.0] * channels)({"image": [value]})["pixel_values"]
        return (pixels * 255).round().to(torch.uint8)

    def test_a_corrupt_file_in_the_middle_of_a_batch_is_named(self, tmp_path):
        good = encode(PIL.Image.new("L", (4, 4)))
        broken = tmp_path / "02.png"
        broken.write_bytes(good["bytes"][:40])
        batch = {"image": [good, {"bytes": None, "path": str(broken)}, good]}
        with pytest.raises(InputError, match=r"Image '.*02\.png' can't be read \(.*Remove or replace it") as caught:
            ImageTransform(4, HALF, HALF)(batch)
        assert caught.value.__cause__ is not None

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"gone\.png' can't be read"):
            self.decode({"bytes": None, "path": str(tmp_path / "gone.png")})

    @pytest.mark.parametrize(
        "value", [None, {"bytes": b"", "path": None}, {"bytes": b"text", "path": None}, {"bytes": None, "path": None}]
    )
    def test_an_image_without_path_is_numbered(self, value):
        good = encode(PIL.Image.new("L", (2, 2)))
        with pytest.raises(InputError, match="Image number 2 of the batch can't be read"):
            ImageTransform(2, HALF, HALF)({"image": [good, value, good]})

    @pytest.mark.parametrize("error", [OSError, SyntaxError, TypeError, KeyError, EOFError, struct.error, zlib.error])
    @pytest.mark.parametrize("message", ["broken", "broken.", ""], ids=["broken", "full stop", "no message"])
    def test_whatever_pillow_raises_for_damaged_files_is_one_error_with_a_reason(self, monkeypatch, error, message):
        def decode_example(self, value):
            raise error(message)

        monkeypatch.setattr(datasets.Image, "decode_example", decode_example)
        reason = str(error(message)).rstrip(".") or error.__name__
        with pytest.raises(InputError, match=rf"^Image number 1 of the batch can't be read \({reason}\)"):
            self.decode({"bytes": b"", "path": None})

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
    def test_damaged_bytes_never_raise_anything_else(self):
        rng = np.random.default_rng(0)
        noise = PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        transform = ImageTransform(16, HALF * 3, HALF * 3)
        for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
            content = np.frombuffer(encode(noise, format)["bytes"], np.uint8)
            for _ in range(40):
                damaged = content.copy()
                damaged[rng.integers(0, min(len(damaged), 200), 4)] = rng.integers(0, 256, 4)
                try:
                    transform({"image": [{"bytes": damaged.tobytes(), "path": None}]})
                except InputError:
                    pass

    def test_transparent_parts_become_white(self):
        image = PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 255))
        image.putpixel((1, 0), (255, 0, 0, 0))
        assert self.decode(encode(image))[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]
        for mode in ("LA", "PA"):
            assert self.decode(PIL.Image.new(mode, (2, 2), (10, 0)), channels=1).unique().tolist() == [255]

    def test_a_palette_is_resolved_and_its_transparent_colour_is_white(self):
        image = PIL.Image.new("P", (2, 2), 0)
        image.putpalette([0, 200, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        assert self.decode(encode(image))[:, 0].T.tolist() == [[0, 200, 0], [9, 9, 9]]
        assert self.decode(encode(image, transparency=1))[:, 0].T.tolist() == [[0, 200, 0], [255, 255, 255]]

    def test_16_bits_are_scaled_not_clipped(self):
        image = PIL.Image.fromarray(np.array([[0, 257], [25700, 65535]], np.uint16))
        for format in ("PNG", "TIFF"):
            assert self.decode(encode(image, format), channels=1).flatten().tolist() == [0, 1, 100, 255]

    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    def test_16_bits_are_scaled_in_either_byte_order(self, dtype):
        image = PIL.Image.fromarray(np.array([[0, 257], [25700, 65535]], dtype))
        assert self.decode(image, channels=1).flatten().tolist() == [0, 1, 100, 255]

    def test_16_bits_of_a_pgm_which_pillow_opens_with_32_are_scaled(self):
        for values in ([0, 1], [257, 65535]):  # dark and bright: the same rule
            encoded = encode(PIL.Image.fromarray(np.array([values, values], np.uint16)), "PPM")
            assert PIL.Image.open(io.BytesIO(encoded["bytes"])).mode == "I"
            assert self.decode(encoded, channels=1)[0, 0].tolist() == [round(value / 257) for value in values]

    def test_the_transparent_grey_of_16_bits_is_white(self):
        image = PIL.Image.fromarray(np.array([[300, 301], [25700, 0]], np.uint16))
        image.info["transparency"] = 300
        assert self.decode(image, channels=1).flatten().tolist() == [255, 1, 100, 0]

    @pytest.mark.parametrize("highest", [1, 51, 255])
    def test_a_float_of_1_is_white_whatever_else_the_image_holds(self, highest):
        expected = np.array([[0, 1], [highest, highest // 2]])
        for dtype in (np.float32, np.float64):
            image = PIL.Image.fromarray((expected / 255).astype(dtype))
            for given in (image, encode(image, "TIFF")):
                assert self.decode(given, channels=1)[0].tolist() == expected.tolist()
                assert self.decode(given, channels=3)[2].tolist() == expected.tolist()

    def test_every_byte_survives_being_stored_as_a_float(self):
        bytes_ = np.arange(256).reshape(16, 16)
        (pixels,) = ImageTransform(16, [0.0], [1.0])(
            {"image": [encode(PIL.Image.fromarray((bytes_ / 255).astype(np.float32)), "TIFF")]}
        )["pixel_values"]
        assert torch.equal((255 * pixels[0]).round().long(), torch.from_numpy(bytes_))

    @pytest.mark.parametrize("value", [255, 1.001, -0.001, float("nan"), float("inf")])
    def test_floats_outside_0_to_1_are_refused(self, value, tmp_path):
        path = tmp_path / "bright.tiff"
        PIL.Image.fromarray(np.array([[0.5, value]], np.float32)).save(path)
        with pytest.raises(InputError, match=r"bright.tiff' can't be read \(its floats reach from .*, and 1 is white"):
            self.decode({"bytes": None, "path": str(path)}, channels=1)

    @pytest.mark.parametrize("values", [[0, 255], [0, 65535], [-1, 70000]], ids=str)
    @pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint32])
    def test_integers_whose_white_is_unknown_are_refused(self, values, dtype):
        image = PIL.Image.fromarray(np.array([values, values]).astype(dtype))
        for given in (image, encode(image, "TIFF")):
            with pytest.raises(InputError, match="holds 32-bit integers, which do not tell what is white.*8 or 16 bi"):
                self.decode(given, channels=1)

    def test_premultiplied_transparency_is_composed_over_white_too(self):
        assert self.decode(PIL.Image.new("RGBa", (2, 2), (0, 0, 0, 0))).unique().tolist() == [255]

    @pytest.mark.parametrize(
        "value", [np.zeros((2, 2), np.uint8), "a.png", b"", 7], ids=lambda value: str(type(value))
    )
    def test_what_is_no_image_is_named_by_its_type(self, value):
        with pytest.raises(
            InputError, match=rf"can't be read \(it is a {type(value).__name__}\); accepted are Pillow's"
        ):
            self.decode(value)

    def test_exif_orientation_turns_the_image_upright(self):
        image = PIL.Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = 3  # upside down
        assert self.decode(encode(image, exif=exif), channels=1).flatten().tolist() == [240, 160, 80, 0]

    def test_images_that_are_decoded_already_are_accepted(self):
        assert self.decode(PIL.Image.new("L", (2, 2), 7), channels=1).unique().tolist() == [7]


class TestTransformArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"augment": "crop-flp"},
                "Unknown augment 'crop-flp'; accepted are 'none', 'crop', 'crop-flip', 'resized-c",
            ),
            ({"interpolation": "cubic"}, "Unknown interpolation 'cubic'; accepted are .*Did you mean 'bicubic'"),
            ({"size": 0}, "size must be an integer of at least 1, got 0"),
            ({"mean": HALF * 2}, "mean and std must have three values each .*, got 2 and 1"),
            ({"std": [0.0]}, "std must be greater than 0 in every channel, got"),
            ({"crop_pct": 0.0}, "crop_pct must be greater than 0 and at most 1, got 0.0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_value_that_is_not_accepted_is_named(self, arguments, message):
        with pytest.raises(InputError, match=message):
            ImageTransform(**{"size": 8, "mean": HALF, "std": HALF, **arguments})

    def test_a_batch_without_images_is_explained(self):
        with pytest.raises(InputError, match="needs the column 'image', got 'label'.*remove_unused_columns=False"):
            ImageTransform(8, HALF, HALF)({"label": [1]})
