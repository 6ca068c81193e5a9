"""torch's PrepareModuleInput and PrepareModuleOutput: layouts of what goes into a module and comes out of it."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import Placement

from tpmp_kernels.tensor_parallel.layouts import Group, leave, plain
from tpmp_kernels.tensor_parallel.styles import Style


class PrepareModuleInput(Style):
    """Arguments of any module, each from its layout to the desired one; None leaves one as it is."""

    def __init__(
        self,
        *,
        input_layouts: Placement | Sequence[Placement | None] | None = None,
        desired_input_layouts: Placement | Sequence[Placement | None] | None = None,
        input_kwarg_layouts: dict[str, Placement] | None = None,
        desired_input_kwarg_layouts: dict[str, Placement] | None = None,
        use_local_output: bool = False,
    ):
        self.input_layouts, self.desired_input_layouts = _pairs("input", input_layouts, desired_input_layouts)
        self.input_kwarg_layouts = input_kwarg_layouts or {}
        self.desired_input_kwarg_layouts = desired_input_kwarg_layouts or {}
        self.use_local_output = use_local_output
        if self.input_kwarg_layouts.keys() != self.desired_input_kwarg_layouts.keys():
            raise ValueError("PrepareModuleInput: input_kwarg_layouts and the desired ones name different arguments")

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        def before(_, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            how = {"group": group, "local": self.use_local_output}
            if self.input_layouts is not None:
                args = _convert(args, self.input_layouts, self.desired_input_layouts, name=name, **how)
            for key, layout in self.input_kwarg_layouts.items():
                if key in kwargs:
                    desired = self.desired_input_kwarg_layouts[key]
                    (value,) = _convert((kwargs[key],), (layout,), (desired,), name=f"{name}.{key}", **how)
                    kwargs = {**kwargs, key: value}
            return args, kwargs

        module.register_forward_pre_hook(before, with_kwargs=True)


class PrepareModuleOutput(Style):
    """The result of any module, or each of a tuple of results, from its layout to the desired one."""

    def __init__(
        self,
        *,
        output_layouts: Placement | Sequence[Placement | None],
        desired_output_layouts: Placement | Sequence[Placement | None],
        use_local_output: bool = True,
    ):
        self.output_layouts, self.desired_output_layouts = _pairs("output", output_layouts, desired_output_layouts)
        self.use_local_output = use_local_output

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        def behind(_, args: tuple, outputs: Any) -> Any:
            given = outputs if isinstance(outputs, tuple) else (outputs,)
            how = {"group": group, "local": self.use_local_output, "name": f"{name}.output"}
            wanted = _convert(given, self.output_layouts, self.desired_output_layouts, **how)
            return wanted if len(wanted) > 1 else wanted[0]

        module.register_forward_hook(behind)


class PrepareModuleInputOutput(Style):
    """PrepareModuleInput and PrepareModuleOutput in one."""

    def __init__(
        self,
        *,
        input_layouts: Placement | Sequence[Placement | None] | None = None,
        desired_input_layouts: Placement | Sequence[Placement | None] | None = None,
        input_kwarg_layouts: dict[str, Placement] | None = None,
        desired_input_kwarg_layouts: dict[str, Placement] | None = None,
        use_local_input: bool = False,
        output_layouts: Placement | Sequence[Placement | None],
        desired_output_layouts: Placement | Sequence[Placement | None],
        use_local_output: bool = True,
    ):
        self.input = PrepareModuleInput(
            input_layouts=input_layouts,
            desired_input_layouts=desired_input_layouts,
            input_kwarg_layouts=input_kwarg_layouts,
            desired_input_kwarg_layouts=desired_input_kwarg_layouts,
            use_local_output=use_local_input,
        )
        self.output = PrepareModuleOutput(
            output_layouts=output_layouts,
            desired_output_layouts=desired_output_layouts,
            use_local_output=use_local_output,
        )

    def check(self, name: str, module: nn.Module, ranks: int, *, has_mesh: bool) -> None:
        for each in (self.input, self.output):
            each.check(name, module, ranks, has_mesh=has_mesh)

    def install(self, name: str, module: nn.Module, group: Group, *, defers: bool = False) -> None:
        for each in (self.input, self.output):
            each.install(name, module, group)


def _pairs(what: str, layouts, desired) -> tuple[tuple | None, tuple | None]:
    layouts, desired = (_tuple(each) for each in (layouts, desired))
    if (layouts is None) != (desired is None) or (layouts is not None and len(layouts) != len(desired)):
        raise ValueError(f"{what}_layouts is {layouts} and desired_{what}_layouts {desired}; pass as many of each")
    return layouts, desired


def _tuple(layouts) -> tuple | None:
    return layouts if layouts is None else (layouts,) if isinstance(layouts, Placement) else tuple(layouts)


def _convert(values: tuple, declared: tuple, targets: tuple, *, group: Group, local: bool, name: str) -> tuple:
    if len(values) != len(declared):
        raise ValueError(f"{name}: {len(values)} values for {len(declared)} layouts; give each one, None to leave it")

    def one(value: Any, declared: Placement | None, target: Placement | None) -> Any:
        if declared is None:
            return value
        value, source = plain(value, declared)
        return leave(value, source, target or source, group, local=local, tag=name)

    return tuple(one(*each) for each in zip(values, declared, targets, strict=True))
