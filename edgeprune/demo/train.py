"""Trains the built-in teacher from scratch: the VAE, then text encoders and MMDiT together.

    python -m edgeprune.demo.train --work DIR [--out DIR]

Three stages, each kept in DIR and skipped when done: `vae`, `latents` (rendered scenes, encoded once), `transformer`.
An interrupted run resumes from its last checkpoint (every 250 steps). The learning rate is constant, then falls to zero
over the second half, so you may change `--steps` when you resume before the fall. It trains on one laptop CPU, not on
several devices.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from edgeprune import shapes
from edgeprune.training.resume import Ema, fill, load_state, save_state, step_generator

TOKENS = 16
WIDTH, BLOCKS, HEADS, TEXT_WIDTH = 128, 14, 4, 64
DROPPED_CAPTIONS = 0.1
# The layout is decided at high noise. Of a logit-normal with mean 0.3, 3 % lies above 0.9; with this mean, 12 %.
SIGMA_MEAN = 1.0
# Stock diffusers appends 256 zero tokens where T5 is absent. Some late steps train with them, so that the pipeline's
# defaults work; the other steps leave them out, which is four times as fast.
ZERO_TOKENS, ZERO_TOKEN_STEPS = 256, 0.05
GENERATION = {"num_inference_steps": 20, "guidance_scale": 2.0, "height": 64, "width": 64, "max_sequence_length": 0}


class ProgressLine:
    """Prints a line every `every` steps: step, mean loss, speed, time left."""

    def __init__(self, name: str, start: int, total: int, every: int = 50) -> None:
        self.name, self.start, self.total, self.every, self.began = name, start, total, every, time.monotonic()
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        """Note a step's loss, and print a line when it is due."""
        self.losses.append(loss)
        if step % self.every == 0 or step == self.total:
            speed = (time.monotonic() - self.began) / (step - self.start)
            left = speed * (self.total - step)
            mean = sum(self.losses) / len(self.losses)
            print(
                f"{self.name} {step}/{self.total} loss {mean:.4f} {speed:.3f} s/step {left / 60:.1f} min left",
                flush=True,
            )
            self.losses.clear()


