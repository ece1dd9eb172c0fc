"""Work on latents: inversion, denoising, guidance, object masks, attention readers, decoder tuning."""
