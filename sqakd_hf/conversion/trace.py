"""One forward pass, watched: which layers run, in which order, on whose behalf, and how much they compute."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn

from .._text import first_line
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer
from ..outputs.forward import run_model
from .watcher import IMAGE, Trace, Watcher, set_sources


logger = logging.getLogger(__name__)


@torch.no_grad()
def trace_model(model: nn.Module, layers: Mapping[str, nn.Module], images: torch.Tensor | None = None) -> Trace | None:
    """Run `model` on one image in eval mode and return what its `layers` did; `None` if it does not run on noise.

    Args:
        model (`nn.Module`): A float model; it is left as it was.
        layers (`dict`): Name → module, the layers to watch.
        images (`torch.Tensor`, *optional*): `(B, C, H, W)`; by default noise of the size that the model states, or
            else of common sizes in turn.

    Raises:
        `InputError`: The model does not run on `images`.
    """
    if images is not None and not (isinstance(images, torch.Tensor) and images.dim() >= 2):
        raise InputError(f"images must be a tensor (B, C, H, W), got {type(images).__name__}.")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    reason = None
    with evaluating(model):
        for example in [images] if images is not None else example_images(model, like.device):
            watcher = Watcher(model, layers)
            try:
                with torch.random.fork_rng(devices=[]), watcher.watching():
                    example = example.to(like.device, like.dtype, copy=True)
                    set_sources(example, frozenset([IMAGE]))
                    output = run_model(model, {"pixel_values": example})
                return watcher.finish(output, len(example))
            except Exception as error:  # whatever a model raises on images it is not made for
                reason = f"{tuple(example.shape)}: {type(error).__name__}: {first_line(error)}"
    if images is not None:
        raise InputError(f"{type(model).__name__} does not run on the example images, {reason}.")
    logger.warning(
        "%s does not run on noise (%s): the order of its layers is that of their registration, and layers that never "
        "run are not known before calibration. Pass example images to tell.",
        type(model).__name__,
        reason,
    )
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode for a while; each module's own mode comes back."""
    was_training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        on_grid = [m for m in was_training if isinstance(m, QuantizedLayer) and m.weight_is_on_grid]
        for layer in on_grid:
            layer.weight_is_on_grid = False  # lest train() makes latents of the values
        model.train()  # timm's caches of what eval mode computed from the weights end with it
        for layer in on_grid:
            layer.weight_is_on_grid = True
        for module, training in was_training.items():
            module.training = training


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of `model` have: what its first convolution takes.

    Where its metadata says otherwise, one forward pass decides: metadata are those of the weights (`in_chans`), and a
    stem may fold pixels into channels before its convolution.
    """
    candidates = _channel_counts(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if len(candidates) > 1 and device.type != "meta":
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for example in example_images(model, device):
                with suppress(Exception):  # whatever a model raises on images it is not made for
                    run_model(model, {"pixel_values": example.to(like.device, like.dtype)})
                    return example.shape[1]
    return candidates[0]


def _channel_counts(model: nn.Module) -> list[int]:
    """Return how many channels images may have, the likeliest first."""
    stated, stems = [], []
    for module in model.modules():
        timm_config, config = getattr(module, "pretrained_cfg", None), getattr(module, "config", None)
        if isinstance(timm_config, Mapping):
            names = timm_config.get("first_conv") or ()
            modules = dict(module.named_modules())
            stems += [modules.get(name) for name in ([names] if isinstance(names, str) else names)]
            stated += [size[0] for size in [timm_config.get("input_size")] if size]
        stated += [count for count in [getattr(config, "num_channels", None)] if isinstance(count, int)]
    stems += [module for module in model.modules() if isinstance(module, nn.Conv2d)][:1]
    first = next((stem.in_channels for stem in stems if isinstance(getattr(stem, "in_channels", None), int)), None)
    return list(dict.fromkeys([*([] if first is None else [first]), *stated])) or [3]


def example_images(model: nn.Module, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield batches of one noise image: of the size the model states, or of common sizes."""
    sizes = [(224, 224), (32, 32), (28, 28), (384, 384)]
    for module in model.modules():
        timm_config, config = getattr(module, "pretrained_cfg", None), getattr(module, "config", None)
        if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
            sizes.insert(0, tuple(timm_config["input_size"][1:]))
            break
        if isinstance(stated := getattr(config, "image_size", None), int | list | tuple):
            sizes.insert(0, (stated, stated) if isinstance(stated, int) else tuple(stated))
            break
    for module in model.modules():
        # timm's patch embedding knows the size that the model was built for, its metadata that of its weights.
        size = getattr(module, "img_size", None)
        if isinstance(size, tuple) and len(size) == 2:
            sizes.insert(0, size)
            break
    for size, channels in itertools.product(dict.fromkeys(sizes), _channel_counts(model)):
        if device.type == "meta":
            yield torch.empty(1, channels, *size, device=device)
        else:
            yield torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
