"""Regions: what is matched and read stays in its region, at every grid."""

import struct
import zlib

import pytest
import torch
from PIL import Image

from qalign import BatchLayout, Site, UNetAttnProcessor, attach
from qalign.context.regions import EVERYTHING, Regions, read_labels
from qalign.methods import BoundedAttention, CrossImage, EyeForAnEye, MasaCtrl, QAlign, QAlignWarp
from tests.methods.test_formulas import GRID, LAYOUT, make_attention
from tests.processors.models import make_unet, unet_inputs

HALVES = torch.arange(GRID[0] * GRID[1]).view(GRID) % GRID[1] // (GRID[1] // 2)  # left 0, right 1
CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [CrossImage(), QAlign(), QAlignWarp(), QAlign(refinement="guided"), MasaCtrl()],
    ids=repr,
)
def test_a_token_reads_its_own_region_alone(method):
    """A change of the reference's right half reaches the output's right half, and not its left half."""
    attn, hidden = make_attention(2, 40)
    attn.set_processor(
        UNetAttnProcessor(method, LAYOUT, regions=Regions(appearance=HALVES, structure=HALVES))
    )
    right = HALVES.flatten().bool()
    changed = hidden.clone()
    changed[1, right] = changed[1, right].flip(0) * 1.5
    before, after = attn(hidden)[0], attn(changed)[0]
    torch.testing.assert_close(
        after[~right], before[~right], rtol=0, atol=2e-6
    )  # unique keys are summed in another order
    assert not torch.allclose(before[right], after[right], atol=1e-3)


def test_a_label_that_the_reference_lacks_sees_everything():
    regions = Regions(
        appearance=torch.zeros(4, 4, dtype=torch.long), structure=torch.tensor([[0, 0, 3, 3]] * 4)
    )
    assert regions.query_labels("appearance", 16, 16, CPU).view(4, 4)[0].tolist() == [
        1,
        1,
        EVERYTHING,
        EVERYTHING,
    ]
    assert regions.query_labels("structure", 16, 16, CPU).view(4, 4)[0].tolist() == [1, 1, 8, 8]


def test_the_background_sees_and_is_seen():
    regions = Regions(structure=torch.tensor([[0, 1], [2, 30]]), background=0)
    assert regions.picture_labels("structure", 4, CPU).tolist() == [[EVERYTHING, 2, 4, 1 << 30]]


def test_labels_are_taken_at_each_tokens_middle():
    labels = torch.arange(8).repeat_interleave(2).repeat(16, 1)
    regions = Regions(structure=labels)
    assert regions.picture_labels("structure", 64, CPU).view(8, 8)[0].tolist() == [1 << n for n in range(8)]
    assert regions.picture_labels("structure", 16, CPU).view(4, 4)[3].tolist() == [
        1 << n for n in (1, 3, 5, 7)
    ]


@torch.no_grad()
def test_regions_reach_every_layer_of_a_unet():
    unet = make_unet("small")
    inputs = unet_inputs(unet)
    one = torch.zeros(16, 16, dtype=torch.long)
    two = one.clone()
    two[:, 8:] = 1
    outputs = {}
    for name, regions in {
        "none": None,
        "one": Regions(appearance=one, structure=one),
        "two": Regions(appearance=two, structure=two),
    }.items():
        with attach(unet, QAlign(), regions=regions):
            outputs[name] = unet(**inputs).sample
    torch.testing.assert_close(outputs["one"], outputs["none"], rtol=0, atol=1e-5)
    assert not torch.allclose(outputs["two"][0], outputs["none"][0], atol=1e-3)
    assert torch.equal(outputs["two"][1:], outputs["none"][1:])


def test_from_pictures(tmp_path):
    Image.fromarray(HALVES.byte().numpy(), mode="L").save(tmp_path / "labels.png")
    regions = Regions.open(tmp_path / "labels.png", tmp_path / "labels.png")
    assert torch.equal(regions.appearance, HALVES) and torch.equal(regions.structure, HALVES)
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(
        ValueError,
        match=r"colours.png: expected a label map, one channel or a palette .*, got a picture of mode RGB",
    ):
        Regions.open(tmp_path / "colours.png", tmp_path / "labels.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Regions(),
            "regions: expected labels of the appearance, of the structure or of both, got none",
        ),
        (
            lambda: Regions(appearance=torch.zeros(4, 4)),
            r"appearance: expected whole numbers \[h, w\], got torch.float32 \[4, 4\]",
        ),
        (
            lambda: Regions(structure=torch.tensor([[31]])),
            "structure: expected labels of 0 to 30, got 31 to 31",
        ),
        (
            lambda: Regions(structure=torch.tensor([[-1]])),
            "structure: expected labels of 0 to 30, got -1 to -1",
        ),
        (
            lambda: Regions(structure=HALVES).query_labels("appearance", 96, 96, CPU),
            "regions: expected labels of the appearance, which .* got None",
        ),
        (
            lambda: Regions(structure=HALVES).picture_labels("structure", 95, CPU),
            "tokens: expected a grid of 8 x 12 halved some times, got 95",
        ),
    ],
)
def test_refusals_name_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounded_attention_needs_regions():
    attn, hidden = make_attention(2, 40)
    attn.set_processor(UNetAttnProcessor(BoundedAttention(), BatchLayout("output")))
    with pytest.raises(
        ValueError, match=r"regions: expected Regions\(structure=...\) for BoundedAttention, got None"
    ):
        attn(hidden)


