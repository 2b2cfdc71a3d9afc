"""Data of a run: text or Megatron's files become samples in a fixed order, and batches from one number of position.

May import the ground and the declaration of a batch. Read parts.py first; integrity.py says what is checked.
"""

from llama_fn.data.blend import Blend
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import Parts, open_parts
from llama_fn.data.prepare import check as check_data
from llama_fn.data.prepare import tokenizer_of
from llama_fn.data.samples import Samples

__all__ = ["BatchIterator", "Blend", "Parts", "Samples", "check_data", "open_parts", "tokenizer_of"]
