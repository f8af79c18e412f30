"""The networks: UNet, motion modules, I2V-Adapter, IP-Adapter, VAE, CLIP. They know torch and einops only."""
