"""Two processes (gloo, on CPU) train as one does with the same global batch: losses and weights."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from accelerate.state import AcceleratorState
from distilling import recipe, setup
from safetensors.torch import load_file
from tiny import config_of, tiny_pipeline, tiny_step, tiny_transformer

from edgeprune.artefact.manifest import Manifest
from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.common.extras import absent
from edgeprune.sampling.denoising import velocity
from edgeprune.training.launch import launch_file
from edgeprune.training.rank_memory import ProcessLayout, forecast_rank
from edgeprune.training.recipe import EIGHT_BIT, DistillOptions, Placement, parameter_groups
from edgeprune.training.zero import plugin

HERE = Path(__file__).parents[1]


def run(count: int, *arguments: str) -> None:
    """Run tests/ranks.py in `count` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), *arguments],
            env=os.environ | ours | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of one process and of two."""
    out = tmp_path_factory.mktemp("ranks")
    ranks.train(out, "one")
    ranks.train(out, "one_tail", from_states=True)
    tiny_pipeline(out / "model")
    ranks.analyze(out, "whole")
    ranks.analyze(out, "begun", until=2)
    assert [p.name for p in (out / "begun").glob("analysis.*")] == ["analysis.json.partial"]
    run(2, str(out))
    return out


@pytest.fixture(scope="module")
def more(folder: Path) -> Path:
    """Add the results that slow tests look at."""
    ranks.train(folder, "one_prefix", int4_group_size=None)
    ranks.train(folder, "one_int8", teacher_precision="int8")
    ranks.train(folder, "one_fresh_blocks", freeze_prefix=False)
    ranks.train(folder, "taken_over", until=3)
    run(2, str(folder), "more")
    return folder


SAME = [("ddp", "one"), ("resumed", "one"), ("tail", "one_tail"), ("sharded", "one")]
MORE = [
    ("accumulated", "one"),
    ("sharded_prefix", "one_prefix"),
    ("ddp_large", "one"),
    ("fresh_blocks", "one_fresh_blocks"),
    ("taken_over", "one"),
    ("prefix", "one_prefix"),
    ("sharded_tail", "one_tail"),
    ("sharded_fresh_blocks", "one_fresh_blocks"),
    ("sharded_accumulated", "one"),
    ("sharded_int8", "one_int8"),
    ("sharded_taken_over", "one"),
]


@pytest.mark.parametrize(("name", "alone"), SAME)
def test_two_processes_train_as_one(folder: Path, name: str, alone: str) -> None:
    check_same(folder, name, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alone"), MORE)
def test_two_processes_train_as_one_in_other_ways(more: Path, name: str, alone: str) -> None:
    check_same(more, name, alone)


def check_same(folder: Path, name: str, alone: str) -> None:
    losses, expected = (json.loads((folder / f"{n}.json").read_text()) for n in (name, alone))
    assert losses == pytest.approx(expected, abs=1e-4, rel=1e-4)
    weights, whole = (load_file(folder / f"{n}.safetensors") for n in (name, alone))
    assert weights.keys() == whole.keys()
    # Adam divides by the gradient's size, so a rounding error of a tiny gradient can move a weight by a whole step.
    far = {n: float((weights[n] - whole[n]).abs().max()) for n in whole}
    assert max(far.values()) < 1e-3, max(far.items(), key=lambda item: item[1])
    moved = torch.cat([(weights[n] - whole[n]).flatten() for n in whole]).norm()
    assert moved < 1e-3


@pytest.fixture(scope="module", params=["2", "3"])
def zero(folder: Path, request: pytest.FixtureRequest) -> str:
    """Train in two processes with a stage of DeepSpeed's ZeRO, and return the stage."""
    if absent("deepspeed"):
        pytest.skip("deepspeed is not installed")
    request.getfixturevalue("more")
    stage = str(request.param)
    ranks.train(folder, f"zero{stage}_taken_over", until=3)
    run(2, str(folder), stage)
    return stage


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("resumed", "one"),
        ("taken_over", "one"),
        ("accumulated_prefix", "one_prefix"),
        ("int8", "one_int8"),
        ("fresh_blocks_offloaded", "one_fresh_blocks"),
    ],
)
def test_two_processes_train_by_zero_as_one(folder: Path, zero: str, name: str, alone: str) -> None:
    check_same(folder, f"zero{zero}_{name}", alone)


