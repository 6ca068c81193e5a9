"""`tpmp_kernels.verify`: prove one's own parallel module in a test, in a script or under torchrun."""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpmp_kernels.comm import Communicator
from tpmp_kernels.errors import TransportError
from tpmp_kernels.pipeline.validate import validate
from tpmp_kernels.prover.bounds import UNIT
from tpmp_kernels.prover.prove import prove
from tpmp_kernels.prover.report import Report
from tpmp_kernels.prover.user import UserModule, adamw, mean_loss
from tpmp_kernels.tensor_parallel import reduce_partial_gradients
from tpmp_kernels.tensor_parallel.plans import Plan
from tpmp_kernels.testing import Outcome, RankPool
from tpmp_kernels.training.launch import RankFailed, given_rank, rank_environment


def verify(
    model_fn: Callable[[], nn.Module],
    batch: tuple[Tensor, Tensor],
    plan: Plan | Callable[..., nn.Module],
    *,
    tp: int = 2,
    pp: int = 1,
    schedule: str = "1f1b",
    microbatches: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = mean_loss,
    parallel_loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adamw,
    reduce_gradients: Callable[[nn.Module, Communicator], None] = reduce_partial_gradients,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    pool: RankPool | None = None,
    timeout: float = 600.0,
) -> Report:
    """Run one training step of a module unsharded and at tp x pp, and say where they first differ.

        assert verify(Model, (tokens, targets), {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}, tp=4)

    model_fn(): the module, whole; built on every rank from one seed, and its parameters moved a little, since at a
    norm's ones and a bias's zeros some mistakes are right. batch: (inputs, targets), cut along dimension 0 into
    microbatches, whose losses are averaged. plan: the table that `parallelize` takes; or a function
    (module, comm) -> module that makes the whole module parallel over `comm`, keeping the names of its modules and
    parameters. With pp > 1 it is called with stage=, stages= as well, and returns that stage: a module from the inputs
    or hidden states to hidden states, the last one's to the outputs, with the names of the whole.

    loss(output, target): a scalar. parallel_loss(output, target, comm=): the same from what the parallel module puts
    out. optimizer(parameters): elementwise. reduce_gradients(module, comm): what the step does between the last
    backward and the optimizer. dtype: float64, where rounding is 1e-14 and any mistake larger, or float32. pool: ranks
    to run on; by default they are started, and gone on return. Under torchrun, called on every rank, it uses those.

    All functions are of a module's top level, since they are sent to the ranks, and the call stands under
    `if __name__ == "__main__"` in a script. Raises ValueError or TypeError for arguments that cannot be, and what a
    rank raised where it did.
    """
    subject = UserModule(
        model_fn, batch, plan, loss, parallel_loss, optimizer, reduce_gradients,
        tp, pp, schedule, microbatches, dtype, seed, timeout,
    )  # fmt: skip
    _check(subject)
    if given_rank() is not None:
        return _here(subject)
    _check_picklable(subject)
    if pool is None:
        # Imported once, where no fork server runs yet.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed", prove.__module__])
    own = RankPool(subject.ranks) if pool is None else pool
    try:
        return _on_ranks(own, subject)
    finally:
        if pool is None:
            own.close()


def _check(subject: UserModule) -> None:
    for name in ("tp", "pp", "microbatches"):
        value = getattr(subject, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"verify: {name} must be a whole number from 1, got {value!r}")
    if subject.dtype not in UNIT:
        raise ValueError(f"verify: dtype must be torch.float64 or torch.float32, got {subject.dtype}")
    if len(subject.batch) != 2 or not all(isinstance(tensor, Tensor) for tensor in subject.batch):
        raise TypeError("verify: batch must be a pair of tensors, (inputs, targets)")
    for what, tensor in zip(("inputs", "targets"), subject.batch, strict=True):
        if not tensor.dim() or not len(tensor) or len(tensor) % subject.microbatches:
            raise ValueError(
                f"verify: {what} are {list(tensor.shape)}, which cannot be cut along dimension 0 into "
                f"{subject.microbatches} equal microbatches; use a number that divides it"
            )
    if subject.pp > 1 and not callable(subject.plan):
        raise ValueError(
            f"verify: pp is {subject.pp}, but a table shards a whole module; pass a function (module, comm, stage=, "
            "stages=) -> module for plan"
        )
    validate(subject.built_schedule())


def _check_picklable(subject: UserModule) -> None:
    try:
        pickle.dumps(subject)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"verify: its arguments are sent to the ranks, which fails with: {error}; pass functions of a module's top "
            "level"
        ) from None


def _here(subject: UserModule) -> Report:
    def checked() -> Report:
        if dist.get_world_size() != subject.ranks:
            raise ValueError(f"verify: expected tp x pp = {subject.ranks} ranks, torchrun has {dist.get_world_size()}")
        return prove(subject)

    if dist.is_initialized():
        return checked()
    with rank_environment(device="cpu", threads=torch.get_num_threads(), timeout=subject.timeout):
        return checked()


def _on_ranks(pool: RankPool, subject: UserModule) -> Report:
    if pool.size != subject.ranks:
        raise ValueError(f"verify: expected a pool of tp x pp = {subject.ranks} ranks, got one of {pool.size}")
    outcomes = pool.outcomes(prove, subject, timeout=subject.timeout)
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.error or outcome.exitcode is not None]
    if not failed:
        return outcomes[0].value
    rank, first = min(failed, key=lambda each: _echoes(each[1]))
    if isinstance(first.error, ValueError | TypeError):
        first.error.add_note(f"on rank {rank}:\n{first.traceback}")
        raise first.error
    raise RankFailed(f"verify: rank {rank} of {pool.size} {_ended(first)}", first.traceback)


def _echoes(outcome: Outcome) -> int:
    """How likely a rank's end is the echo of another's: it died, it raised, it lost a peer, it waited for one."""
    if outcome.error is None:
        return 3 if outcome.traceback else 0
    return 2 if isinstance(outcome.error, TransportError) or "gloo" in str(outcome.error) else 1


def _ended(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"failed with {type(outcome.error).__name__}: {outcome.error}\n{outcome.traceback}"
    if outcome.traceback:
        return f"was {outcome.traceback}"
    if outcome.exitcode is not None and outcome.exitcode < 0:
        return f"was killed by {signal.Signals(-outcome.exitcode).name}"
    return f"ended with exit code {outcome.exitcode}"
