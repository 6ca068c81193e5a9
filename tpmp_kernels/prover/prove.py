"""The proof, on every rank: the reference, the step as it is, the replay, and what they say together."""

from collections.abc import Collection

import torch

from tpmp_kernels.prover import findings, reference, replay, steps, verdict
from tpmp_kernels.prover.diagnose import EVERY, SUMMANDS
from tpmp_kernels.prover.findings import StageFindings
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.report import Report
from tpmp_kernels.prover.subject import Subject
from tpmp_kernels.tensor_parallel import close_communicators
from tpmp_kernels.training.config import Config, ParallelConfig, TrainingConfig
from tpmp_kernels.training.launch import progress
from tpmp_kernels.training.layout import Layout, layout


def prove(subject: Subject) -> Report:
    """The report, the same on every rank. Collective over all ranks; torch.distributed is initialised."""
    groups = Config(
        parallel=ParallelConfig(tp=subject.tp, pp=subject.pp), training=TrainingConfig(timeout=subject.timeout)
    )
    with torch.random.fork_rng(devices=[]):
        progress("in the reference")
        recorded = reference.share(subject)
        try:
            # Behind the reference, during which no rank need wait at a communicator's deadline.
            with layout(groups, "cpu") as where:
                try:
                    found = _compare(subject, where, recorded)
                    return verdict.of_all(found, recorded, subject)
                finally:
                    close_communicators(where.mesh)
        finally:
            recorded.tape.close()


def _compare(subject: Subject, where: Layout, recorded: Reference) -> StageFindings:
    progress("in the parallel step")
    part = subject.part(where)
    unclear, split = steps.unclear(part, recorded), steps.split(part, recorded)

    def judge(run: str, **known) -> Judge:  # known: what an earlier run told
        return Judge(recorded, run, where.tp.rank, where.tp.size, unclear=unclear, split=split, **known)

    step = judge("step")
    found = StageFindings(parameters=frozenset(part.parameters()), unclear=unclear)
    steps.weights(part, step)
    if _any(step.wrong or step.shapes, where):
        findings.add(found, step, subject, where)
        return found
    called = steps.run(part, step, subject.seed)
    found.drift = steps.replicas(part, recorded, step.parts())

    progress("in the replay")
    replayed = judge("replay")
    found.called = called | steps.run(subject.part(where), replayed, subject.seed)
    findings.add(found, replayed, subject, where, tests=SUMMANDS)
    if _any(found.findings, where):
        # Again, now that it is known which partial sums are meant to be, so that each mistake is seen by itself.
        found.forget("replay")
        known = {"meant": found.meant}
        part, isolated, alone = subject.part(where), judge("replay", **known), judge("replay", **known)
        steps.run(part, isolated, subject.seed)
        found.drift = steps.replicas(part, recorded, step.parts())
        replay.alone(subject.part(where), alone, found.called, subject.microbatches)
        findings.add(found, isolated, subject, where)
        findings.add(found, alone, subject, where)
    step_alone = _any(step.wrong, where) and not _any(found.findings, where)
    findings.add(found, step, subject, where, tests=EVERY if step_alone else None)
    return found


def _any(mine: Collection, where: Layout) -> bool:
    """Whether any rank has some. Collective over all ranks."""
    return bool(where.world.all_reduce(torch.tensor([len(mine)]), "max", tag="differences") > 0)
