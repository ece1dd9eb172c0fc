"""The names of the methods. This module needs no torch, so the command line can list them at once."""

TRANSFERS = {  # the methods with an appearance row: name on the command line -> module.class
    "qalign": "qalign.QAlign",
    "qalign_warp": "qalign.QAlignWarp",
    "cross_image": "cross_image.CrossImage",
    "eye_for_an_eye": "eye_for_an_eye.EyeForAnEye",
    "masactrl": "masactrl.MasaCtrl",
    "style_aligned": "style_aligned.StyleAligned",
    "visual_style": "visual_style.VisualStylePrompting",
    "style_id": "style_id.StyleID",
    "z_star": "z_star.ZStar",
    "ctrl_x": "ctrl_x.CtrlX",
    "seal": "seal.SeAl",
    "reference_only": "reference_only.ReferenceOnly",
    "free_custom": "free_custom.FreeCustom",
    "dream_matcher": "dream_matcher.DreamMatcher",
}
OTHERS = {  # the methods that relate the outputs of a batch to each other, or the subjects of one output
    "bounded": "bounded.BoundedAttention",
    "story_diffusion": "story_diffusion.StoryDiffusion",
    "consistory": "consistory.ConsiStory",
}
MODULES = {kind: module for module, kind in (path.split(".") for path in (TRANSFERS | OTHERS).values())}

ALIGNED = ("output", "structure", "both")  # of QAlign and QAlignWarp
