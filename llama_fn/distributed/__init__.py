"""One process per device: groups along mesh axes, arrays taken apart and put together, and who is missing.

May import the ground, compat and the declarations of arrays. Read processes.py first.
"""

from llama_fn.distributed.hangs import GivingUp, StepWatch
from llama_fn.distributed.messages import Messages
from llama_fn.distributed.processes import Processes, by_chief, start

__all__ = ["GivingUp", "Messages", "Processes", "StepWatch", "by_chief", "start"]
