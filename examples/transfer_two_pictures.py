"""Give one picture the appearance of another.

python examples/transfer_two_pictures.py appearance.png structure.png output.png
"""

import sys

import torch
from PIL import Image

from qalign import AppearanceTransferPipeline, QAlign

STEPS = 100

# The embedded model knows pictures of 128 x 128 pixels. For photographs take Stable Diffusion:
# pipe = AppearanceTransferPipeline.from_pipe(StableDiffusionPipeline.from_pretrained("..."))
pipe = AppearanceTransferPipeline.embedded()

appearance, structure = (Image.open(path).convert("RGB").resize((128, 128)) for path in sys.argv[1:3])
made = pipe(
    appearance,
    structure,
    "a photo of a quadruped",
    method=QAlign(),
    num_inference_steps=STEPS,
    generator=torch.Generator().manual_seed(0),  # the noise of the inversion: the same picture every time
)
made.images[0].save(sys.argv[3])
print(f"{sys.argv[3]}: {made.images[0].size[0]} x {made.images[0].size[1]} pixels")
