"""Metrics on tiny models with known answers; a comment at each constant names the reference it came from."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer, tiny_transformer
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from edgeprune import metrics
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.metrics import geneval, hps, hps_convert, lpips_distance, pretrained
from edgeprune.metrics.clip_model import Clip, ImageProcessor
from edgeprune.metrics.geneval_rules import NAMES

Image = NDArray[np.uint8]


def pair(height: int = 96, width: int = 80) -> tuple[Image, Image]:
    """Return random images, and the same images with added noise."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    other = np.clip(first.astype(int) + rng.integers(-40, 40, first.shape), 0, 255).astype(np.uint8)
    return first, other


# ---------------------------------------------------------------------------------------- fidelity


def test_psnr_of_a_known_error() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    psnr = metrics.of_images("psnr", {})
    assert psnr.score([black, black, black], ["", "", ""], [black + 255, black + 16, black]) == pytest.approx(
        [0, 10 * np.log10(255**2 / 256), 100]
    )
    with pytest.raises(InputError, match="found one of 4x4, expected 4x2"):
        psnr.score([black], [""], [black[:2]])


def test_ssim_is_scikit_image_s() -> None:
    ssim = metrics.of_images("ssim", {})
    first, other = pair()
    # structural_similarity(…, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255) of scikit-image 0.26
    assert ssim.score([first, first], ["", ""], [other, first]) == pytest.approx([0.9549161061125109, 1.0], abs=1e-9)
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim.score([first[:10]], [""], [first[:10]])


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make random LPIPS weights; those of the last layers are positive."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in lpips_distance.shapes().items():
        values = torch.randn(shape, generator=generator) / np.sqrt(np.prod(shape[1:]))
        state[name] = values.abs() if name.startswith("lin") else values
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(state, path)
    return path


def test_lpips_is_the_package_s(alexnet: Path) -> None:
    lpips = metrics.of_images("lpips", {"lpips": str(alexnet)})
    first, other = pair()
    # lpips 0.1.4, LPIPS(net="alex", pnet_rand=True) with these weights loaded
    assert lpips.score([first, first], ["", ""], [other, first]) == pytest.approx([0.006351097, 0.0], rel=1e-4)
    with pytest.raises(InputError, match="at least 31 pixels"):
        lpips.score([first[:30]], [""], [first[:30]])


def test_lpips_refuses_other_weights(alexnet: Path, tmp_path: Path) -> None:
    state = load_file(alexnet)
    del state["lin2.model.1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="lin2.model.1.weight: found nothing, expected"):
        metrics.of_images("lpips", {"lpips": str(tmp_path / "part.safetensors")})
    (tmp_path / "alex.pth").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match="not a safetensors file"):
        metrics.of_images("lpips", {"lpips": str(tmp_path / "alex.pth")})


# ------------------------------------------------------------------------------------ CLIP and HPS


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random CLIP with the built-in model's tokenizer, whose embeddings differ clearly between inputs."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    small: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 64}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text | small, vision_config=vision | small, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # biases would make all vectors similar
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


PROMPTS = ["a red circle", "two blue squares and a green star", "a circle " * 40]


