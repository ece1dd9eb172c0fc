"""Cross-Image attention as ALGORITHMS.md §2 writes it: maps in memory, three rows, two UNet calls a step.

Slow and plain on purpose, in any floating dtype, without `qalign`. `AppearanceTransferPipeline` is
compared with it. Rows are [OUT, STYLE, STRUCT].
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

OUT, STYLE, STRUCT = 0, 1, 2


@dataclass
class Numbers:
    """The published settings. Windows are (first, end), in the processors' `step` or in the loop's i."""

    edit: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {32**2: (10, 70), 64**2: (10, 90)}
    )  # tokens: window of `step`
    structure_every: int = 5
    structure_end: int = 40
    contrast: float = 1.67
    guidance: tuple[int, int] = (10, 91)
    swap_scale: float = 3.5
    adain: tuple[int, int] = (20, 100)
    mask_step: int = 19
    masked: bool = True
    rearranged: bool = False  # Q-Align §1.2 in place of the bare swap: cosine, joint over heads, hard, R1


@dataclass
class Run:
    """The state that the processors share, and a record of their calls."""

    numbers: Numbers
    step: int = 0
    perform_swap: bool = False
    enable_edit: bool = False
    maps: dict[tuple[bool, int], Tensor] = field(
        default_factory=dict
    )  # (is self-attention, queries): head mean [3, N_q, N_k], last writer wins
    edits: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # (step, tokens, row that gave keys and values)
    scales: list[float] = field(default_factory=list)  # of the swap guidance, 1 where there is none
    blended: list[int] = field(default_factory=list)  # i of every AdaIN
    masks: dict[int, Tensor] = field(default_factory=dict)  # row: bool [h, w]
    margin: float = float("inf")  # smallest lead of a best match over the second best


class Processor:
    """Attention of one layer with its map in memory."""

    def __init__(self, run: Run, place: str) -> None:
        self.run, self.place = run, place

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        run, is_self = self.run, encoder_hidden_states is None
        context = hidden_states if is_self else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        first, end = run.numbers.edit.get(q.shape[1], (0, 0))
        edit = (
            run.perform_swap
            and run.enable_edit
            and is_self
            and self.place == "up"
            and first <= run.step < end
        )
        if edit:
            k, v = self._swap(q, k, v)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        if edit:
            mean = p[OUT].mean(-1, keepdim=True)
            p[OUT] = ((p[OUT] - mean) * run.numbers.contrast + mean).clip(0, 1)
        if run.enable_edit and run.step == run.numbers.mask_step:
            run.maps[is_self, q.shape[2]] = p.mean(1)
        return attn.to_out[1](attn.to_out[0]((p @ v).transpose(1, 2).flatten(2)))

    def _swap(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [3, N, C] before the split into heads, those of OUT replaced."""
        step, numbers = self.run.step, self.run.numbers
        row = STRUCT if step % numbers.structure_every == 0 and step < numbers.structure_end else STYLE
        self.run.edits.append((step, q.shape[1], row))
        k, v = k.clone(), v.clone()
        k[OUT], v[OUT] = k[row], v[row]
        if numbers.rearranged:
            unit = q / q.norm(dim=-1, keepdim=True)
            similarity = unit[OUT] @ unit[row].T
            best, second = similarity.topk(2).values.unbind(-1)
            self.run.margin = min(self.run.margin, float((best - second).min()))
            match = similarity.argmax(-1)
            k[OUT], v[OUT] = k[row][match], v[row][match]
        return k, v


@contextlib.contextmanager
def processors(unet: UNet2DConditionModel, run: Run) -> Iterator[None]:
    """The literal processors on every attention layer of `unet`."""
    before = dict(unet.attn_processors)
    try:
        unet.set_attn_processor({name: Processor(run, name.split("_")[0]) for name in before})
        yield
    finally:
        unet.set_attn_processor(before)


def noise_prediction(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, x: Tensor, t: int, prompt: Tensor
) -> Tensor:
    """ε̂ of one call; every row has the same prompt [1, tokens, C]."""
    output = unet(x, t, encoder_hidden_states=prompt.expand(len(x), -1, -1)).sample
    bar = scheduler.alphas_cumprod[t].to(x)
    return {"epsilon": output, "v_prediction": bar.sqrt() * output + (1 - bar).sqrt() * x}[
        scheduler.config.prediction_type
    ]


def mean_and_deviation(
    scheduler: DDIMScheduler, noise: Tensor, t: int, x: Tensor, steps: int, eta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """μ and ησ_t of §2.1 for a schedule of `steps` steps."""
    before = t - scheduler.config.num_train_timesteps // steps
    bar = scheduler.alphas_cumprod[t].to(x)
    bar_before = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).to(x)
    clean = (x - (1 - bar).sqrt() * noise) / bar.sqrt()
    variance = (1 - bar_before) / (1 - bar) * (1 - bar / bar_before)
    return bar_before.sqrt() * clean + (1 - bar_before - eta * variance).sqrt() * noise, eta * variance.sqrt()


