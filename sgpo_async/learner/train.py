"""The training loop of the learner, the same on every rank; rank 0 also writes metrics and controls the hub.

    hub ── Shard ──▶ update ──▶ commit ──▶ publish ─ ─ ─ (background) ─ ─ ▶ weight store
                       ▲                     │
                       └──── next step ◀── record, evaluate, checkpoint

The loop waits for the hub (batches and answers), for the other ranks (gradients, statistics, gathers), and for the
previous publication and checkpoint, which are written in the background. Each wait has a deadline.

A rank that has received a signal says so when it requests its next batch. Then the hub gives no rank this batch, so all
ranks stop at the same step, and write a checkpoint. An interrupted hub stops them in the same way.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.config.schema import CHECKPOINTS, Run, require
from sgpo_async.errors import CheckpointError, Interrupted
from sgpo_async.learner import checkpoint, optimiser
from sgpo_async.learner.canary import CanaryScore, canary_due
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.contexts import Contexts
from sgpo_async.learner.demonstrations import Demonstrations
from sgpo_async.learner.hub_client import HubClient
from sgpo_async.learner.loading import load_policy, load_teacher
from sgpo_async.learner.mismatch import Alarm, bound_for
from sgpo_async.learner.patterns import Patterns
from sgpo_async.learner.policy import in_bfloat16
from sgpo_async.learner.process_group import join_world
from sgpo_async.learner.progress import Progress, hub_metrics
from sgpo_async.learner.publish import Publisher, gather, gather_trained
from sgpo_async.learner.remote_store import open_store
from sgpo_async.learner.resume import how_to_go_on, require_same_adapters, resume_point
from sgpo_async.learner.rounds import remove_rounds, write_round
from sgpo_async.learner.samples import Samples
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.step_log import StepLog
from sgpo_async.learner.teacher import Teacher
from sgpo_async.learner.waits import Waits
from sgpo_async.logs import fields
from sgpo_async.metrics import MetricsWriter, read_metrics
from sgpo_async.metrics.canary import canary_summary
from sgpo_async.metrics.mismatch import excess, mismatch_summary
from sgpo_async.model.adapters import save
from sgpo_async.model.canary import canary_of
from sgpo_async.model.export import export
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint
from sgpo_async.model.load import end_token_warning, positions
from sgpo_async.processes.signals import UrgentSignals
from sgpo_async.processes.torchrun import all_ranks_run
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.transport.token import token_of
from sgpo_async.wire.records import Evaluated, Hello, NoBatch, Shard

log = logging.getLogger(__name__)

CONNECT_S = 120.0  # timeout of the connection to the hub
COLLECTIVE_SLACK_S = 300.0
EXPORT_S = 86400.0  # longest time in which rank 0 exports the policy at the end


def train(run: Run, hub_address: str) -> int:
    """Train to the end of `run` as one rank under torchrun; return the exit status.

    Raises:
        Interrupted: a signal has ended the training; there is a checkpoint of its last step.
        SgpoError: training failed; the message is one line.
    """
    signals = UrgentSignals(in_order=all_ranks_run)
    mesh = join_world(run.learner, timeout_s=run.learner.batch_timeout_s + COLLECTIVE_SLACK_S)
    dealer = Dealer(hub_address, keys=run.hub.keys, role="learner", max_bytes=run.hub.max_message_mb * 2**20)
    try:
        dealer.wait_connected(CONNECT_S)
    except BaseException:
        dealer.close()
        raise
    hub = HubClient(
        Mailbox(dealer),
        name=f"learner-{dist.get_rank()}",
        heartbeat_s=run.hub.heartbeat_s,
        stopping=lambda: signals.reason and f"learner rank {dist.get_rank()} {signals.reason}",
    )
    try:
        folder, own = Path(run.folder) / CHECKPOINTS, run.learner
        with CheckpointWriter(folder, keep=own.keep_checkpoints, minutes=own.checkpoint_minutes) as checkpoints:
            trainer = Trainer.start(run, mesh, hub, checkpoints, hub_address=hub_address)
            with signals:
                if reason := trainer.loop():
                    trainer.interrupt(reason)
                else:
                    trainer.finish()
    except BaseException as error:
        hub.leave(f"{type(error).__name__}: {error}".partition("\n")[0])  # the hub takes back the batch
        raise
    # The other ranks leave after rank 0 has exported the policy and sent Finish; one that dies ends the wait at once.
    dist.barrier(timeout=timedelta(seconds=EXPORT_S))
    hub.leave(reason or "finished")
    dist.destroy_process_group()
    if reason:
        raise Interrupted(
            "" if trainer.metrics is None else how_to_go_on(reason, trainer.saved, hub_address if hub.ended else ""),
            *([signals.exit_code] if signals.stop else []),
        )
    return 0


@dataclass
class Trainer:
    """One rank that is ready to train."""

    run: Run
    hub: HubClient
    stepper: Stepper
    publisher: Publisher
    checkpoints: CheckpointWriter
    progress: Progress
    canary: CanaryScore
    base: int  # version of the weights minus the number of optimiser steps
    metrics: MetricsWriter | None  # only on rank 0
    alarm: Alarm
    samples: Samples
    step_log: StepLog
    saved: int = 0  # step of the newest checkpoint; 0: none
    waits: Waits = field(default_factory=Waits)
    _scored: bool = False  # the canary, since this learner began

    @classmethod
    def start(
        cls, run: Run, mesh: DeviceMesh, hub: HubClient, checkpoints: CheckpointWriter, *, hub_address: str
    ) -> Trainer:
        """Load the model or resume from a checkpoint, and register with the hub. A collective of all ranks."""
        stepper, fingerprint = build(run, mesh)
        bfloat16 = in_bfloat16(run.learner.precision, mesh)
        rank, lead = dist.get_rank(), dist.get_rank() == 0
        resumed = resume_point(run, Path(run.folder) / CHECKPOINTS)
        if resumed:
            require_same_adapters(run, resumed)
        saved = (
            checkpoint.restore(
                resumed, module=stepper.policy, optimiser=stepper.optimiser, teacher=stepper.teacher.moving
            )
            if resumed
            else Saved(Progress().plain(), b"")
        )
        progress = Progress(**saved.progress)
        progress.lora = asdict(run.learner.lora)
        welcome = hub.join(
            Hello(
                role="learner",
                name=hub.name,
                tokenizer=fingerprint,
                rank=rank,
                world_size=dist.get_world_size(),
                vocabulary=stepper.policy.head.shape[0],
                bfloat16=bfloat16,
                token="" if run.hub.keys else token_of(Path(run.folder)),
            )
        )
        # If an earlier learner has published weights, this one must not continue its tasks and versions.
        version = hub.restore(saved.hub_state) if lead and (resumed or welcome.begun) else welcome.version
        dtype = torch.float32 if run.learner.lora.rank else getattr(torch, run.model.dtype)
        nbytes = dtype.itemsize * sum(p.numel() for p in stepper.policy.parameters() if p.requires_grad)
        place = (welcome, Path(run.folder), hub_address, hub.moved)
        store = open_store(*place, nbytes=nbytes) if lead else None
        tokens = canary_of(load_tokenizer(model_folder(run.model.path)))
        canary = CanaryScore(policy=stepper.policy, canary=tokens, dtype=dtype, bfloat16=bfloat16)
        publisher = Publisher(stepper.policy, dtype, store=store, published=hub.published)
        if lead and not progress.step:
            remove_rounds(run)
        elif lead and progress.version is not None:
            remove_rounds(run, above=progress.version)
        alarm = Alarm(bound_for(run, learner_bfloat16=bfloat16))
        base = version - progress.step
        samples = Samples.start(run, resume_from=progress.step)
        metrics = MetricsWriter(run.folder, resume_from=progress.step, trackers=run.learner.trackers) if lead else None
        if lead:
            _log_start(run, resumed)
        saved_step = progress.step if resumed else 0
        log_of = StepLog(run.steps)
        return cls(
            run, hub, stepper, publisher, checkpoints, progress, canary, base, metrics, alarm, samples, log_of,
            saved_step,
        )  # fmt: skip

    @property
    def version(self) -> int:
        """The version of the current weights; correct only on rank 0."""
        return self.base + self.progress.step

    def loop(self) -> str:
        """Train to the last step, or until all ranks have to stop; return why they have to stop, or ""."""
        self._publish()
        if self.metrics and not self.progress.step:
            self.hub.evaluate(self.version)
        lap = time.monotonic()
        self.waits.begin()
        while self.progress.step < self.run.steps:
            parts: list[Shard] = []
            while len(parts) < self.run.learner.parts:
                if parts:
                    self.stepper.add(parts[-1])
                timeout_s = self.run.learner.batch_timeout_s
                with self.waits.on("batch"):
                    shard = self.hub.batch(self.progress.step, len(parts), timeout_s=timeout_s)
                if isinstance(shard, NoBatch):
                    return shard.reason  # the gradient of the parts so far is lost; their rollouts are not
                parts.append(shard)
            line = self.stepper.update(parts[-1])
            status = self.hub.commit(self.progress.step) if self.metrics else {}
            self._publish(after=1)
            lap, wall = time.monotonic(), time.monotonic() - lap
            self.progress.trained(line, idle_s=self.waits.seconds["batch"], wall_s=wall)
            waits = self.waits.shares(wall)
            self.waits.begin()
            if self.metrics:
                own = {"learner_idle": waits["batch"], "learner_waits": waits}
                line = self._record(self.metrics, line | hub_metrics(status) | own)
                self.step_log.step(line, seconds=wall)
            elif self._last:
                while _rank_0_waits():
                    pass
            self.samples.keep(parts, self.stepper.statistics)
            if self.checkpoints.due(self._due(self.run.learner.checkpoint_every)):
                with self.waits.on("checkpoint"):  # it is a part of the next step
                    self._checkpoint()
        return ""

    def _publish(self, after: int = 0) -> None:
        """Publish the weights `after` steps that are not counted yet. A collective of all ranks."""
        due = not self._scored or canary_due(self.progress.step + after, self.run.learner.canary_every)
        self._scored = True
        canary = self.canary() if due else None
        with self.waits.on("publication"):
            self.publisher.publish(self.version + after, canary)

    def interrupt(self, reason: str) -> None:
        """Write a checkpoint, unless there is one of this step. A collective of all ranks. Raises CheckpointError."""
        try:
            if self.progress.step > self.saved:
                log.info("%s: writing a checkpoint of step %d", reason, self.progress.step)
                self._checkpoint()
            self.checkpoints.wait()
            self.publisher.wait()
        except RuntimeError as error:
            lost = f"another rank is gone, or the copy of the state failed ({str(error).partition(chr(10))[0]})"
            raise CheckpointError(f"{reason}, and no checkpoint could be written: {lost}") from None
        if self.metrics:
            self.samples.close()
            self.metrics.close()
            self.metrics.wait()

    def finish(self) -> None:
        """Export the policy, write the summary and end the run. A collective of all ranks."""
        policy, lora = self.stepper.policy, self.run.learner.lora
        tensors = gather(policy)
        adapters = gather_trained(policy, torch.float32) if lora.rank else []
        self.publisher.wait()
        self.checkpoints.wait()
        if not self.metrics:
            return
        source, folder = model_folder(self.run.model.path), Path(self.run.folder)
        export(policy.model, dict(tensors), folder / "policy", source=source)
        if adapters:
            save(dict(adapters), lora, folder / "adapter", base=source)
        own: dict[str, Any] = {"world_size": dist.get_world_size(), "objective": self.run.algorithm.objective}
        reference = self.stepper.reference
        own["teacher_mb"] = self.stepper.teacher.nbytes / 2**20
        if reference is not None and reference is not self.stepper.teacher:
            own["reference_mb"] = reference.nbytes / 2**20
        lines = read_metrics(self.run.folder)  # including the steps before an interruption
        own |= {"mismatch": mismatch_summary(lines), "canary": canary_summary(lines)}
        self.metrics.summary(self.progress.summary(self.hub.status()) | own)
        self.samples.close()
        self.metrics.close()
        log.info("finished after %d steps: the policy is in %s/policy", self.progress.step, self.run.folder)
        self.hub.finish()
        self.publisher.close()  # now the hub does not miss the link to these weights
        self.metrics.wait()

    def _record(self, metrics: MetricsWriter, line: dict[str, Any]) -> dict[str, Any]:
        """Write the metrics of this step, and return them; after the last step, wait for the last evaluation first."""
        if self._last:
            results = self._last_evaluations()
        else:
            if self._due(self.run.evaluation.every):
                self.hub.evaluate(self.version)
            results = self.hub.take_evaluations()
        for result in results:
            write_round(self.run, result)
        head = {"step": self.progress.step, "wall_s": self.progress.wall_s, "tokens_trained": self.progress.tokens}
        line = head | line | self.alarm.judge(line) | self.progress.evaluated(results)
        if exceeded := excess(line):
            log.warning("mismatch alarm: %s", exceeded.text)
        metrics.step(line)
        return line

    def _last_evaluations(self) -> list[Evaluated]:
        """Request the evaluation of the final weights and wait for it, as the other ranks do in `_rank_0_waits`."""
        limit_s = self.run.learner.batch_timeout_s
        results = self.hub.take_evaluations(until=self.version, timeout_s=limit_s, meanwhile=_rank_0_waits)
        _rank_0_waits(False)
        return results

    @property
    def _last(self) -> bool:
        """Whether the last step has been trained."""
        return self.progress.step == self.run.steps

    def _due(self, every: int) -> bool:
        """Return whether something is due that happens every `every` steps and after the last step (0: only then)."""
        return self._last or (every > 0 and self.progress.step % every == 0)

    def _checkpoint(self) -> None:
        state = self._hub_state() if self.metrics else b""
        self.progress.version = self.version
        self.saved = self.progress.step
        self.checkpoints.save(
            step=self.progress.step,
            module=self.stepper.policy,
            optimiser=self.stepper.optimiser,
            saved=Saved(self.progress.plain(), state),
            teacher=self.stepper.teacher.moving,
        )

    def _hub_state(self) -> bytes:
        """Return the hub's state, and write the evaluation rounds that the hub has sent to disk.

        The hub's state does not contain the per-problem results of these rounds.
        """
        state = self.hub.snapshot(self.progress.step)
        for result in self.hub.evaluations:  # they arrived after the metrics of this step; the next step reports them
            write_round(self.run, result)
        return state


def _log_start(run: Run, resumed: Path | None) -> None:
    """Log what this learner is about to do."""
    ranks = dist.get_world_size()
    where = f"from {resumed}" if resumed else f"into {run.folder}"
    text = "training %s: %d steps of %d problems with %s on %d rank%s, %s"
    objective = run.algorithm.objective
    values = fields(event="started", run=run.name, steps=run.steps, ranks=ranks, objective=objective)
    about = (run.name, run.steps, run.learner.problems_per_step, objective, ranks, "s" * (ranks > 1), where)
    log.info(text, *about, extra=values)


def _rank_0_waits(value: bool = True) -> bool:
    """Broadcast rank 0's `value`: whether it still waits for the last evaluation, which may take very long.

    A collective of all ranks. Rank 0 calls it more often than a collective times out.
    """
    waits = torch.tensor([value])
    dist.broadcast(waits, 0)
    return bool(waits)


def build(run: Run, mesh: DeviceMesh, source: ProblemSource | None = None) -> tuple[Stepper, str]:
    """Load the sharded policy with its optimiser and teacher; return also the fingerprint of its tokenizer.

    Raises ConfigError or DataError if the model cannot be trained as `run` specifies.

    Args:
        source: the source of the training problems, for objectives that train on responses or read with contexts; by
            default the run's.
    """
    folder = model_folder(run.model.path)
    tokenizer = load_tokenizer(folder)
    fingerprint = tokenizer_fingerprint(tokenizer)
    policy = load_policy(folder, run, mesh)
    if dist.get_rank() == 0 and (warning := end_token_warning(policy.model, tokenizer)):
        log.warning("model.path: %s", warning)
    vocabulary, k = policy.head.shape[0], run.algorithm.top_logprobs_num
    require(k < vocabulary, "algorithm.teacher_top_k", f"must be < {vocabulary}, the size of the vocabulary", k)
    copy = load_teacher(folder, run, mesh) if run.copies_teacher else None
    teacher = Teacher(run.algorithm, copy)
    stepper = Stepper(run, policy, optimiser.build(policy, run.optim), teacher)
    if run.algorithm.reference_kl:
        own = load_teacher(folder, run, mesh) if run.copies_reference else None
        stepper.reference = Teacher(run.algorithm, own, kind="frozen") if run.algorithm.copies_reference else teacher
    if run.algorithm.needs_responses:
        stepper.responses = Demonstrations(run, source or source_of(run), tokenizer, longest=positions(folder)).tokens
    if run.algorithm.reads_in_context:
        stepper.contexts = Contexts(run, source or source_of(run), tokenizer, longest=positions(folder))
    if run.learner.patterns or run.learner.quoted_words or run.learner.token_classes:
        stepper.patterns = Patterns(run.learner, tokenizer)
    return stepper, fingerprint
