"""What Stable Diffusion 1, 2 and XL share: a UNet with cross-attention, CLIP text encoders, a KL autoencoder."""
