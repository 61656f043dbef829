"""Walk one small member of every timm family and many transformers classes: what is quantized, what is not, and why.

Each is built with random weights and converted (W8A8, first and last layer too), calibrated, trained for one step,
packed, reloaded and compared. Run `python benchmarks/coverage.py` to write COVERAGE.md (about 40 minutes);
`--only NAME ...` prints single ones.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import transformers
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sqakd_hf import InputError, QuantizationConfig, build_model, calibrate_model, quantize_model
from sqakd_hf.outputs.forward import predict


ROOT = Path(__file__).parent.parent
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
# Class → small config fields.
TRANSFORMERS = {
    "ViTForImageClassification": SMALL,
    "DeiTForImageClassification": SMALL,
    "DeiTForImageClassificationWithTeacher": SMALL,
    "BeitForImageClassification": {**SMALL, "use_absolute_position_embeddings": True},
    "Data2VecVisionForImageClassification": SMALL,
    "Dinov2ForImageClassification": SMALL,
    "Dinov2WithRegistersForImageClassification": SMALL,
    "IJepaForImageClassification": SMALL,
    "ViTMSNForImageClassification": SMALL,
    "ConvNextForImageClassification": STAGES,
    "ConvNextV2ForImageClassification": STAGES,
    "ResNetForImageClassification": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "RegNetForImageClassification": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "BitForImageClassification": {**STAGES, "embedding_size": 8, "num_groups": 4},
    "SwinForImageClassification": SWIN,
    "Swinv2ForImageClassification": SWIN,
    # With weights as small as these start with, nothing reaches the last layer.
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "initializer_range": 0.2},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35, "initializer_range": 0.2},
    "MobileViTForImageClassification": {"image_size": 64, "initializer_range": 0.2},
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.5, "initializer_range": 0.2},
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.35,
        "depth_coefficient": 0.35,
        "hidden_dim": 448,
        "image_size": 64,
        "initializer_range": 0.2,
    },
    "LevitForImageClassification": {"image_size": 64},
    "PvtForImageClassification": {"image_size": 64, "depths": [1, 1, 1, 1]},
    "PvtV2ForImageClassification": {"image_size": 64, "depths": [1, 1, 1, 1]},
    "PoolFormerForImageClassification": {"depths": [1, 1, 1, 1]},
    "FocalNetForImageClassification": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]},
    "CvtForImageClassification": {"depth": [1, 2, 3], "embed_dim": [8, 16, 32], "num_heads": [1, 2, 2]},
    "SwiftFormerForImageClassification": {},
    "SegformerForImageClassification": {},
    "HieraForImageClassification": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1]},
    "TextNetForImageClassification": {},
    "SegformerForSemanticSegmentation": {},
    "DPTForSemanticSegmentation": {
        **SMALL,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
        "initializer_range": 0.2,
    },
    "MobileViTForSemanticSegmentation": {"image_size": 64, "initializer_range": 0.2},
    "BeitForSemanticSegmentation": {
        **SMALL,
        "num_hidden_layers": 4,
        "out_indices": [1, 2, 3, 4],
        "pool_scales": [1, 2],
    },
    "DetrForObjectDetection": {
        "use_timm_backbone": False,
        "backbone_config": {"model_type": "resnet", **STAGES, "embedding_size": 8, "layer_type": "basic"},
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 5,
    },
    "YolosForObjectDetection": {**SMALL, "image_size": [64, 64], "num_detection_tokens": 5},
    "SiglipForImageClassification": {"vision_config": SMALL},
    "CLIPForImageClassification": {"vision_config": SMALL},
}


# A family without a small member: fewer blocks of it.
SHALLOW = {"deepseek_vit_412m": {"depth": 2}}


def timm_families() -> dict[str, list[str]]:
    """Return timm's module families and their members."""
    families = {module: timm.list_models(module=module) for module in timm.list_modules()}
    return {module: names for module, names in families.items() if names}


def smallest(names: list[str]) -> str:
    """Return the member with the fewest weights, built without memory."""
    best = None
    for name in names:
        with contextlib.suppress(Exception), torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
            count = sum(p.numel() for p in timm.create_model(name).parameters())
            if best is None or count < best[0]:
                best = count, name
    return names[0] if best is None else best[1]