def test_one_process_takes_over_from_zero(folder: Path, zero: str) -> None:
    ranks.train(folder, f"zero{zero}_left")
    check_same(folder, f"zero{zero}_left", "one")


def test_zero_computes_in_bf16_with_weights_in_float32(folder: Path, zero: str) -> None:
    """Losses differ by bf16 rounding only. INT4 of weights gathered in bf16 would be 6 % off."""
    AcceleratorState._reset_state()  # accelerate allows one precision per process
    ranks.train(folder, "one_bf16", mixed_precision="bf16")
    AcceleratorState._reset_state()
    losses, expected = (json.loads((folder / f"{n}.json").read_text()) for n in (f"zero{zero}_bf16", "one_bf16"))
    assert losses == pytest.approx(expected, rel=0.01)


def test_zero_cuts_up_what_it_says(folder: Path, zero: str) -> None:
    """Two processes hold half of the moments each; with ZeRO-3 also of both models' weights, gradients and average."""
    whole, part = (json.loads((folder / f"{n}.held.json").read_text()) for n in ("one", f"zero{zero}_resumed"))
    halved = {key for key in whole if part[key] < 0.6 * whole[key]}
    shared = {"student_bytes", "teacher_bytes", "average_bytes", "gradients_bytes"}
    assert halved == {"moments_bytes"} | (shared if zero == "3" else set())


@pytest.mark.parametrize(
    ("environment", "precision", "expected"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "no", "zero_stage: found 1, expected 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "no", "found nvme, expected none or cpu"),
        ({}, "fp16", "--mixed-precision: found fp16, expected no or bf16 with DeepSpeed"),
    ],
)
def test_zero_refuses_what_it_does_not_do(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], precision: str, expected: str
) -> None:
    monkeypatch.setattr("edgeprune.common.extras.require", lambda *_: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=expected):
        plugin(precision, 1, 1)


def test_zero_refuses_a_file_that_sets_what_is_set_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.common.extras.require", lambda *_: None)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(InputError, match="deepspeed_config_file: bf16: edgeprune sets this; remove it"):
        plugin("no", 1, 1)


@pytest.mark.skipif(not absent("deepspeed"), reason="deepspeed is installed")
def test_zero_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"edgeprune\[deepspeed\]"):
        plugin("no", 1, 1)


@pytest.mark.parametrize("name", ["two", "begun"])
def test_two_processes_score_as_one_to_the_byte(folder: Path, name: str) -> None:
    found, whole = (folder / n / "analysis.json" for n in (name, "whole"))
    assert found.read_bytes() == whole.read_bytes()
    assert not list(found.parent.glob("analysis.json.partial*"))
    assert Manifest.load(found.parent).stages.keys() == {"analyze"}


HELD: list[tuple[str, ProcessLayout, dict[str, Any]]] = [
    ("one", ProcessLayout(), {}),
    ("ddp", ProcessLayout(2), {}),
    ("sharded", ProcessLayout(2, sharded=True), {}),
]
HELD_OF_MORE: list[tuple[str, ProcessLayout, dict[str, Any]]] = [
    ("sharded_fresh_blocks", ProcessLayout(2, sharded=True), {"freeze_prefix": False}),
    ("sharded_int8", ProcessLayout(2, sharded=True), {"teacher_precision": "int8", "gradient_checkpointing": True}),
]


