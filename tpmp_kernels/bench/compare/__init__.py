"""`tpmp compare OP`: every backend of one op and its peers on this machine, times beside errors.

problems.py says what an op is asked, measure.py finds errors, times and memory, options.py and command.py are the
command line. The benchmark suites race the same problems.
"""