def falling(step: int, total: int, peak: float, *, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, constant, then linear to zero over the second half."""
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (total - step) / (0.5 * total)))


def descend(loss: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, rate: float) -> None:
    """Take one optimizer step at this learning rate, with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


# ------------------------------------------------------------------------------------------- data


def scenes(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Return scenes without held-out meanings, uint8 (count, 3, 64, 64), and their plain captions."""
    images, captions = shapes.training_scenes(count, seed, shapes.SEEN)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float in -1..1."""
    return images.float() / 127.5 - 1


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the folder's CLIP tokenizer; make it if needed, with one token for every word of the caption grammar."""
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    captions = [t.format(p.text) for p in shapes.prompts() for t in shapes.TEMPLATES]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
    raw = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(characters),
        show_progress=False,
    )
    raw.train_from_iterator(captions, trainer)
    model = json.loads(raw.to_str())["model"]
    # Sort the words: the trainer numbers characters differently from run to run. Byte-level CLIP needs each character
    # alone and at a word's end.
    words = sorted(model["vocab"])
    words += [f"{c}</w>" for c in characters if f"{c}</w>" not in model["vocab"]]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


# -------------------------------------------------------------------------------------------- vae


def make_vae() -> AutoencoderKL:
    """Return a VAE with factor 8, 8 latent channels and 0.6 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=shapes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(work: Path, *, steps: int, seed: int, count: int) -> AutoencoderKL:
    """Train the VAE unless that is done: L1 + L2 (ink counts five times) + 1e-5 KL; AdamW 2e-3, batch 16.

    The mean and the standard deviation of the latents go into the config.
    """
    torch.manual_seed(seed)
    vae = make_vae()
    if (work / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(work / "vae")
    images, _ = scenes(count, seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint, step = work / "vae.safetensors", 0
    if checkpoint.exists():
        modules, meta = load_state(checkpoint, optimizer)
        vae.load_state_dict(modules["vae"])
        step = meta["step"]
    background = to_unit(torch.tensor(shapes.BACKGROUND)).view(1, 3, 1, 1)
    progress = ProgressLine("vae", step, steps)
    while step < steps:
        generator = step_generator(seed, step)
        x = to_unit(images[torch.randint(len(images), (16,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        recon = vae.decode(posterior.mean + posterior.std * noise).sample
        # Ink is a tenth of the pixels, and small shapes must keep their colour.
        weight = 1 + 4 * ((x - background).abs().amax(1, keepdim=True) > 0.1).float()
        error = recon - x
        loss = (weight * (error.abs() + error.square())).mean() + 1e-5 * posterior.kl().mean()
        descend(loss, vae, optimizer, rate=falling(step, steps, 2e-3))
        step += 1
        progress(step, loss.item())
        if step % 250 == 0 or step == steps:
            save_state(checkpoint, {"vae": vae.state_dict()}, optimizer, {"step": step})
    with torch.no_grad():
        means = torch.cat([vae.encode(to_unit(b)).latent_dist.mean for b in images[:1024].split(64)])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
    vae.save_pretrained(work / "vae.tmp")
    (work / "vae.tmp").rename(work / "vae")
    return vae


def make_latents(work: Path, vae: AutoencoderKL, *, seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """Return normalised latents of `count` training scenes, (count, 8, 8, 8), and their captions; computed once."""
    path, captions_path = work / "latents.safetensors", work / "captions.json"
    if not path.exists():
        images, captions = scenes(count, seed + 2)
        vae.eval()
        with torch.no_grad():
            parts = [vae.encode(to_unit(b)).latent_dist.mean for b in images.split(64)]
        latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
        captions_path.write_text(json.dumps(captions))
        save_file({"latents": latents.contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"], json.loads(captions_path.read_text())


# -------------------------------------------------------------------------------------- transformer


def make_text_encoder(vocab: int, end: int) -> CLIPTextModelWithProjection:
    """Return an encoder of three layers; diffusers reads its second last hidden state and its pooled output."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=TOKENS,
            bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def make_transformer() -> SD3Transformer2DModel:
    """Return 14 MMDiT blocks of width 128 over 8x8 latents: 64 image tokens."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


def encode_text(encoders: list[Any], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode token ids (B, M) like StableDiffusion3Pipeline: hidden (B, M, 128) and pooled (B, 128)."""
    outputs = [e(ids, output_hidden_states=True) for e in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o[0] for o in outputs], -1)


def load_weights(nets: torch.nn.ModuleDict, folder: Path) -> None:
    """Load transformer and text encoders from a finished pipeline of this recipe, to train it further."""
    for name, net in nets.items():
        file = "diffusion_pytorch_model.safetensors" if name == "transformer" else "model.safetensors"
        net.load_state_dict({n: t.float() for n, t in load_file(folder / name / file).items()})


