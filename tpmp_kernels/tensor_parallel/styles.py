"""torch's ParallelStyles on our layers: a plan written for torch.distributed.tensor.parallel works with these imported.

    from tpmp_kernels.tensor_parallel import ColwiseParallel, RowwiseParallel
    parallelize_module(block, mesh["tp"], {"attn.q": ColwiseParallel(), "attn.out": RowwiseParallel()})    # torch's
    parallelize(model, mesh, {"layers.*.attn.q": ColwiseParallel(), ...})                                   # or ours

The options are torch's, and so is what they mean; parameters become plain local shards with a placement (shard.py)
instead of DTensors, and activations travel through our communicator. Both kinds of activation are taken and given,
plain tensors and DTensors. `src_data_rank` is the rank whose values all others take, None for each rank's own.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from tpmp_kernels.comm import Communicator
from tpmp_kernels.tensor_parallel.layouts import Group, enter, leave
from tpmp_kernels.tensor_parallel.meshes import communicator_of, tp_mesh
from tpmp_kernels.tensor_parallel.shard import placement_of, replicas_of, shard_size, take_shard
from tpmp_kernels.tensor_parallel.styled import (
    StyledColumn,
    StyledColumnEmbedding,
    StyledRow,
    StyledVocabEmbedding,
    become,
)


class Style(ParallelStyle):
    """What the styles have in common: a check that changes nothing, and then the change.

    defers: gradients that are partial sums stay so and are marked for `reduce_partial_gradients`; else backward adds
    them.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name, mesh = type(module).__name__, tp_mesh(device_mesh)
        self.check(name, module, mesh.size(), has_mesh=True)
        self.install(name, module, Group(communicator_of(mesh), mesh))
        return module

    def check(self, name: str, module: nn.Module, ranks: int, *, has_mesh: bool) -> None:
        """Raise TypeError or ValueError, which begins with `name`, where `install` on `ranks` ranks cannot be done."""
        if not has_mesh and not getattr(self, "use_local_output", True):
            raise ValueError(f"{name}: use_local_output=False gives DTensors, which need a mesh; pass a DeviceMesh")

    def placements(self, module: nn.Module) -> dict[str, Placement]:
        """Of the parameters that the style cuts, by name."""
        return {}

    @abstractmethod
    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        """Change `module` in place. Collective."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._options() == other._options()

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self._options().items())})"

    def _options(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "src_data_rank"}


class _Cut(Style):
    """A style that cuts the weight of an nn.Linear or nn.Embedding."""

    def __init__(self, input_layouts: Placement, output_layouts: Placement, use_local_output: bool):
        for option, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if not isinstance(layout, Shard | Replicate):
                raise ValueError(f"{type(self).__name__}: {option} is {layout!r}; pass Shard(dim) or Replicate()")
        self.input_layouts, self.output_layouts = input_layouts, output_layouts
        self.use_local_output = use_local_output

    def check(self, name: str, module: nn.Module, ranks: int, *, has_mesh: bool) -> None:
        super().check(name, module, ranks, has_mesh=has_mesh)
        _check_stock(name, module, type(self).__name__)
        axis = self._axis(module)
        self._check_size(f"{axis} of {name}", getattr(module, axis), ranks)
        for key, placement in self.placements(module).items():
            _, part = getattr(getattr(module, key), "_tp_part", (None, None))
            if part is not None and placement_of(part) != placement:
                raise ValueError(
                    f"{name}: {key} is tied to a parameter that is cut as {placement_of(part)}, {type(self).__name__} "
                    f"cuts it as {placement}; cut both alike, or untie them"
                )

    def placements(self, module: nn.Module) -> dict[str, Placement]:
        dim = 0 if self._axis(module) in ("out_features", "num_embeddings") else 1
        cut = {"weight": Shard(dim)}
        return cut | ({"bias": Shard(0)} if dim == 0 and getattr(module, "bias", None) is not None else {})

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        layer = self._layer(module, group).lay(
            name, group, self.input_layouts, self.output_layouts, self.use_local_output, defers
        )
        for parameter in layer.parameters():
            if not defers and hasattr(parameter, "tp_partial_grad"):
                del parameter.tp_partial_grad
        stock = dict(module.named_parameters(recurse=False))
        parts = {key: self._part(f"{name}.{key}", stock[key], p, group.comm) for key, p in layer.named_parameters()}
        become(module, layer, parts)

    def _part(self, name: str, whole: nn.Parameter, like: nn.Parameter, comm: Communicator) -> nn.Parameter:
        """This rank's part of `whole`; one for both where a parameter stands in two modules."""
        owner, part = getattr(whole, "_tp_part", (None, None))
        if owner is not comm:
            values = _shard(whole.detach(), like, comm, self.src_data_rank, tag=name)
            part = nn.Parameter(values, requires_grad=whole.requires_grad)
            part.__dict__.update(vars(like))
            whole._tp_part = comm, part
        return part

    def _check_size(self, what: str, size: int, ranks: int) -> None:
        shard_size(size, ranks, what)

    @abstractmethod
    def _axis(self, module: nn.Module) -> str:
        """The attribute of the stock module that names the length of the axis to cut."""

    @abstractmethod
    def _layer(self, module: nn.Module, group: Group):
        """The layer that the module is to become, on the device meta."""


