"""train.py on an NPU that only the CANN stand-in knows: everything happens up to the first byte of device memory.

Driver and device files are taken for present; torch_npu, its HCCL process groups and torchair are the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app

import train
from llama_fn.ascend import requirements

requirements.on_this_machine = lambda: iter(())
train.define_flags()
app.run(train.main, flags_parser=train.parse)