def cosines(folder: Path, images: Sequence[Image]) -> list[float]:
    """Return the scores of PROMPTS from the full model's own logits."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), tiny_tokenizer()
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = ImageProcessor.from_pretrained(folder)(images=list(images), return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    return [float(v) for v in logits.diagonal()]


def test_clip_score_is_the_models_cosine(clip_folder: Path) -> None:
    images = [pair()[0], np.zeros((40, 64, 3), np.uint8), np.full((40, 64, 3), 200, np.uint8)]
    expected = cosines(clip_folder, images)
    found = metrics.of_images("clip", {"clip": str(clip_folder)}).score(images, PROMPTS, None)
    assert found == pytest.approx([max(0, 100 * v) for v in expected], abs=1e-3)
    signed = metrics.of_images("hpsv2", {"hpsv2": str(clip_folder)}).score(images, PROMPTS, None)
    whole = cosines(clip_folder, [hps.padded(image, 32) for image in images])
    assert signed == pytest.approx([100 * v for v in whole], abs=1e-3)
    assert signed != pytest.approx([100 * v for v in expected], abs=1e-1)  # images that are not square
    assert min(signed) < 0 < max(signed)  # otherwise the test would not cover the clamp of CLIPScore


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (40, 80), (4, 8), (8, 8), (1, 64), (7, 16)])
def test_hps_pads_the_longer_side_to_the_models_square(height: int, width: int) -> None:
    found = hps.padded(np.full((height, width, 3), 200, np.uint8), 16)
    rows, columns = (found > 0).any((1, 2)), (found > 0).any((0, 2))
    scale = 16 / max(height, width)
    wanted = tuple(max(1, round(length * scale)) for length in (height, width))
    assert found.shape == (16, 16, 3) and (rows.sum(), columns.sum()) == wanted
    assert (found[rows][:, columns] == 200).all()
    assert int(np.flatnonzero(rows)[0]) == (16 - wanted[0]) // 2  # the odd row of zeros is below


def test_an_image_of_three_rows_is_an_image(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), "clip")
    assert clip.images([np.zeros((3, 40, 3), np.uint8)]).shape == (1, 16)


def test_clip_takes_no_pickle_and_no_part(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "pickled")
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"--weights clip=.*not a usable CLIPModel with model.safetensors"):
        Clip(str(folder), "clip")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of CLIPModel are not there, such as text_projection.weight"):
        Clip(str(folder), "clip")
    with pytest.raises(InputError, match="no such folder"):
        Clip(str(tmp_path / "nowhere"), "clip")


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a CLIP's weights as in open_clip 3.3, whose outputs agreed with the converted model's to 5e-8."""
    out = {
        "logit_scale": state["logit_scale"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for here, there in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            for i in (0, 1):
                new, old = f"{here}.resblocks.{i}", f"{there}.encoder.layers.{i}"
                attention = [state[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{new}.attn.in_proj_{kind}"] = torch.cat(attention)
                out[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
                out[f"{new}.ln_1.{kind}"] = state[f"{old}.layer_norm1.{kind}"]
                out[f"{new}.ln_2.{kind}"] = state[f"{old}.layer_norm2.{kind}"]
                out[f"{new}.mlp.c_fc.{kind}"] = state[f"{old}.mlp.fc1.{kind}"]
                out[f"{new}.mlp.c_proj.{kind}"] = state[f"{old}.mlp.fc2.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}


def test_hps_is_converted_whole(clip_folder: Path, tmp_path: Path) -> None:
    state = load_file(clip_folder / "model.safetensors")
    torch.save({"epoch": 1, "state_dict": open_clip_names(state)}, tmp_path / "hps.pt")
    hps_convert.convert(tmp_path / "hps.pt", str(clip_folder), tmp_path / "hps")
    found = load_file(tmp_path / "hps" / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    images = [pair()[0]] * 3
    scores = metrics.of_images("hpsv2", {"hpsv2": str(tmp_path / "hps")}).score(images, PROMPTS, None)
    squares = [hps.padded(image, 32) for image in images]
    assert scores == pytest.approx([100 * v for v in cosines(clip_folder, squares)], abs=1e-3)


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("this must never be printed",))


def test_hps_never_runs_a_pickle_and_refuses_other_shapes(clip_folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="not readable as a file of weights only"):
        hps_convert.convert(tmp_path / "evil.pt", str(clip_folder), tmp_path / "out")
    state = open_clip_names(load_file(clip_folder / "model.safetensors"))
    save_file(state | {"visual.proj": torch.zeros(48, 8)}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"visual_projection.weight: found \(8, 48\), expected \(16, 48\)"):
        hps_convert.convert(tmp_path / "narrow.safetensors", str(clip_folder), tmp_path / "out")
    save_file(state | {"head.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=r"head.weight: found a weight of this name"):
        hps_convert.convert(tmp_path / "more.safetensors", str(clip_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- GenEval


def save_detector(folder: Path, labels: Sequence[str]) -> Path:
    """Make a random Mask2Former."""
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    geneval.ImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> geneval.GenEval:
    detector = save_detector(tmp_path_factory.mktemp("detector"), NAMES)
    return geneval.GenEval({"geneval": str(detector), "clip": str(clip_folder)}, "cpu")


def test_a_detector_of_other_classes_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    save_detector(tmp_path, ["cat", "dog"])
    with pytest.raises(InputError, match="found 2 classes from 'cat'"):
        geneval.GenEval({"geneval": str(tmp_path), "clip": str(clip_folder)}, "cpu")


def test_random_weights_see_nothing(judge: geneval.GenEval) -> None:
    assert judge.score([pair()[0]], ["a photo of a bench"], None) == [0.0]


class Outputs:
    """Returns for any image: a car in the upper left quarter, a bench in the lower right one, and an uncertain dog."""

    device = torch.device("cpu")

    def __call__(self, **_: Any) -> Any:
        classes, masks = torch.zeros(1, 3, 81), torch.full((1, 3, 24, 24), -9.0)
        for query, (name, logit) in enumerate((("car", 9.0), ("bench", 9.0), ("dog", 1.0))):
            classes[0, query, NAMES.index(name)] = logit
        masks[0, 0, :12, :12] = masks[0, 1, 12:, 12:] = masks[0, 2, :4, :4] = 9.0
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


class Eyes:
    """A CLIP that distinguishes red from green, in crops by their pixels and in texts by their words."""

    def __init__(self) -> None:
        self.seen: list[Image] = []

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[float("red" in t.split()), float("green" in t.split())] for t in texts])

    def images(self, images: Sequence[Image]) -> torch.Tensor:
        self.seen += images
        return torch.tensor([[float(i[..., 0].mean()), float(i[..., 1].mean())] for i in images])


def test_from_detections_to_verdicts(judge: geneval.GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = Eyes()
    monkeypatch.setattr(judge, "detector", Outputs())
    monkeypatch.setattr(judge, "clip", eyes)
    monkeypatch.setattr(judge, "_shades", {})
    image = np.zeros((96, 64, 3), np.uint8)
    image[:48, :32], image[48:, 32:] = (255, 0, 0), (0, 255, 0)
    car, bench = judge.detect(image)
    assert (car.name, bench.name) == ("car", "bench") and min(car.score, bench.score) > 0.9
    assert car.box == pytest.approx((0, 0, 32, 48), abs=1) and bench.box == pytest.approx((32, 48, 64, 96), abs=1)
    verdicts = {
        "a photo of a car": 1.0,
        "a photo of a dog": 0.0,
        "a photo of a car and a bench": 1.0,
        "a photo of two cars": 0.0,
        "a photo of a red car": 1.0,
        "a photo of a green car": 0.0,
        "a photo of a car above a bench": 1.0,
        "a photo of a car below a bench": 0.0,
        "a photo of a red car and a green bench": 1.0,
        "a photo of a green car and a red bench": 0.0,
    }
    assert dict(zip(verdicts, judge.score([image] * len(verdicts), list(verdicts), None), strict=True)) == verdicts
    assert eyes.seen and all(abs(c.shape[0] - 48) <= 1 and abs(c.shape[1] - 32) <= 1 for c in eyes.seen)


def test_what_surrounds_an_object_is_grey(judge: geneval.GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = Eyes()
    monkeypatch.setattr(judge, "clip", eyes)
    monkeypatch.setattr(judge, "_shades", {})
    mask = np.zeros((8, 8), bool)
    mask[2, 2:6] = mask[2:6, 2] = True
    found = geneval.Detection("car", 0.9, (2, 2, 6, 6), mask)
    judge.colors_of(np.full((8, 8, 3), 255, np.uint8), [found], "car")
    (crop,) = eyes.seen
    assert crop.shape == (4, 4, 3) and (crop[0] == 255).all() and (crop[1:, 1:] == 0x99).all()


# ----------------------------------------------------------------------------------------- the rest


def test_unknown_names_and_missing_weights() -> None:
    with pytest.raises(InputError, match="found 'beauty', expected one of shapes, clip"):
        metrics.of_images("beauty", {})
    with pytest.raises(InputError, match="found 'beauty', expected one of velocity, shapes"):
        metrics.check_analysis("beauty", {})
    with pytest.raises(InputError, match=r"--metric geneval: no weights; give --weights clip=PATH: a CLIP folder"):
        metrics.require("geneval", {"geneval": "x"})
    with pytest.raises(InputError, match="not a caption of shapes world"):
        metrics.check_analysis("shapes", {}, ["a lighthouse"])
    assert metrics.parse_weights(["clip=a=b", "lpips=c"]) == {"clip": "a=b", "lpips": "c"}
    for wrong in (["clip"], ["clip="], ["other=x"], ["clip=a", "clip=b"]):
        with pytest.raises(InputError, match=r"--weights: found .*expected NAME=PATH"):
            metrics.parse_weights(wrong)


@pytest.mark.parametrize("name", ["psnr", "lpips", "hpsv2"])
def test_analyze_asks_any_metric_higher_is_better(
    name: str, alexnet: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.metrics import drawn
    from edgeprune.sampling.generation import Generation

    drawings = [pair(64, 64)[0], pair(64, 64)[1]]
    monkeypatch.setattr(drawn, "generate", lambda pipe, texts, *_: np.stack([drawings[pipe.state]] * len(texts)))
    pipe = SimpleNamespace(transformer=tiny_transformer(num_layers=1), state=0)
    weights = {"lpips": str(alexnet), "hpsv2": str(clip_folder)}
    metric = metrics.of_pipeline(
        name, pipe, Generation(4, 3.0, 64, 64, 0), ["a red circle", "a star"], weights, split=Split.ANALYSIS
    )
    untouched = metric.score()
    pipe.state = 1  # as if something had been removed
    changed = metric.score()
    assert metric.name == name and len(untouched) == len(changed) == 2 and untouched != changed
    if metrics.KNOWN[name].paired:
        assert min(untouched) > max(changed)
        assert untouched == [100.0 if name == "psnr" else 0.0] * 2
    assert metrics.evaluations(name, Generation(4, 3.0, 64, 64, 0), 2, lambda steps: [2] * steps) == 16


def test_networks_of_metrics_go_where_they_are_asked_to(
    alexnet: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a wish, to the device that everything takes, which computes nothing here."""
    monkeypatch.setattr("edgeprune.residency.compute._here", lambda: {"xpu": 1, "cpu": 1})
    assert pretrained.placed("auto") == torch.device("xpu") and pretrained.placed("cpu") == torch.device("cpu")
    weights = {"lpips": str(alexnet), "clip": str(clip_folder), "hpsv2": str(clip_folder)}
    images = [pair(64, 64)[0]]
    for name in weights:
        assert len(metrics.of_images(name, weights, "cpu").score(images, ["a red circle"], images)) == 1
        with pytest.raises((RuntimeError, AssertionError)):
            metrics.of_images(name, weights)
    with pytest.raises(InputError, match="--device: found 'cuda', expected one of auto, xpu, cpu"):
        metrics.of_images("lpips", weights, "cuda")
