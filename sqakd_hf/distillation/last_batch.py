"""A batch of one image, of which BatchNorm has no statistics: found before the training instead of in it."""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from ..conversion.student import batch_norms
from ..data.reproducible import own_random_numbers
from ..errors import InputError
from ..outputs.forward import run_model


def check_last_batch(
    model: nn.Module,
    args: TrainingArguments,
    dataset: Dataset | None,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
) -> None:
    """Refuse a training that would meet a batch of one image where BatchNorm sees one value a channel.

    Args:
        model (`nn.Module`): What is to be trained; it is run once, in eval mode, if a batch will hold one image.
        args (`TrainingArguments`): The training's.
        dataset (`Dataset`): Its images. Of streams nobody knows the last batch.
        collate (`Callable`): Makes a batch of a list of them.

    Raises:
        `InputError`: Images and batch size, the layer, and what to do.
    """
    if dataset is None or isinstance(dataset, IterableDataset) or not batch_norms(model):
        return
    images, size = len(dataset), args.train_batch_size
    # Several processes fill up the last batch.
    is_alone = size == 1 or (images % size == 1 and args.world_size == 1 and not args.dataloader_drop_last)
    if is_alone and size > 1 and args.max_steps > 0:
        is_alone = args.max_steps * args.gradient_accumulation_steps >= ceil(images / size)
    if is_alone and (name := _of_one_value(model, dataset, collate)) is not None:
        way_on = "" if size == 1 else " or dataloader_drop_last=True"
        raise InputError(
            f"{images} images in batches of {size} make a batch of one, of which BatchNorm has no statistics where "
            f"each channel is one value, as in {name!r}. Pass another per_device_train_batch_size{way_on}."
        )


@torch.no_grad()
def _of_one_value(
    model: nn.Module, dataset: Dataset, collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]
) -> str | None:
    """Return the name of the first BatchNorm that sees one value of each channel of an image."""
    found = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].numel() == 2 * module.num_features:
            found.append(names[module])

    with own_random_numbers():
        batch = collate([dataset[0]] * 2)
    device = next(model.parameters()).device
    handles = [module.register_forward_pre_hook(look) for module in batch_norms(model)]
    was_training = model.training
    try:
        run_model(model.eval(), {name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found[0] if found else None
