"""InternViT over several devices: tensor parallelism, FSDP2, and their checkpoints."""

from internvit.parallel.fsdp import shard_blocks
from internvit.parallel.load import from_pretrained, load_weights
from internvit.parallel.parallelize import parallelize
from internvit.parallel.plan import TensorParallelPlan, tensor_parallel_plan
from internvit.parallel.save import load_checkpoint, save_checkpoint, save_pretrained

__all__ = [
    "TensorParallelPlan",
    "from_pretrained",
    "load_checkpoint",
    "load_weights",
    "parallelize",
    "save_checkpoint",
    "save_pretrained",
    "shard_blocks",
    "tensor_parallel_plan",
]
