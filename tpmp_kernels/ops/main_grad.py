"""Weight gradients that add up in fp32 over a step: attach_main_grad, and how a linear's backward adds to them.

The backward of every linear adds dW to its weight's `main_grad` in the GEMM's epilogue and hands autograd nothing.
For an fp32 (fp64) parameter `.grad` is the same tensor, so that a plain training loop works. Its `zero_grad()` sets
`.grad` to None while `main_grad` keeps the last step's sums: whoever adds next sees that and starts anew (`_begin`).

That must be seen when the backward runs, inside a compiled graph too, where only the op's implementation runs. What
AOTAutograd makes of a `main_grad` that the backward writes: it saves it for backward like any tensor, and the second
microbatch then finds it at another version and refuses to run; and aot_eager hands the op a clone. So the graph never
sees `main_grad`. The op takes the parameter's slot, one number in memory of its own that nobody writes, looks up the
parameter by the slot's address, and is declared to have an effect, or it would be eliminated for want of outputs.
"""

import sys
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tpmp_kernels.ops import backend
from tpmp_kernels.ops._register import register
from tpmp_kernels.ops.plain import mm, widens

_owners: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


def attach_main_grad(parameters: Iterable[Tensor]) -> None:
    """Give each parameter that requires grad a `main_grad`, fp32 (fp64 for fp64), of its shape, and what `.grad` holds.

    ops.linear, gated_linear, mlp and gated_mlp then add the gradients of their weights to it. Gradients that autograd
    computes, of biases, of norms and of any other use of the parameter, arrive in it too. For fp32 and fp64 parameters
    `.grad` is `main_grad`, and training loops and optimizers need no change. For bf16 and fp16 ones `.grad` stays None,
    and the optimizer reads `main_grad` and zeroes it each step. Attaching again changes nothing.

    Where autograd runs but would not accumulate (autograd.grad for other inputs, backward(inputs=...)), neither do the
    ops. They refuse autograd.grad for an attached weight, and a backward with create_graph leaves `.grad` to autograd.
    Hooks that wait for a parameter's gradient do not see those that never pass through autograd. Raises TypeError for
    a parameter that is no plain floating-point tensor, ValueError for one that is no leaf.
    """
    for parameter in parameters:
        if parameter.requires_grad and _owner(slot(parameter)) is not parameter:
            _attach(parameter)


def _attach(parameter: Tensor) -> None:
    if not parameter.is_leaf:
        raise ValueError(
            f"attach_main_grad: each parameter must be a leaf, got the result of {parameter.grad_fn}; pass "
            "module.parameters()"
        )
    if is_traceable_wrapper_subclass(parameter):
        raise TypeError(
            f"attach_main_grad: each parameter must be a plain tensor, got {type(parameter).__name__}; attach before "
            "the parameters are distributed, or leave their gradients to autograd"
        )
    wide = torch.promote_types(parameter.dtype, torch.float32)
    parameter.main_grad = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
    parameter.main_grad_slot = parameter.main_grad.main_grad_slot = torch.zeros(1, dtype=torch.int64)
    _owners[parameter.main_grad_slot.data_ptr()] = parameter
    if parameter.grad is not None:
        _adopt(parameter)
    elif parameter.dtype == wide:
        parameter.grad = parameter.main_grad
    parameter.register_post_accumulate_grad_hook(_adopt)


@torch.no_grad()
def _adopt(parameter: Tensor) -> None:
    """After autograd has written `.grad` itself: bring what it holds into `main_grad`."""
    grad, main_grad = parameter.grad, parameter.main_grad
    if grad is None or grad is main_grad or grad.requires_grad:
        return
    if parameter.dtype == main_grad.dtype:
        main_grad.copy_(grad)
        parameter.grad = main_grad
    else:
        main_grad.add_(grad)
        parameter.grad = None


def slot(parameter: Tensor) -> Tensor | None:
    """What stands for the parameter in the ops, or None where no main_grad was attached."""
    return getattr(parameter, "main_grad_slot", None)


def _owner(slot: Tensor | None) -> Tensor | None:
    """The parameter of a slot; None for a slot that came out of a pickle, with an address of its own."""
    return None if slot is None else _owners.get(slot.data_ptr())


