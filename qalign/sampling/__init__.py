"""What acts on latents: inversion, guidance, masks of objects, and the attention that guides or is distilled."""
