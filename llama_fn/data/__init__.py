"""Data of a run: text or Megatron's files become samples in a fixed order, and batches from one number of position.

May import the ground and the declaration of a batch; what makes token files (encoding, corpus, writer) has no torch.
Read parts.py first; integrity.py says what is checked.
"""
