"""The checks of all families in Triton's interpreter, run as a program: families are added here.

TRITON_INTERPRET=1 python interpreter_cases.py NAME...     prints {name: "ok" or what went wrong} as JSON
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import fused_loss_cases  # noqa: F401
import interpreter
import linear_cases  # noqa: F401
import loss_cases  # noqa: F401
import neighbour_cases  # noqa: F401

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    print(json.dumps(interpreter.run(sys.argv[1:])))
