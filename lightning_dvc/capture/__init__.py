"""A batch through an unmodified LightningModule: per-sample losses, activations, gradients."""
