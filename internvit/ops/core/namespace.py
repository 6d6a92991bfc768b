"""The namespace that the ops are registered in, `torch.ops.internvit`; a build for a kernel hub has one of its own."""

NAMESPACE = "internvit"
