"""The artefact folder being made: its lock, its manifest, and the rule by which a stage runs, is skipped or is refused.

A stage's identity is the digest of its inputs, which include the digests of the stages before it. A stage that was
done with the same inputs is skipped. One that was done with other inputs is refused unless `fresh`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune import targets
from edgeprune.analysis.contribution import ContributionReport, fingerprint
from edgeprune.artefact.card import MARK
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.licensing import CARD
from edgeprune.artefact.manifest import HALF, INT4, MANIFEST, Manifest, packed_encoders
from edgeprune.artefact.resolve import read_original, resolve
from edgeprune.artefact.text_store import TextStore
from edgeprune.artefact.writing import remove_mark
from edgeprune.common import invocation, processes
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.files import digest
from edgeprune.common.hashes import kept_sha256
from edgeprune.common.hub_cache import commit_of
from edgeprune.common.lock import LOCK, Lock, hold, is_free
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress
from edgeprune.planning.fit import Fit, fit
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.precision import TEXT_INT4
from edgeprune.residency.compute import Compute
from edgeprune.residency.model_files import model_files
from edgeprune.sampling.generation import Generation, heed
from edgeprune.shapes import World, world_of
from edgeprune.stages.differences import differences
from edgeprune.stages.memory import Memory
from edgeprune.stages.original import Original
from edgeprune.stages.work import Pace, Speeds, Subject, Work, least

STAGES = ("analyze", "plan", "prune", "distill", "quantize")
"""The stages of `compress`."""
ENCODERS_STAGE = "encoders"
"""Of a pipeline with a T5 or Qwen3, after the others."""
ORDER = (*STAGES[:-1], "merge", STAGES[-1], ENCODERS_STAGE)
"""All stages: each depends on those before it. `merge` has a command of its own, `edgeprune lora --merge`."""


class Workspace:
    """An artefact folder being made from an original model."""

    def __init__(
        self,
        out: Path,
        model: str | None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        model_given: bool = True,
        fresh: bool = False,
        generation: dict[str, Any] | None = None,
        original: Original | None = None,
        compute: ComputeOptions | None = None,
    ) -> None:
        """Open a folder or begin a new one. This process holds its lock as long as the object lives, see lock.py.

        With several processes, rank 0 opens the folder first and is the only one that writes.

        Args:
            out: the artefact's folder.
            model: as the user named it; None is the built-in model.
            revision: a branch, tag or commit of a hub model; None for its default. A begun folder keeps the commit
                that it was begun with.
            variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
            model_given: False uses the model, revision and variant that the folder was begun with.
            fresh: allow stages to be done again with other inputs.
            generation: fields of `Generation` to change; the others come from the folder, or from the source.
            original: the model, if it is open already; None opens it.
            compute: where networks run, and in how much memory; None takes what this machine has. An original that is
                open keeps its own.

        Raises:
            InputError: the model is not usable, or the folder holds something else.
            StaleStageError: the folder was begun with another model, revision or variant.
            LockedError: another process uses the folder.
        """
        self.out, self.fresh, self.cache, self._opened = out, fresh, out / "cache", original
        self._compute = original.compute if original else Compute.of(compute or ComputeOptions())
        self.longest_s = compute.longest_s if compute else None
        """Most seconds of a stage."""
        self.command = invocation.command.get()
        """What the user typed; the manifest keeps it for each stage."""
        name = "built-in" if model is None else str(Path(model).resolve()) if Path(model).is_dir() else model
        if (out / MANIFEST).is_file():
            self._lock = self._hold()  # before the manifest is read: another run may be changing it
            self.manifest = Manifest.load(out)
            if not model_given:
                name, revision = self.manifest.source, revision or self.manifest.revision
                variant = variant or self.manifest.variant
                model = None if name == "built-in" else name
            self._reopen_original(model, name, revision, variant)
            self._set_generation(self.manifest.generation or Generation.load(self.source).to_json(), generation or {})
            return
        if not is_free(out, MANIFEST):
            raise InputError(f"{out}: exists and is not a folder of edgeprune (no {MANIFEST}); use another -o")
        self._open_original(model, revision, variant)
        self.manifest = Manifest(
            source=name, fingerprint=fingerprint(self.config), family=self.family.name, config=self.config,
            revision=revision, variant=variant, commit=commit_of(self.source),
        )  # fmt: skip
        self._set_generation(Generation.load(self.source).to_json(), generation or {})
        self._lock = self._hold()
        if (out / MANIFEST).is_file():
            raise InputError(f"{out}: another run began this folder at the same moment; run again to continue it")
        self.manifest.save(self.out)

    def _hold(self) -> Lock | None:
        """Take the folder's lock, in rank 0 only."""
        return hold(self.out / LOCK, self.out) if processes.is_main() else None

    def _save(self) -> None:
        if processes.is_main():
            self.manifest.save(self.out)

    def _reopen_original(self, model: str | None, name: str, revision: str | None, variant: str | None) -> None:
        """Open the model that the folder was begun with, at the same commit.

        Raises:
            StaleStageError: that is not `name` at `revision` in this variant.
        """
        begun = self.manifest
        if (begun.source, begun.revision, begun.variant) != (name, revision, variant):
            found, asked = _named(begun.source, begun.revision, begun.variant), _named(name, revision, variant)
            raise StaleStageError(f"{self.out}: made from {found}, not from {asked}; use another -o")
        self._open_original(model, begun.commit or revision, variant)
        if self.original.texts and processes.is_main():
            self.original.texts.tidy()
        if begun.fingerprint != fingerprint(self.config):
            raise StaleStageError(f"{self.out}: made from {name!r}, whose config has changed since; use another -o")

    def _open_original(self, model: str | None, revision: str | None, variant: str | None) -> None:
        self.original = self._opened or Original(resolve(model, revision, variant), variant, self._compute)
        self.source = self.original.source
        if self.original.texts is None:
            self.original.texts = TextStore(self.cache / "text", self.source, self.variant, kept_sha256)
        check_pipeline(self.source, self.original.variant)
        self.config, self.family = read_original(self.source)

    def _set_generation(self, current: dict[str, Any], requested: dict[str, Any]) -> None:
        requested, where = heed(self.source, requested), f"{self.out / MANIFEST}: generation"
        begun = Generation.checked(current, where)
        self.generation = Generation.checked(current | requested, where)
        self.generation.check_size(self.source, requested)
        changed = [name for name in requested if getattr(begun, name) != getattr(self.generation, name)]
        if changed and self.manifest.stages and not self.fresh:
            settings = ", ".join(f"{name} {getattr(begun, name)}" for name in changed)
            raise StaleStageError(f"{self.out}: begun with {settings}; use --fresh to redo its stages, or another -o")
        if self.generation.to_json() != self.manifest.generation:
            self.manifest.generation = self.generation.to_json()
            if (self.out / MANIFEST).is_file():
                self._save()

    def training_option(self, option: str) -> Any:
        """Return an option of the training that the weights have had; None without a training."""
        done = self.manifest.stages.get("distill", {}).get("options", {}).get("options")
        return done.get(option) if isinstance(done, dict) else None

    @property
    def student_generation(self) -> Generation:
        """How the artefact draws: without guidance where it has learned the guided velocity."""
        return self.generation.without_guidance() if self.training_option("guidance") else self.generation

    def keep_choice(self, choice: dict[str, Any]) -> None:
        """Keep what `compress --time` chose, for runs that resume."""
        self.manifest.choice = choice
        self._save()

    def limit_memory(self, memory: int) -> None:
        """Take at most so many bytes from now on, unless memory was given; 0 changes nothing."""
        if memory and self._compute.memory is None:
            self.original.compute = self._compute = replace(self._compute, memory=memory)

    def sibling(self, out: Path) -> Workspace:
        """Open another artefact of the same model and settings; it shares what is loaded and cached of the model."""
        other = Workspace(
            out, None if self.builtin else self.manifest.source, revision=self.manifest.revision,
            variant=self.variant, fresh=self.fresh, generation=asdict(self.generation),
            original=self.original.shared(),
        )  # fmt: skip
        other.cache, other.weights_hash = self.cache, self.weights_hash
        return other

    @property
    def builtin(self) -> bool:
        """Whether the model is the one that ships with edgeprune."""
        return self.manifest.source == "built-in"

    @cached_property
    def world(self) -> World | None:
        """The world that the model draws, whose captions and scenes all stages use; None for other models."""
        return world_of(self.source)

    @property
    def variant(self) -> str | None:
        """The variant of the original's weights that the user asked for."""
        return self.original.variant

    @property
    def teacher(self) -> Any:
        """The original transformer, opened once; see `Original.transformer`."""
        return self.original.transformer

    @property
    def pipe(self) -> Any:
        """The original pipeline around it."""
        return self.original.pipe

    @property
    def encoders(self) -> Any:
        """The original pipeline for its text encoders, see `Original.encoders`."""
        return self.original.encoders

    @cached_property
    def weights_hash(self) -> str:
        """Identity of the original pipeline: its weights, configs and tokenizers. Unchanged files are hashed once."""
        paths = [p for p in model_files(self.source, self.variant) if p.suffix in (".safetensors", ".json")]
        return digest([(p.relative_to(self.source).as_posix(), kept_sha256(p)) for p in paths])

    @property
    def report_path(self) -> Path:
        """Where `analyze` writes."""
        return self.out / "analysis.json"

    @property
    def scores_path(self) -> Path:
        """Where `plan` keeps scores of another folder that it was given."""
        return self.out / "scores.json"

    def report(self) -> ContributionReport | None:
        """Load the contribution scores: those that `plan` was given, else the folder's own; None if there are none."""
        paths = [p for p in (self.scores_path, self.report_path) if p.is_file()]
        return ContributionReport.load(paths[0]) if paths else None

    def fit(self, target: str, encoders: str = TEXT_INT4) -> Fit:
        """Return how much room a device leaves for the transformer's weights.

        Args:
            target: the device.
            encoders: how a T5 or Qwen3 is exported, one of precision.ENCODERS.

        Raises:
            InputError: no such target.
            BudgetError: nothing is left.
        """
        return fit(self.source, targets.load(target), self.generation, encoders)

    def plan(self) -> PrunePlan:
        """Load the plan.

        Raises:
            InputError: there is no plan yet.
        """
        path = self.out / "plan.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; run `edgeprune plan -o {self.out}` first")
        plan = PrunePlan.load(path)
        plan.check(self.config, path)
        return plan

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        run: Callable[[str], dict[str, Any]],
        check: Callable[[], None] = lambda: None,
    ) -> bool:
        """Run a stage unless it was done with the same inputs; return whether it ran.

        Args:
            name: one of ORDER.
            inputs: everything that the result depends on, besides the model and earlier stages.
            run: does the work. It gets the inputs' digest, and returns what to store in the manifest of the result.
            check: called before that and before earlier results are dropped; may raise.

        Raises:
            StaleStageError: the stage was done with other inputs, and `fresh` is not set.
        """
        position, key = ORDER.index(name), self.key(name, inputs)
        earlier = self.manifest.stages.get(name)
        if earlier and earlier["inputs"] == key:
            self._remove_marks()
            return False
        if self.manifest.loras and position < ORDER.index("merge"):
            raise StaleStageError(
                f"{self.out}: has a LoRA merged into its weights; {name} in the folder that it was merged "
                "from, and merge again: edgeprune lora --merge"
            )
        if earlier and not self.fresh:
            raise StaleStageError(
                f"{self.out}: {name} was done with {differences(earlier.get('options', {}), inputs)}; "
                "use --fresh to do it again, or a copy of the folder to keep this one"
            )
        check()
        # The weights of an earlier training are there until others replace them, and so is its record.
        self._forget(ORDER[position + bool(earlier and name == "distill") :])
        start = time.monotonic()
        result = run(key)
        self.manifest.stages[name] = {
            "inputs": key,
            "command": self.command,
            "seconds": round(time.monotonic() - start, 3),
            "options": inputs,
        } | result
        self.record()
        return True

    def key(self, name: str, inputs: dict[str, Any], *, after: Sequence[str] = ()) -> str:
        """Return a stage's identity: the digest of the original's weights, the stages before it, and its inputs.

        Args:
            name: one of ORDER.
            inputs: see `stage`.
            after: identities of stages that will have run before it, besides those that have.
        """
        before = [self.manifest.stages[s]["inputs"] for s in ORDER[: ORDER.index(name)] if s in self.manifest.stages]
        with processes.main_first():  # gigabytes are hashed by one process only
            return digest({"weights": self.weights_hash, "upstream": [*before, *after], "inputs": inputs})

    def record(self) -> None:
        """Save the manifest, which now lists the weights that were written."""
        self._save()
        self._remove_marks()

    def _remove_marks(self) -> None:
        """Remove the marks of written weights whose stages are in the manifest."""
        recorded = [stage["inputs"] for stage in self.manifest.stages.values()]
        for subfolder in (HALF, INT4) if processes.is_main() else ():
            remove_mark(self.out, subfolder, recorded)
        if ENCODERS_STAGE in self.manifest.stages and processes.is_main():
            for name in packed_encoders(self.out):  # may be of a second writing, which has inputs of its own
                remove_mark(self.out, name)

    def _forget(self, stages: tuple[str, ...]) -> None:
        """Drop stages and the weights that they wrote, before anything new is written: nobody may read old weights."""
        if not any(s in self.manifest.stages for s in stages):
            return
        written = {"prune": [HALF], "quantize": [INT4], ENCODERS_STAGE: packed_encoders(self.out)}
        dropped = [subfolder for stage in stages for subfolder in written.get(stage, [])]
        for stage in stages:
            self.manifest.stages.pop(stage, None)
        if ENCODERS_STAGE in stages:
            self.manifest.encoders = None
        self.manifest.files = {k: v for k, v in self.manifest.files.items() if k.split("/")[0] not in dropped}
        self._save()
        if processes.is_main():
            self._remove_report()
        for subfolder in dropped if processes.is_main() else ():
            shutil.rmtree(self.out / subfolder, ignore_errors=True)

    def _remove_report(self) -> None:
        """Remove the page and the card: they tell of weights that are about to be replaced. A user's card stays."""
        (self.out / "report.html").unlink(missing_ok=True)
        card = self.out / CARD
        if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
            card.unlink()

    @property
    def subject(self) -> Subject:
        """The original as forecasts count it."""
        return Subject(self.source, self.family, self.config, self.generation)

    @property
    def memory(self) -> Memory:
        """What the original takes of the memory at least."""
        return Memory(self.subject, self._compute)

    @cached_property
    def speeds(self) -> Speeds:
        """How fast work is done here at most; all processes share what rank 0 measures."""
        found = least(self.subject, self._compute, self.cache) if processes.is_main() else None
        return Speeds(*processes.from_main(found and list(asdict(found).values())))

    def check_time(
        self,
        stage: str,
        work: Work,
        ways: Sequence[tuple[str, Work]],
        progress: Progress,
        *,
        memory: int = 0,
        written: int = 0,
    ) -> None:
        """Say what a stage takes at least, and refuse it if that is too long or too much; see `Pace.check`."""
        pace = Pace(self.subject, self._compute, self.longest_s, lambda: self.speeds)
        pace.check(stage, work, ways, progress, memory=memory, written=written)

    def skip_distillation(self) -> None:
        """Prepare to continue without distillation: a distilled folder has to be pruned again.

        Raises:
            StaleStageError: the folder was distilled, and `fresh` is not set.
        """
        if "distill" not in self.manifest.stages:
            return
        if not self.fresh:
            raise StaleStageError(
                f"{self.out}: was distilled; use --fresh to prune again without distillation, or another -o"
            )
        self._forget(ORDER[ORDER.index("prune") :])

    def need(self, name: str, after: str) -> None:
        """Refuse to run the stage `after` before the stage `name`.

        Raises:
            InputError: `name` was not run.
        """
        if name not in self.manifest.stages:
            raise InputError(f"{self.out}: {after} needs {name}; run `edgeprune {name} -o {self.out}` first")


def _named(source: str, revision: str | None, variant: str | None) -> str:
    """Return a model, its revision and its variant for a message."""
    return repr(source) + (f" at revision {revision!r}" if revision else "") + (f" as {variant}" if variant else "")
