"""Seconds of classifying a batch, side by side with plain flax, PyTorch and Keras.

Command: python experiments/benchmarks/inference.py --model=densenet121 --batch_size=8
             [--implementations=densejax,flax,torchvision,torch_compile,keras]
             [--torch_python=PATH] [--format=json]

`densejax` is what densejax.predict computes. All have the same weights and images; the first
image's logits must agree.
"""

import compare

from experiments import script

if __name__ == "__main__":
    ours = {
        True: "densejax,flax,torchvision,torch_compile,keras",
        False: "densejax,torchvision,torch_compile",
    }
    script.run(lambda: compare.main("inference", __doc__, ours))
