"""Pictures: what is drawn is what was given."""

import numpy
import pytest
import torch
from matplotlib import colors
from PIL import Image

from qalign.evaluation import images, match_plots, plots
from qalign.evaluation.match_plots import MatchPanel


def _picture(seed, height=24, width=32):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def _frames(figure):
    return [axes for axes in figure.axes if axes.images]


def _shown(axes):
    return torch.tensor(numpy.asarray(axes.images[0].get_array()))


def test_label_picture_keeps_labels_and_colours_each(tmp_path):
    labels = torch.arange(20).repeat(2, 1)
    images.label_picture(labels).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as read:
        assert read.mode == "P"
        assert torch.equal(torch.tensor(numpy.asarray(read)), labels.byte())
        assert len(set(read.convert("RGB").crop((0, 0, 20, 1)).get_flattened_data())) == 20


def test_to_image_rounds_to_the_nearest_byte():
    levels = torch.arange(256).expand(3, 1, 256)
    assert torch.equal(
        torch.tensor(numpy.asarray(images.to_image(levels / 255))), levels.permute(1, 2, 0).byte()
    )
    assert images.to_image(torch.full((3, 1, 1), 0.5)).getpixel((0, 0)) == (128, 128, 128)


def test_transfer_grid_shows_every_picture_in_its_place():
    rows = [
        {"structure": _picture(0), "Q-Align": images.to_image(_picture(1))},
        {"structure": _picture(2), "Q-Align": _picture(3)},
    ]
    frames = _frames(plots.transfer_grid(rows, title="t"))
    assert [axes.get_title() for axes in frames] == ["structure", "Q-Align", "", ""]
    for seed, axes in enumerate(frames):
        torch.testing.assert_close(_shown(axes), _picture(seed).permute(1, 2, 0), atol=0.5 / 255, rtol=0)


@pytest.mark.parametrize("rows", [[], [{"a": _picture(0)}, {"b": _picture(0)}]])
def test_transfer_grid_refuses_rows_that_do_not_match(rows):
    with pytest.raises(ValueError, match="rows: expected"):
        plots.transfer_grid(rows)


def test_contact_sheet_names_exactly_the_occurring_labels():
    labels = [torch.full((32, 32), 2), torch.full((32, 32), 0)]
    figure = plots.contact_sheet(
        [_picture(0, 32), _picture(1, 32)], labels, ["one", "two"], names=("sky", "ground", "water")
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "water"]
    assert [axes.get_title() for axes in _frames(figure)] == ["one", "two"]
    below = _shown(_frames(figure)[0])[-1]
    assert torch.equal(
        (255 * below).round().byte(), torch.tensor(images.PALETTE[2], dtype=torch.uint8).expand(32, 3)
    )


def test_correspondence_lines_end_at_matches_coloured_by_verdict():
    source, target = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]),
    )
    panels = [
        MatchPanel("judged", source, target, torch.tensor([True, False, True])),
        MatchPanel("not", source, target),
    ]
    judged, free = match_plots.correspondence(_picture(0), _picture(1), panels, title="t").axes
    offset = 32 + 32 // 16
    for axes in (judged, free):
        ends = torch.tensor(numpy.stack([line.get_xydata() for line in axes.lines]))
        torch.testing.assert_close(
            ends, torch.stack([source, target + torch.tensor([offset, 0])], 1).double()
        )
    assert [line.get_color() for line in judged.lines] == [plots.RIGHT, plots.WRONG, plots.RIGHT]
    assert len({colors.to_hex(line.get_color()) for line in free.lines} - {plots.RIGHT, plots.WRONG}) == 3


def test_correspondence_curves_are_shares_within_a_distance():
    panels = [MatchPanel("m", torch.zeros(1, 2), torch.zeros(1, 2))]
    errors = torch.tensor([3.0, 1.0, 2.0, 2.0])
    axes = match_plots.correspondence(
        _picture(0),
        _picture(1),
        panels,
        title="t",
        curves={"method": errors, "chance": errors},
        tolerance=1.5,
    ).axes[-1]
    method, chance, tolerance = axes.lines
    assert method.get_xydata().tolist() == [[1, 0.25], [2, 0.5], [2, 0.75], [3, 1]]
    assert chance.get_linestyle() == "--"
    assert list(tolerance.get_xdata()) == [1.5, 1.5]


def test_point_heat_maps_are_hot_at_the_maximum():
    heat = torch.zeros(1, 6, 8)
    heat[0, 4, 5] = 0.7
    figure = match_plots.point_heat_maps(
        _picture(0),
        _picture(1),
        torch.tensor([[20.0, 10.0]]),
        {"map": heat},
        title="t",
        captions={"map": ["limb: 70%"]},
    )
    structure, mapped = _frames(figure)
    assert [line.get_xydata().tolist() for line in structure.lines] == [[[20, 10]]] * 2
    assert mapped.lines[0].get_xydata().tolist() == [[5.5 * 4 - 0.5, 4.5 * 4 - 0.5]]
    assert [text.get_text() for text in mapped.texts] == ["limb: 70%"]
    saturation = _shown(mapped).amax(-1) - _shown(mapped).amin(-1)
    assert saturation[:8].max() < 1e-6  # far from it the appearance is grey
    assert saturation[16:20, 20:24].min() > 0.1


def test_leakage_plot_draws_each_method_and_layer():
    curves = {
        "Cross-Image": {"up.0": [(0, 0.9), (3, 0.8)], "up.1": [(0, 0.7), (3, 0.6)]},
        "Q-Align": {"up.0": [(0, 0.5), (3, 0.4)]},
    }
    figure = plots.leakage_by_layer_and_step(curves, title="t", ylabel="mass", threshold=0.55)
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("up.0", "up.1")
    assert [line.get_xydata().tolist() for line in first.lines[:2]] == [
        [[0, 0.9], [3, 0.8]],
        [[0, 0.5], [3, 0.4]],
    ]
    assert second.lines[0].get_xydata().tolist() == [[0, 0.7], [3, 0.6]]
    assert numpy.isnan(second.lines[1].get_xydata()).all()
    assert list(first.lines[2].get_ydata()) == [0.55, 0.55]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Cross-Image", "Q-Align"]


def test_figures_leave_no_global_state(tmp_path):
    from matplotlib import pyplot

    plots.transfer_grid([{"a": _picture(0)}]).savefig(tmp_path / "grid.png")
    assert pyplot.get_fignums() == []