def weight_grad(dz: Tensor, x: Tensor, slot: Tensor | None) -> Tensor | None:
    """dz^T @ x for autograd, or None where it was added to a main_grad. dz [M, N], x [M, K] -> [N, K].

    With grad enabled, under create_graph, it is autograd's: the sum in main_grad has no graph.
    """
    if slot is None or torch.is_grad_enabled():
        return mm(dz.t(), x)
    _wgrad_of_parameter(dz, x, slot, torch.compiler.is_compiling())
    return None


def add_product(dz: Tensor, x: Tensor, main_grad: Tensor, *, slot: Tensor | None) -> None:
    """main_grad += dz^T @ x, from zero where the parameter of `slot` has had its gradient set to None.

    In plain torch a half-precision product that is not widened is rounded once before it is added: torch has no other.
    """
    add = _begin(slot, main_grad)
    if widens(dz.t(), x):
        dz, x = dz.float(), x.float()
    if backend.choose(dz) == "triton":
        from tpmp_kernels.kernels import wgrad as kernel

        kernel.wgrad(dz, x, main_grad, add=add)
        torch.autograd.graph.increment_version(main_grad)
    elif dz.dtype != main_grad.dtype:
        product = torch.mm(dz.t(), x)
        main_grad.add_(product) if add else main_grad.copy_(product)
    elif add:
        main_grad.addmm_(dz.t(), x)
    else:
        torch.mm(dz.t(), x, out=main_grad)


def _begin(slot: Tensor | None, main_grad: Tensor) -> bool:
    """Make `.grad` of slot's parameter its main_grad again, and say whether `main_grad` holds a sum to add to.

    `main_grad` is the parameter's, or a copy of it that a compiled graph makes and writes back.
    """
    parameter = _owner(slot)
    if parameter is None or parameter.dtype != main_grad.dtype or parameter.grad is parameter.main_grad:
        return True
    grad, parameter.grad = parameter.grad, parameter.main_grad
    if grad is not None:
        main_grad.copy_(grad)
    return grad is not None


def _add_to_parameter(dz: Tensor, x: Tensor, slot: Tensor, compiled: bool) -> None:
    """Add the product now, or leave it to whom split_backward gave the parameter (see split.py).

    compiled: whether a compiled graph calls, which may write its next result where dz or x lies.
    """
    parameter = _owner(slot)
    if parameter is None:
        raise RuntimeError(
            "main_grad: expected a parameter that attach_main_grad saw in this process, got one out of a pickle or a "
            "saved-tensor hook; attach again"
        )
    main_grad, wide = parameter.main_grad, torch.promote_types(parameter.dtype, torch.float32)
    if (main_grad.shape, main_grad.device, main_grad.dtype) != (parameter.shape, parameter.device, wide):
        raise RuntimeError(
            f"main_grad: must be {wide} {list(parameter.shape)} on {parameter.device} as its parameter, got "
            f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}; attach after converting the parameters"
        )
    if not _accumulates(parameter):
        return
    later = getattr(parameter, "main_grad_later", None)
    if later is None:
        add_product(dz, x, main_grad, slot=slot)
    else:
        later.append(parameter, *((dz.clone(), x.clone()) if compiled else (dz, x)))


def _accumulates(parameter: Tensor) -> bool:
    """Whether the backward that runs now would accumulate into the parameter's `.grad`."""
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
        raise RuntimeError(
            "main_grad: expected torch's own autograd engine, got compiled autograd, which sets `.grad` back to what "
            "it was; switch that off, or attach no main_grad"
        )
    if torch._C._current_graph_task_id() == -1:
        return True
    every_key = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    # Below autograd, where ops run, the parameter's node could not be found: that takes a recorded view.
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), every_key):
        node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        raise RuntimeError(
            "main_grad: expected backward() for a parameter with a main_grad, got autograd.grad, which would find no "
            "gradient; use backward(), or ops.tap and ops.wgrad"
        ) from None


_wgrad_of_parameter = register(
    "wgrad_of_parameter(Tensor dz, Tensor x, Tensor slot, bool compiled) -> ()",
    _add_to_parameter,
    lambda dz, x, slot, compiled: None,
    sharding="a main_grad belongs to a plain parameter",
)
_register_effectful_op(_wgrad_of_parameter, _EffectType.ORDERED)
