"""Flow matching: text encoders and transformer together, and how a model learns guidance as an input.

A transformer that takes the guidance scale as an input is trained in two parts. First, every scale is 1, at which the
target is the plain velocity. In the last quarter, half of each batch has a scale between 1 and 4. Its target is what
the training's average (EMA) gives at scale 1 with guidance: the velocity without caption, plus the scale times the
difference that the caption makes. FLUX.1 dev, too, learned its input from a model that is evaluated twice.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from edgeprune.common.errors import InputError
from edgeprune.demo.train.loop import CHECKPOINT_STEPS, ProgressLine, descend, falling
from edgeprune.demo.train.networks import Networks
from edgeprune.families import family_of_model
from edgeprune.shapes import TEMPLATES
from edgeprune.training.resume import Ema, fill, load_state, save_state, step_generator

_CHECKPOINT = "transformer.safetensors"
_DROPPED_CAPTIONS = 0.1
# The layout is decided at high noise. Of a logit-normal with mean 0.3, 3 % lies above 0.9; with this mean, 12 %.
_SIGMA_MEAN = 1.0
# Where a pipeline may append zero tokens, some late steps train with them; the others leave them out, which is four
# times as fast.
_LATE, _ZERO_TOKEN_STEPS = 0.8, 0.05
_GUIDED_AFTER, _MOST_GUIDANCE = 0.75, 4.0


@dataclass(frozen=True)
class Captions:
    """Token ids of the training captions in every template."""

    table: torch.Tensor
    """(templates, different captions, tokenizers, M)."""
    rows: torch.Tensor
    """Each scene's index in the table, (count,)."""
    empty: torch.Tensor
    """Ids of the empty prompt, (tokenizers, M)."""

    @classmethod
    def of(cls, captions: list[str], networks: Networks) -> Captions:
        """Tokenize the captions of all scenes."""
        unique = sorted(set(captions))
        row = {caption: i for i, caption in enumerate(unique)}
        return cls(
            table=torch.stack([networks.ids([t.format(c) for c in unique]) for t in TEMPLATES]),
            rows=torch.tensor([row[c] for c in captions]),
            empty=networks.ids([""])[0],
        )

    def draw(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return token ids of these scenes in random templates; a tenth of them get the empty prompt."""
        batch = len(picked)
        template = torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), batch, replacement=True, generator=generator)
        dropped = torch.rand(batch, 1, 1, generator=generator) < _DROPPED_CAPTIONS
        return torch.where(dropped, self.empty, self.table[template, self.rows[picked]])


def train_transformer(
    folder: Path,
    networks: Networks,
    latents: torch.Tensor,
    captions: list[str],
    *,
    steps: int,
    seed: int,
    batch: int,
    peak: float,
    compiled: bool = False,
) -> None:
    """Train the networks: velocity target, sigma logit-normal; AdamW, EMA 0.999. They end as their average.

    Args:
        folder: for checkpoints, from which an interrupted training resumes.
        networks: to train.
        latents: of the training scenes, (count, C, h, w), with their `captions`.
        steps: in total.
        seed: of everything random.
        batch: scenes in a step.
        peak: highest learning rate.
        compiled: compile the transformer.
    """
    nets = networks.modules.train()
    optimizer = torch.optim.AdamW(nets.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    ema = Ema(dict(nets.named_parameters()), 0.999)
    texts = Captions.of(captions, networks)
    checkpoint, step = folder / _CHECKPOINT, 0
    if checkpoint.exists():
        modules, meta = load_state(checkpoint, optimizer)
        nets.load_state_dict(modules["nets"])
        fill(ema.average, modules["ema"])
        step = meta["step"]
    plain: Any = nets["transformer"]
    usual = torch.compile(plain) if compiled else plain
    guides = bool(plain.config.get("guidance_embeds"))
    average = _sharing(nets, ema.average) if guides else nets
    progress = ProgressLine("transformer", step, steps)
    while step < steps:
        g = step_generator(seed, step)
        picked = torch.randint(len(latents), (batch,), generator=g)
        ids = texts.draw(picked, g)
        clean = latents[picked].float()
        noise = torch.randn(clean.shape, generator=g)
        sigma = torch.sigmoid(torch.randn(batch, generator=g) + _SIGMA_MEAN)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        target, scale = noise - clean, torch.ones(batch)
        if guides and step >= _GUIDED_AFTER * steps:
            half = batch // 2
            scale[:half] += (_MOST_GUIDANCE - 1) * torch.rand(half, generator=g)
            target[:half] = _guided(
                networks, average, mixed[:half], ids[:half], texts.empty, sigma[:half], scale[:half]
            )
        hidden, pooled = networks.encode(nets, ids)
        transformer = usual
        if networks.zero_tokens and step > _LATE * steps and torch.rand((), generator=g) < _ZERO_TOKEN_STEPS:
            hidden = F.pad(hidden, (0, 0, 0, networks.zero_tokens))
            transformer = plain  # compiled only for one length
        loss = F.mse_loss(velocity(transformer, nets, mixed, hidden, pooled, sigma, scale), target)
        descend(loss, nets, optimizer, rate=falling(step, steps, peak))
        ema.update(step)
        step += 1
        progress(step, loss.item())
        if step % CHECKPOINT_STEPS == 0 or step == steps:
            save_state(checkpoint, {"nets": nets.state_dict(), "ema": ema.average}, optimizer, {"step": step})
    nets.load_state_dict(nets.state_dict() | ema.average)
    nets.eval()


def load_average(folder: Path, networks: Networks) -> None:
    """Load the average of an unfinished training's last checkpoint.

    Raises:
        InputError: there is no checkpoint.
    """
    path = folder / _CHECKPOINT
    if not path.exists():
        raise InputError(f"{path}: no checkpoint yet; the first is written after {CHECKPOINT_STEPS} steps")
    average = {name[4:]: tensor for name, tensor in load_file(path).items() if name.startswith("ema/")}
    networks.modules.load_state_dict(networks.modules.state_dict() | average)
    networks.modules.eval()


def velocity(
    transformer: Any,
    modules: Any,
    mixed: torch.Tensor,
    hidden: torch.Tensor,
    pooled: torch.Tensor,
    sigma: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Return the velocity of noisy latents, (B, C, h, w).

    Args:
        transformer: of `modules`, maybe compiled.
        modules: the networks.
        mixed: noisy latents, (B, C, h, w).
        hidden: of the text, (B, M, K).
        pooled: of the text, (B, P).
        sigma: noise levels, (B,).
        scale: guidance scales, (B,), which a transformer without this input ignores.
    """
    config = modules["transformer"].config
    family = family_of_model(modules["transformer"])
    inputs = family.inputs(config, mixed, hidden, pooled, sigma, 1.0)
    inputs = {name: torch.tensor(value) if not torch.is_tensor(value) else value for name, value in inputs.items()}
    if "guidance" in inputs:
        inputs["guidance"] = scale
    found: torch.Tensor = family.velocity(config, family.call(transformer, inputs), tuple(mixed.shape))
    return found


def _sharing(nets: torch.nn.ModuleDict, average: dict[str, torch.Tensor]) -> torch.nn.ModuleDict:
    """Return a copy of the networks whose parameters are the tensors of `average`, which stays up to date."""
    twin = copy.deepcopy(nets).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        parameter.data = average[name]
    return twin


@torch.no_grad()
def _guided(
    networks: Networks,
    average: torch.nn.ModuleDict,
    mixed: torch.Tensor,
    ids: torch.Tensor,
    empty: torch.Tensor,
    sigma: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Return the average's velocity with guidance of these scales, (B, C, h, w)."""
    hidden, pooled = networks.encode(average, torch.cat([empty.expand_as(ids), ids]))
    one = torch.ones(2 * len(scale))
    both = velocity(average["transformer"], average, mixed.repeat(2, 1, 1, 1), hidden, pooled, sigma.repeat(2), one)
    without, with_text = both.chunk(2)
    return torch.lerp(without, with_text, scale.view(-1, 1, 1, 1))
