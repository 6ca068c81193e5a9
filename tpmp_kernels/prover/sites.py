"""Sites: the places of a training step at which two runs are compared, each named the same in both."""

from collections.abc import Container
from typing import NamedTuple

# Treated as modules, by names that none can have; a parameter's slot begins likewise.
LOSS = ":loss"
OPTIMIZER = ":optimizer"
WHOLE_STEP = -1  # in place of a microbatch

# In order of execution. forward: values; backward: gradients of values, and of parameters for one microbatch;
# gradients: of parameters, as the optimizer gets them; update: parameters behind it.
PASSES = ("weights", "forward", "backward", "gradients", "update", "replicas")


class Site(NamedTuple):
    """slot: "in.0" (an argument), "out" (a result, or "out.1"), or ":weight", a parameter of `module`.

    module: by its full name, "" for the root. call: 0 for its first in this microbatch.
    """

    pass_: str
    microbatch: int
    module: str
    call: int
    slot: str

    @property
    def is_input(self) -> bool:
        return self.slot.split(".")[0] == "in"

    @property
    def is_output(self) -> bool:
        return self.slot.split(".")[0] == "out"

    @property
    def parameter(self) -> str | None:
        """The full name of the parameter whose value or gradient stands here, if it is one's."""
        if not self.slot.startswith(":"):
            return None
        return f"{self.module}.{self.slot[1:]}" if self.module else self.slot[1:]


def likeness(site: Site) -> Site:
    """The same for all microbatches and calls."""
    return site._replace(microbatch=0, call=0)


def of_parameter(pass_: str, name: str, microbatch: int = WHOLE_STEP) -> Site:
    module, _, slot = name.rpartition(".")
    return Site(pass_, microbatch, module, 0, f":{slot}")


class Place(NamedTuple):
    """Whose mistake a difference at a site is: `detail` says where in that module, "" where it is its result."""

    module: str
    detail: str


def place(site: Site, called: Container[str]) -> Place:
    """What a module is given, and the gradient that comes back to it, are made by the code around it: its parent's."""
    if site.pass_ == "forward" and site.is_input:
        return Place(_caller(site.module, called), f"in what {shown(site.module)} is given")
    if site.pass_ == "backward" and site.is_output:
        if site.module == "":
            return Place(shown(LOSS), "")
        return Place(_caller(site.module, called), f"in the gradient that comes back to {shown(site.module)}")
    if site.pass_ == "backward" and site.is_input:
        return Place(shown(site.module), "in the gradient of its input")
    if site.parameter is not None:
        gradient = site.pass_ in ("backward", "gradients")
        return Place(shown(site.module), f"in {'the gradient of ' * gradient}{site.slot[1:]}")
    return Place(shown(site.module), "")


def shown(module: str) -> str:
    return module.removeprefix(":") or "model"


def _caller(module: str, called: Container[str]) -> str:
    """The nearest module around it that was called itself, as containers are not."""
    if module == "":
        return "model"
    while module:
        module = module.rpartition(".")[0]
        if module in called:
            break
    return shown(module)
