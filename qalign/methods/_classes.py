"""The classes of `_names`, for type checkers, which cannot read a table of strings. A test compares both."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bounded import BoundedAttention as BoundedAttention
    from .consistory import ConsiStory as ConsiStory
    from .cross_image import CrossImage as CrossImage
    from .ctrl_x import CtrlX as CtrlX
    from .dream_matcher import DreamMatcher as DreamMatcher
    from .eye_for_an_eye import EyeForAnEye as EyeForAnEye
    from .free_custom import FreeCustom as FreeCustom
    from .masactrl import MasaCtrl as MasaCtrl
    from .qalign import QAlign as QAlign
    from .qalign import QAlignWarp as QAlignWarp
    from .reference_only import ReferenceOnly as ReferenceOnly
    from .seal import SeAl as SeAl
    from .story_diffusion import StoryDiffusion as StoryDiffusion
    from .style_aligned import StyleAligned as StyleAligned
    from .style_id import StyleID as StyleID
    from .visual_style import VisualStylePrompting as VisualStylePrompting
    from .z_star import ZStar as ZStar
