"""The published methods: settings, and what they make of queries, keys and values."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..context.layer_call import Site
from ._editing import Editing, Hook, require_method
from .bounded import BoundedAttention
from .consistory import ConsiStory
from .cross_image import CrossImage
from .ctrl_x import CtrlX
from .dream_matcher import DreamMatcher
from .eye_for_an_eye import EyeForAnEye
from .free_custom import FreeCustom
from .masactrl import MasaCtrl
from .qalign import QAlign, QAlignWarp
from .reference_only import ReferenceOnly
from .seal import SeAl
from .story_diffusion import StoryDiffusion
from .style_aligned import StyleAligned
from .style_id import StyleID
from .visual_style import VisualStylePrompting
from .z_star import ZStar


class Method(Protocol):
    """Frozen settings with one function on [B, H, N, D] tensors, and what `attach` asks of them.

    What a method may have besides:
        default_steps: a (start, stop) for `attach` where the user gives none.
        prepare(hidden, project, site): what it makes of the hidden states [B, N, C] before `project` gives queries, keys and values of them.
        hooks(model): by module name, what it makes of the output [B, ...] of modules that are no attention; `site.replace` puts the edited
            rows in place.
        cross_layers(names), attend_cross(q, k, v, site): which cross-attention layers it acts on, and their attention output; keys and values are
            the prompt's.
        start(latents, appearance), change_clean(clean, appearance, timestep): in `AppearanceTransferPipeline`, what the outputs' first latents
            [outputs, C, h, w] become beside the appearance's [1, C, h, w]; and likewise their x̂_0 in a step.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The attention output of every row of the batch, [B, H, N, D]."""

    def default_layers(self, names: Sequence[str]) -> list[str]:
        """Which of a denoiser's self-attention layers the method edits where the user names none."""

    def takes_structure(self, step: int, total: int) -> bool:
        """Whether keys and values come from the structure at this step."""


METHODS: dict[str, type[Method]] = {
    "qalign": QAlign,
    "qalign_warp": QAlignWarp,
    "cross_image": CrossImage,
    "eye_for_an_eye": EyeForAnEye,
    "masactrl": MasaCtrl,
    "style_aligned": StyleAligned,
    "visual_style": VisualStylePrompting,
    "style_id": StyleID,
    "z_star": ZStar,
    "ctrl_x": CtrlX,
    "seal": SeAl,
    "reference_only": ReferenceOnly,
    "bounded": BoundedAttention,
    "story_diffusion": StoryDiffusion,
    "free_custom": FreeCustom,
    "dream_matcher": DreamMatcher,
    "consistory": ConsiStory,
}

__all__ = [
    "METHODS",
    "BoundedAttention",
    "ConsiStory",
    "CrossImage",
    "CtrlX",
    "DreamMatcher",
    "Editing",
    "EyeForAnEye",
    "FreeCustom",
    "Hook",
    "MasaCtrl",
    "Method",
    "QAlign",
    "QAlignWarp",
    "ReferenceOnly",
    "SeAl",
    "StoryDiffusion",
    "StyleAligned",
    "StyleID",
    "VisualStylePrompting",
    "ZStar",
    "require_method",
]