def photographs(channels: int, size: int, count: int = 8) -> torch.Tensor:
    """Return crops of two photographs at several scales, `(count, channels, size, size)`, about normalised.

    Noise looks the same everywhere: what a network makes of two images of it differs by less than rounding does.
    """
    generator = torch.Generator().manual_seed(0)
    sources = [torch.from_numpy(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    crops = []
    for i in range(count):
        source = sources[i % len(sources)]
        side = int(torch.randint(64, 400, (1,), generator=generator))
        top, left = (int(torch.randint(0, n - side, (1,), generator=generator)) for n in source.shape[1:])
        crop = source[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    images = torch.cat(crops) / 64 - 2
    return images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a model of ten classes with random weights, and a few images of the smallest size it accepts."""
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**(TRANSFORMERS[name] or {}), num_labels=10)
        model = model_class(config)
        size = getattr(config, "image_size", None) or 64
        size = size if isinstance(size, int) else size[0]
        images = photographs(getattr(config, "num_channels", 3), size)
        reseeded(model).train()
        with torch.no_grad():
            predict(model, {"pixel_values": images})  # one update of BatchNorm's statistics
        return model, images
    cfg = timm.models.get_pretrained_cfg(name)
    native = cfg.input_size[-1] if cfg else 224
    errors = []
    for size in sorted({32, 64, 96, 128, native}):
        if size > native:
            continue
        try:
            model = build_model(f"timm/{name}", 10, image_size=size, model_args=SHALLOW.get(name))
            images = photographs(model.config.pretrained_cfg["input_size"][0], size, 8 if size < 160 else 4)
            with torch.no_grad():
                reseeded(model).train()(images)
                logits = model.eval()(images[:2]).logits
            if torch.isfinite(logits).all() and logits.shape == (2, 10):
                return model, images
        except Exception as error:
            errors.append(f"{size}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise InputError(errors[-1] if errors else "no size fits")


def reseeded(model: nn.Module) -> nn.Module:
    """Give heads and gates that start at or near zero random weights: a constant output can't be compared."""
    for name, parameter in model.named_parameters():
        if parameter.abs().max() < 0.01 and parameter.dim() >= 1 and "bias" not in name:
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model


@torch.no_grad()
def plainly_rounded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits where each layer's weight and input is rounded to 8 bits over its whole range.

    The yardstick of a random network: some amplify the rounding of any layer to as much as their logits.
    """

    def rounded(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        step = (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)).clamp(min=1e-9) / 255
        return (x / step).round() * step

    def round_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(args[0], tuple(range(args[0].dim()))), *args[1:])

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.weight.copy_(rounded(module.weight, tuple(range(1, module.weight.dim()))))
            module.register_forward_pre_hook(round_input)
    return predict(model, {"pixel_values": images}).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error, in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm()).item()


def examine(name: str) -> dict[str, object]:
    """Take one model through everything; return its row."""
    started = time.perf_counter()
    model, images = build(name)
    model.eval()
    with torch.no_grad():
        expected = predict(model, {"pixel_values": images}).logits
    yardstick = relative(plainly_rounded(model, images), expected)
    plan = quantize_model(model, QuantizationConfig(weight_bits=8, activation_bits=8))
    calibrate_model(model, [images], disable_progress=True)
    model.eval()
    with torch.no_grad():
        calibrated = predict(model, {"pixel_values": images}).logits
    error = relative(calibrated, expected)
    model.train()
    for module in model.modules():
        # Random weights' own statistics are far from the running ones that ranges were set under.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    prediction = predict(model, {"pixel_values": images})
    loss = prediction.logits.square().mean()
    (loss if prediction.boxes is None else loss + prediction.boxes.square().mean()).backward()
    without = [n for n, p in model.named_parameters() if n.endswith("weight_quantizer.scale") and p.grad is None]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = predict(model, {"pixel_values": images}).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder)
        with torch.no_grad():
            exact = torch.equal(predict(reloaded, {"pixel_values": images}).logits, trained)
    if not torch.isfinite(trained).all():
        raise InputError("the logits after one training step are not finite")
    coverage = plan.coverage()
    skipped = {}
    for layer in plan.skipped:
        skipped.setdefault(layer.skipped, []).append(layer.name)
    return {
        "name": name,
        "layers": f"{coverage.quantized_layers}/{coverage.layers}",
        "weights": coverage.quantized_weights / max(coverage.weights, 1),
        "macs": coverage.quantized_macs / coverage.macs if coverage.macs else None,
        "layer_macs": coverage.quantized_macs / max(sum(line.macs or 0 for line in plan.layers), 1),
        "error": error,
        "yardstick": yardstick,
        "exact": exact,
        "without_gradient": len(without),
        "skipped": {reason: len(names) for reason, names in skipped.items()},
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="timm models or transformers classes; print, write no file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--jobs-file", type=Path, default=None, help="keep each row in this file, and go on from it")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one model")
    options = parser.parse_args()
    if options.one:
        logging.disable(logging.WARNING)
        torch.set_num_threads(2)
        print(json.dumps(examine(options.one)))
        return
    names = {name: name for name in options.only} if options.only else {}
    if not options.only:
        families = timm_families()
        for family, members in tqdm(families.items(), desc="Smallest members", unit="family"):
            names[family] = smallest(members)
        names.update({name: name for name in TRANSFORMERS})
    rows = {}
    if options.jobs_file and options.jobs_file.exists():
        rows = {row["family"]: row for row in map(json.loads, options.jobs_file.read_text().splitlines())}
    for family, name in tqdm(names.items(), desc="Models", unit="model"):
        if family in rows:
            continue
        # A process each: one model's crash or memory is not another's.
        command = [sys.executable, __file__, "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            row = json.loads(lines[-1]) if lines else {"name": name, "failed": last}
        except subprocess.TimeoutExpired:
            row = {"name": name, "failed": f"took more than {options.timeout} s"}
        rows[family] = {"family": family, **row}
        if options.jobs_file:
            with options.jobs_file.open("a") as file:
                file.write(json.dumps(rows[family]) + "\n")
        if options.only:
            print(json.dumps(rows[family], indent=1))
    if not options.only:
        (ROOT / "COVERAGE.md").write_text(table(list(rows.values())))


def table(rows: list[dict[str, object]]) -> str:
    """Return COVERAGE.md."""
    done = [row for row in rows if "failed" not in row]
    covered = [row for row in done if row["layer_macs"] >= 0.99]
    lines = [
        "# Coverage",
        "",
        f"Measured by `python benchmarks/coverage.py` with torch {torch.__version__}, timm {timm.__version__}, "
        f"transformers {transformers.__version__}. One small member of each timm module family and of each "
        "transformers class, random weights: quantize (W8A8, first and last layer too), calibrate on crops of "
        "photographs, one training step, pack, reload. Errors of logits are relative, before the step; plain rounding "
        "is a network of float layers whose weights and inputs are rounded to 8 bits over their whole range, for how "
        "far a random network carries any rounding.",
        "",
        f"{len(rows)} models, {len(done)} went through; the packed reload is exact in "
        f"{sum(bool(row['exact']) for row in done)}; at least 99 % of the multiply-accumulates of convolutions and "
        f"linear layers are quantized in {len(covered)}. Weights and MACs in the table count all matrices that a "
        "model multiplies activations by.",
        "",
        "| family | model | layers | weights | MACs | logit error | of plain rounding | reload | in float, and why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['family']} | {row['name']} | | | | | | | {row['failed'].replace('|', '/')} |")
            continue
        why = "; ".join(f"{count} x {reason}" for reason, count in row["skipped"].items())
        macs = "not traced" if row["macs"] is None else f"{100 * row['macs']:.1f} %"
        lines.append(
            f"| {row['family']} | {row['name']} | {row['layers']} | {100 * row['weights']:.1f} % | {macs} | "
            f"{100 * row['error']:.1f} % | {100 * row['yardstick']:.1f} % | "
            f"{'exact' if row['exact'] else 'differs'} | {why} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
