"""torch.distributed's calls as a table: each runs on a given group and returns the tensors that it filled.

Inputs depend on the rank alone, so that two groups of the same ranks must return the same.
"""

import contextlib

import torch
import torch.distributed as dist

ROOT = 1
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextlib.contextmanager
def tpmp_group(*args, **kwargs):
    made = dist.new_group(*args, backend="tpmp", **kwargs)
    yield made
    if made is not dist.GroupMember.NON_GROUP_MEMBER:
        dist.destroy_process_group(made)


def raised(call, *args, **kwargs) -> Exception | None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error


def rows(rank: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(31 * rank + count)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(count, 5, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 9, (count, 5), generator=generator).to(dtype)


class Calls:
    """One rank's calls on `group`. With `asynchronous` each is posted and then waited for."""

    MOVING = (
        "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "gather", "scatter",
        "all_to_all", "all_to_all_uneven", "all_to_all_single", "all_to_all_single_uneven", "strided", "send_recv",
    )  # fmt: skip
    REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce_coalesced")

    def __init__(self, group, asynchronous: bool, dtype: torch.dtype = torch.float32, op=dist.ReduceOp.SUM):
        self.group, self.asynchronous, self.dtype, self.op = group, asynchronous, dtype, op
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def run(self, name: str) -> list[torch.Tensor]:
        return getattr(self, name)()

    def _do(self, call, *args, **kwargs):
        work = call(*args, group=self.group, async_op=self.asynchronous, **kwargs)
        if self.asynchronous:
            work.wait()

    def _in(self, count: int = 3) -> torch.Tensor:
        return rows(self.rank, count, self.dtype)

    def _out(self, *counts: int) -> list[torch.Tensor]:
        return [torch.zeros(count, 5, dtype=self.dtype) for count in counts]

    # ---- movement

    def broadcast(self):
        x = self._in()
        self._do(dist.broadcast, x, group_src=ROOT)
        return [x]

    def all_gather(self):
        parts = self._out(*[3] * self.size)
        self._do(dist.all_gather, parts, self._in())
        return parts

    def all_gather_into_tensor(self):
        (whole,) = self._out(3 * self.size)
        self._do(ALL_GATHER, whole, self._in())
        return [whole]

    def all_gather_coalesced(self):
        """On the group itself: the function of this name in torch.distributed hands out no Work."""
        outputs = [self._out(3, 2) for _ in range(self.size)]
        self.group.allgather_coalesced(outputs, [self._in(3), self._in(2)]).wait()
        return [tensor for parts in outputs for tensor in parts]

    def gather(self):
        parts = self._out(*[3] * self.size) if self.rank == ROOT else None
        self._do(dist.gather, self._in(), parts, group_dst=ROOT)
        return parts or []

    def scatter(self):
        parts = list(self._in(3 * self.size).chunk(self.size)) if self.rank == ROOT else None
        (x,) = self._out(3)
        self._do(dist.scatter, x, parts, group_src=ROOT)
        return [x]

    def all_to_all(self):
        return self._listed([3] * self.size, [3] * self.size)

    def all_to_all_uneven(self):
        return self._listed(*self._splits())

    def _listed(self, outgoing: list[int], incoming: list[int]):
        """Not with gloo, which has no uneven lists and before torch 2.13 none at all: there by the one tensor."""
        if dist.get_backend(self.group) == "gloo":
            return list(self._single(outgoing, incoming).split(incoming))
        parts = self._out(*incoming)
        self._do(dist.all_to_all, parts, list(self._in(sum(outgoing)).split(outgoing)))
        return parts

    def all_to_all_single(self):
        (output,) = self._out(2 * self.size)
        self._do(dist.all_to_all_single, output, self._in(2 * self.size))
        return [output]

    def all_to_all_single_uneven(self):
        return [self._single(*self._splits())]

    def _single(self, outgoing: list[int], incoming: list[int]) -> torch.Tensor:
        (output,) = self._out(sum(incoming))
        self._do(dist.all_to_all_single, output, self._in(sum(outgoing)), incoming, outgoing)
        return output

    def _splits(self) -> tuple[list[int], list[int]]:
        """Rank r sends (r + d) % 3 rows to rank d."""
        counts = [(self.rank + d) % 3 for d in range(self.size)]
        return counts, counts

    def strided(self):
        """Views with gaps, as input and as output."""
        whole = torch.zeros(self.size, 5, 6, dtype=self.dtype)
        parts = [part[:, ::2].t() for part in whole]
        self._do(dist.all_gather, parts, self._in(6)[::2])
        x = self._in(4).t()
        self._do(dist.broadcast, x, group_src=ROOT)
        return [whole, x]

    def send_recv(self):
        """Around the ring, everyone sending first."""
        (x,) = self._out(3)
        works = [
            dist.isend(self._in(), group=self.group, group_dst=(self.rank + 1) % self.size, tag=7),
            dist.irecv(x, group=self.group, group_src=(self.rank - 1) % self.size, tag=7),
        ]
        for work in works:
            work.wait()
        return [x]

    # ---- reductions

    def all_reduce(self):
        x = self._in()
        self._do(dist.all_reduce, x, op=self.op)
        return [x]

    def reduce(self):
        x = self._in()
        self._do(dist.reduce, x, op=self.op, group_dst=ROOT)
        return [x] if self.rank == ROOT else []

    def reduce_scatter(self):
        (x,) = self._out(3)
        self._do(dist.reduce_scatter, x, list(self._in(3 * self.size).chunk(self.size)), op=self.op)
        return [x]

    def reduce_scatter_tensor(self):
        (x,) = self._out(3)
        self._do(REDUCE_SCATTER, x, self._in(3 * self.size), op=self.op)
        return [x]

    def all_reduce_coalesced(self):
        tensors = [self._in(3), self._in(2)]
        with dist.distributed_c10d._coalescing_manager(self.group, async_ops=self.asynchronous) as works:
            for tensor in tensors:
                dist.all_reduce(tensor, op=self.op, group=self.group)
        if self.asynchronous:
            works.wait()
        return tensors
