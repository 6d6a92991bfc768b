"""Dense prediction: backbones, feature pyramids, segmentation."""