def noised(scheduler: DDIMScheduler, clean: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """[steps + 1, B, C, h, w], noisiest first: new noise for every timestep, the clean latents last."""
    scheduler.set_timesteps(steps)
    bars = [scheduler.alphas_cumprod[t].to(clean) for t in scheduler.timesteps]
    draws = [torch.randn(clean.shape, generator=generator, dtype=clean.dtype) for _ in bars]
    return torch.stack(
        [bar.sqrt() * clean + (1 - bar).sqrt() * draw for bar, draw in zip(bars, draws)] + [clean]
    )


def invert(
    unet, scheduler: DDIMScheduler, latents: Tensor, prompt: Tensor, empty: Tensor, *, guidance: float = 3.5
) -> Tensor:
    """§2.1: z [T, B, C, h, w] for noised latents [T + 1, B, C, h, w]; the last is zero.

    t ascends, and each x_{t-1} is corrected for drift.
    """
    latents, steps = latents.clone(), len(latents) - 1
    scheduler.set_timesteps(steps)
    z = torch.zeros_like(latents[:-1])
    for index in reversed(range(steps)):
        t, x = int(scheduler.timesteps[index]), latents[index]
        unconditional, conditional = (
            noise_prediction(unet, scheduler, x, t, text) for text in (empty, prompt)
        )
        mean, deviation = mean_and_deviation(
            scheduler, unconditional + guidance * (conditional - unconditional), t, x, steps
        )
        if index < steps - 1:
            z[index] = (latents[index + 1] - mean) / deviation
            latents[index + 1] = mean + deviation * z[index]
    return z


def generate(
    unet,
    scheduler: DDIMScheduler,
    latents: Tensor,
    z: Tensor,
    prompt: Tensor,
    numbers: Numbers,
    *,
    skip: int = 32,
    make_mask: Callable | None = None,
) -> tuple[list[Tensor], Run]:
    """§2.2 to §2.5 from inverted [appearance, structure].

    Returns the latents [3, C, h, w] after each step and its callback, and the record. `make_mask` takes
    (maps, row) and returns bool [h, w] for one row; masked AdaIN needs it.
    """
    steps, (app, struct) = len(z), (0, 1)
    scheduler.set_timesteps(steps)
    x, z = latents[skip][[struct, app, struct]], z[skip:, [struct, app, struct]]
    gammas = torch.linspace(numbers.swap_scale, max(numbers.swap_scale / 2, 1), steps - skip)
    run, trajectory = Run(numbers, enable_edit=True), []
    with processors(unet, run):
        for i, t in enumerate(scheduler.timesteps[skip:].tolist()):
            run.perform_swap = True
            noise = noise_prediction(unet, scheduler, x, t, prompt)
            run.perform_swap = False
            without = noise_prediction(unet, scheduler, x, t, prompt)
            guided = numbers.guidance[0] <= i < numbers.guidance[1] and numbers.swap_scale > 1
            run.scales.append(float(gammas[i]) if guided else 1.0)
            if guided:
                noise = without + gammas[i].to(x) * (noise - without)
            mean, deviation = mean_and_deviation(scheduler, noise, t, x, steps)
            x = mean + deviation * z[i]
            run.step = i  # from here on this is the step-end callback
            if run.maps and not run.masks and make_mask is not None:
                run.masks = {row: make_mask(run.maps, row) for row in (STYLE, STRUCT)}
            if numbers.adain[0] <= i < numbers.adain[1]:
                run.blended.append(i)
                x[OUT] = (
                    adain(x[OUT], x[STYLE], run.masks[STRUCT], run.masks[STYLE])
                    if numbers.masked
                    else adain(x[OUT], x[STYLE])
                )
            trajectory.append(x.clone())
    return trajectory, run


def adain(
    content: Tensor, style: Tensor, content_mask: Tensor | None = None, style_mask: Tensor | None = None
) -> Tensor:
    """§2.4 for [C, h, w] and masks bool [h, w]: unbiased variance, 1e-5 added to it."""
    result = content.clone()
    for channel in range(len(content)):
        inside = content[channel] if content_mask is None else content[channel][content_mask]
        model = style[channel] if style_mask is None else style[channel][style_mask]
        n, m = inside.numel(), model.numel()
        deviation = (((inside - inside.sum() / n) ** 2).sum() / (n - 1) + 1e-5).sqrt()
        wanted = (((model - model.sum() / m) ** 2).sum() / (m - 1) + 1e-5).sqrt()
        normalised = (content[channel] - inside.sum() / n) / deviation * wanted + model.sum() / m
        result[channel] = (
            normalised if content_mask is None else torch.where(content_mask, normalised, content[channel])
        )
    return result


def object_mask(
    self_map: Tensor, cross_map: Tensor, noun: int, grid: tuple[int, int], cluster: Callable[[Tensor], Tensor]
) -> Tensor:
    """§2.5 for one row and one noun: bool [h, w] from [N, N], [N/4, text tokens] and the noun's column.

    Where no cluster is chosen, which the text leaves open, the object is everywhere.
    """
    height, width = grid
    labels = cluster(self_map).view(height, width)
    score_map = (
        cross_map[:, noun].view(height // 2, width // 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    score_map = (score_map - score_map.min().abs()) / score_map.max()
    scores = {int(label): float(score_map[labels == label].mean()) for label in labels.unique()}
    others = sorted(scores.values())[:-1]
    chosen = [label for label, score in scores.items() if score > 1.4 * sum(others) / len(others)]
    return torch.isin(labels, torch.tensor(chosen or list(scores), dtype=labels.dtype))


@contextlib.contextmanager
def freeu(unet: UNet2DConditionModel, wide: int, narrow: int) -> Iterator[None]:
    """§2.6 on every up block, where SD 1.5 has 1280 (`wide`) and 640 (`narrow`) channels."""

    def before(block, args, kwargs):
        x = kwargs["hidden_states"].clone()
        for channels, gain, low in ((wide, 1.2, 0.9), (narrow, 1.4, 0.2)):
            if x.shape[1] == channels:
                x[:, : channels // 2] *= gain
                kwargs = {**kwargs, "hidden_states": scale_low_frequencies(x, low)}
        return args, kwargs

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scale_low_frequencies(x: Tensor, scale: float, threshold: int = 1) -> Tensor:
    """Scale the square of ±threshold frequencies around the centre of the shifted spectrum."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    rows, columns = (slice(size // 2 - threshold, size // 2 + threshold) for size in (height, width))
    spectrum[..., rows, columns] *= scale
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
