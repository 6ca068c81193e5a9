"""Pipeline parallelism: what order the ranks work in (data), and the one runtime that carries it out.

    schedule.py    the intermediate representation: Action, Schedule, Transfer, Event
    lowering.py    from a schedule to programs: adds the transfers
    schedules/     one short file for each schedule of the field, and `build` by name
    validate.py    the proof that a schedule finishes, loses nothing and stays within its memory
    rendezvous.py  its half that concerns transfers
    draw.py        a timeline of what every rank did, as SVG
    stage.py       a module and what it remembers of each microbatch between forward and backward
    runtime.py     the one loop that executes a schedule

All but the last two import the standard library alone, so that schedules can be built, proved and drawn without torch.
Nothing is imported here for the same reason: take names from the modules themselves.
"""
