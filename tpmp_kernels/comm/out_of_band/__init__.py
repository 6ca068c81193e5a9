"""Calls compared, failures and deaths told beside the data, for transports whose own library does none of it.

communicator.py is the base of such a transport. board.py is one rank's side and its thread; bulletin.py the reports in
a torch Store; reports.py and agreement.py say what there is to compare, presence.py who still lives.
"""
