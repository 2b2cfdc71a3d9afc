"""The maths of a run, as pure functions over trees: the model, the step, the optimizer, and what declares their arrays.

May import the ground, kernels and sharding; never the compiler, which does not import the maths either but for the
declarations of arrays.py. Read llama.py first, then weights.py and train_step.py.
"""