class ColwiseParallel(_Cut):
    """nn.Linear: weight and bias by output features; nn.Embedding: weight by columns.

    heads: the output features are that many heads of equal size, none of which is to be cut. Where there are fewer
    heads than ranks, neighbouring ranks hold the same one: key and value projections of grouped-query attention.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        heads: int | None = None,
    ):
        super().__init__(input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output)
        self.heads = heads

    def check(self, name: str, module: nn.Module, ranks: int, *, has_mesh: bool) -> None:
        super().check(name, module, ranks, has_mesh=has_mesh)
        if self.heads is None:
            return
        if not isinstance(module, nn.Linear) or module.out_features % self.heads:
            raise ValueError(f"{name}: {module} is not {self.heads} heads of equal size; pass its number of heads")
        if self._replicas(ranks) > 1 and self.output_layouts != Shard(-1):
            raise ValueError(
                f"{name}: {self.heads} heads over tp={ranks} are the same on neighbouring ranks and cannot be "
                "gathered; keep output_layouts=Shard(-1), or leave the layer whole"
            )

    def _check_size(self, what: str, size: int, ranks: int) -> None:
        if self.heads is None:
            shard_size(size, ranks, what)
        elif self.heads % ranks and ranks % self.heads:
            allowed = [r for r in range(1, max(ranks, self.heads) + 1) if self.heads % r == 0 or r % self.heads == 0]
            raise ValueError(
                f"{what} is {self.heads} heads and tp={ranks}, neither divides the other; use tp in {allowed}"
            )

    def _axis(self, module: nn.Module) -> str:
        return "out_features" if isinstance(module, nn.Linear) else "embedding_dim"

    def _replicas(self, ranks: int) -> int:
        return 1 if self.heads is None else max(1, ranks // self.heads)

    def _layer(self, module: nn.Module, group: Group):
        if isinstance(module, nn.Embedding):
            return StyledColumnEmbedding(module.num_embeddings, module.embedding_dim, group.comm, device="meta")
        bias, replicas = module.bias is not None, self._replicas(group.comm.size)
        size = (module.in_features, module.out_features)
        return StyledColumn(*size, group.comm, bias=bias, replicas=replicas, device="meta")


class RowwiseParallel(_Cut):
    """nn.Linear: weight by input features, bias whole; nn.Embedding: weight by rows, that is by token ids."""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__(input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output)

    def _axis(self, module: nn.Module) -> str:
        return "in_features" if isinstance(module, nn.Linear) else "num_embeddings"

    def _layer(self, module: nn.Module, group: Group):
        if isinstance(module, nn.Embedding):
            ids = module.num_embeddings
            return StyledVocabEmbedding(ids, module.embedding_dim, group.comm, padded_vocab=ids, device="meta")
        bias, sequence_parallel = module.bias is not None, isinstance(self.output_layouts, Shard)
        size = (module.in_features, module.out_features)
        return StyledRow(*size, group.comm, bias=bias, sequence_parallel=sequence_parallel, device="meta")


class ReplicateParallel(Style):
    """Any module, whole on every rank. partial_gradients: each rank's gradients of its parameters are those of its own
    heads or tokens, and are added over the ranks: a norm of each head, between a column and a row layer."""

    def __init__(self, *, partial_gradients: bool = False):
        self.partial_gradients = partial_gradients

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        if not self.partial_gradients or group.comm.size == 1:
            return

        def mark(module: nn.Module, *_) -> None:
            for key, parameter in module.named_parameters():
                _add_gradients(parameter, group.comm, defers=defers, tag=f"{name}.{key}.grad")

        mark(module)
        module.register_forward_pre_hook(mark)  # again: to_empty, deepcopy and a thaw make parameters without a mark


class SequenceParallel(ReplicateParallel):
    """A norm, or any module that treats tokens alike, on this rank's part of the sequence; its first argument and its
    result are cut along `sequence_dim`."""

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = False):
        super().__init__(partial_gradients=True)
        self.sequence_dim, self.use_local_output = sequence_dim, use_local_output

    def check(self, name: str, module: nn.Module, ranks: int, *, has_mesh: bool) -> None:
        super().check(name, module, ranks, has_mesh=has_mesh)
        dropout = [each for each in module.modules() if isinstance(each, nn.modules.dropout._DropoutNd) and each.p]
        if dropout:
            raise ValueError(
                f"{name}: the masks of {dropout[0]} would be the same on every rank's part of the sequence; use "
                "tensor_parallel.Dropout, whose mask is one for the whole"
            )

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        super().install(name, module, group, defers=defers)
        cut = Shard(self.sequence_dim)

        def before(_, args: tuple) -> tuple:
            return enter(args[0], cut, cut, group, tag=f"{name}.input"), *args[1:]

        def behind(_, args: tuple, y: Tensor) -> Tensor:
            return leave(y, cut, cut, group, local=self.use_local_output, tag=f"{name}.output")

        module.register_forward_pre_hook(before)
        module.register_forward_hook(behind)


@torch.no_grad()
def _shard(whole: Tensor, like: nn.Parameter, comm: Communicator, source: int | None, *, tag: str) -> Tensor:
    """This rank's part of `whole`, in memory of its own: of rank `source`'s, or of its own where that is None."""
    placement, replicas = placement_of(like), replicas_of(like)
    part = take_shard(whole, placement, comm, replicas)
    if source is None or comm.size == 1 or whole.is_meta:
        return part.clone(memory_format=torch.contiguous_format)
    mine = part.new_empty(part.shape)
    if not isinstance(placement, Shard):
        return comm.broadcast(part.clone() if comm.rank == source else mine, source, tag=tag)
    parts = None
    if comm.rank == source:
        pieces = whole.chunk(comm.size // replicas, dim=placement.dim)
        parts = torch.stack([pieces[r // replicas] for r in range(comm.size)])
    return comm.scatter(mine, parts, source, tag=tag)


def _add_gradients(parameter: nn.Parameter, comm: Communicator, *, defers: bool, tag: str) -> None:
    if defers:
        parameter.tp_partial_grad = comm.size
    elif parameter.requires_grad and not hasattr(parameter, "_tp_added"):
        parameter._tp_added = parameter.register_hook(
            lambda grad: comm.all_reduce(grad.detach().clone(memory_format=torch.contiguous_format), tag=tag)
        )


def _check_stock(name: str, module: nn.Module, style: str) -> None:
    """TypeError or ValueError unless the module computes what nn.Linear or nn.Embedding computes, of whole weights."""
    stock = next((kind for kind in (nn.Linear, nn.Embedding) if isinstance(module, kind)), None)
    if stock is None:
        raise TypeError(f"{name}: {style} is for nn.Linear and nn.Embedding, got {type(module).__name__}")
    parameters = dict(module.named_parameters(recurse=False))
    own = type(module).forward is not stock.forward or "forward" in vars(module)
    if own or not parameters.keys() <= {"weight", "bias"} or "weight" not in parameters:
        raise TypeError(
            f"{name}: {type(module).__name__} is no plain {stock.__name__}, so that {style} would leave out what it "
            "adds; shard the layer before it is wrapped"
        )
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        raise TypeError(f"{name}: its parameters are DTensors already; shard it before FSDP or another plan does")
    if stock is nn.Embedding and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        raise ValueError(f"{name}: max_norm, scale_grad_by_freq and sparse need the whole table; make it without them")