@dataclass(frozen=True)
class Captions:
    """Token ids of the training captions in every template."""

    table: torch.Tensor
    """(templates, different captions, M)."""
    rows: torch.Tensor
    """Each scene's index in the table, (count,)."""
    empty: torch.Tensor
    """Ids of the empty prompt, (M,)."""

    @classmethod
    def of(cls, captions: list[str], tokenizer: CLIPTokenizer) -> Captions:
        """Tokenize the captions of all scenes."""

        def ids_of(texts: list[str]) -> torch.Tensor:
            encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
            ids: torch.Tensor = encoded.input_ids
            return ids

        unique = sorted(set(captions))
        row = {c: i for i, c in enumerate(unique)}
        return cls(
            table=torch.stack([ids_of([t.format(c) for c in unique]) for t in shapes.TEMPLATES]),
            rows=torch.tensor([row[c] for c in captions]),
            empty=ids_of([""])[0],
        )

    def draw(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return token ids (B, M) of these scenes in random templates; a tenth of them get the empty prompt."""
        batch = len(picked)
        template = torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), batch, replacement=True, generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < DROPPED_CAPTIONS
        return torch.where(dropped, self.empty, self.table[template, self.rows[picked]])


def train_transformer(
    work: Path,
    latents: torch.Tensor,
    captions: list[str],
    *,
    steps: int,
    seed: int,
    batch: int,
    peak: float,
    start: Path | None = None,
    compiled: bool = False,
    bf16: bool = False,
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoders: flow matching, velocity target, sigma logit-normal; AdamW, EMA 0.999.

    Args:
        latents: of the training scenes, (count, 8, 8, 8), with their `captions`.
        peak: highest learning rate.
        start: a finished pipeline to start from instead of random weights.
        compiled: compile the transformer.
        bf16: autocast the transformer.
    """
    tokenizer = make_tokenizer(work / "tokenizer")
    torch.manual_seed(seed + 3)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoders = [make_text_encoder(len(tokenizer), end) for _ in range(2)]
    transformer = make_transformer()
    nets = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1]})
    if start is not None:
        load_weights(nets, start)
    nets.train()
    optimizer = torch.optim.AdamW(nets.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    usual = torch.compile(transformer) if compiled else transformer
    ema = Ema(dict(nets.named_parameters()), 0.999)

    texts = Captions.of(captions, tokenizer)
    checkpoint, step = work / "transformer.safetensors", 0
    if checkpoint.exists():
        modules, meta = load_state(checkpoint, optimizer)
        nets.load_state_dict(modules["nets"])
        fill(ema.average, modules["ema"])
        step = meta["step"]
    progress = ProgressLine("transformer", step, steps)
    while step < steps:
        g = step_generator(seed, step)
        picked = torch.randint(len(latents), (batch,), generator=g)
        ids = texts.draw(picked, g)
        clean = latents[picked]
        noise = torch.randn(clean.shape, generator=g)
        sigma = torch.sigmoid(torch.randn(batch, generator=g) + SIGMA_MEAN)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        hidden, pooled = encode_text(encoders, ids)
        predict = usual
        if step > 0.8 * steps and torch.rand((), generator=g) < ZERO_TOKEN_STEPS:
            hidden, predict = F.pad(hidden, (0, 0, 0, ZERO_TOKENS)), transformer  # compiled only for one length
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            velocity = predict(mixed, hidden, pooled, sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        descend(loss, nets, optimizer, rate=falling(step, steps, peak))
        ema.update(step)
        step += 1
        progress(step, loss.item())
        if step % 250 == 0 or step == steps:
            save_state(checkpoint, {"nets": nets.state_dict(), "ema": ema.average}, optimizer, {"step": step})
    nets.load_state_dict(nets.state_dict() | ema.average)
    nets.eval()
    return assemble(work, transformer, encoders, tokenizer)


def assemble(
    work: Path,
    transformer: SD3Transformer2DModel,
    encoders: list[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> StableDiffusion3Pipeline:
    """Return a pipeline of the trained networks and the VAE in `work`."""
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def save_pipeline(pipeline: StableDiffusion3Pipeline, out: Path, generation: dict[str, Any]) -> None:
    """Write the finished pipeline, transformer and VAE in half precision, with its generation settings."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # transformers loads in the precision of the file, diffusers in float32: after a plain `from_pretrained`, text
    # encoders in half precision would not match a float32 transformer. They are small, so they stay in float32.
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(temporary)
    path = temporary / "vae" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    (temporary / "generation.json").write_text(json.dumps(generation, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    print(f"wrote {out}")


def main() -> None:
    """Read the command line and train what is missing."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/teacher"), help="folder for the stages and their checkpoints"
    )
    parser.add_argument("--out", type=Path, help="write the finished pipeline here, in half precision")
    parser.add_argument("--steps", type=int, default=7000, help="transformer steps")
    parser.add_argument("--vae-steps", type=int, default=3000, help="VAE steps")
    parser.add_argument("--scenes", type=int, default=40_000, help="training scenes to render")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile: a fifth faster; needs a C++ compiler")
    parser.add_argument(
        "--bf16", action="store_true", help="autocast the transformer: a tenth faster where bf16 is native"
    )
    parser.add_argument("--start", type=Path, help="finished pipeline to start from: VAE, tokenizer and weights")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "tokenizer"):
        if args.start and not (args.work / name).exists():
            shutil.copytree(args.start / name, args.work / name)
    vae = train_vae(args.work, steps=args.vae_steps, seed=args.seed, count=min(args.scenes, 12_000))
    latents, captions = make_latents(args.work, vae, seed=args.seed, count=args.scenes)
    pipeline = train_transformer(
        args.work,
        latents,
        captions,
        steps=args.steps,
        seed=args.seed,
        batch=args.batch,
        peak=args.rate,
        start=args.start,
        compiled=args.compile,
        bf16=args.bf16,
    )
    if args.out:
        save_pipeline(pipeline, args.out, GENERATION)


if __name__ == "__main__":
    main()