def check_held(folder: Path, name: str, layout: ProcessLayout, options: dict[str, Any]) -> None:
    held = json.loads((folder / f"{name}.held.json").read_text())
    family, _, student, plan, report, _ = setup()
    config = config_of(tiny_transformer(num_layers=5))
    chosen = DistillOptions(batch=8, **options)
    found = forecast_rank(family, config, plan, report, chosen, recipe(chosen), Placement(), layout, tiny_step(batch=1))
    assert {key: found[key] for key in held} == held
    assert found["rank_bytes"] == sum(v for k, v in found.items() if k not in ("rank_bytes", "processes"))


@pytest.mark.parametrize(("name", "layout", "options"), HELD)
def test_what_a_process_holds_is_as_forecast(
    folder: Path, name: str, layout: ProcessLayout, options: dict[str, Any]
) -> None:
    check_held(folder, name, layout, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "options"), HELD_OF_MORE)
def test_what_a_process_holds_in_other_ways_is_as_forecast(
    more: Path, name: str, layout: ProcessLayout, options: dict[str, Any]
) -> None:
    check_held(more, name, layout, options)


def test_the_forecast_refuses_what_the_run_refuses() -> None:
    family, _, _, plan, report, _ = setup()
    config, layout = config_of(tiny_transformer(num_layers=5)), ProcessLayout(2, sharded=True)

    def forecast(placement: Placement, **options: Any) -> None:
        chosen = DistillOptions(**{"batch": 8, **options})
        forecast_rank(family, config, plan, report, chosen, recipe(chosen), placement, layout, tiny_step(batch=1))

    with pytest.raises(InputError, match="--batch: found 8, expected a multiple of 6, the number of processes times"):
        forecast(Placement(accumulate=3))
    with pytest.raises(InputError, match="--optimizer: found adamw8bit, expected adamw where FSDP or DeepSpeed"):
        forecast(Placement(), optimizer=EIGHT_BIT)
    with pytest.raises(InputError, match="--ema-offload: FSDP and DeepSpeed shard the average"):
        forecast(Placement(ema_offload=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_as_forecast(checkpointing: bool) -> None:
    """Compare with what autograd saves in a real pass; with checkpointing, less is saved at a time."""
    family, _, student, plan, report, _ = setup()
    config = config_of(tiny_transformer(num_layers=5))
    options = DistillOptions(batch=2, int4_group_size=None, gradient_checkpointing=checkpointing)
    rows = forecast_rank(
        family, config, plan, report, options, recipe(options), Placement(), ProcessLayout(), tiny_step(batch=1)
    )
    parameter_groups(family, student, plan, report, recipe(options), options.rate)
    known = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = velocity(student, *tiny_step(batch=2))
    assert alive.requires_grad
    found = rows["activations_bytes"]
    assert (
        0 < found < 0.7 * sum(kept.values()) if checkpointing else found == pytest.approx(sum(kept.values()), rel=0.02)
    )


def test_a_config_starts_processes_and_passes_on_how_they_end(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        'num_processes: 2\nmixed_precision: "no"\n'
    )
    command = [sys.executable, "-m", "edgeprune.distill", "-o", str(tmp_path / "none"), "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    # Whichever process stops first, the launcher ends the other, at times before it has said its own line.
    assert re.search(r"^error( in process 1)?: .*none/edgeprune.json", ended.stderr, re.M), ended.stderr
    assert ProcessLayout.of_launch_file(config) == ProcessLayout(2)


def test_a_config_of_one_process_starts_it_once(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n")
    command = [sys.executable, "-m", "edgeprune.distill", "-o", str(tmp_path / "none"), "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("begin with: edgeprune analyze") == 1, ended.stderr


@pytest.mark.parametrize("name", ["1x24gb", "1x80gb", "8x80gb"])
def test_configs_that_come_with_it_are_accelerates(name: str) -> None:
    layout = ProcessLayout.of_launch_file(launch_file(name))
    assert f"{layout.processes}x" == name[:2] and layout.sharded == (name != "1x80gb")
    with pytest.raises(InputError, match="expected a YAML file of accelerate's or one of 1x24gb, 1x80gb, 8x80gb"):
        launch_file("2x80gb")
