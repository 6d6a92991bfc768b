"""Whole models on this machine against the reference: eval, optimised, as CUDA graphs, and a training step.

    python -m internvit.benchmarks.reports.gpu_smoke [--device cuda|cpu]

The 300M's and the 6B's first layers at 448 px; on a CPU small ones. A result may err as much as the reference in the
same dtype does beside float32, and a tenth more; a parameter's gradient twice as much.
"""

import argparse
import copy
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from internvit import InternViT, InternViTConfig, optimize_for_inference, reference
from internvit.benchmarks.model.bench_model import trained_like
from internvit.numerics import relative_error

LAYERS = 2
MODELS = ("internvit-300m-448px", "internvit-6b-448px-v2.5")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "image_size": 56}


class Smoke:
    """One model, its reference in bfloat16 and in float32, and images.

    Attributes:
        name: as published.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        changes = SMALL if device == "cpu" else {}
        config = InternViTConfig.from_name(name).replace(
            name=None, num_hidden_layers=LAYERS, drop_path_rate=0.0, **changes
        )
        weights = {k: v.to(device, torch.bfloat16) for k, v in trained_like(config).items()}
        self.model = InternViT(config, device="meta")
        self.model.load_state_dict(weights, assign=True)
        self.model.eval()
        self.plain = reference.InternViT(config).to(device, torch.bfloat16).eval()
        self.plain.load_state_dict(weights)
        self.exact = copy.deepcopy(self.plain).float()
        self.images = torch.randn(3, 3, *config.image_hw).to(device, torch.bfloat16)

    def checks(self) -> dict[str, Callable[[], str]]:
        """What is done -> a function that does it and says how far off the result is; raises where it is wrong."""
        found = {"eval": self._eval, "optimize_for_inference": self._optimized, "training step": self._train}
        if self.device != "cpu":
            found |= {"CUDA graphs": self._graphed}
        return found

    def _features(self, module: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = module(images).last_hidden_state
        return features

    def _compare(self, what: str, actual: Tensor, emulation: Tensor, truth: Tensor, factor: float) -> float:
        error, allowed = relative_error(actual, truth), factor * relative_error(emulation, truth)
        if not error <= max(allowed, torch.finfo(torch.bfloat16).eps):
            raise AssertionError(f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")
        return error

    def _inference(self, module: nn.Module, images: Tensor) -> str:
        actual, emulation = self._features(module, images), self._features(self.plain, images)
        truth = self._features(self.exact, images.float())
        return f"relative error {self._compare('last_hidden_state', actual, emulation, truth, 1.1):.1e}"

    def _eval(self) -> str:
        return self._inference(self.model, self.images)

    def _optimized(self) -> str:
        return self._inference(optimize_for_inference(self.model), self.images)

    def _graphed(self) -> str:
        fast = optimize_for_inference(self.model, cuda_graph=True, graph_batches=(1, 4))
        for images in (self.images, self.images[:1], self.images[1:2], self.images):
            said = self._inference(fast, images)
        fast.undo()
        return said

    def _gradients(self, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        features = module(self.images.to(dtype)).last_hidden_state
        names, parameters = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(features.float().square().sum(), parameters, allow_unused=True)
        return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}

    def _train(self) -> str:
        model = copy.deepcopy(self.model).train()
        actual = self._gradients(model, torch.bfloat16)
        emulation, truth = self._gradients(self.plain, torch.bfloat16), self._gradients(self.exact, torch.float32)
        if actual.keys() != truth.keys():
            raise AssertionError(f"gradients of other parameters: {sorted(actual.keys() ^ truth.keys())}")
        errors = [self._compare(name, grad, emulation[name], truth[name], 2.0) for name, grad in actual.items()]
        return f"{len(errors)} gradients, relative error {max(errors):.1e} at most"


def run(device: str) -> Iterator[tuple[str, str | None]]:
    """(model and check, what is wrong or None), printed as they come."""
    torch.manual_seed(0)
    for name in MODELS:
        smoke = Smoke(name, device)
        for what, check in smoke.checks().items():
            try:
                said, wrong = check(), None
            except Exception as error:  # the next check may tell more
                traceback.print_exc()
                said = wrong = f"{type(error).__name__}: {error}"
            print(f"{name}, {what}: {said}", flush=True)
            yield f"{name}, {what}", wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.benchmarks.reports.gpu_smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    results = list(run(parser.parse_args(arguments).device))
    failed = [what for what, wrong in results if wrong is not None]
    print(f"{len(results) - len(failed)} of {len(results)} right" + (f"; wrong: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
