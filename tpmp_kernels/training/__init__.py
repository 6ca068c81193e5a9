"""Training: the config, the launcher of ranks, and what each rank runs.

    config.py      frozen dataclasses, read from TOML and written to it
    config_check.py   what is refused before a process starts;  overrides.py: values from the command line
    rank.py        what every rank calls
    loop.py        the run: train, validate, checkpoint, prove;  trainer.py: one rank's share of a step
    plan.py        schedule and partition of a config;  stages.py: the modules that this makes a rank's
    data.py, optimizer.py, layout.py, metrics.py, timeline.py, proof.py   what its name says
    launch.py      starts local ranks, or uses torchrun's; says in one sentence why a run ended early
    slate.py       what a rank leaves for its launcher: how far it came, and why it failed
    interrupt.py   Ctrl-C and requests to end
    lifeline.py    no process outlives its launcher

Nothing is imported here, so that a config can be read and refused before torch is loaded.
"""
