"""Pipeline parallelism: what order the ranks work in (data), and the one runtime that carries it out.

    schedule.py    the intermediate representation: Action, Schedule, Transfer, Group, Event
    schedules/     one short file for each schedule of the field, and `build` by name
    files.py       schedules as JSON, and as the CSV of torch.distributed.pipelining
    lowering.py    from a schedule to programs: adds the transfers
    messages.py    the messages of a schedule by number, for lowering, proof and simulation
    validate.py    the proof that a schedule finishes, loses nothing and stays within its memory
    rendezvous.py  its half that concerns transfers; docs/schedules.md says why one run is a proof
    costs.py       what computing, sending and remembering cost
    simulate.py    a schedule carried out with time; simulation.py is the result with its figures
    draw/          pictures: SVG, PNG, terminal, Chrome trace
    command.py     `tpmp schedule`, with its options.py and summary.py
    stage.py       a module and what it remembers of each microbatch between forward and weight gradient
    channels.py    what crosses stage borders
    memory.py      counts what a pass holds, and predicts it
    runtime.py     the one loop that executes a schedule
    parts.py       modules for stages out of a whole model
    measured.py    a pass that ran, in the simulator's format
    partition.py   which layers make which stage, with partition_search.py and partition_pins.py; command_model.py
                   shows it

All but stage, parts, channels, memory, runtime and draw/png.py import the standard library alone, so that schedules
can be built, proved, timed and drawn without torch. Nothing is imported here for the same reason: take names from the
modules themselves.
"""
