"""Text to tokens to batches: corpus -> tokenizer -> .bin/.idx -> sample order -> iterator.

A mixture of several sources goes between `samples` and `iterator`.
"""
