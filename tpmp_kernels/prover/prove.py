"""The proof, on every rank: the reference, the step as it is, the replay, and what they say together."""

import torch

from tpmp_kernels.prover import reference, replay, steps, verdict
from tpmp_kernels.prover.judge import Judge
from tpmp_kernels.prover.reference import Reference
from tpmp_kernels.prover.report import Report
from tpmp_kernels.prover.subject import Subject
from tpmp_kernels.prover.verdict import StageFindings
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
    def judge(run: str, **known) -> Judge:
        return Judge(recorded, run, where.tp.rank, where.tp.size, **known)

    progress("in the parallel step")
    part, step = subject.part(where), judge("step")
    found = StageFindings(parameters=frozenset(part.parameters()))
    steps.weights(part, step)
    verdict.gather(found, [step], subject, where)
    if _differ(found, where):
        return found
    called = steps.run(part, step, subject.seed)
    found.drift = steps.replicas(part, where, step.blocks())

    progress("in the replay")
    replayed = judge("replay")
    found.called = called | steps.run(subject.part(where), replayed, subject.seed)
    verdict.gather(found, [step, replayed], subject, where)
    if _differ(found, where):
        isolated, alone = judge("replay", meant=found.meant), judge("replay", meant=found.meant)
        part = subject.part(where)
        steps.run(part, isolated, subject.seed)
        found.drift = steps.replicas(part, where, step.blocks())
        replay.alone(subject.part(where), alone, found.called, subject.microbatches)
        found.forget("replay")
        verdict.gather(found, [isolated, alone], subject, where)
    return found


def _differ(found: StageFindings, where: Layout) -> bool:
    """Whether any rank has a finding. Collective over all ranks."""
    count = torch.tensor([len(found.findings) + len(found.shapes_of("weights"))])
    return bool(where.world.all_reduce(count, "max", tag="differences") > 0)
