"""Declares the two ops that torchvision needs to be imported beside a torch it was not built for; no test calls them.

This folder is on PYTHONPATH in the processes that vLLM starts.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