def test_regions_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="regions: expected Regions"):
        attach(make_unet("small"), QAlign(), regions=HALVES)


def test_a_window_has_the_labels_of_its_place():
    labels = torch.arange(24).view(4, 6)
    for scale in (1, 4):
        whole = labels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        cut = Regions(appearance=labels, structure=whole, background=2).window(
            slice(1, 3), slice(2, 6), (4, 6)
        )
        assert (
            cut.structure.shape == (2 * scale, 4 * scale)
            and cut.background == 2
            and torch.equal(cut.appearance, labels)
        )
        assert torch.equal(cut.structure[::scale, ::scale], labels[1:3, 2:6])
    with pytest.raises(
        ValueError,
        match="^regions: expected a label map of the structure of 4 x 4 latents, .*, got 4 x 6$",
    ):
        Regions(structure=labels).window(slice(0, 2), slice(0, 2), (4, 4))


@torch.no_grad()
@pytest.mark.parametrize(
    "regions",
    [
        Regions(appearance=HALVES, structure=HALVES),  # 0 is outside
        Regions(appearance=1 - HALVES, structure=1 - HALVES, background=1),
        Regions(appearance=torch.full(GRID, 2), structure=1 + HALVES),  # the appearance has no 1
    ],
    ids=["zero", "background", "missing"],
)
def test_eye_for_an_eye_keeps_features_outside(regions):
    _, hidden = make_attention(2, 40)
    found = EyeForAnEye().prepare(hidden, None, Site(LAYOUT, regions=regions))
    kept = ~HALVES.flatten().bool()
    assert torch.equal(found[0, kept], hidden[0, kept]) and torch.equal(
        found[[1, 2, 4, 5]], hidden[[1, 2, 4, 5]]
    )
    assert (found[0, ~kept] != hidden[0, ~kept]).any(-1).all()
    same = (found[0, ~kept, None] == hidden[1]).all(-1)  # [tokens, tokens of the appearance]
    outside = regions.appearance.flatten() == (regions.background or 0)
    assert same.any(1).all() and not same[:, outside].any()


def test_published_masks_take_the_upper_left_label():
    """MasaCtrl, FreeCustom and attention distillation resize by torch's default."""
    labels = torch.arange(4).repeat(4, 1)
    regions = Regions(appearance=labels, structure=labels)
    for resize, columns in (("nearest", [0, 2]), ("nearest-exact", [1, 3])):
        expected = [[1 << label for label in columns] * 2]
        assert regions.picture_labels("structure", 4, CPU, resize=resize).tolist() == expected
        assert regions.query_labels("appearance", 4, 4, CPU, resize=resize).tolist() == expected
        shown = [[0 if label == 0 else EVERYTHING for label in columns] * 2]
        assert regions.subject_labels("appearance", 0, 1, 4, CPU, resize=resize).tolist() == shown


def png(width, height, data):
    """A PNG of grey bytes, whatever its header says."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no such file"),
        ("folder", "found a folder"),
        (b"words", ".* got something that cannot be read as one"),
        (png(8, 8, bytes(72))[:45], ".* got something that cannot be read as one"),
        (png(20000, 20000, bytes(9)), ".* got a picture of more than [0-9]+ pixels"),
        (png(12000, 12000, bytes(9)), ".* got a picture of more than [0-9]+ pixels"),  # Pillow warns only
        (png(2**31 - 1, 2**31 - 1, bytes(9)), ".* got a picture of more than [0-9]+ pixels"),
    ],
    ids=["missing", "folder", "text", "cut", "bomb", "warning", "largest"],
)
def test_unreadable_label_maps_are_one_line(tmp_path, content, message, recwarn):
    path = tmp_path / "labels.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: expected a label map, {message}$") as error:
        read_labels(path)
    assert "\n" not in str(error.value) and not recwarn.list


def test_a_small_label_map_is_read(tmp_path):
    (tmp_path / "labels.png").write_bytes(png(4, 2, bytes([0, 0, 1, 2, 3, 0, 4, 5, 6, 7])))
    assert read_labels(tmp_path / "labels.png").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_labels_are_those_of_the_moment():
    """Bit sets are kept, so a later change of the array would reach some layers and not others."""
    labels = torch.zeros(4, 4, dtype=torch.long)
    for given in (labels, labels.numpy()):
        regions = Regions(structure=given)
        before = regions.picture_labels("structure", 4, CPU).clone()
        given[:] = 1
        assert torch.equal(regions.picture_labels("structure", 4, CPU), before)
        assert regions.picture_labels("structure", 16, CPU).unique().tolist() == [1]
        given[:] = 0
