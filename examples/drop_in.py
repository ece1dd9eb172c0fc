"""Run Q-Align inside a stock diffusers pipeline: `python examples/drop_in.py`."""

from diffusers import DDIMScheduler

from qalign import AppearanceTransferPipeline, QAlign, attach, embedded
from qalign.embedded.scenes import held_out_seed, render

STEPS = 50

pipe, prompt = embedded.load(), "a photo of a quadruped"  # or StableDiffusionPipeline.from_pretrained(...)
appearance, structure = render([held_out_seed(1), held_out_seed(5)]).image  # or two PIL images of one size

# Inversion: latents that reproduce both pictures. It needs the steps of the pipeline's own scheduler.
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
tool = AppearanceTransferPipeline.from_pipe(pipe)  # shares the weights
settings = {"num_inference_steps": STEPS, "inversion": "ddim", "inversion_guidance_scale": 1}
inverted = tool.invert(appearance, structure, prompt, **settings)

# Rows of the batch: output (begins as the structure), appearance, structure.
latents = inverted.latents[0][[1, 0, 1]].to(pipe.dtype)
with attach(pipe, QAlign()):  # the method's own layers and steps; the pipeline is restored at the end
    images = pipe([prompt] * 3, latents=latents, num_inference_steps=STEPS, guidance_scale=1).images
images[0].save("drop_in.png")
print(f"drop_in.png: {images[0].size[0]} x {images[0].size[1]} pixels")
