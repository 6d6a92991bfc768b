"""The file formats: how a program is written, and how its runtime runs it.

Runtimes are imported where they are used: onnxruntime and onnxscript, or openvino, are extras.
"""

import importlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"export: {module} is not installed; pip install 'internvit[export]'") from error


LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The largest relative error between the file's runtime and PyTorch, by the model's dtype."""
INT8_LIMIT = 0.1


class Target(ABC):
    """One format.

    Attributes:
        suffix: of its files.
        dtypes: of the models that its runtime computes in their own precision on a CPU.
        modules: what must be installed to write and run it.
    """

    suffix: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def check_installed(self) -> None:
        """Raises an ImportError that names the first of `modules` that is missing."""
        for module in self.modules:
            _need(module)

    def limit(self, dtype: torch.dtype) -> float:
        """The largest relative error between the runtime and PyTorch for a model in `dtype`."""
        return LIMITS[dtype]

    @abstractmethod
    def write(
        self, program: torch.export.ExportedProgram, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]
    ) -> None:
        """Writes `path`, and beside it what does not fit into it."""

    @abstractmethod
    def run(self, path: Path, pixels: Tensor) -> list[Tensor]:
        """The outputs of the file for pixels, computed by its runtime on the CPU."""


class ONNX(Target):
    """ONNX for ONNX Runtime and others; weights of over 2 GB, the most that the format takes, lie in `PATH.data`.

    Args:
        opset: 18, or from 23 on with ONNX's own Attention and RMSNormalization.
        int8: Linears in int8 by ONNX Runtime's dynamic quantisation: weights by output channel, activations by tensor
            at each call.
    """

    suffix = ".onnx"
    modules = ("onnx", "onnxscript", "onnxruntime")
    inline_bytes = 2**31 - 2**24

    def __init__(self, opset: int = 18, int8: bool = False) -> None:
        self.opset, self.int8 = opset, int8
        self.dtypes = (torch.float32,) if int8 else (torch.float32, torch.float16)

    def limit(self, dtype: torch.dtype) -> float:
        return INT8_LIMIT if self.int8 else super().limit(dtype)

    def write(
        self, program: torch.export.ExportedProgram, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]
    ) -> None:
        exported = torch.onnx.export(
            program, (), dynamo=True, opset_version=self.opset, output_names=list(names), verbose=False
        )
        assert exported is not None
        exported.model.metadata_props.update(metadata)
        large = sum(t.nbytes for t in program.state_dict.values()) > self.inline_bytes
        if not self.int8:
            exported.save(str(path), external_data=large)
            return
        # The quantiser takes constants alone: the weight of a Linear without bias is behind a Transpose.
        fold = _need("onnxscript.optimizer").fold_constants
        fold(exported.model, should_fold=lambda node: True if node.op_type == "Transpose" else None)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            plain = Path(folder) / path.name
            exported.save(str(plain), external_data=large)
            self._quantize(plain, path, large)

    @staticmethod
    def _quantize(plain: Path, path: Path, large: bool) -> None:
        quantize = _need("onnxruntime.quantization").quantize_dynamic
        # A trained ViT-S at 224 pixels: 4 % of error; with a scale for each weight instead of each channel 9 %, with
        # attention's products, of two activations, in int8 too 6 %.
        quantize(plain, path, op_types_to_quantize=["Gemm", "MatMul"], per_channel=True, use_external_data_format=large)

    def run(self, path: Path, pixels: Tensor) -> list[Tensor]:
        runtime = _need("onnxruntime")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(out) for out in session.run(None, {"pixel_values": pixels.numpy()})]


class OpenVINO(Target):
    """OpenVINO's IR: PATH.xml, and the weights in PATH.bin."""

    suffix = ".xml"
    dtypes = (torch.float32,)
    modules = ("openvino",)

    def write(
        self, program: torch.export.ExportedProgram, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]
    ) -> None:
        openvino = _need("openvino")
        model = openvino.convert_model(program)
        model.inputs[0].get_tensor().set_names({"pixel_values"})
        for output, name in zip(model.outputs, names, strict=True):
            output.get_tensor().set_names({name})
        for key, value in metadata.items():
            model.set_rt_info(value, ["internvit", key.removeprefix("internvit.")])
        openvino.save_model(model, str(path), compress_to_fp16=False)

    def run(self, path: Path, pixels: Tensor) -> list[Tensor]:
        openvino = _need("openvino")
        # On a CPU with bfloat16 units it computes in bfloat16 unless told.
        model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = model(pixels.numpy())
        return [torch.from_numpy(outputs[i].copy()) for i in range(len(model.outputs))]


class PT2(Target):
    """A torch.export program of PyTorch's own ops, for torch.export.load."""

    suffix = ".pt2"

    def write(
        self, program: torch.export.ExportedProgram, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]
    ) -> None:
        torch.export.save(program, str(path), extra_files={**metadata, "output_names": json.dumps(names)})

    def run(self, path: Path, pixels: Tensor) -> list[Tensor]:
        return list(torch.export.load(str(path)).module()(pixels))


class AOTInductor(Target):
    """A package of compiled code for torch._inductor.aoti_load_package, or libtorch without Python."""

    suffix = ".pt2"

    def write(
        self, program: torch.export.ExportedProgram, path: Path, names: tuple[str, ...], metadata: Mapping[str, str]
    ) -> None:
        from torch._inductor import aoti_compile_and_package

        settings = {"aot_inductor.metadata": {**metadata, "output_names": json.dumps(names)}}
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)

    def run(self, path: Path, pixels: Tensor) -> list[Tensor]:
        from torch._inductor import aoti_load_package

        return list(aoti_load_package(str(path))(pixels))


TARGETS: dict[str, Target] = {"onnx": ONNX(), "openvino": OpenVINO(), "aoti": AOTInductor(), "pt2": PT2()}
