"""What machine code does between the stores of a tile and the signal that they are there, on every path through it.

Threads store; they meet at a barrier; one of them passes a fence of the whole system, and moves a counter: by then
everything stored before the barrier is visible to whoever sees the counter (PTX memory model: causality order goes
through the barrier and is cumulative). An instruction under a predicate may be passed over: it counts where it stores,
and where it protects only if the signal itself is under that predicate.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

SIGNAL = r"(REDG?|ATOMG?)\.(?!\w*CAS)"
# What has happened since the last store, from best to worst: the way in is the worst of all paths.
RELEASED, MET, STORED = range(3)
MISSING = {MET: "a fence of the system", STORED: "a barrier"}

Code = dict[int, tuple[str, str]]  # address -> (predicate or nothing, instruction)


def faults(code: str) -> list[str]:
    """What is wrong with the signals of a kernel, one sentence each."""
    instructions = read(code)
    at_entry = states(instructions)
    signals = {a: text for a, (_, text) in instructions.items() if re.match(SIGNAL, text)}
    found = [] if signals else ["no signal"]
    found += ["stores by descriptor, which are under way when the counter moves"] * ("UTMASTG" in code)
    for address, text in signals.items():
        if ".STRONG.SYS" not in text:
            found.append(f"{text.split()[0]} is not of the system")
        if state := at_entry.get(address):
            found.append(f"no {MISSING[state].removeprefix('a ')} between a store and {text.split()[0]}")
    ends = [a for a, (_, text) in instructions.items() if text.startswith("EXIT") and at_entry.get(a) == STORED]
    return found + ["a store after the last signal"] * bool(ends)


def read(code: str) -> Code:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][^;]*?)\s*;", code)
    return without_own_predicates({int(a, 16): (predicate.strip(), text) for a, predicate, text in found})


def without_own_predicates(instructions: Code) -> Code:
    """The predicate of a signal dropped, from it and from the unbroken run before it that has the same."""
    order, freed = sorted(instructions), dict(instructions)
    for position, address in enumerate(order):
        own, text = instructions[address]
        if own and re.match(SIGNAL, text):
            for before in reversed(order[: position + 1]):
                predicate, text = instructions[before]
                if predicate != own or re.search(rf"\b{own.strip('@!')}\b", text):
                    break
                freed[before] = ("", text)
    return freed


def states(instructions: Code) -> dict[int, int]:
    """The state before each instruction that can be reached, the worst over the paths to it."""
    ways = dict(edges(instructions))
    known, pending = {}, [(min(instructions), RELEASED)]
    while pending:
        address, state = pending.pop()
        if known.get(address, -1) >= state:
            continue
        known[address] = state
        after = step(state, *instructions[address])
        pending += [(target, after) for target in ways[address]]
    return known


def step(state: int, predicate: str, text: str) -> int:
    if re.match(r"STG?\.", text):
        return STORED
    if predicate:
        return state
    if text.startswith("BAR.SYNC"):
        return min(state, MET)
    return RELEASED if state == MET and re.match(r"MEMBAR\.\w+\.SYS", text) else state


def edges(instructions: Code) -> Iterator[tuple[int, list[int]]]:
    """(address, addresses that may come next)."""
    order = sorted(instructions)
    following = dict(pairwise(order))
    joins: dict[str, list[int]] = {}
    for _, text in instructions.values():
        if text.startswith("BSSY"):
            joins.setdefault(re.search(r"\bB\d+", text)[0], []).append(target(text))
    for address, (predicate, text) in instructions.items():
        opcode = text.split()[0]
        assert not opcode.startswith(("BRX", "JMX")), f"{text}: a branch whose targets are not known"
        to = [following[address]] if address in following else []
        ends = opcode == "EXIT" or opcode.startswith("RET.") or re.fullmatch(r"BRA\s+0x[0-9a-f]+", text)
        if ends and not predicate:
            to = []
        if opcode.startswith(("BRA", "CALL")):
            to = [*to, target(text)]
        if opcode.startswith("BSYNC"):
            to = [*to, *joins[re.search(r"\bB\d+", text)[0]]]
        yield address, to


def target(text: str) -> int:
    return int(re.search(r"0x[0-9a-f]+", text)[0], 16)
